"""Triton rows of the construction of DCLS kernels."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; the only compiled GPU backend"


def _unsupported(first: Tensor, *args) -> str | None:
    return _triton.unsupported(first, _FLOATS)


def _run(*args) -> Tensor:
    from pydenoise.kernels import dcls_kernel

    return dcls_kernel.forward(*args)


def _run_backward(*args) -> tuple[Tensor, Tensor, Tensor | None]:
    from pydenoise.kernels import dcls_kernel

    return dcls_kernel.backward(*args)


ROWS = (
    Backend("dcls_kernel", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("dcls_kernel_backward", "triton", 110, _unsupported, _run_backward, _MEASURED),
)
