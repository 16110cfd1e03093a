"""Triton rows of ``quantize``, ``quantize_dynamic`` and ``dequantize``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def _unsupported(input: Tensor, *args) -> str | None:
    return _triton.unsupported(input, _FLOATS)


def _unsupported_dequantize(input: Tensor, *args) -> str | None:
    return _triton.unsupported(input, (torch.int8,), args[2])


def _kernels():
    from pydenoise.kernels import quantize

    return quantize


def _run(*args) -> Tensor:
    return _kernels().quantize(*args)


def _run_dynamic(*args) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().quantize_dynamic(*args)


def _run_dequantize(*args) -> Tensor:
    return _kernels().dequantize(*args)


ROWS = (
    Backend("quantize", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("quantize_dynamic", "triton", 110, _unsupported, _run_dynamic, _MEASURED),
    Backend("dequantize", "triton", 110, _unsupported_dequantize, _run_dequantize, _MEASURED),
)
