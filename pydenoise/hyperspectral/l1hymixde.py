"""L1HyMixDe: denoise a cube with Gaussian noise and sparse outliers in a subspace.

Source: Zhuang and Ng, "Hyperspectral Mixed Noise Removal by l1-Norm-Based Subspace Representation", IEEE JSTARS 2020.
"""

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube, check_integer, check_number
from pydenoise.hyperspectral.denoisers import Denoiser
from pydenoise.hyperspectral.fasthyde import FastHyDe
from pydenoise.hyperspectral.median import adaptive_median
from pydenoise.hyperspectral.moments import BandMoments
from pydenoise.hyperspectral.shrinkage import soft_threshold
from pydenoise.hyperspectral.wavelets import decompose, extend

NORMAL_QUARTILE = 0.6744897501960817  # the median of |x| for normal x of deviation 1


def l1hymixde(
    cube: Tensor,
    rank: int | None = None,
    denoiser: str | Denoiser = "ffdnet",
    *,
    threshold: float = 1.0,
    iterations: int = 10,
    tolerance: float = 1e-3,
    window: int = 21,
) -> Tensor:
    """Split ``cube`` into a low-rank image, sparse outliers and Gaussian noise; returns the image.

    An adaptive median filter makes the start, from which the subspace is taken. Then components and outliers take
    turns: components are what the denoiser makes of the cube without outliers, outliers what is left above the
    threshold.

    Args:
        cube: [L, H, W], float32 or float64.
        rank: number of components; by default as for ``fasthyde``, on the filtered cube.
        denoiser: as for :func:`~pydenoise.hyperspectral.fasthyde`.
        threshold: of an outlier, in standard deviations of the band's Gaussian noise.
        iterations: at most so many turns; they end when the image changes by less than ``tolerance`` of its norm.
        window: side of the largest window of the median filter, odd.
    """
    check_cube(cube)
    threshold = check_number("threshold", threshold)
    tolerance = check_number("tolerance", tolerance, zero=True)
    check_integer("iterations", iterations, 1)
    if check_integer("window", window, 3) % 2 == 0:
        raise ValueError(f"window: expected an odd number, got {window}")
    start = adaptive_median(cube, window)
    sigma = robust_sigma(cube)
    model = FastHyDe.fit(BandMoments.of(start), "non-iid", rank, denoiser, sigma)
    limit = (threshold * sigma).to(cube).view(-1, 1, 1)
    image = start
    for _ in range(iterations):
        outliers = soft_threshold(cube - image, limit)
        previous, image = image, model(cube - outliers)
        if (image - previous).norm() <= tolerance * previous.norm():
            break
    return image


def robust_sigma(cube: Tensor) -> Tensor:
    """Standard deviation of each band's Gaussian noise, [L], in float64, whatever a few outliers are.

    From the median magnitude of the finest diagonal wavelet coefficients (Donoho and Johnstone, 1994); nothing below
    1e-6 of the band's largest value, which stands for no noise.
    """
    height, width = cube.shape[-2:]
    details = decompose(extend(cube[:, None], (0, 0), (4 + height % 2, 4 + width % 2)), 2, 1)[1][0]
    sigma = details[:, 2].flatten(1).abs().median(1).values.double() / NORMAL_QUARTILE
    largest = cube.flatten(1).abs().amax(1).double()
    return torch.maximum(sigma, torch.where(largest > 0, 1e-6 * largest, 1.0))
