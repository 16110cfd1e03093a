"""NoiseShift: which time a model should be told at a resolution, or in steps, that it was not trained for.

Source: He et al., "NoiseShift: Resolution-Aware Noise Recalibration for Better Low-Resolution Image Generation", 2025.
A sampler's noise levels and update stay; only the time that the model is told changes, by a table made once for a
model, a resolution and a number of steps. The table is the ``time_table`` of ``Sampler``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._seeds import sample_keys
from pydenoise.samplers.levels import Level
from pydenoise.samplers.runtime import FLOATS, Sampler

_NOISE = 2**32 - 2  # the number of the first noise; others count down from it


@dataclass(frozen=True)
class NoiseShift:
    """A calibrated table.

    Args:
        time_table: what to tell the model at each call: ``Sampler(..., time_table=shift.time_table)``.
        times: what the sampler would have told it.
        errors: mean squared error of a step with the table, and ``errors_before`` without; one for each call.
    """

    time_table: tuple[float, ...]
    times: tuple[float, ...]
    errors: tuple[float, ...]
    errors_before: tuple[float, ...]


@dataclass(frozen=True)
class _Step:
    """A noise level of the plan, the one after it, and what the model needs for a call there."""

    call: int
    time: float
    level: Level
    target: Level
    input_scale: float


def calibrate_noise_shift(
    sampler: Sampler,
    x0: Tensor,
    *,
    conditioning: Mapping[str, object] | None = None,
    radius: float | None = None,
    coarse: int = 11,
    fine: int = 11,
    repeats: int = 1,
    seed: int = 0,
    max_batch: int | None = None,
) -> NoiseShift:
    """The times at which the sampler's model makes the least error of a step on clean samples.

    For every noise level of the sampler's plan: x at this level and at the next are made of ``x0`` and the same noise;
    of all candidate times, the one wins whose deterministic step from x ends nearest to the next x. A coarse grid
    around the level's own time comes first, then a fine one around its best. Times never rise from level to level.

    Args:
        sampler: its plan, model, schedule and prediction type are used; guidance is not.
        x0: clean samples [B, ...] of the resolution to calibrate for.
        conditioning: keyword arguments of the model, as in ``Sampler.sample``.
        radius: how far candidates are from the level's time: in times, for a "ve" schedule in log sigma. ``None``: a
            twentieth of the schedule, for "ve" 0.25.
        coarse, fine: points of the two grids, odd numbers; the level's own time is always a candidate.
        repeats: different noises per sample.
        max_batch: larger batches go through the model in pieces.

    Returns: a ``NoiseShift``. Where the sampler's times are whole numbers of a "vp" schedule, so are the table's.

    Raises:
        TypeError, ValueError: a bad argument, or a bad result of the model; the message names it.
    """
    _check(sampler, x0, radius, coarse, fine, repeats, max_batch)
    steps = _steps(sampler)
    grid = _Grid(sampler, radius, coarse, fine)
    measure = _Measure(sampler, x0, conditioning, repeats, seed, max_batch)
    found: dict[tuple[float, Level], tuple[float, float, float]] = {}
    most = math.inf
    for step in steps:
        measure.begin(step)
        before = measure(step.time)
        most, error = grid.best(step.time, most, measure)
        found[step.time, step.level] = (most, error, before)
    each = [found[pair] for pair in zip(sampler.plan.times, sampler.plan.levels, strict=True)]
    table, errors, before = zip(*each, strict=True)
    return NoiseShift(table, sampler.plan.times, errors, before)


def _check(sampler, x0, radius, coarse, fine, repeats, max_batch) -> None:
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
    if sampler.plan.start is not None:
        raise ValueError(f"sampler: the levels of {sampler.solver.name} also depend on a degraded sample")
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0: expected a tensor, got {type(x0).__name__}")
    if x0.dtype not in FLOATS or x0.dim() < 1 or x0.numel() == 0:
        raise ValueError(f"x0: expected a floating-point tensor [B, ...], got {x0.dtype} {tuple(x0.shape)}")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius: expected a finite number above 0, got {radius}")
    for name, value in (("coarse", coarse), ("fine", fine)):
        if value < 3 or value % 2 == 0:
            raise ValueError(f"{name}: expected an odd number of at least 3, got {value}")
    if repeats < 1:
        raise ValueError(f"repeats: expected a positive number, got {repeats}")
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch: expected a positive number, got {max_batch}")


def _steps(sampler: Sampler) -> list[_Step]:
    """One for every noise level of the plan, from the most noise down, each with the next lower level.

    Solvers that call the model several times a step pass some levels more than once, and not in order.
    """
    plan = sampler.plan
    scales = [sampler.first_input_scale, *plan.table[:-1, C.INPUT_SCALE].tolist()]
    calls = {}
    for call, (time, level) in enumerate(zip(plan.times, plan.levels, strict=True)):
        calls.setdefault((time, level), call)
    ordered = sorted(calls, key=lambda pair: pair[1].log_snr)
    targets = [*(level for _, level in ordered[1:]), Level.clean()]
    return [
        _Step(calls[time, level], time, level, target, scales[calls[time, level]])
        for (time, level), target in zip(ordered, targets, strict=True)
    ]


class _Grid:
    """Candidate times around a level's own."""

    def __init__(self, sampler: Sampler, radius: float | None, coarse: int, fine: int):
        schedule = sampler.schedule
        self._log = schedule.kind == "ve"
        self._whole = schedule.kind == "vp" and all(t == round(t) for t in sampler.plan.times)
        self._coarse, self._fine = coarse, fine
        self._radius = (0.25 if self._log else schedule.num_timesteps / 20) if radius is None else float(radius)
        self._top = schedule.num_timesteps - (schedule.kind == "vp")

    def _move(self, time: float, by: float) -> float:
        if self._log:
            return time * math.exp(by)
        moved = min(max(time + by, 0.0), float(self._top))
        return float(round(moved)) if self._whole else moved

    def _around(self, time: float, radius: float, points: int) -> Iterator[float]:
        half = points // 2
        return (self._move(time, radius * k / half) for k in range(-half, half + 1))

    def best(self, time: float, most: float, measure: "_Measure") -> tuple[float, float]:
        """(the candidate with the least error, that error); none is above ``most``."""
        chosen = min({min(t, most) for t in (time, *self._around(time, self._radius, self._coarse))}, key=measure)
        gap = self._radius / (self._coarse // 2)
        chosen = min({min(t, most) for t in (chosen, *self._around(chosen, gap, self._fine))}, key=measure)
        return chosen, measure(chosen)


class _Measure:
    """The error of a step, by the time the model is told; the same noises for every time."""

    def __init__(self, sampler: Sampler, x0: Tensor, conditioning, repeats: int, seed: int, max_batch: int | None):
        self._sampler, self._x0, self._repeats = sampler, x0.detach(), repeats
        self._conditions = Conditions(conditioning, None, x0, False)
        self._keys = sample_keys(seed, None, x0.shape[0], x0.device)
        self._size = max_batch or x0.shape[0]
        self._whole = sampler.schedule.kind == "vp" and all(t == round(t) for t in sampler.plan.times)
        self._known: dict[float, float] = {}
        for observer in sampler.observers:
            if hasattr(observer, "begin_run"):
                observer.begin_run(sampler.times)

    def begin(self, step: _Step) -> None:
        """Errors are those at ``step`` from now on."""
        self._step, self._known = step, {}
        for observer in self._sampler.observers:
            observer.begin_step(step.call, self._sampler.plan.calls)

    def __call__(self, time: float) -> float:
        if time not in self._known:
            with torch.no_grad():
                sums = [float(self._sum(repeat, begin, time)) for repeat in range(self._repeats)
                        for begin in range(0, self._x0.shape[0], self._size)]  # fmt: skip
            self._known[time] = math.fsum(sums) / (self._x0.numel() * self._repeats)
        return self._known[time]

    def _sum(self, repeat: int, begin: int, time: float) -> Tensor:
        """Squared errors of one piece of the batch, added up."""
        sampler, step, part = self._sampler, self._step, slice(begin, begin + self._size)
        x0 = self._x0[part]
        noise = initial_noise(x0.shape, self._keys[part], 1.0, x0.dtype, "auto", number=_NOISE - repeat)
        x = step.level.alpha * x0 + step.level.sigma * noise
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        t = torch.full((x.shape[0],), time, dtype=torch.int64 if self._whole else exact, device=x.device)
        out = sampler.denoiser(x * step.input_scale, t, **self._conditions.part(part))
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ValueError(f"denoiser: expected a tensor {tuple(x.shape)}, got {getattr(out, 'shape', type(out))}")
        ends = [getattr(sampler.conversion, name)(step.level) for name in ("x0", "epsilon")]
        on_sample, on_output = (step.target.alpha * p + step.target.sigma * r for p, r in zip(*ends, strict=True))
        wanted = step.target.alpha * x0.to(exact) + step.target.sigma * noise.to(exact)
        error = (on_sample * x.to(exact) + on_output * out.to(exact) - wanted).double().square().sum()
        if not bool(error.isfinite()):
            raise ValueError(f"denoiser: NaN or infinity when told time {time:g} at noise level {step.time:g}")
        return error
