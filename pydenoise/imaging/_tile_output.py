"""Where the results of windows go: cropped to their own part, or blended over the overlap with their neighbours."""

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

    @property
    def read(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def used(self) -> slice:
        return slice(self.low, self.high)

    @property
    def within(self) -> slice:
        """The used part, counted from the start of the read part."""
        return slice(self.low - self.start, self.high - self.start)


class Window(NamedTuple):
    """A box of a cube [H, W, B]."""

    rows: Span
    columns: Span
    bands: Span

    @property
    def read(self) -> tuple[slice, ...]:
        return tuple(span.read for span in self)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(span.stop - span.start for span in self)


def to_samples(values: Tensor, dtype: np.dtype, scale: float) -> np.ndarray:
    """``values`` times ``scale`` as samples of ``dtype``: integers are rounded and clipped to their range."""
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    values = values * scale if scale != 1 else values
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        values = values.round().clamp(limits.min, limits.max)
    return values.cpu().numpy()


class Cropped:
    """Every sample is taken from one window, in which it lies at least the margin away from the border."""

    def __init__(self, out: np.ndarray, scale: float):
        self.out, self.scale = out, scale

    def put(self, window: Window, result: Tensor) -> None:
        """``result`` [B, h, w]: what the network made of ``window``."""
        rows, columns, bands = window
        inner = result[bands.within, rows.within, columns.within].permute(1, 2, 0)
        self.out[rows.used, columns.used, bands.used] = to_samples(inner, self.out.dtype, self.scale)

    def finish(self) -> None:
        """Nothing is held back."""


class Blended:
    """Neighbours are added with weights that change linearly over the overlap and sum to one.

    Sums are kept for one row of tiles: [rows of a tile, W, B] in float32, or float64 for results of that dtype.
    ``ramps``: half the width of the change along rows, columns and bands. Windows must come row by row.
    """

    def __init__(self, out: np.ndarray, scale: float, windows: list[Window], ramps: tuple[int, int, int]):
        self.out, self.scale, self.ramps = out, scale, ramps
        height = max(window.shape[0] for window in windows)
        dtype = torch.float64 if out.dtype == np.float64 else torch.float32
        self.sums = torch.zeros(height, *out.shape[1:], dtype=dtype)
        self.first = 0  # the row of the picture where the sums begin

    def put(self, window: Window, result: Tensor) -> None:
        """``result`` [B, h, w]: what the network made of ``window``."""
        begin = window.rows.low - self.ramps[0] if window.rows.low else 0
        if begin > self.first:
            self._advance(begin)
        weights = [
            ramp_weights(span, size, ramp) for span, size, ramp in zip(window, self.out.shape, self.ramps, strict=True)
        ]
        inside = [slice(int(w.nonzero()[0]), int(w.nonzero()[-1]) + 1) for w in weights]
        rows, columns, bands = (
            slice(span.start + part.start - shift, span.start + part.stop - shift)
            for span, part, shift in zip(window, inside, (self.first, 0, 0), strict=True)
        )
        values = result[inside[2], inside[0], inside[1]].permute(1, 2, 0).to("cpu", self.sums.dtype)
        for axis, (weight, part) in enumerate(zip(weights, inside, strict=True)):
            values = values * weight[part].view([-1 if axis == other else 1 for other in range(3)])
        self.sums[rows, columns, bands] += values

    def finish(self) -> None:
        """Write the rows that are still held."""
        self._advance(self.out.shape[0])

    def _advance(self, first: int) -> None:
        done = first - self.first
        self.out[self.first : first] = to_samples(self.sums[:done], self.out.dtype, self.scale)
        self.sums = torch.cat((self.sums[done:], torch.zeros_like(self.sums[:done])))
        self.first = first


def ramp_weights(span: Span, size: int, ramp: int) -> Tensor:
    """Weights of the read part of ``span`` on an axis of ``size``: 1 inside, linear within ``ramp`` of its two cuts."""
    centre = torch.arange(span.start, span.stop, dtype=torch.float32) + 0.5
    weight = torch.ones(span.stop - span.start)
    for cut, sign in ((span.low, 1.0), (span.high, -1.0)):
        if 0 < cut < size:
            distance = sign * (centre - cut)
            weight *= (distance > 0).float() if ramp == 0 else (0.5 + distance / (2 * ramp)).clamp(0, 1)
    return weight
