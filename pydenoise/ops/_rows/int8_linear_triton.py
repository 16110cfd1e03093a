"""Triton rows of ``int8_linear``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def _unsupported(input: Tensor, *args) -> str | None:
    residual, out_dtype = args[5], args[7]
    return _triton.unsupported(input, (torch.int8,), out_dtype, *(() if residual is None else (residual.dtype,)))


def _run(*args) -> Tensor:
    from pydenoise.kernels import int8_linear

    return int8_linear.forward(*args)


ROWS = (Backend("int8_linear", "triton", 110, _unsupported, _run, _MEASURED),)
