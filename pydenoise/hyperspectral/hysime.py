"""HySime: the noise of every band of a hyperspectral cube, and the subspace that its signal lives in.

Source: Bioucas-Dias and Nascimento, "Hyperspectral Subspace Identification", IEEE TGRS 2008. Noise is what a regression
of a band on all others leaves. The L regressions share one matrix: with Y [L, N] and R = Y Y^T, the residuals are
W = diag(1 / diag(R^-1)) R^-1 Y and the noise variances 1 / (N diag(R^-1)). So everything but the residual image itself
is a function of R, which :class:`BandMoments` holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube, check_integer
from pydenoise.hyperspectral.moments import BLOCK_VALUES, BandMoments

# Added to the diagonal of R once every band has power 1: below it lies the rounding of R itself.
RIDGE = 1e-12
LEAST_VARIANCE = 1e-12  # of the noise, relative to a band's power: a band without noise has no finite weight


@dataclass(frozen=True)
class BandNoise:
    """Noise by regression: ``operator`` [L, L] turns a cube's pixels into their noise, ``variance`` [L]: its power."""

    operator: Tensor
    variance: Tensor

    def residual(self, cube: Tensor) -> Tensor:
        """The noise estimate W of ``cube`` [L, H, W] or [L, N], of its shape and dtype.

        The product is formed in float64: nearly all of the signal cancels in it.
        """
        pixels = cube.flatten(1)
        blocks = pixels.split(max(1, BLOCK_VALUES // len(pixels)), dim=1)
        return torch.cat([(self.operator @ block.double()).to(cube.dtype) for block in blocks], 1).view_as(cube)


@dataclass(frozen=True)
class Subspace:
    """What HySime finds. ``basis`` [L, k]: orthonormal, the most important direction first; k is the estimated rank.

    ``noise``: the regression's. ``gains`` [k]: by how much keeping a direction lowers the mean squared error.
    """

    basis: Tensor
    noise: BandNoise
    gains: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


def regression_noise(cube: Tensor | BandMoments) -> BandNoise:
    """Estimate the noise of each band by its regression on the other bands.

    Args:
        cube: [L, H, W] or [L, N], float32 or float64, or its moments. At least two bands, and more pixels than bands.

    Returns:
        :class:`BandNoise`, in float64. The variance is that of the residuals: larger than the noise by what the other
        bands' noise adds to the prediction (few percent where many bands share the signal).

    Raises ``ValueError`` for too few bands or pixels and for values that are not finite.
    """
    moments = _moments(cube)
    bands = moments.bands
    if moments.count <= bands:
        raise ValueError(f"cube: {moments.count} pixels cannot tell the noise of {bands} bands; more pixels are needed")
    power = moments.power
    dead = power == 0  # a band of zeros: it predicts nothing and has no noise
    root = torch.where(dead, 1.0, power.sqrt())
    correlation = moments.products / (moments.count * root[:, None] * root)
    correlation.diagonal().copy_(torch.where(dead, 1.0, correlation.diagonal()) + RIDGE)
    values, vectors = torch.linalg.eigh(correlation)
    inverse = vectors / values.clamp(min=RIDGE) @ vectors.T
    operator = inverse / inverse.diagonal()[:, None] * (root[:, None] / root)
    # diag(A R A^T) and not 1 / diag(R^-1): the same but for the ridge.
    variance = (operator @ (moments.products / moments.count) * operator).sum(1).clamp(min=0)
    return BandNoise(operator, torch.where(dead, 0.0, variance))


def whitening(moments: BandMoments, variance: Tensor) -> Tensor:
    """Weights [L] that give the noise of all bands, of ``variance`` [L], the standard deviation 1."""
    power = moments.power
    least = torch.where(power > 0, power * LEAST_VARIANCE, 1.0)
    return 1 / torch.maximum(variance, least).sqrt()


def hysime(cube: Tensor | BandMoments, rank: int | None = None) -> Subspace:
    """Estimate the noise and the signal's subspace.

    A direction u is kept where -u^T R_y u + 2 u^T R_n u < 0: there it holds more signal than noise.

    Args:
        cube: as for :func:`regression_noise`.
        rank: keep so many directions, by importance, in place of those that pay.

    Returns:
        :class:`Subspace`, in float64. A cube of noise alone may have rank 0.
    """
    moments = _moments(cube)
    if rank is not None:
        check_integer("rank", rank, 1, moments.bands)
    noise = regression_noise(moments)
    measured = moments.products / moments.count
    cleaner = torch.eye(moments.bands).to(measured) - noise.operator
    signal = cleaner @ measured @ cleaner.T
    _, vectors = torch.linalg.eigh((signal + signal.T) / 2)
    # A noise power of next to nothing in every direction: or rounding decides where there is neither noise nor signal.
    floor = measured.diagonal().mean() * RIDGE
    gains = (vectors * (measured @ vectors)).sum(0) - 2 * (vectors.square().T @ (noise.variance + floor))
    gains, order = gains.sort(descending=True)
    keep = int((gains > 0).sum()) if rank is None else rank
    return Subspace(vectors[:, order[:keep]], noise, gains[:keep])


def _moments(cube: Tensor | BandMoments) -> BandMoments:
    if isinstance(cube, BandMoments):
        return cube
    return BandMoments.of(cube if isinstance(cube, Tensor) and cube.dim() == 2 else check_cube(cube, finite=False))
