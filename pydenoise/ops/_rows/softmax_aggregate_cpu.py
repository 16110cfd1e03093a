"""CPU rows of softmax_aggregate: the C++ kernels of ``pydenoise._C``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _maps
from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend

_MEASURED = "bench/notes-blocks-afa.md, the only compiled CPU backend"


def _aggregate(features: Tensor, hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, size = _maps.has_adjacent_channels(features), features.shape[-2:]
    out, shares = torch.ops.pydenoise.softmax_aggregate_cpu.default(
        _maps.flat(features, rows), _maps.flat_either(hidden), None if weight is None else weight.float().contiguous(),
        not rows,
    )  # fmt: skip
    return out.unflatten(-1, size), shares.unflatten(-1, size)


def _aggregate_backward(grad, grad_shares, features, shares, wants_features):
    rows, size = _maps.has_adjacent_channels(features), features.shape[-2:]
    grad_features, grad_logits = torch.ops.pydenoise.softmax_aggregate_backward_cpu.default(
        _maps.flat(grad, rows), None if grad_shares is None else grad_shares.contiguous(),
        _maps.flat(features, rows), shares.contiguous(), not rows, wants_features,
    )  # fmt: skip
    return grad_features.unflatten(-1, size) if wants_features else None, grad_logits.unflatten(-1, size)


def _unsupported_backward(grad, *args):
    return unsupported_floats(grad)


ROWS = (
    Backend("softmax_aggregate", "cpu", 100, unsupported_floats, _aggregate, _MEASURED),
    Backend("softmax_aggregate_backward", "cpu", 100, _unsupported_backward, _aggregate_backward, _MEASURED),
)
