"""int8 weights: symmetric, one scale per output channel."""

import torch
from torch import Tensor

from pydenoise.quantization import numbers, search
from pydenoise.quantization.schemes import CLIPS


def quantize_weight(weight: Tensor, *, clip: str = "minmax") -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales of a convolution's or linear layer's weight.

    Args:
        weight: [C_out, ...], floating point and finite.
        clip: "minmax": scale = the channel's largest magnitude / 127. "search": the best of its shrinks.

    Returns:
        (codes, scale): int8 of ``weight``'s shape, within -127..127; float32 [C_out], 1 for channels of zeros.

    Raises:
        TypeError, ValueError: a bad argument; names it.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError("weight: expected a floating-point tensor")
    if weight.dim() < 1 or weight.numel() == 0:
        raise ValueError(f"weight: expected [C_out, ...] without empty dimensions, got {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight: holds values that are not finite")
    if clip not in CLIPS:
        raise ValueError(f"clip: expected one of {', '.join(map(repr, CLIPS))}, got {clip!r}")
    rows = weight.detach().float().reshape(weight.shape[0], -1)
    amax = rows.abs().amax(1)
    if clip == "search":
        _, amax = search.search_range(rows, -amax, amax, symmetric=True)
    scale, _ = numbers.range_parameters(-amax, amax, symmetric=True)
    return numbers.encode(rows, scale.unsqueeze(1)).reshape(weight.shape), scale
