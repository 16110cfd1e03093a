"""CPU rows of wavelet_gate: the C++ kernels of ``pydenoise._C``."""

import torch
from torch import Tensor

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _run(input: Tensor, gate: Tensor, up: bool, size: tuple[int, int]) -> Tensor:
    return torch.ops.pydenoise.wavelet_gate_cpu.default(input, _floats(gate), up, size)


def _backward(grad, input, gate, pool_grad, up, size, mask) -> tuple[Tensor | None, Tensor | None]:
    pool_grad = None if pool_grad is None else _floats(pool_grad) / (input.shape[2] * input.shape[3])
    of_input, of_gate = torch.ops.pydenoise.wavelet_gate_cpu_backward.default(
        grad, input, _floats(gate), pool_grad, up, size, *mask
    )
    return of_input if mask[0] else None, of_gate.to(gate.dtype) if mask[1] else None


def _pool(input: Tensor) -> Tensor:
    return torch.ops.pydenoise.wavelet_gate_cpu_pool.default(input).to(input.dtype)


_MEASURED = "bench/notes-blocks-wavelet.md"

ROWS = (
    Backend("wavelet_gate", "cpu", 100, unsupported_floats, _run, _MEASURED),
    Backend("wavelet_gate_backward", "cpu", 100, unsupported_floats, _backward, _MEASURED),
    Backend("wavelet_gate_pool", "cpu", 100, unsupported_floats, _pool, _MEASURED),
)
