"""Scales, zero points and codes of int8 tensors, and how far quantized values are from what they stand for.

Rules: true division in float32, round half to even; symmetric codes are -127..127, affine codes -128..127 with
``zero_point = clamp(rint(-128 - low / scale))`` of a range that includes 0. A scale below the smallest normal float32
becomes 1: such a range holds only zeros, as far as int8 can tell.
"""

import math

import torch
from torch import Tensor

from pydenoise.reference import quantize as reference

LOW, HIGH = reference.LOW, reference.HIGH


def range_parameters(low: Tensor, high: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of the ranges ``low`` .. ``high``, elementwise.

    Args:
        low, high: finite, of one shape; ``low <= high``. The range is widened to include 0.
        symmetric: scale = the larger magnitude / 127, and no zero point.

    Returns:
        (scale, zero_point): float32 and int32 of the shape of ``low``; ``None`` instead of a zero point if symmetric.

    Raises:
        ValueError: ``low`` or ``high`` is not finite, or ``low > high`` somewhere.
    """
    low, high = torch.as_tensor(low).float(), torch.as_tensor(high).float()
    for name, values in (("low", low), ("high", high)):
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: expected finite values")
    if (low > high).any():
        raise ValueError("low: expected at most high")
    ends = torch.stack(torch.broadcast_tensors(low, high), dim=-1)
    scale, zero_point = reference.dynamic_parameters(ends, -1, symmetric)
    return scale.squeeze(-1), None if symmetric else zero_point.squeeze(-1)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """int8 codes of ``x``; ``scale`` and ``zero_point`` (``None``: symmetric) broadcast over it. Exact rules above."""
    return reference.codes(reference.widen(x), scale, zero_point)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """float32 values that int8 ``codes`` stand for."""
    return reference.dequantize(codes, scale, zero_point, torch.float32)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """``x`` as int8 would keep it: ``decode(encode(x))``, float32."""
    low = LOW + 1 if zero_point is None else LOW
    offset = 0 if zero_point is None else zero_point
    # A clamp of the shifted code, without the way through int8: searches call this a hundred times.
    return (torch.round(x.float() / scale).clamp(low - offset, HIGH - offset)) * scale


def fake_quantize_dynamic(x: Tensor, dim: int, symmetric: bool = False) -> Tensor:
    """``x`` as int8 would keep it with a scale per position over ``dim``, float32."""
    scale, zero_point = reference.dynamic_parameters(x.float(), dim, symmetric)
    return fake_quantize(x, scale, None if symmetric else zero_point)


def snr_db(expected: Tensor, actual: Tensor) -> float:
    """Signal-to-noise ratio of ``actual`` in dB: 10 log10(sum expected^2 / sum (actual - expected)^2).

    ``inf`` where they are equal; ``-inf`` where ``expected`` is all zeros and ``actual`` is not.
    """
    expected, actual = expected.double(), actual.double()
    return decibels(expected.square().sum().item(), (actual - expected).square().sum().item())


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), with the limits for zeros."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """||actual - expected|| / ||expected||: 1.5 % is 36.5 dB, 3 % is 30.5 dB."""
    ratio = snr_db(expected, actual)
    return 0.0 if ratio == math.inf else 10.0 ** (-ratio / 20.0)
