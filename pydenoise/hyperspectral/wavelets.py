"""Orthonormal 2-D wavelet transform (Daubechies, periodic) in plain torch, for batches of images on any device.

Periodic means that the transform of independent noise is independent noise of the same power, which thresholds rely on.
Images are continued by reflection first (:func:`extend`), so that opposite borders do not meet.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MOMENTS = 10  # beyond, the roots of the polynomial lose digits


@lru_cache
def daubechies(moments: int) -> tuple[float, ...]:
    """The scaling filter with ``moments`` vanishing moments, of length 2 * moments; db5 has 5.

    Source: Daubechies, "Orthonormal Bases of Compactly Supported Wavelets", 1988. Of the polynomial's reciprocal pairs
    of roots those inside the unit circle are taken.
    """
    if isinstance(moments, bool) or not isinstance(moments, int) or not 1 <= moments <= MAX_MOMENTS:
        raise ValueError(f"wavelet: expected 1 to {MAX_MOMENTS} vanishing moments, got {moments!r}")
    polynomial = [math.comb(moments - 1 + k, k) for k in range(moments)]
    filter_ = np.ones(1)
    for root in np.roots(polynomial[::-1]):
        middle = 1 - 2 * root
        pair = middle + np.sqrt(middle * middle - 1 + 0j) * np.array([1, -1])
        filter_ = np.convolve(filter_, [1, -pair[np.abs(pair).argmin()]])
    for _ in range(moments):
        filter_ = np.convolve(filter_, [1, 1])
    filter_ = np.real(filter_)
    return tuple((filter_ * math.sqrt(2) / filter_.sum()).tolist())


def reach(moments: int, levels: int) -> int:
    """How far apart two pixels can be that share a coefficient."""
    return (2 * moments - 1) * (2**levels - 1)


def fitting_levels(size: int, moments: int, levels: int) -> int:
    """At most ``levels``, such that the coarsest split still has a signal as long as the filter."""
    while levels > 0 and size / 2 ** (levels - 1) < 2 * moments:
        levels -= 1
    return levels


def extend(images: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Continue ``images`` [..., H, W] by reflection, as often as it takes: (rows, columns) before and after."""
    for axis, low, high in ((-2, before[0], after[0]), (-1, before[1], after[1])):
        size = images.shape[axis]
        index = torch.arange(-low, size + high, device=images.device) % (2 * size)
        images = images.index_select(axis, torch.minimum(index, 2 * size - 1 - index))
    return images


def decompose(images: Tensor, moments: int, levels: int) -> tuple[Tensor, list[Tensor]]:
    """Coefficients of ``images`` [K, 1, H, W], H and W multiples of 2^levels.

    Returns the approximation [K, 1, H / 2^levels, W / 2^levels] and for each level, finest first, details [K, 3, h, w].
    """
    details = []
    for _ in range(levels):
        parts = _split(images, moments)
        images, rest = parts[:, :1], parts[:, 1:]
        details.append(rest)
    return images, details


def compose(approximation: Tensor, details: list[Tensor], moments: int) -> Tensor:
    """The images that :func:`decompose` would take apart into these coefficients."""
    for rest in reversed(details):
        approximation = _join(torch.cat((approximation, rest), 1), moments)
    return approximation


def _filters(moments: int, like: Tensor) -> Tensor:
    low = daubechies(moments)
    high = [(-1) ** i * value for i, value in enumerate(reversed(low))]
    return torch.tensor([low, high], dtype=like.dtype, device=like.device)


def _split(x: Tensor, moments: int) -> Tensor:
    """[K, 1, H, W] to [K, 4, H/2, W/2]: low and high along rows of the low, then of the high, along columns."""
    filters, tail = _filters(moments, x), 2 * moments - 2
    x = F.conv2d(_wrap(x, tail, 3), filters[:, None, None, :], stride=(1, 2))
    return F.conv2d(_wrap(x, tail, 2), filters[:, None, :, None].repeat(2, 1, 1, 1), stride=(2, 1), groups=2)


def _join(x: Tensor, moments: int) -> Tensor:
    """The transpose of :func:`_split`, which is its inverse."""
    filters, tail = _filters(moments, x), 2 * moments - 2
    x = F.conv_transpose2d(x, filters[:, None, :, None].repeat(2, 1, 1, 1), stride=(2, 1), groups=2)
    x = F.conv_transpose2d(_fold(x, tail, 2), filters[:, None, None, :], stride=(1, 2))
    return _fold(x, tail, 3)


def _wrap(x: Tensor, tail: int, axis: int) -> Tensor:
    return torch.cat((x, x.narrow(axis, 0, tail)), axis) if tail else x


def _fold(x: Tensor, tail: int, axis: int) -> Tensor:
    """Add the last ``tail`` values to the first ones: what :func:`_wrap` does, transposed."""
    if not tail:
        return x
    size = x.shape[axis] - tail
    body = x.narrow(axis, 0, size).clone()
    body.narrow(axis, 0, tail).add_(x.narrow(axis, size, tail))
    return body
