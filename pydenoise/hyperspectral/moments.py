"""First and second moments of the bands of a cube: all that noise and subspace estimation need of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_cube

BLOCK_VALUES = 1 << 22  # so many values are in float64 at a time


@dataclass(frozen=True)
class BandMoments:
    """Sums over the pixels of a cube of L bands, in float64.

    ``count``: pixels. ``total`` [L]: sums of the values. ``products`` [L, L]: sums of the products of two bands.
    Moments of parts of a cube add up (``a + b``), so a cube that does not fit into memory is read once, in pieces.

    The products are one matrix product. They are in float64 because the noise is what remains when nearly all of the
    signal cancels: with 60 dB between the two, float32 would leave one digit.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, cube: Tensor) -> "BandMoments":
        """Moments of ``cube``, [L, H, W] or [L, N], float32 or float64, on any device.

        Raises ``ValueError`` if it holds values that are not finite.
        """
        if isinstance(cube, Tensor) and cube.dim() == 2:
            cube = cube.unsqueeze(1)
        pixels = check_cube(cube, finite=False).flatten(1)
        bands, count = pixels.shape
        total = torch.zeros(bands, dtype=torch.float64, device=cube.device)
        products = torch.zeros(bands, bands, dtype=torch.float64, device=cube.device)
        for block in pixels.split(max(1, BLOCK_VALUES // bands), dim=1):
            wide = block.double()
            total += wide.sum(1)
            products.addmm_(wide, wide.T)
        if not torch.isfinite(products).all():  # any NaN or infinity is in the sums
            raise ValueError("cube: holds values that are not finite")
        return cls(count, total, products)

    def __add__(self, other: "BandMoments") -> "BandMoments":
        if not isinstance(other, BandMoments):
            return NotImplemented
        if len(other.total) != len(self.total):
            raise ValueError(f"moments: of {len(self.total)} and of {len(other.total)} bands do not add up")
        return BandMoments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def bands(self) -> int:
        return len(self.total)

    @property
    def power(self) -> Tensor:
        """Mean square of each band, [L]."""
        return self.products.diagonal() / self.count

    def weighted(self, weights: Tensor) -> "BandMoments":
        """The moments of the cube whose bands are multiplied by ``weights`` [L]."""
        weights = weights.to(self.total)
        return BandMoments(self.count, self.total * weights, self.products * weights[:, None] * weights)
