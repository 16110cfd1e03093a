"""FastHyDe: denoise a cube in the few components that its signal lives in.

Source: Zhuang and Bioucas-Dias, "Fast Hyperspectral Image Denoising and Inpainting Based on Low-Rank and Sparse
Representations", IEEE JSTARS 2018. Whiten the noise, project onto HySime's subspace, denoise each component as a gray
image, go back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube, check_sigma
from pydenoise.hyperspectral.anscombe import anscombe, inverse_anscombe
from pydenoise.hyperspectral.denoisers import Denoiser, denoise_images, find_denoiser
from pydenoise.hyperspectral.hysime import hysime, regression_noise, whitening
from pydenoise.hyperspectral.moments import BandMoments

NOISES = ("iid", "non-iid", "poisson")
# A component is shown to the denoiser with mean 1/2 and this many standard deviations in [0, 1]: as in a photograph.
DEVIATIONS = 6.0
USUAL_RANK = 10  # the paper's


@dataclass
class FastHyDe:
    """A fitted FastHyDe: ``model(cube)`` denoises a cube, or any tile of it.

    What is taken from the whole cube are the moments of its bands; the rest is a matrix product at each pixel and the
    denoiser. So tiles give the same result as the whole, where their margins are as wide as the denoiser looks.

    Attributes:
        noise: "iid", "non-iid" or "poisson".
        sigma: estimated (or given) standard deviation of each band, [L], in float64; of the transformed values for
            "poisson".
        weights: [L], what the bands are multiplied by to whiten the noise.
        basis: [L, k], orthonormal: the subspace of the whitened bands.
        centre, scale: [k], what components are shifted and divided by for the denoiser.
        levels: [k], the standard deviation of their noise after that.
        denoiser: a callable.
    """

    noise: str
    sigma: Tensor
    weights: Tensor
    basis: Tensor
    centre: Tensor
    scale: Tensor
    levels: Tensor
    denoiser: Denoiser

    @classmethod
    def fit(
        cls,
        cube: Tensor | BandMoments,
        noise: str = "non-iid",
        rank: int | None = None,
        denoiser: str | Denoiser = "ffdnet",
        sigma: float | Tensor | None = None,
    ) -> "FastHyDe":
        """Estimate noise and subspace.

        Args:
            cube: [L, H, W] or [L, N], float32 or float64, or the moments of one (for "poisson", of its
                :func:`~pydenoise.hyperspectral.anscombe` transform).
            noise: "iid": independent, of one power in all bands; "non-iid": of a power of its own in each band;
                "poisson": the values are counts.
            rank: number of components; by default HySime's estimate, but at least 10 (or all bands, if they are fewer):
                the denoiser still finds signal in components that hold more noise, and too many do little harm.
            denoiser: "ffdnet", "wavelet", or a callable (:mod:`pydenoise.hyperspectral.denoisers`).
            sigma: standard deviation of the noise, a number or [L], where it is known.
        """
        if noise not in NOISES:
            raise ValueError(f"noise: expected one of {', '.join(NOISES)}, got {noise!r}")
        if noise == "poisson" and sigma is not None:
            raise ValueError("sigma: Poisson noise follows from the counts; leave it out")
        moments = cube
        if not isinstance(cube, BandMoments):
            moments = BandMoments.of(anscombe(cube) if noise == "poisson" else cube)
        variance = _variance(moments, noise, sigma)
        weights = whitening(moments, variance)
        white = moments.weighted(weights)
        basis = hysime(white, _default_rank(white) if rank is None else rank).basis
        mean = basis.T @ white.total / white.count
        square = (basis * (white.products @ basis)).sum(0) / white.count
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        scale = DEVIATIONS * torch.where(deviation > 0, deviation, 1.0)
        levels = (basis.square().T @ (variance * weights.square())).sqrt() / scale
        found = find_denoiser(denoiser, moments.total.device)
        return cls(noise, variance.sqrt(), weights, basis, mean, scale, levels, found)

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.centre)

    def __call__(self, cube: Tensor) -> Tensor:
        """Denoise ``cube``, [L, H, W] or [N, L, H, W]; returns its shape and dtype."""
        self._check(cube)
        values = anscombe(cube) if self.noise == "poisson" else cube
        return self.from_components(self.denoise(self.components(values)))

    def components(self, values: Tensor) -> Tensor:
        """[..., L, H, W], transformed if need be, to [..., k, H, W], scaled for the denoiser."""
        forward = self.basis.T * self.weights / self.scale[:, None]
        shift = 0.5 - self.centre / self.scale
        components = forward.to(values) @ values.flatten(-2) + shift.to(values)[:, None]
        return components.unflatten(-1, values.shape[-2:])

    def denoise(self, components: Tensor) -> Tensor:
        """Denoise components [..., k, H, W], each with its own noise level."""
        images = components.reshape(-1, 1, *components.shape[-2:])
        levels = self.levels.to(images).repeat(len(images) // self.rank).view(-1, 1, 1, 1)
        return denoise_images(self.denoiser, images, levels).view_as(components)

    def from_components(self, components: Tensor) -> Tensor:
        """Scaled components [..., k, H, W] to values [..., L, H, W]; for "poisson", to counts."""
        backward = self.basis / self.weights[:, None]
        shift = backward @ (self.centre - 0.5 * self.scale)
        values = (backward * self.scale).to(components) @ components.flatten(-2) + shift.to(components)[:, None]
        values = values.unflatten(-1, components.shape[-2:])
        return inverse_anscombe(values) if self.noise == "poisson" else values

    def _check(self, cube: Tensor) -> None:
        bands = len(self.weights)
        if not isinstance(cube, Tensor) or cube.dim() not in (3, 4) or cube.shape[-3] != bands:
            got = list(cube.shape) if isinstance(cube, Tensor) else type(cube).__name__
            raise ValueError(f"cube: expected [{bands}, H, W] or [N, {bands}, H, W], got {got}")


def fasthyde(
    cube: Tensor,
    noise: str = "non-iid",
    rank: int | None = None,
    denoiser: str | Denoiser = "ffdnet",
    sigma: float | Tensor | None = None,
) -> Tensor:
    """Denoise ``cube`` [L, H, W] (float32 or float64) by FastHyDe; the arguments are those of :meth:`FastHyDe.fit`.

    Raises ``ValueError`` or ``TypeError`` for a cube of less than two bands, of no more pixels than bands, or with
    values that are not finite, and for arguments that do not fit.
    """
    return FastHyDe.fit(check_cube(cube, finite=False), noise, rank, denoiser, sigma)(cube)


def _default_rank(moments: BandMoments) -> int:
    return max(hysime(moments).rank, min(USUAL_RANK, moments.bands))


def _variance(moments: BandMoments, noise: str, sigma: float | Tensor | None) -> Tensor:
    """Variance of each band's noise, [L]."""
    if noise == "poisson":
        return torch.ones_like(moments.total)
    if sigma is not None:
        variance = check_sigma(sigma, moments.bands).square().to(moments.total)
    else:
        variance = regression_noise(moments).variance
    return variance.mean().expand(moments.bands) if noise == "iid" else variance
