"""At which times a solver calls the model: the spacings in use, each a list of descending times.

Where the last step ends (at a clean sample, or at the schedule's first level) is the solver's choice; it is not in the
list. ``drop_last=True`` spaces one time more and leaves the last one out, for solvers whose last step ends there.
"""

import math
from collections.abc import Callable, Sequence

import torch

from pydenoise.samplers.levels import NoiseSchedule, check_count, karras_ramp

Times = list[float]


def leading(schedule: NoiseSchedule, num_steps: int, *, offset: int = 0, drop_last: bool = False) -> Times:
    """k (T // N) + offset for k = N - 1 ... 0, T the number of timesteps (DDIM; diffusers' "leading").

    Raises:
        ValueError: ``num_steps`` below 1 or above T, an offset that leaves the schedule, a schedule that is not "vp".
    """
    points = _discrete(schedule, num_steps, "leading", drop_last)
    stride, last = schedule.num_timesteps // points, schedule.num_timesteps - 1
    largest = (points - 1) * stride
    if not 0 <= check_count("steps_offset", offset, 0) <= last - largest:
        raise ValueError(f"steps_offset: {offset} moves timestep {largest} past the last one, {last}")
    return _without_last([k * stride + offset for k in reversed(range(points))], drop_last)


def trailing(schedule: NoiseSchedule, num_steps: int, *, drop_last: bool = False) -> Times:
    """round(T - k T / N) - 1 for k = 0 ... N - 1: begins at the last timestep (diffusers' "trailing")."""
    points = _discrete(schedule, num_steps, "trailing", drop_last)
    stride = schedule.num_timesteps / points
    return _without_last([round(schedule.num_timesteps - k * stride) - 1 for k in range(points)], drop_last)


def linspace(schedule: NoiseSchedule, num_steps: int, *, drop_last: bool = False) -> Times:
    """Both ends and equal steps: whole timesteps in a "vp" schedule; sigmas, or sigmas times T, in the others."""
    points = _points(schedule, num_steps, drop_last)
    low, high = _ends(schedule)
    if schedule.kind != "vp":
        return _without_last(torch.linspace(high, low, points, dtype=torch.float64).tolist(), drop_last)
    stride = (high - low) / max(points - 1, 1)
    # One point alone is the last timestep. Half to even, as NumPy rounds.
    times = [round(low + k * stride) for k in reversed(range(points))] if points > 1 else [high]
    return _without_last(times, drop_last)


def quadratic(schedule: NoiseSchedule, num_steps: int, *, drop_last: bool = False) -> Times:
    """floor(u^2) for N equal steps of u from 0 to sqrt(0.8 T): denser near the sample (Song et al., 2021, CIFAR-10).

    Where that gives a timestep twice, the later ones move up to the next free one.
    """
    points = _discrete(schedule, num_steps, "quadratic", drop_last)
    stride = math.sqrt(0.8 * schedule.num_timesteps) / max(points - 1, 1)
    # The root and the square of a whole number can end just below it.
    squares = [(k * stride) ** 2 * (1 + 1e-12) for k in range(points)] if points > 1 else [0.8 * schedule.num_timesteps]
    times: list[int] = []
    for square in squares:
        times.append(math.floor(square) if not times else max(math.floor(square), times[-1] + 1))
    return _without_last(times[::-1], drop_last)


def uniform_log_snr(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    first: float | None = None,
    last: float | None = None,
    drop_last: bool = False,
) -> Times:
    """Equal steps of log(alpha / sigma) from time ``first`` to ``last``; those of the schedule's ends if not given.

    Times need not be whole. Where a schedule ends in pure noise (zero terminal SNR, flow) the logarithm has no end, so
    the equal steps begin at the level before, and the last level is the first time.
    """
    points = _points(schedule, num_steps, drop_last)
    low, high = _ends(schedule)
    low, high = low if last is None else float(last), high if first is None else float(first)
    if not low < high:
        raise ValueError(f"first: expected a time above last, got {high:g} and {low:g}")
    if points == 1:
        return [high]
    pure = math.isinf(schedule.log_snr(high))
    start = high
    if pure:
        start = float(schedule.times[-2]) if schedule.num_timesteps > 1 else high
        points -= 1
    top, bottom = schedule.log_snr(start), schedule.log_snr(low)
    if not (math.isfinite(top) and math.isfinite(bottom)):
        raise ValueError("last: log(alpha / sigma) is infinite at one of the ends")
    inner = [schedule.time_of(top + (bottom - top) * k / (points - 1)) for k in range(1, points - 1)]
    times = [start, *inner, low] if points > 1 else [start]
    return _without_last([high, *times] if pure else times, drop_last)


def karras(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    drop_last: bool = False,
) -> Times:
    """Equal steps of (sigma / alpha)^(1/rho) from ``sigma_max`` to ``sigma_min`` (Karras et al., 2022).

    The ends are ratios sigma / alpha; those of the schedule if not given. Times need not be whole.
    """
    points = _points(schedule, num_steps, drop_last)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho: expected a number above 0, got {rho}")
    low = math.exp(-schedule.first.log_snr) if sigma_min is None else float(sigma_min)
    if sigma_max is None and schedule.last.alpha == 0:
        raise ValueError("sigma_max: needed for a schedule that ends in pure noise, where sigma / alpha is infinite")
    high = math.exp(-schedule.last.log_snr) if sigma_max is None else float(sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    times = karras_ramp(low, high, points, rho).tolist()
    if schedule.kind != "ve":  # there a time is the ratio itself
        times = [schedule.time_of(-math.log(sigma)) for sigma in times]
    return _without_last(times, drop_last)


def pndm(schedule: NoiseSchedule, num_steps: int) -> Times:
    """0, T // N, 2 (T // N) ... as long as they are below T, descending, as PNDM's public code has them.

    More than N times where N does not divide T.
    """
    stride = schedule.num_timesteps // _discrete(schedule, num_steps, "pndm", False)
    return [float(t) for t in reversed(range(0, schedule.num_timesteps, stride))]


SPACINGS: dict[str, Callable[..., Times]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
    "uniform_log_snr": uniform_log_snr,
    "karras": karras,
    "pndm": pndm,
}


def check_spacing(spacing: object) -> None:
    """ValueError for a name that is no spacing."""
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")


def spaced(spacing: str, schedule: NoiseSchedule, num_steps: int, *, steps_offset: int = 0, **options) -> Times:
    """The times of a named spacing; only "leading" knows an offset.

    Raises:
        ValueError: an unknown name, an offset with another spacing, or what the spacing itself refuses.
    """
    check_spacing(spacing)
    if spacing == "leading":
        return leading(schedule, num_steps, offset=steps_offset, **options)
    if steps_offset:
        raise ValueError(f"steps_offset: only spacing 'leading' has an offset, not {spacing!r}")
    return SPACINGS[spacing](schedule, num_steps, **options)


def solver_times(
    schedule: NoiseSchedule, num_steps: int, spacing: str | None, *, steps_offset: int = 0, ends_clean: bool = True
) -> Times:
    """The times of a solver with an option ``spacing``; ``None``: "leading", "karras" on "ve", "linspace" on "flow".

    A solver that does not end at a clean sample ends at the schedule's first level, which is then left out of the times
    of "karras" and "linspace" chosen here.
    """
    if spacing is not None:
        return spaced(spacing, schedule, num_steps, steps_offset=steps_offset)
    if schedule.kind == "vp":
        return leading(schedule, num_steps, offset=steps_offset)
    chosen = "karras" if schedule.kind == "ve" else "linspace"
    return spaced(chosen, schedule, num_steps, steps_offset=steps_offset, drop_last=not ends_clean)


def check_times(schedule: NoiseSchedule, timesteps: Sequence[float]) -> Times:
    """``timesteps`` as floats: at least one, strictly descending, inside the schedule."""
    times = [float(t) for t in timesteps]
    if not times:
        raise ValueError("timesteps: expected at least one")
    for earlier, later in zip(times, times[1:], strict=False):
        if not later < earlier:
            raise ValueError(f"timesteps: expected descending times, got {earlier:g} before {later:g}")
    for t in (times[0], times[-1]):
        try:
            schedule.level(t)
        except ValueError as error:
            raise ValueError(f"timesteps: {error}") from None
    return times


def _points(schedule: NoiseSchedule, num_steps: int, drop_last: bool) -> int:
    """How many times to space; a "vp" schedule has at most one for each timestep."""
    points = check_count("num_steps", num_steps) + bool(drop_last)
    if schedule.kind == "vp" and points > schedule.num_timesteps:
        most = schedule.num_timesteps - bool(drop_last)
        raise ValueError(f"num_steps: expected at most {most} for {schedule.num_timesteps} timesteps, got {num_steps}")
    return points


def _discrete(schedule: NoiseSchedule, num_steps: int, spacing: str, drop_last: bool) -> int:
    if schedule.kind != "vp":
        raise ValueError(
            f"spacing: {spacing!r} counts timesteps of a 'vp' schedule; for {schedule.kind!r} use 'linspace', "
            "'uniform_log_snr' or 'karras'"
        )
    return _points(schedule, num_steps, drop_last)


def _ends(schedule: NoiseSchedule) -> tuple[float, float]:
    times = schedule.times
    return float(times[0]), float(times[-1])


def _without_last(times: Sequence[float], drop: bool) -> Times:
    times = [float(t) for t in times]
    return times[:-1] if drop else times
