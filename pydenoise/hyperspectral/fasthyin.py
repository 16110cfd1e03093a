"""FastHyIn: FastHyDe for cubes with missing samples (dead lines, stripes, clouds in some bands).

Source: Zhuang and Bioucas-Dias, IEEE JSTARS 2018 (see :mod:`pydenoise.hyperspectral.fasthyde`). The components of a
pixel with missing bands are the least-squares fit to the bands it has.
"""

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube
from pydenoise.hyperspectral.anscombe import anscombe
from pydenoise.hyperspectral.denoisers import Denoiser
from pydenoise.hyperspectral.fasthyde import FastHyDe
from pydenoise.hyperspectral.moments import BandMoments

PIXELS_AT_ONCE = 1 << 14
LEAST_SPREAD = 1e-12  # of a component, relative to all: one that is the same everywhere has no inverse variance


def fasthyin(
    cube: Tensor,
    mask: Tensor,
    noise: str = "non-iid",
    rank: int | None = None,
    denoiser: str | Denoiser = "ffdnet",
    sigma: float | Tensor | None = None,
) -> Tensor:
    """Denoise a cube and fill in what is missing.

    Args:
        cube: [L, H, W], float32 or float64; what it holds where the mask is false does not matter (it may be NaN).
        mask: [L, H, W] or [H, W], bool: true where a sample is valid.
        noise, rank, denoiser, sigma: as for :func:`~pydenoise.hyperspectral.fasthyde`. Noise and subspace are estimated
            from the pixels that have all bands; there must be more of them than bands.

    Returns:
        The whole cube, of its shape and dtype. A pixel's fit is regularised by what components of complete pixels look
        like (mean and covariance), so it stays bounded where fewer bands than components are left; a pixel without any
        band becomes the mean spectrum before the denoiser smooths it in.
    """
    check_cube(cube, finite=False)
    mask = _check_mask(mask, cube)
    values = torch.where(mask, cube, 0.0)
    if not torch.isfinite(values).all():
        raise ValueError("cube: holds values that are not finite where the mask is true")
    values = anscombe(values) if noise == "poisson" else values
    complete = mask.all(0)
    count = int(complete.sum())
    if count <= len(cube):
        raise ValueError(f"mask: only {count} pixels have all bands; more than {len(cube)}, the bands, are needed")
    moments = BandMoments.of(values[:, complete])
    model = FastHyDe.fit(moments, noise, rank, denoiser, sigma)
    components = model.components(values)
    holes = ~complete
    if holes.any():
        components[:, holes] = _fit(model, moments, values[:, holes], mask[:, holes])
    return model.from_components(model.denoise(components))


def _check_mask(mask: Tensor, cube: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape not in (cube.shape, cube.shape[1:]):
        raise ValueError(f"mask: expected {list(cube.shape)} or {list(cube.shape[1:])}, got {list(mask.shape)}")
    return mask.to(cube.device).expand_as(cube)


def _fit(model: FastHyDe, moments: BandMoments, values: Tensor, mask: Tensor) -> Tensor:
    """Scaled components [k, P] of pixels ``values`` [L, P] of which only those bands count that ``mask`` [L, P] names.

    For each pixel (E^T M E + C^-1) z = E^T M y + C^-1 m, in whitened bands, with mean m and covariance C of the
    components. The matrices E^T M E of all pixels are one matrix product: sums of the outer products of E's rows.
    """
    basis, white = model.basis, moments.weighted(model.weights)
    outer = (basis[:, :, None] * basis[:, None, :]).flatten(1)
    covariance = basis.T @ white.products @ basis / white.count - model.centre.outer(model.centre)
    covariance.diagonal().add_(covariance.trace() * LEAST_SPREAD)
    prior = torch.linalg.inv(covariance)
    parts = []
    for y, valid in zip(values.split(PIXELS_AT_ONCE, 1), mask.split(PIXELS_AT_ONCE, 1), strict=True):
        matrices = (valid.double().T @ outer).unflatten(1, (model.rank, model.rank)) + prior
        right = (y.double() * valid).T @ (basis * model.weights[:, None]) + prior @ model.centre
        parts.append(torch.linalg.solve(matrices, right))
    components = torch.cat(parts).T
    return ((components - model.centre[:, None]) / model.scale[:, None] + 0.5).to(values)
