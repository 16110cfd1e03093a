"""Denoisers of gray images, for the components of a cube.

A denoiser is any callable ``denoiser(images, sigma)``: images [K, 1, H, W] with independent noise of standard deviation
sigma [K, 1, 1, 1] in them, result of the same shape. Components come scaled like pictures, most of their values in
[0, 1]. Two attributes say how tiles must lie for the same result as without tiles, as far as the denoiser has them:
``radius``, how far it looks, and ``align``, the grid of its phases.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pydenoise.hyperspectral._arguments import check_integer, check_number
from pydenoise.hyperspectral.wavelets import compose, daubechies, decompose, extend, fitting_levels, reach
from pydenoise.models import FFDNet, load_ffdnet
from pydenoise.models.ffdnet import gray_through_colour
from pydenoise.models.weights import find_ffdnet

Denoiser = Callable[[Tensor, Tensor], Tensor]
PIXELS_AT_ONCE = 1 << 20


class FFDNetDenoiser:
    """FFDNet on gray images: a network for RGB gets them as three equal channels.

    Args:
        model: the network; by default the published one for RGB, from the cache (``pydenoise weights ffdnet``), else
            ``WeightsError`` says how to get it.
        network: what to call in place of ``model``: an accelerated copy of it.
        least_sigma: below this noise level the network would remove more detail than noise. It is then asked for
            ``least_sigma`` and its change is scaled down in proportion.
    """

    align = 2

    def __init__(
        self, model: FFDNet | None = None, network: Callable | None = None, least_sigma: float = 1 / 255
    ) -> None:
        self.model = load_ffdnet(find_ffdnet()) if model is None else model
        if not isinstance(self.model, FFDNet) or self.model.channels not in (1, 3):
            raise TypeError(f"model: expected an FFDNet of 1 or 3 channels, got {type(model).__name__}")
        self.network = self.model if network is None else network
        self.least_sigma = check_number("least_sigma", least_sigma)
        self.radius = self.model.receptive_radius

    def to(self, device: torch.device) -> "FFDNetDenoiser":
        """Move the network, unless it was given as ``network``."""
        if self.network is self.model:
            self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, sigma: Tensor) -> Tensor:
        step = max(1, PIXELS_AT_ONCE // max(1, images.shape[-2] * images.shape[-1]))
        groups = zip(images.split(step), sigma.split(step), strict=True)
        return torch.cat([self._denoise(x, level) for x, level in groups]) if len(images) else images.clone()

    def _denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        x, level = images.to(dtype), sigma.clamp(min=self.least_sigma).to(dtype)
        result = self.network(x, level) if self.model.channels == 1 else gray_through_colour(self.network, x, level)
        return images + (result.to(images.dtype) - images) * (sigma / self.least_sigma).clamp(max=1)


class WaveletDenoiser:
    """Translation-invariant wavelet thresholding: needs no weights, and is a few tenths to one dB behind a network.

    Every coefficient below ``threshold`` times sigma becomes zero, in the transforms of ``spins`` shifted copies, whose
    results are averaged. Source: Coifman and Donoho, "Translation-Invariant De-Noising", 1995.

    Args:
        wavelet: vanishing moments of the Daubechies wavelet.
        levels: how often the approximation is split; fewer on images that are too small.
        spins: shifts, at most 4^levels.
        threshold: in standard deviations of the noise.
    """

    def __init__(self, wavelet: int = 2, levels: int = 4, spins: int = 8, threshold: float = 3.0):
        daubechies(wavelet)
        self.wavelet, self.levels = wavelet, check_integer("levels", levels, 1, 8)
        self.spins = check_integer("spins", spins, 1, 4**levels)
        self.threshold = check_number("threshold", threshold)
        self.align = 2**levels
        self.radius = -(-reach(wavelet, levels) // self.align) * self.align

    def __call__(self, images: Tensor, sigma: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        smallest = min(height, width) + 2 * self.radius
        levels = fitting_levels(smallest, self.wavelet, self.levels)
        grid, limit = 2**levels, self.threshold * sigma
        total = torch.zeros_like(images)
        for row, column in self._shifts(grid):
            before = self.radius + row, self.radius + column
            after = tuple(
                self.radius + -(size + first) % grid for size, first in zip((height, width), before, strict=True)
            )
            approximation, details = decompose(extend(images, before, after), self.wavelet, levels)
            details = [torch.where(part.abs() > limit, part, 0.0) for part in details]
            result = compose(approximation, details, self.wavelet)
            total += result[..., before[0] : before[0] + height, before[1] : before[1] + width]
        return total / self.spins

    def _shifts(self, grid: int) -> list[tuple[int, int]]:
        """``spins`` points of a lattice, evenly over a period of the transform."""
        return [
            (index * grid // self.spins, (5 * index * grid // self.spins + index) % grid) for index in range(self.spins)
        ]


NAMED: dict[str, Callable[[], Denoiser]] = {"ffdnet": FFDNetDenoiser, "wavelet": WaveletDenoiser}


def find_denoiser(denoiser: str | Denoiser, device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser called "ffdnet" or "wavelet", on ``device``; a callable is taken as it is."""
    if isinstance(denoiser, str):
        if denoiser not in NAMED:
            raise ValueError(f"denoiser: no denoiser named {denoiser!r}; known: {', '.join(NAMED)}, or any callable")
        made = NAMED[denoiser]()
        return made.to(device) if isinstance(made, FFDNetDenoiser) else made
    if not callable(denoiser):
        raise TypeError(f"denoiser: expected a name or a callable(images, sigma), got {type(denoiser).__name__}")
    return denoiser


def denoise_images(denoiser: Denoiser, images: Tensor, sigma: Tensor) -> Tensor:
    """Call ``denoiser`` on [K, 1, H, W], and refuse a result that does not fit."""
    result = denoiser(images, sigma)
    if not isinstance(result, Tensor) or result.shape != images.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"denoiser: expected a result of shape {list(images.shape)}, got {got}")
    return result.to(images)
