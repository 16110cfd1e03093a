"""HyRes: denoise a cube by a sparse and low-rank model, without any parameter.

Source: Rasti, Ulfarsson and Ghamisi, "Automatic Hyperspectral Image Restoration Using Sparse and Low-Rank Modeling",
IEEE GRSL 2017. Whitened bands are turned into principal components, each component into wavelet coefficients (db5, 5
levels); Stein's unbiased risk estimate chooses the soft thresholds and the number of components.
"""

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube, check_integer, check_sigma
from pydenoise.hyperspectral.hysime import regression_noise, whitening
from pydenoise.hyperspectral.moments import BandMoments
from pydenoise.hyperspectral.shrinkage import soft_threshold, sure_threshold
from pydenoise.hyperspectral.wavelets import compose, daubechies, decompose, extend, fitting_levels

COMPONENTS_AT_ONCE = 8


def hyres(cube: Tensor, *, wavelet: int = 5, levels: int = 5, sigma: float | Tensor | None = None) -> Tensor:
    """Denoise ``cube``.

    Args:
        cube: [L, H, W], float32 or float64, with noise of its own power in each band.
        wavelet: vanishing moments of the Daubechies wavelet.
        levels: of the transform; fewer on cubes that are too small.
        sigma: standard deviation of the noise, a number or [L]; estimated where it is not given.

    Returns:
        The denoised cube, of its shape and dtype. Each subband of each component has the threshold of least estimated
        risk, and components are kept as long as that lowers the estimated risk of the whole.

    Raises ``ValueError`` for a cube of less than two bands, of no more pixels than bands, or with values that are not
    finite.
    """
    check_cube(cube, finite=False)
    daubechies(wavelet)
    check_integer("levels", levels, 1, 8)
    moments = BandMoments.of(cube)
    variance = regression_noise(moments).variance if sigma is None else check_sigma(sigma, moments.bands).square()
    weights = whitening(moments, variance.to(moments.total))
    _, vectors = torch.linalg.eigh(moments.weighted(weights).products)
    vectors = vectors.flip(1)
    kept = _restore_components(cube, vectors.T * weights, wavelet, levels)
    back = (vectors[:, : len(kept)] / weights[:, None]).to(cube)
    return (back @ kept.flatten(1)).view_as(cube)


def _restore_components(cube: Tensor, forward: Tensor, wavelet: int, levels: int) -> Tensor:
    """The restored principal components that pay, [r, H, W]; ``forward`` [L, L] has one of them in each row."""
    height, width = cube.shape[1:]
    restored, gains = [], []
    for rows in forward.split(COMPONENTS_AT_ONCE):
        images = (rows.to(cube) @ cube.flatten(1)).view(-1, 1, height, width)
        results, risk, energy = _shrink(images, wavelet, levels)
        restored.append(results[:, 0])
        gains.append(energy - risk)
        if not (gains[-1] > 0).any():
            break
    total = torch.cat(gains).cumsum(0)
    rank = int(total.argmax()) + 1 if total.max() > 0 else 1
    return torch.cat(restored)[:rank]


def _shrink(images: Tensor, wavelet: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Restored images [K, 1, H, W] with noise 1, the estimated risk of each, and what dropping it would cost, [K]."""
    height, width = images.shape[-2:]
    margin = 1 << levels
    levels = fitting_levels(min(height, width) + 2 * margin, wavelet, levels)
    grid = 1 << levels
    after = margin + -(height + 2 * margin) % grid, margin + -(width + 2 * margin) % grid
    extended = extend(images, (margin, margin), after)
    approximation, details = decompose(extended, wavelet, levels)
    count = extended[0].numel()
    energy = extended.double().square().sum((1, 2, 3)) - count
    risk = torch.full_like(energy, approximation[0].numel())
    for index, part in enumerate(details):
        threshold, least = sure_threshold(part.flatten(0, 1).flatten(1))
        details[index] = soft_threshold(part, threshold.view(*part.shape[:2], 1, 1))
        risk += least.view(part.shape[:2]).sum(1)
    result = compose(approximation, details, wavelet)
    return result[..., margin : margin + height, margin : margin + width], risk, energy
