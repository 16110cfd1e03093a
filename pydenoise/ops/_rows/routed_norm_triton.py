"""Triton rows of routed_norm."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops._rows.routed_norm_cpu import adjacent, dense
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; the only compiled backend there"
_LONGEST, _LONGEST_BACK = 8192, 2048  # as kernels/routed_norm.py has it


def _unsupported(input: Tensor, *args) -> str | None:
    if input.shape[-1] > _LONGEST:
        return f"{input.shape[-1]} channels are more than {_LONGEST}"
    return _triton.unsupported(input, _FLOATS)


def _unsupported_backward(grad: Tensor, *args) -> str | None:
    if grad.shape[-1] > _LONGEST_BACK:
        return f"{grad.shape[-1]} channels are more than {_LONGEST_BACK}"
    return _triton.unsupported(grad, _FLOATS)


def _run(input, mask, update, gate, scale, shift, total, eps) -> tuple[Tensor, Tensor, Tensor]:
    from pydenoise.kernels import routed_norm

    return routed_norm.routed_norm(
        adjacent(input), dense(mask), adjacent(update), dense(gate), dense(scale), dense(shift), total, eps
    )


def _backward(grad, grad_carried, grad_constant, input, mask, update, gate, scale, stats, total):
    from pydenoise.kernels import routed_norm

    return routed_norm.routed_norm_backward(
        dense(grad), dense(grad_carried), dense(grad_constant), adjacent(input), dense(mask), adjacent(update),
        dense(gate), dense(scale), dense(stats), total,
    )  # fmt: skip


ROWS = (
    Backend("routed_norm", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("routed_norm_backward", "triton", 110, _unsupported_backward, _backward, _MEASURED),
)
