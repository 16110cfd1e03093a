"""Where the windows of a large sample lie along its axes, and how they are copied out of it and back.

Windows of an axis that wraps may begin near its end and go on at its beginning. They are copied in up to two pieces an
axis, so that nothing is rolled and no index lies in memory.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHTS = ("uniform", "linear", "cosine")


class Span(NamedTuple):
    """A window along one axis: it begins at ``start``; [low, high) of it is what windows of earlier stages lack."""

    start: int
    low: int
    high: int
    stage: int = 0


class Window(NamedTuple):
    """A window of all axes: one span an axis."""

    spans: tuple[Span, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Where it begins."""
        return tuple(span.start for span in self.spans)

    @property
    def stage(self) -> tuple[int, ...]:
        """Windows of one stage do not overlap; a later one is docked beside them along more axes."""
        return tuple(span.stage for span in self.spans)


def shifted_spans(size: int, window: int, offset: int, wraps: bool) -> list[Span]:
    """Windows side by side from ``offset`` on, and docked ones (of later stages) where that leaves something over."""
    if size == window:
        return [Span(0, 0, window)]
    if wraps:
        count, rest = divmod(size, window)
        spans = [Span((offset + number * window) % size, 0, window) for number in range(count)]
        if rest:
            spans.append(Span((offset + size - window) % size, window - rest, window, 1))
        return spans
    if offset + window > size:  # none would fit between the docks: the first dock is the window they begin with
        offset = 0
    spans = [Span(start, 0, window) for start in range(offset, size - window + 1, window)]
    rest = size - spans[-1].start - window
    if offset:
        spans.append(Span(0, 0, offset, 1))
    if rest:
        overlapping = offset and size < 2 * window
        spans.append(Span(size - window, window - rest, window, 2 if overlapping else 1))
    return spans


def overlapped_starts(size: int, window: int, overlap: int, wraps: bool) -> list[int]:
    """Where windows begin that share at least ``overlap`` with the next one; evenly round an axis that wraps."""
    stride = window - overlap
    if wraps:
        count = -(-size // stride)
        return [number * size // count for number in range(count)]
    return [*range(0, size - window, stride), size - window]


def profiles(
    size: int, window: int, starts: Sequence[int], overlap: int, margin: int, kind: str, wraps: bool
) -> Tensor:
    """Weights [windows, window] in float64 that add up to 1 at every place of the axis.

    Those of a box are products over its axes, and the sum over all boxes is the product of the sums: no sum of weights
    of the sample's size is needed.
    """
    places = torch.arange(window, dtype=torch.float64)
    weights = torch.ones(len(starts), window, dtype=torch.float64)
    for number, start in enumerate(starts):
        if wraps or start > 0:
            weights[number] *= _ramp(places - margin, overlap - 2 * margin, kind)
        if wraps or start + window < size:
            weights[number] *= _ramp(window - 1 - margin - places, overlap - 2 * margin, kind)
    total = torch.zeros(size, dtype=torch.float64)
    where = (torch.tensor(list(starts))[:, None] + torch.arange(window)) % size
    total.index_put_((where,), weights, accumulate=True)
    return weights / total[where]


def _ramp(inside: Tensor, width: int, kind: str) -> Tensor:
    """0 where ``inside`` is negative, then rising over ``width`` places to 1."""
    if kind == "uniform" or width < 1:
        return (inside >= 0).double()
    share = ((inside + 0.5) / width).clamp(0, 1)
    return share if kind == "linear" else (share * (torch.pi / 2)).sin() ** 2


def windows_of(spans: Iterable[Sequence[Span]]) -> list[Window]:
    """All windows, by stage."""
    found = [Window(tuple(each)) for each in itertools.product(*spans)]
    return sorted(found, key=lambda window: (sum(window.stage), window.stage))


def _pieces(start: int, length: int, size: int) -> list[tuple[slice, slice]]:
    """(places of the axis, places of the window): one piece, or two round the end."""
    first = min(length, size - start)
    pieces = [(slice(start, start + first), slice(0, first))]
    return pieces if first == length else [*pieces, (slice(0, length - first), slice(first, length))]


def boxes(
    starts: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """(slices of the last axes of the whole, slices of the window), pieces of a window that together are all of it."""
    each = [_pieces(*along) for along in zip(starts, lengths, sizes, strict=True)]
    for pieces in itertools.product(*each):
        whole, part = zip(*pieces, strict=True)
        yield (..., *whole), (..., *part)


def gather(whole: Tensor, starts: Sequence[int], out: Tensor) -> Tensor:
    """Copy the window that begins at ``starts`` along the last axes into ``out``."""
    axes = len(starts)
    for here, there in boxes(starts, out.shape[-axes:], whole.shape[-axes:]):
        out[there].copy_(whole[here])
    return out


def scatter(whole: Tensor, starts: Sequence[int], window: Tensor, *, add: bool = False) -> None:
    """Copy, or add, a window to its place."""
    axes = len(starts)
    for here, there in boxes(starts, window.shape[-axes:], whole.shape[-axes:]):
        if add:
            whole[here].add_(window[there])
        else:
            whole[here].copy_(window[there])
