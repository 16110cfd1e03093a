"""Cases of the op ``adaptive_bilateral_filter``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import adaptive_bilateral_filter as op
from pydenoise.reference import adaptive_bilateral_filter as reference
from pydenoise.testing.policy import arrange


@dataclass(frozen=True)
class BilateralCase:
    """One call, and the reason why it is in the table. ``tile``: pixels (down, across) that share a sigma."""

    name: str
    why: str
    batch: int = 1
    channels: int = 1
    size: tuple[int, int] = (16, 24)
    tile: tuple[int, int] = (8, 8)
    spatial: tuple[float, float] = (0.7, 2.0)  # sigmas of x and y are drawn between these
    range: tuple[float, float] = (0.05, 0.5)  # of the image's values
    radius: str | int = "batch"
    strides: str = "contiguous"
    offset: float = 0.0  # added to the image

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """(input, sigma, incoming gradient), drawn in float64."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.channels, *self.size)
        x = torch.rand(shape, generator=generator, dtype=torch.float64) + self.offset
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        tiles = (self.size[0] // self.tile[0], self.size[1] // self.tile[1])
        u = torch.rand(self.batch, *tiles, 3, generator=generator, dtype=torch.float64)
        low = torch.tensor([self.spatial[0], self.spatial[0], self.range[0]], dtype=torch.float64)
        high = torch.tensor([self.spatial[1], self.spatial[1], self.range[1]], dtype=torch.float64)
        sigma = low * (high / low) ** u
        if self.batch > 1 and self.radius != "batch":  # images with windows of their own
            sigma[1:, ..., :2] *= 0.5
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moved = (arrange(x.to(dtype).to(device), self.strides), sigma.to(wide).to(device))
        return *moved, arrange(grad.to(dtype).to(device), self.strides)

    def args(self, dtype: torch.dtype, device: str = "cpu", save_norm: bool = False) -> tuple:
        """The positional arguments of the forward rows."""
        input, sigma, _ = self.tensors(dtype, device)
        return *op.prepare(input, sigma, radius=self.radius)[:-1], save_norm

    def backward_args(self, dtype: torch.dtype, device: str = "cpu", mask=(True, True)) -> tuple:
        """The positional arguments of the backward rows: output and norm are the oracle's, rounded."""
        input, sigma, radius, _ = self.args(dtype, device)
        wide = reference.adaptive_bilateral_filter(input.cpu().double(), sigma.cpu().double(), radius, True)
        output, norm = wide[0].to(dtype).to(device), wide[1].to(sigma.dtype).to(device)
        return self.tensors(dtype, device)[2], input, sigma, radius, output, norm, list(mask)


BILATERAL_CASES = (
    BilateralCase("tiles", "the predictor's tiles of 8 x 8"),
    BilateralCase("pixels", "a sigma for every pixel", size=(13, 19), tile=(1, 1)),
    BilateralCase("rgb", "three channels share their weights", channels=3, size=(16, 16)),
    BilateralCase("two_channels", "the compiler knows two", channels=2, size=(9, 33), tile=(3, 11)),
    BilateralCase("four_channels", "and four", channels=4, size=(8, 40), tile=(4, 5)),
    BilateralCase("many_channels", "any number, in groups and a rest", 2, 13, (10, 12), (5, 4), radius="per_image"),
    BilateralCase("batch", "the largest window of the batch is everyone's", 3, size=(8, 16)),
    BilateralCase("per_image", "each image its own window", 3, 1, (24, 16), radius="per_image", spatial=(0.7, 3.0)),
    BilateralCase("rgb_per_image", "the same in colour", 2, 3, (8, 8), (4, 4), radius="per_image"),
    BilateralCase("wide_window", "the published sigmas end at 6.000001, so their radius at 7", spatial=(4, 6.000001)),
    BilateralCase("one_sigma", "the whole image is one tile", size=(40, 300), tile=(40, 300)),
    BilateralCase("large_tiles", "tiles that are cut into blocks", size=(72, 520), tile=(36, 260), spatial=(0.6, 1)),
    BilateralCase("uneven_tiles", "tile sides with no common factor", size=(21, 51), tile=(7, 17)),
    BilateralCase("odd", "nothing is a multiple of a vector", 2, 3, (5, 37), (1, 37)),
    BilateralCase("mirrored_twice", "the window is larger than the image", size=(4, 5), tile=(2, 5), radius=7),
    BilateralCase("mirrored_twice_rgb", "the same in colour", channels=3, size=(3, 2), tile=(1, 1), radius=6),
    BilateralCase("just_fits", "the radius is the image less one", size=(4, 20), tile=(4, 4), radius=3),
    BilateralCase("one_row", "nothing to mirror along an axis", size=(1, 40), tile=(1, 8)),
    BilateralCase("one_pixel", "nothing to mirror", channels=3, size=(1, 1), tile=(1, 1)),
    BilateralCase("radius_0", "the window is the pixel", radius=0),
    BilateralCase("radius_3", "a window that sigma does not know of", channels=3, size=(16, 8), radius=3),
    BilateralCase("narrow_range", "weights that vanish", range=(1e-3, 1e-3)),
    BilateralCase("wide_range", "a Gaussian blur", range=(1e3, 1e3)),
    BilateralCase("small_spatial", "hardly a neighbour counts", spatial=(0.05, 0.2)),
    BilateralCase("offset", "differences small beside the values", offset=10.0, range=(0.02, 0.1)),
    BilateralCase("channels_last", "columns are not adjacent", 2, 3, strides="channels_last"),
    BilateralCase("sliced", "every other column of a tensor with NaN between", 2, 2, strides="sliced"),
    BilateralCase("blocks", "several blocks both ways", size=(40, 280), tile=(4, 10), spatial=(0.6, 1.6)),
    BilateralCase("empty", "no image", batch=0),
)
