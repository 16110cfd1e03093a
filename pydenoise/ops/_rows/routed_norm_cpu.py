"""CPU rows of routed_norm: the C++ kernels of ``pydenoise._C``."""

import torch
from torch import Tensor

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend

_MEASURED = "bench/notes-blocks-afa.md, the only compiled CPU backend"


def adjacent(tokens: Tensor | None) -> Tensor | None:
    """[B, T, C] with adjacent channels."""
    return tokens if tokens is None or tokens.shape[-1] == 1 or tokens.stride(-1) == 1 else tokens.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """Row-major."""
    return None if tensor is None else tensor.contiguous()


def _run(input, mask, update, gate, scale, shift, total, eps) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.pydenoise.routed_norm_cpu.default(
        adjacent(input), dense(mask), adjacent(update), dense(gate), dense(scale), dense(shift), total, eps
    )


def _backward(grad, grad_carried, grad_constant, input, mask, update, gate, scale, stats, total):
    grad_input, grad_update, partials = torch.ops.pydenoise.routed_norm_backward_cpu.default(
        dense(grad), dense(grad_carried), dense(grad_constant), adjacent(input), dense(mask), adjacent(update),
        dense(gate), dense(scale), dense(stats), total,
    )  # fmt: skip
    return grad_input, grad_update, partials.sum(1)


def _unsupported_backward(grad, *args):
    return unsupported_floats(grad)


ROWS = (
    Backend("routed_norm", "cpu", 100, unsupported_floats, _run, _MEASURED),
    Backend("routed_norm_backward", "cpu", 100, _unsupported_backward, _backward, _MEASURED),
)
