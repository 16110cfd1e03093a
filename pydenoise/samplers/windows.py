"""Samples of any size from a denoiser of a fixed one: it sees windows of them, a few at a time.

Sources: Bar-Tal et al., "MultiDiffusion", ICML 2023 (windows that overlap, their predictions averaged); Liu et al.,
"DynamicScaler", CVPR 2025 (windows side by side whose offset moves from step to step, on axes that wrap or with docked
windows at the ends; samples of any width, height and length).

What is put together is the denoiser's output, and the solver's step runs once on the whole sample. So every solver,
guidance and control works as it does on a small sample, noise does not depend on the windows, and a step needs one
tensor of the sample's size (the output) whatever the solver keeps; a step for each window would have to cut every slot
of the history out and write it back. All else that the windows need has the size of ``max_batch`` windows.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers import _window_grid as grid
from pydenoise.samplers._loop import State
from pydenoise.samplers.ddim import ddim_row, step_variance
from pydenoise.samplers.levels import Level, check_count

Size = int | Sequence[int | None]
_RENOISING = 2**31  # numbers of re-noising's noise: no call of a sampler has them


class _Windowed:
    """What both kinds of windows share: the denoiser is called with batches of windows and their conditions."""

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        window: Size,
        wrap: Sequence[int],
        max_batch: int,
        crop: Sequence[str],
        coordinates: str | None,
    ):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
        if isinstance(crop, str) or not all(isinstance(name, str) for name in crop):
            raise TypeError("crop: expected a list of names of keyword arguments")
        if coordinates is not None and not isinstance(coordinates, str):
            raise TypeError(f"coordinates: expected a keyword's name, got {type(coordinates).__name__}")
        self.denoiser, self.window = denoiser, _window_of(window)
        self.wrap = _wrap_of(wrap, self.window)
        self.max_batch = check_count("max_batch", max_batch)
        self.crop, self.coordinates = frozenset(crop), coordinates

    def _sizes(self, x: object) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        """(size of x, size of a window, does it wrap) of every windowed axis, the last ones of x."""
        if not isinstance(x, Tensor) or x.dim() < 3:
            raise ValueError(f"x: expected a tensor [B, C, ...], got {getattr(x, 'shape', type(x).__name__)}")
        axes = x.dim() - 2
        window = (self.window,) * axes if isinstance(self.window, int) else self.window
        if len(window) > axes:
            raise ValueError(f"x: expected {len(window)} axes after [B, C] for window {window}, got {tuple(x.shape)}")
        sizes = tuple(x.shape[-len(window) :])
        for size, part in zip(sizes, window, strict=True):
            if part is not None and part > size:
                raise ValueError(f"window: {window} is larger than the sample's {sizes}")
        wraps = tuple(axis - len(window) in self.wrap for axis in range(len(window)))
        if any(axis < -axes for axis in self.wrap):
            raise ValueError(f"wrap: no axis {min(self.wrap)} in samples of shape {tuple(x.shape)}")
        return sizes, tuple(part or size for size, part in zip(sizes, window, strict=True)), wraps

    def _outputs(
        self, x: Tensor, t: Tensor, conditioning: Mapping[str, object], starts: Sequence[tuple[int, ...]], parts
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """(number of a window, rows of x, the denoiser's output for them), in batches of at most ``max_batch``."""
        rows, axes = x.shape[0], len(parts)
        self._check_conditions(x, conditioning, axes)
        places = list(itertools.product(range(len(starts)), range(rows)))
        for begin in range(0, len(places), self.max_batch):
            batch = places[begin : begin + self.max_batch]
            runs = _runs(batch)
            inputs = x.new_empty((len(batch), *x.shape[1 : x.dim() - axes], *parts))
            for number, own, at in runs:
                grid.gather(x[own], starts[number], inputs[at])
            told = self._conditions(x, conditioning, [starts[n] for n, _ in batch], [row for _, row in batch], parts)
            times = _times(t, x, [starts[n] for n, _ in batch], [row for _, row in batch], parts)
            output = self.denoiser(inputs, times, **told)
            _check_output(output, inputs)
            for number, own, at in runs:
                yield number, own, output[at]

    def _conditions(self, x, conditioning, starts, rows, parts) -> dict[str, object]:
        """Keyword arguments for a batch: the rows of its samples, spatial ones cut like x, and coordinates."""
        told = {}
        for name, value in conditioning.items():
            cut = (lambda tensor: _cropped(tensor, x, starts, rows, parts)) if name in self.crop else None
            told[name] = _map(value, cut or (lambda tensor: _rows(tensor, rows, x.shape[0])))
        if self.coordinates is not None:
            told[self.coordinates] = _coordinates(x, starts, parts)
        return told

    def _check_conditions(self, x: Tensor, conditioning: Mapping[str, object], axes: int) -> None:
        missing = sorted(self.crop - set(conditioning))
        if missing:
            raise ValueError(f"crop: the denoiser was given no {missing[0]!r}")
        if self.coordinates in conditioning:
            raise ValueError(f"coordinates: {self.coordinates!r} is also a given keyword argument")
        for name in self.crop:
            _map(conditioning[name], lambda tensor, name=name: _check_crop(name, tensor, x, axes))


class OverlappedWindows(_Windowed):
    """A denoiser of large samples: windows that overlap, and weighted means of the outputs where they do.

    Give it to a ``Sampler`` in place of ``denoiser``. Samples are [B, C, ...]: images [B, C, H, W], videos
    [B, C, F, H, W], sequences [B, C, L].

    Args:
        denoiser: ``denoiser(x, t, **conditioning) -> output``, of at most ``max_batch`` windows of the window's size.
        window: the window's size along the last axes, ``None`` for all of an axis: (64, 64) of images, (16, None, None)
            along the frames of videos. An int: of every axis after the channels.
        overlap: how much of a window at least lies in the next one, one number for all windowed axes or one for each.
        margin: places at a window's sides, except at the sample's own borders, that are evaluated and not used; at most
            half of ``overlap``. With the radius of what a convolutional denoiser sees, the result is that of the whole.
        weights: how two windows are mixed where they overlap: "linear" or "cosine" ramps, or "uniform".
        wrap: axes that go round, as negative numbers: (-1,) for a panorama.
        max_batch: windows in one call of the denoiser; bounds the memory.
        crop: names of keyword arguments with an image of the sample's size, [B, ..., H, W]: a window gets its part.
        coordinates: name of a keyword argument that tells the denoiser where it is: [N, axes, ...] of the window's
            size, from -1 to 1 along the windowed axes of the whole.

    Other tensors of B rows are repeated for the windows of their samples; the rest is passed on.

    Raises:
        TypeError, ValueError: a bad argument; with a call: a window that is larger than the sample, or a bad output.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        window: Size,
        *,
        overlap: int | Sequence[int],
        margin: int = 0,
        weights: str = "linear",
        wrap: Sequence[int] = (),
        max_batch: int = 8,
        crop: Sequence[str] = (),
        coordinates: str | None = None,
    ):
        super().__init__(denoiser, window, wrap, max_batch, crop, coordinates)
        self.margin = check_count("margin", margin, 0)
        self.overlap = _overlap_of(overlap, self.window, self.margin)
        if weights not in grid.WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(map(repr, grid.WEIGHTS))}, got {weights!r}")
        self.weights = weights
        self._grids: dict[tuple, tuple[list, list]] = {}

    def __call__(self, x: Tensor, t: Tensor, **conditioning: object) -> Tensor:
        """The output for all of x [B, C, ...]; t: [B], or one for all."""
        sizes, parts, wraps = self._sizes(x)
        places, weights = self._grid(sizes, parts, wraps, x)
        starts = [tuple(along[i] for along, i in zip(places, at, strict=True)) for at in _counts(places)]
        numbers = list(_counts(places))
        result = None
        for number, rows, output in self._outputs(x, t, conditioning, starts, parts):
            if result is None:
                # sums of half precision are kept in float32
                exact = output.dtype if output.dtype == torch.float64 else torch.float32
                result = torch.zeros((x.shape[0], output.shape[1], *x.shape[2:]), dtype=exact, device=x.device)
            share = output.to(result.dtype)
            for axis, along in enumerate(numbers[number]):
                factor = weights[axis][along]
                share = share * factor.to(share.dtype).view(-1, *(1,) * (len(parts) - 1 - axis))
            grid.scatter(result[rows], starts[number], share, add=True)
        return torch.zeros_like(x) if result is None else result

    def _grid(self, sizes, parts, wraps, x: Tensor) -> tuple[list, list]:
        """(starts, weights) of every axis; kept, because a captured graph reads the weights."""
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (sizes, x.device, exact)
        if key not in self._grids:
            while len(self._grids) >= 8:
                self._grids.pop(next(iter(self._grids)))
            overlaps = self.overlap if isinstance(self.overlap, tuple) else (self.overlap,) * len(sizes)
            given = (None,) * len(sizes) if isinstance(self.window, int) else self.window
            places, weights = [], []
            whole = [part is None and not isinstance(self.window, int) for part in given]
            for size, part, overlap, wrapped, all_of_it in zip(sizes, parts, overlaps, wraps, whole, strict=True):
                starts = [0] if all_of_it else grid.overlapped_starts(size, part, overlap, wrapped)
                places.append(starts)
                own = grid.profiles(size, part, starts, overlap, self.margin, self.weights, wrapped)
                weights.append(own.to(exact).to(x.device))
            self._grids[key] = (places, weights)
        return self._grids[key]


class ShiftedWindows(_Windowed):
    """A denoiser of large samples: windows side by side, at another offset in every call. No place is evaluated twice.

    Seams move from call to call and heal in the next one. Give it to a ``Sampler`` in place of ``denoiser`` and among
    its ``observers``, by which it hears of every call. Along axes that wrap, windows begin anywhere; along others, and
    where the size is no multiple of the window's, docked windows lie at the end and overlap their neighbours.

    Args:
        denoiser, window, wrap, max_batch, crop, coordinates: as of ``OverlappedWindows``.
        shifts: offsets of a cycle: call i begins its windows at (i mod shifts) * (window // shifts), along axes with
            more than one window. At most the window's size along those.
        mix: where a docked window overlaps what this step has denoised already, the solver's state becomes ``mix``
            times that, noised again to the level of the step, plus 1 - mix times what it was, before the docked window
            is evaluated and denoises it once more (the published system's 1.0). 0: the state stays as it is, the docked
            window's output counts, and all windows share batches. In between the variance at docks is lowered, as a
            mean of two states has less of it. With ``mix``, noise comes from the sampler's seed,
            the denoised state is that of a DDIM step whatever the solver, and solvers that begin several calls from a
            saved sample, dynamic thresholding and CUDA graphs are refused.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        window: Size,
        *,
        shifts: int = 8,
        mix: float = 1.0,
        wrap: Sequence[int] = (),
        max_batch: int = 8,
        crop: Sequence[str] = (),
        coordinates: str | None = None,
    ):
        super().__init__(denoiser, window, wrap, max_batch, crop, coordinates)
        self.shifts = check_count("shifts", shifts)
        largest = self.window if isinstance(self.window, int) else max(part or 1 for part in self.window)
        if self.shifts > largest:
            raise ValueError(f"shifts: expected at most the window's {largest}, got {shifts}")
        if isinstance(mix, bool) or not isinstance(mix, (int, float)):
            raise TypeError(f"mix: expected a number, got {type(mix).__name__}")
        if not 0 <= mix <= 1:
            raise ValueError(f"mix: expected a number from 0 to 1, got {mix}")
        self.mix = float(mix)
        self._call: int | None = None
        self._state: State | None = None

    @property
    def changes_sample(self) -> bool:
        """Whether ``begin_state`` is needed: the sampler then gives its state, and captures no graph."""
        return self.mix > 0

    def begin_state(self, state: State) -> None:
        """A run begins, with these buffers."""
        if state.run.conversion.dynamic:
            raise ValueError("mix: cannot be used with dynamic_threshold; 0 can")
        if state.run.plan.uses_base or not all(state.run.plan.ends):
            raise ValueError("mix: this solver begins several calls from a saved sample; use mix=0")
        if state.run.plan.start is not None or state.run.plan.predictions != 1:
            raise ValueError("mix: this solver's chain does not lead to noise; use mix=0")
        self._state = state

    def begin_step(self, step: int, num_steps: int) -> None:
        """Call ``step`` comes next."""
        self._call = step

    def graph_key(self, step: int) -> int:
        """Calls of one offset can share a CUDA graph."""
        return step % self.shifts

    def __call__(self, x: Tensor, t: Tensor, **conditioning: object) -> Tensor:
        """The output for all of x [B, C, ...] at the offset of the call; t: [B], or one for all."""
        if self._call is None:
            raise RuntimeError("ShiftedWindows: begin_step comes first; name it among the sampler's observers")
        sizes, parts, wraps = self._sizes(x)
        windows = self._windows(sizes, parts, wraps)
        stages = [[*group] for _, group in itertools.groupby(windows, lambda w: w.stage if self.mix else ())]
        if len(stages) > 1 and (self._state is None or x.data_ptr() != self._state.input.data_ptr()):
            raise RuntimeError(
                "ShiftedWindows: mix needs a Sampler whose denoiser it is, and with it among the observers; 0 does not"
            )
        result, done = None, 0
        for stage in stages:
            if result is not None and done:
                for number, window in enumerate(stage, done):
                    self._renoise(x, result, window, parts, number)
            done += len(stage)
            starts = [window.starts for window in stage]
            for number, rows, output in self._outputs(x, t, conditioning, starts, parts):
                if result is None:
                    shape = (x.shape[0], output.shape[1], *x.shape[2:])
                    result = torch.empty(shape, dtype=output.dtype, device=x.device)
                grid.scatter(result[rows], starts[number], output)
        return torch.zeros_like(x) if result is None else result

    def _windows(self, sizes, parts, wraps) -> list[grid.Window]:
        for size, part in zip(sizes, parts, strict=True):
            if part < min(size, self.shifts):
                raise ValueError(f"shifts: {self.shifts} offsets do not fit into a window of {part} (sample {size})")
        shift = self._call % self.shifts
        spans = [
            grid.shifted_spans(size, part, shift * (part // self.shifts), wrapped)
            for size, part, wrapped in zip(sizes, parts, wraps, strict=True)
        ]
        return grid.windows_of(spans)

    def _renoise(self, x: Tensor, result: Tensor, window: grid.Window, parts: tuple[int, ...], number: int) -> None:
        """What was denoised already of a docked window goes one step on and back by noise, in the state and in x."""
        state, call = self._state, self._call
        sample, table = state.sample, self._row(call).to(state.table)
        batch, copies = sample.shape[0], x.shape[0] // max(1, sample.shape[0])
        new: tuple[slice | EllipsisType, ...] = (..., *(slice(span.low, span.high) for span in window.spans))
        for begin in range(0, batch, self.max_batch):
            rows = slice(begin, min(begin + self.max_batch, batch))
            own = grid.gather(sample[rows], window.starts, _empty(sample, rows, parts))
            # halves of guidance: the unconditional one first
            halves = [result[copy * batch :][rows, : sample.shape[1]] for copy in range(copies)]
            outputs = [grid.gather(half, window.starts, _empty(half, rows, parts)) for half in halves]
            for output in outputs:
                output[new] = 0  # nothing was written there
            mixed = PF.sampler_step(
                own, outputs[-1], table, unconditional=outputs[0] if copies == 2 else None, seed=state.keys[rows],
                step=_RENOISING + call * 2**16 + number, backend=state.backend,
            )  # fmt: skip
            mixed[new] = own[new]
            grid.scatter(sample[rows], window.starts, mixed)
            if state.input is not sample:
                for copy in range(copies):
                    grid.scatter(x[copy * batch :][rows], window.starts, mixed * state.input_scales[call])

    def _row(self, call: int) -> Tensor:
        """One row: a step to the next level, then noise up to this one, mixed with the sample."""
        plan, mix = self._state.run.plan, self.mix
        level = plan.levels[call]
        target = plan.levels[call + 1] if call + 1 < plan.calls else Level.clean()
        values = ddim_row(self._state.run.conversion, level, target)
        for column in (C.SAMPLE, C.OUTPUT, C.M):
            values[column] *= mix * level.alpha / target.alpha
        values[C.SAMPLE] += 1 - mix
        values[C.NOISE] = mix * math.sqrt(step_variance(level, target))
        values[C.GUIDANCE] = float(self._state.table[call, C.GUIDANCE])
        return torch.tensor([values], dtype=torch.float64)


def _window_of(window: object) -> int | tuple[int | None, ...]:
    if not isinstance(window, Sequence):
        return check_count("window", window)
    sizes = tuple(None if part is None else check_count("window", part) for part in window)
    if isinstance(window, str) or all(part is None for part in sizes):
        raise ValueError(f"window: expected the size of a window along at least one axis, got {window!r}")
    return sizes


def _wrap_of(wrap: object, window: int | tuple[int | None, ...]) -> frozenset[int]:
    if not isinstance(wrap, Sequence) or isinstance(wrap, str):
        raise TypeError(f"wrap: expected negative numbers of axes such as (-1,), got {wrap!r}")
    axes = [axis for axis in wrap if not isinstance(axis, bool) and isinstance(axis, int) and axis < 0]
    if len(axes) != len(wrap):
        raise ValueError(f"wrap: expected negative numbers of axes such as (-1,), got {wrap!r}")
    for axis in axes:
        if not isinstance(window, int) and (-axis > len(window) or window[axis] is None):
            raise ValueError(f"wrap: axis {axis} has no windows (window {window})")
    return frozenset(axes)


def _overlap_of(overlap: object, window, margin: int) -> int | tuple[int, ...]:
    if isinstance(overlap, Sequence) and not isinstance(overlap, str):
        if isinstance(window, int) or len(overlap) != len(window):
            raise ValueError(f"overlap: expected one number, or one for each of window {window}, got {overlap!r}")
        each = tuple(check_count("overlap", own, 0) for own in overlap)
        pairs = list(zip(each, window, strict=True))
    else:
        each = check_count("overlap", overlap, 0)
        pairs = [(each, part) for part in ([window] if isinstance(window, int) else window)]
    for own, part in pairs:
        if part is not None and not 2 * margin <= own < part:
            raise ValueError(f"overlap: expected from {2 * margin} (twice the margin) to {part - 1}, got {own}")
    return each


def _counts(places: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(along)) for along in places))


def _runs(batch: Sequence[tuple[int, int]]) -> list[tuple[int, slice, slice]]:
    """(window, rows of x, rows of the batch): neighbouring rows of one window are copied together."""
    runs, at = [], 0
    for number, group in itertools.groupby(batch, lambda place: place[0]):
        rows = [row for _, row in group]
        runs.append((number, slice(rows[0], rows[-1] + 1), slice(at, at + len(rows))))
        at += len(rows)
    return runs


def _empty(like: Tensor, rows: slice, parts: Sequence[int]) -> Tensor:
    return like.new_empty((rows.stop - rows.start, *like.shape[1 : like.dim() - len(parts)], *parts))


def _map(value: object, function: Callable[[Tensor], object]) -> object:
    if isinstance(value, Mapping):
        return {key: _map(inner, function) for key, inner in value.items()}
    return function(value) if isinstance(value, Tensor) else value


def _rows(tensor: object, rows: Sequence[int], batch: int) -> object:
    """The rows of a batch; what has no row for each sample is the same for all."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor[row : row + 1] for row in rows])


def _times(t: Tensor, x: Tensor, starts, rows: Sequence[int], parts: tuple[int, ...]) -> object:
    """The times of a batch; where every frame of [B, C, F, ...] has its own, those of the window's frames."""
    if not isinstance(t, Tensor) or t.dim() < 2 or len(parts) < x.dim() - 2:
        return _rows(t, rows, x.shape[0])
    return _cropped(t, x, [start[:1] for start in starts], rows, parts[:1])


def _cropped(tensor: Tensor, x: Tensor, starts, rows: Sequence[int], parts: tuple[int, ...]) -> Tensor:
    lead = tensor.shape[1 : tensor.dim() - len(parts)]
    out = tensor.new_empty((len(rows), *lead, *parts))
    for number, (start, row) in enumerate(zip(starts, rows, strict=True)):
        grid.gather(tensor[row if tensor.shape[0] == x.shape[0] else 0], start, out[number])
    return out


def _check_crop(name: str, tensor: Tensor, x: Tensor, axes: int) -> None:
    if tensor.dim() <= axes or tensor.shape[-axes:] != x.shape[-axes:] or tensor.shape[0] not in (1, x.shape[0]):
        wanted = f"[{x.shape[0]} or 1, ..., {', '.join(map(str, x.shape[-axes:]))}]"
        raise ValueError(f"crop: expected {name!r} of shape {wanted}, got {tuple(tensor.shape)}")


def _coordinates(x: Tensor, starts, parts: tuple[int, ...]) -> Tensor:
    """[N, axes, *window]: places of pixel centres, -1 to 1 along the whole."""
    axes = len(parts)
    out = torch.empty((len(starts), axes, *parts), dtype=torch.float32, device=x.device)
    for axis, (part, size) in enumerate(zip(parts, x.shape[-axes:], strict=True)):
        place = torch.arange(part, device=x.device)
        for number, start in enumerate(starts):
            along = ((place + start[axis]) % size * 2 + 1) / size - 1
            out[number, axis] = along.view(-1, *(1,) * (axes - 1 - axis))
    return out


def _check_output(output: object, inputs: Tensor) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"denoiser: expected a tensor, got {type(output).__name__}")
    if output.dim() != inputs.dim() or output.shape[0] != inputs.shape[0] or output.shape[2:] != inputs.shape[2:]:
        raise ValueError(f"denoiser: expected windows of shape {tuple(inputs.shape)}, got {tuple(output.shape)}")
