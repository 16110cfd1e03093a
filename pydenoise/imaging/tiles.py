"""Large pictures in overlapping tiles: only one tile is ever in floating point.

A tile's result is used without its margins. With a margin of at least the network's receptive radius, and tile starts
aligned to the network's phases, that is the untiled result exactly (up to the order of a kernel's additions): nothing
needs blending.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Span(NamedTuple):
    """Along one axis: the network reads [start, stop) and its result is used in [low, high)."""

    start: int
    stop: int
    low: int
    high: int


def axis_spans(size: int, tile: int, overlap: int, align: int = 2) -> list[Span]:
    """Cut ``size`` pixels into spans of at most ``tile``, starting at multiples of ``align``.

    The used parts partition the axis, and end ``overlap`` pixels inside the read parts except at the picture's border.
    All spans but the last have the length ``tile``; the last falls short of it by less than ``align``.
    """
    if size <= tile:
        return [Span(0, size, 0, size)]
    step = tile - 2 * overlap
    spans: list[Span] = []
    start = low = 0
    while start + tile < size:
        high = start + tile - overlap
        spans.append(Span(start, start + tile, low, high))
        low = high
        start = min(start + step, size - tile + (tile - size) % align)
    return [*spans, Span(start, size, low, size)]


def tile_windows(height: int, width: int, tile: int, overlap: int, align: int = 2) -> list[tuple[Span, Span]]:
    """(rows, columns) of every tile of a picture, row by row. ``tile`` 0 is the whole picture.

    Args:
        tile: side of the square that the network reads, margins included; a multiple of ``align``.
        overlap: margin on each side that is read and not used; a multiple of ``align``, less than half of ``tile``.
        align: tiles start at multiples of it: the network's phase grid.
    """
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value < 0 or value % align:
            raise ValueError(f"{name}: expected a multiple of {align}, zero or more, got {value}")
    if tile == 0:
        tile = max(height, width)
    elif tile - 2 * overlap < align:
        raise ValueError(
            f"tile: {tile} leaves nothing between two margins of overlap {overlap}; expected more than {2 * overlap}"
        )
    columns = axis_spans(width, tile, overlap, align)
    return [(row, column) for row in axis_spans(height, tile, overlap, align) for column in columns]


def map_tiles(
    pixels: np.ndarray,
    run: Callable[[Tensor], Tensor],
    *,
    tile: int = 512,
    overlap: int = 24,
    align: int = 2,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    on_tile: Callable[[], object] | None = None,
) -> np.ndarray:
    """Run ``run`` over the tiles of ``pixels``; returns a new array of its shape and dtype.

    Args:
        pixels: [H, W, C], uint8 or uint16.
        run: takes [1, C, h, w] in channels_last memory, values in [0, 1], and returns that shape; the result is clipped
            to [0, 1] and rounded to the samples of ``pixels``' dtype.
        on_tile: called after every tile.

    Raises ``ValueError`` for a tile or overlap that :func:`tile_windows` refuses, and for a result of another shape.
    """
    height, width, _ = pixels.shape
    windows = tile_windows(height, width, tile, overlap, align)
    out = np.empty(pixels.shape, pixels.dtype)
    top = float(np.iinfo(pixels.dtype).max)
    for rows, columns in windows:
        window = np.ascontiguousarray(pixels[rows.start : rows.stop, columns.start : columns.stop], np.float32)
        x = torch.from_numpy(window).to(device).div_(top).to(dtype).permute(2, 0, 1).unsqueeze(0)
        y = run(x)
        if y.shape != x.shape:
            raise ValueError(f"run: expected a result of shape {list(x.shape)}, got {list(y.shape)}")
        inner = y[
            0,
            :,
            rows.low - rows.start : rows.high - rows.start,
            columns.low - columns.start : columns.high - columns.start,
        ]
        samples = inner.permute(1, 2, 0).float().clamp(0, 1).mul(top).round().cpu().numpy()
        out[rows.low : rows.high, columns.low : columns.high] = samples
        if on_tile is not None:
            on_tile()
    return out
