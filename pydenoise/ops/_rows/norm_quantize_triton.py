"""Triton rows of ``group_norm_quantize`` and ``layer_norm_quantize``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def _unsupported(input: Tensor, *args) -> str | None:
    return _triton.unsupported(input, _FLOATS)


def _kernels():
    from pydenoise.kernels import norm_quantize

    return norm_quantize


def _run_group_norm(*args) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _kernels().group_norm(*args)


def _run_layer_norm(*args) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _kernels().layer_norm(*args)


ROWS = (
    Backend("group_norm_quantize", "triton", 110, _unsupported, _run_group_norm, _MEASURED),
    Backend("layer_norm_quantize", "triton", 110, _unsupported, _run_layer_norm, _MEASURED),
)
