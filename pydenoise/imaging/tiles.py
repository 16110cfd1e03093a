"""Large pictures and cubes of many bands in overlapping tiles: only one batch of tiles is ever in floating point.

A tile's result is used without its margins. With a margin of at least the network's receptive radius, and tile starts
aligned to the network's phases, that is the untiled result exactly (up to the order of a kernel's additions): nothing
needs blending. Where a margin of that size costs too much, blending hides the seams.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pydenoise.imaging._tile_output import Blended, Cropped, Span, Window
from pydenoise.imaging.mapped import release

SAMPLES = ("uint8", "uint16", "int16", "float32", "float64")


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
    _check_window("tile", tile, "overlap", overlap, align)
    side = tile or max(height, width)
    columns = axis_spans(width, side, overlap, align)
    return [(row, column) for row in axis_spans(height, side, overlap, align) for column in columns]


def band_spans(depth: int, bands: int, overlap: int) -> list[Span]:
    """Windows of ``bands`` neighbouring bands out of ``depth``, all of that length; 0 is all of them at once."""
    _check_window("bands", bands, "band_overlap", overlap, 1)
    return axis_spans(depth, bands or depth, overlap, 1)


def map_tiles(
    pixels: np.ndarray,
    run: Callable[[Tensor], Tensor],
    *,
    tile: int = 512,
    overlap: int = 24,
    align: int = 2,
    bands: int = 0,
    band_overlap: int = 0,
    batch: int = 1,
    blend: bool = False,
    scale: float | None = None,
    out: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    on_tile: Callable[[], object] | None = None,
) -> np.ndarray:
    """Run ``run`` over the tiles of ``pixels``; returns ``out``, or a new array of the same shape and dtype.

    With memory-mapped ``pixels`` and ``out``, memory does not depend on their size: pages are let go of after every
    batch (with ``blend``, one row of tiles is held beside that).

    Args:
        pixels: [H, W, C]; uint8, uint16, int16, float32 or float64.
        run: takes [N, C, h, w], where N is at most ``batch``, and returns that shape. One tile lies in channels_last
            memory.
        tile, overlap, align: see :func:`tile_windows`.
        bands, band_overlap: with ``bands`` above 0, a tile has that many neighbouring bands (C, if there are fewer), of
            which ``band_overlap`` on each side are read and not used.
        batch: so many tiles of the same shape go through ``run`` at once.
        blend: neighbouring tiles change over linearly within the margins, in place of the margins being discarded.
        scale: samples over ``scale`` are the values that ``run`` gets. By default the largest sample of an integer
            dtype, so that pictures have values in [0, 1], and 1 for floating point. Results are multiplied by it; for
            integers they are rounded and clipped to the dtype's range.
        out: where results go: an array of the shape of ``pixels``, which may not be ``pixels`` itself.
        on_tile: called after every tile.

    Raises ``ValueError`` for a tile or overlap that :func:`tile_windows` refuses, for samples of another dtype, for an
    ``out`` that does not fit, and for a result of another shape.
    """
    scale = _check_samples(pixels, out, scale, batch)
    height, width, depth = pixels.shape
    spans = band_spans(depth, bands, band_overlap)
    windows = [Window(*place, span) for place in tile_windows(height, width, tile, overlap, align) for span in spans]
    out = np.empty(pixels.shape, pixels.dtype.newbyteorder("=")) if out is None else out
    ramps = _ramp(tile, overlap), _ramp(tile, overlap), _ramp(bands, band_overlap)
    sink = Blended(out, scale, windows, ramps) if blend else Cropped(out, scale)
    number = np.float64 if dtype == torch.float64 else np.float32
    for group in _batches(windows, batch, by_row=blend):
        x = np.stack([pixels[window.read] for window in group]).astype(number, copy=False)
        x = torch.from_numpy(x).to(device)
        x = (x.div_(scale) if scale != 1 else x).to(dtype).permute(0, 3, 1, 2)
        y = run(x)
        if y.shape != x.shape:
            raise ValueError(f"run: expected a result of shape {list(x.shape)}, got {list(y.shape)}")
        for window, result in zip(group, y, strict=True):
            sink.put(window, result)
            if on_tile is not None:
                on_tile()
        release(pixels)
        release(out)
    sink.finish()
    return out


def _batches(windows: Sequence[Window], batch: int, by_row: bool) -> Iterator[list[Window]]:
    """At most ``batch`` windows of one shape at a time; with ``by_row``, a row of tiles ends before the next begins."""
    pending: dict[tuple[int, ...], list[Window]] = {}
    rows = None
    for window in windows:
        if by_row and rows not in (None, window.rows):
            yield from pending.values()
            pending = {}
        rows = window.rows
        group = pending.setdefault(window.shape, [])
        group.append(window)
        if len(group) == batch:
            yield pending.pop(window.shape)
    yield from pending.values()


def _ramp(tile: int, overlap: int) -> int:
    """Half the width over which neighbours are blended: no further than halfway to the next cut."""
    return min(overlap, (tile - 2 * overlap) // 2) if tile else 0


def _check_window(name: str, tile: int, margin_name: str, margin: int, align: int) -> None:
    for argument, value in ((name, tile), (margin_name, margin)):
        if value < 0 or value % align:
            raise ValueError(f"{argument}: expected a multiple of {align}, zero or more, got {value}")
    if tile and tile - 2 * margin < align:
        raise ValueError(
            f"{name}: {tile} leaves nothing between two margins of {margin_name} {margin}; "
            f"expected more than {2 * margin}"
        )


def _check_samples(pixels: np.ndarray, out: np.ndarray | None, scale: float | None, batch: int) -> float:
    """Refuse what :func:`map_tiles` cannot take; returns the scale."""
    dtype = pixels.dtype.newbyteorder("=")
    if dtype.name not in SAMPLES:
        raise ValueError(f"pixels: expected samples of {', '.join(SAMPLES)}, got {pixels.dtype}")
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected [H, W, C] with at least one sample, got {list(pixels.shape)}")
    if out is not None and (out.shape != pixels.shape or out.dtype.newbyteorder("=") != dtype):
        raise ValueError(
            f"out: expected {list(pixels.shape)} {pixels.dtype}, got {list(out.shape)} {out.dtype}: as pixels"
        )
    if out is not None and np.may_share_memory(out, pixels):
        raise ValueError("out: may not be pixels itself: the margins of later tiles would be results")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if scale is None:
        return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive number, got {scale}")
    return float(scale)
