"""Triton rows of ``adaptive_bilateral_filter``, forward and backward."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; the only compiled row for its device"
_MOST_ELEMENTS = 2**31 - 1


def _unsupported(input: Tensor, *args) -> str | None:
    extent = 1 + sum((n - 1) * s for n, s in zip(input.shape[1:], input.stride()[1:], strict=True))
    if input.numel() and max(extent, input[0].numel()) > _MOST_ELEMENTS:
        return f"an image of shape {tuple(input.shape[1:])} is too long for offsets of 32 bits"
    return _triton.unsupported(input, _FLOATS)


def _unsupported_backward(grad: Tensor, input: Tensor, *args) -> str | None:
    return _unsupported(grad) or _unsupported(input)


def _forward(*args) -> tuple[Tensor, Tensor]:
    from pydenoise.kernels import adaptive_bilateral_filter

    return adaptive_bilateral_filter.forward(*args)


def _backward(*args) -> tuple[Tensor | None, Tensor | None]:
    from pydenoise.kernels import adaptive_bilateral_filter

    return adaptive_bilateral_filter.backward(*args)


ROWS = (
    Backend("adaptive_bilateral_filter", "triton", 110, _unsupported, _forward, _MEASURED),
    Backend("adaptive_bilateral_filter_backward", "triton", 110, _unsupported_backward, _backward, _MEASURED),
)
