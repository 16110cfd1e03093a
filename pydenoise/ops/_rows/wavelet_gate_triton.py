"""Triton rows of wavelet_gate."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 2**30  # elements of a sample, which kernels number with 31 bits
_MEASURED = "not yet measured on a GPU; placed above cpu (other device), the only one for GPUs"


def _unsupported(input: Tensor, gate: Tensor, *args) -> str | None:
    return _too_large(input) or _triton.unsupported(input, _FLOATS, gate.dtype)


def _unsupported_backward(grad: Tensor, input: Tensor, gate: Tensor, *args) -> str | None:
    return _unsupported(input, gate)


def _unsupported_pool(input: Tensor) -> str | None:
    return _too_large(input) or _triton.unsupported(input, _FLOATS)


def _too_large(input: Tensor) -> str | None:
    elements = input.shape[1:].numel()
    return f"{elements} elements of a sample are more than 2^30" if elements > _MOST else None


def _kernels():
    from pydenoise.kernels import wavelet_gate

    return wavelet_gate


def _run(*args) -> Tensor:
    return _kernels().wavelet_gate(*args)


def _backward(*args) -> tuple[Tensor | None, Tensor | None]:
    return _kernels().wavelet_gate_backward(*args)


def _pool(input: Tensor) -> Tensor:
    return _kernels().wavelet_gate_pool(input)


ROWS = (
    Backend("wavelet_gate", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("wavelet_gate_backward", "triton", 110, _unsupported_backward, _backward, _MEASURED),
    Backend("wavelet_gate_pool", "triton", 110, _unsupported_pool, _pool, _MEASURED),
)
