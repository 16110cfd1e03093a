"""HyMiNoR: remove Gaussian noise and outliers (impulses, dead lines) from a cube.

Source: Rasti, Ghamisi and Chanussot, "Mixed Noise Reduction in Hyperspectral Imagery", WHISPERS 2019. HyRes removes the
Gaussian part; what is left of the outliers goes by min ||H - X||_1 + lambda ||D X||_1 with differences D along the
bands.
"""

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube, check_integer, check_number
from pydenoise.hyperspectral.hyres import hyres
from pydenoise.hyperspectral.shrinkage import soft_threshold

PIXELS_AT_ONCE = 1 << 14  # their iterates stay in the cache: pixels do not see each other


def hyminor(cube: Tensor, *, regularization: float = 0.75, iterations: int = 50, penalty: float = 5.0) -> Tensor:
    """Denoise ``cube`` with mixed noise.

    Args:
        cube: [L, H, W], float32 or float64.
        regularization: lambda. Above 1/2, what stands out in one band alone goes, whatever its height; from 1 on, the
            first and last bands become equal to their neighbours, and features of less than 2 lambda bands go. (The
            published settings are lambda 10, penalty 0.5 and 50 iterations, which stop far from the minimum.)
        iterations: of ADMM.
        penalty: mu of ADMM, for values whose mean magnitude is 1 (the cube is scaled to that and back). It decides how
            fast the minimum is approached, not where it is.

    Returns:
        The denoised cube, of its shape and dtype.
    """
    check_cube(cube)
    lam, penalty = check_number("regularization", regularization), check_number("penalty", penalty)
    check_integer("iterations", iterations, 1)
    start = hyres(cube).flatten(1)
    scale = start.abs().mean().clamp(min=torch.finfo(cube.dtype).tiny)
    inverse = _inverse(len(cube)).to(start)
    parts = [_solve(part / scale, inverse, lam, penalty, iterations) for part in start.split(PIXELS_AT_ONCE, 1)]
    return (torch.cat(parts, 1) * scale).view_as(cube)


def _inverse(bands: int) -> Tensor:
    """(I + D^T D)^-1, [bands, bands]: the same in every iteration."""
    differences = torch.eye(bands, dtype=torch.float64).diff(dim=0)
    return torch.linalg.inv(torch.eye(bands, dtype=torch.float64) + differences.T @ differences)


def _solve(target: Tensor, inverse: Tensor, lam: float, penalty: float, iterations: int) -> Tensor:
    """ADMM on the split v = X - H, w = D X, with scaled multipliers."""
    x = target
    v, w = torch.zeros_like(x), x.diff(dim=0)
    p, q = torch.zeros_like(v), torch.zeros_like(w)
    for _ in range(iterations):
        x = inverse @ (target + v - p + _transposed_difference(w - q))
        residual, slope = x - target, x.diff(dim=0)
        v = soft_threshold(residual + p, 1 / penalty)
        w = soft_threshold(slope + q, lam / penalty)
        p, q = p + residual - v, q + slope - w
    return x


def _transposed_difference(w: Tensor) -> Tensor:
    """D^T w."""
    zero = torch.zeros_like(w[:1])
    return torch.cat((zero, w)) - torch.cat((w, zero))
