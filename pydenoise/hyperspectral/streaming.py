"""Cubes that do not fit into memory: arrays [H, W, bands], memory-mapped or not, read window by window."""

import math
from collections.abc import Callable

import numpy as np
import torch

from pydenoise.hyperspectral.anscombe import anscombe
from pydenoise.hyperspectral.denoisers import Denoiser
from pydenoise.hyperspectral.fasthyde import FastHyDe
from pydenoise.hyperspectral.moments import BandMoments
from pydenoise.imaging import map_tiles, tile_windows
from pydenoise.imaging.mapped import release

WINDOW_VALUES = 1 << 22


def moments_of(
    pixels: np.ndarray,
    *,
    noise: str = "non-iid",
    scale: float = 1.0,
    device: str | torch.device = "cpu",
    on_window: Callable[[int], object] | None = None,
) -> BandMoments:
    """Moments of a cube, for ``FastHyDe.fit``: one pass over ``pixels`` [H, W, L].

    Args:
        pixels: of any dtype that :func:`pydenoise.imaging.map_tiles` takes.
        noise: "poisson" takes those of the Anscombe transform.
        scale: samples over ``scale`` are the values.
        on_window: called with the number of pixels of each window that is done.
    """
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected [H, W, bands] with at least one sample, got {list(pixels.shape)}")
    if pixels.shape[2] < 2:
        raise ValueError("pixels: a cube has at least 2 bands, this has 1")
    side = max(16, math.isqrt(WINDOW_VALUES // pixels.shape[2]))
    number = np.float64 if pixels.dtype.itemsize > 4 else np.float32
    bands = pixels.shape[2]
    # One buffer for all: memory for windows of many sizes, taken and given back, would fall into pieces and grow.
    buffer = np.empty(min(side, pixels.shape[0]) * min(side, pixels.shape[1]) * bands, number)
    total = None
    for rows, columns in tile_windows(*pixels.shape[:2], side, 0, 1):
        part = pixels[rows.used, columns.used]
        window = buffer[: part.size].reshape(-1, bands)
        np.divide(part, scale, out=window.reshape(part.shape), dtype=number, casting="unsafe")
        values = torch.from_numpy(window).to(device).T
        part = BandMoments.of(anscombe(values) if noise == "poisson" else values)
        total = part if total is None else total + part
        release(pixels)
        if on_window is not None:
            on_window(part.count)
    return total


def denoise_tiles(
    pixels: np.ndarray,
    *,
    noise: str = "non-iid",
    rank: int | None = None,
    denoiser: str | Denoiser = "ffdnet",
    sigma: float | torch.Tensor | None = None,
    tile: int = 512,
    overlap: int | None = None,
    batch: int = 1,
    blend: bool = False,
    scale: float = 1.0,
    out: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """FastHyDe on a cube of any size, with memory that depends on the tile and the number of bands alone.

    The cube is read twice: once for the moments of its bands, once for the tiles. The result is that of ``fasthyde`` on
    the whole cube, if the margins are as wide as the denoiser looks.

    Args:
        pixels: [H, W, L]; uint8, uint16, int16, float32 or float64. Pass a ``numpy.memmap`` for a cube on disk.
        noise, rank, denoiser, sigma: as for :func:`~pydenoise.hyperspectral.fasthyde`, in units of ``pixels`` /
            ``scale``.
        tile, batch, blend, out, scale: as for :func:`pydenoise.imaging.map_tiles`.
        overlap: margin of a tile; by default the denoiser's ``radius`` (0 for a callable that has none).

    Returns:
        ``out``, or a new array of the shape and dtype of ``pixels``.
    """
    moments = moments_of(pixels, noise=noise, scale=scale, device=device)
    model = FastHyDe.fit(moments, noise, rank, denoiser, sigma)
    margin = getattr(model.denoiser, "radius", 0) if overlap is None else overlap
    align = getattr(model.denoiser, "align", 1)
    options = {"tile": tile, "overlap": margin, "align": align, "batch": batch, "blend": blend}
    number = torch.float64 if pixels.dtype.itemsize > 4 else torch.float32
    with torch.inference_mode():
        return map_tiles(pixels, model, **options, scale=scale, out=out, device=device, dtype=number)
