"""Triton rows of softmax_aggregate."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _maps, _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; the only compiled backend there"
_MOST_MAPS = 8  # that one program holds


def _unsupported_maps(features: Tensor) -> str | None:
    if features.shape[1] > _MOST_MAPS:
        return f"{features.shape[1]} maps are more than {_MOST_MAPS}"
    return _triton.unsupported(features, _FLOATS)


def _unsupported(features: Tensor, *args) -> str | None:
    return _unsupported_maps(features)


def _unsupported_backward(grad: Tensor, grad_shares: Tensor | None, features: Tensor, *args) -> str | None:
    return _unsupported_maps(features)


def _aggregate(features: Tensor, hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    from pydenoise.kernels import softmax_aggregate

    rows, size = _maps.has_adjacent_channels(features), features.shape[-2:]
    weight = None if weight is None else weight.float().contiguous()
    out, shares = softmax_aggregate.aggregate(_maps.flat(features, rows), _maps.flat_either(hidden), weight, not rows)
    return out.unflatten(-1, size), shares.unflatten(-1, size)


def _aggregate_backward(grad, grad_shares, features, shares, wants_features):
    from pydenoise.kernels import softmax_aggregate

    rows, size = _maps.has_adjacent_channels(features), features.shape[-2:]
    grad_features, grad_logits = softmax_aggregate.aggregate_backward(
        _maps.flat(grad, rows), None if grad_shares is None else grad_shares.contiguous(), _maps.flat(features, rows),
        shares.contiguous(), not rows, wants_features,
    )  # fmt: skip
    return grad_features.unflatten(-1, size) if wants_features else None, grad_logits.unflatten(-1, size)


ROWS = (
    Backend("softmax_aggregate", "triton", 110, _unsupported, _aggregate, _MEASURED),
    Backend("softmax_aggregate_backward", "triton", 110, _unsupported_backward, _aggregate_backward, _MEASURED),
)
