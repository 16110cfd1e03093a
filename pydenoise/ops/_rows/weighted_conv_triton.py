"""Triton rows of weighted convolution. Triton is imported when a call could run on it, not before."""

from functools import cache

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda (which takes a few shapes only)"


@cache
def _kernels():
    from pydenoise.kernels import weighted_conv

    return weighted_conv


def _unsupported(input: Tensor, *args) -> str | None:
    return _triton.unsupported(input, _DTYPES)


def _run(input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm) -> Tensor:
    return _kernels().forward(input, weight, density, bias, residual, stride, padding, dilation, groups, activation)


def _run_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask):
    return _kernels().backward(grad, input, weight, density, stride, padding, dilation, groups, mask)


ROWS = (
    Backend("weighted_conv", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("weighted_conv_backward", "triton", 110, _unsupported, _run_backward, _MEASURED),
)
