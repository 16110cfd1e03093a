"""Clip search: narrower ranges that lose a few large values and keep the many small ones better.

The range is shrunk in steps of 1 %, and the one with the least mean ``|x - x_hat| ** 2.4`` is taken. Source: the public
code of PTQ4DM (arXiv 2211.15736; 80 shrinks) and Q-Diffusion (100). Affine ranges may also be shrunk at the
farther end only: after SiLU or GELU the nearer one carries most of the values.
"""

import torch
from torch import Tensor

from pydenoise.quantization import numbers

SHRINKS = 90
STEP = 0.01
EXPONENT = 2.4
_AT_ONCE = 1 << 18  # elements of one pass: they stay in the cache


def search_range(
    values: Tensor,
    low: Tensor,
    high: Tensor,
    symmetric: bool = False,
    *,
    shrinks: int = SHRINKS,
    exponent: float = EXPONENT,
) -> tuple[Tensor, Tensor]:
    """The best shrunk range of each row.

    Args:
        values: [rows, n], samples of what has the range; NaN marks places without a sample (rows of unequal length).
        low, high: [rows], finite: the ranges to start from, 0 included; usually the least and largest ever seen.
        symmetric: one number, the larger magnitude, is shrunk.
        shrinks: candidates of each kind: 1, 0.99, 0.98, ... (at most 100).
        exponent: of the error.

    Returns:
        (low, high), [rows] each, float32. Rows without samples keep their range.

    Raises:
        ValueError: shapes that do not fit, or ``shrinks`` out of range.
    """
    if values.dim() != 2 or low.shape != high.shape or low.shape != values.shape[:1]:
        raise ValueError(
            f"values: expected [rows, n] with low and high of [rows], got {list(values.shape)}, "
            f"{list(low.shape)} and {list(high.shape)}"
        )
    if not 1 <= shrinks <= 100:
        raise ValueError(f"shrinks: expected 1 to 100, got {shrinks}")
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if values.shape[1] == 0 or values.shape[0] == 0:
        return low, high
    rows = max(1, _AT_ONCE // values.shape[1])
    parts = [
        _search(values[i : i + rows].float(), low[i : i + rows], high[i : i + rows], symmetric, shrinks, exponent)
        for i in range(0, values.shape[0], rows)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _search(
    values: Tensor, low: Tensor, high: Tensor, symmetric: bool, shrinks: int, exponent: float
) -> tuple[Tensor, Tensor]:
    missing = torch.isnan(values)
    x = values.masked_fill(missing, 0.0) if missing.any() else values  # zeros are kept exactly: no error
    lows, highs = _candidates(low, high, symmetric, shrinks)
    scales, zero_points = numbers.range_parameters(lows, highs, symmetric)
    errors = []
    for index, scale in enumerate(scales):
        offset = None if zero_points is None else zero_points[index].unsqueeze(1).to(x.dtype)
        kept = numbers.fake_quantize(x, scale.unsqueeze(1), offset)
        errors.append(kept.sub_(x).abs_().pow_(exponent).sum(1))
    best = torch.stack(errors).argmin(0, keepdim=True)  # the widest of equals
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _candidates(low: Tensor, high: Tensor, symmetric: bool, shrinks: int) -> tuple[Tensor, Tensor]:
    """[candidates, rows] ends of ranges: both ends shrunk, then the farther end alone where there are two."""
    factors = 1.0 - STEP * torch.arange(shrinks, dtype=low.dtype, device=low.device).unsqueeze(1)
    lows, highs = low * factors, high * factors
    if symmetric or not ((low < 0) & (high > 0)).any():
        return lows, highs
    farther = -low > high
    one_low = torch.where(farther, lows, low.expand_as(lows))
    one_high = torch.where(farther, high.expand_as(highs), highs)
    return torch.cat((lows, one_low[1:])), torch.cat((highs, one_high[1:]))
