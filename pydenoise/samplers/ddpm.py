"""DDPM's ancestral sampling (Ho, Jain and Abbeel, 2020), on all timesteps or on some of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydenoise.samplers.ddim import posterior_variance, step_variance
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion, Plan, Solver, row
from pydenoise.samplers.timesteps import check_spacing, check_times, solver_times

VARIANCES = ("fixed_small", "fixed_large", "fixed_large_ddsm", "fast_ddpm", "learned_range")
LEAST_VARIANCE = 1e-20  # of the posterior, before its logarithm


@dataclass(frozen=True)
class DDPM(Solver):
    """x' = mean of the posterior given x and x0, plus noise except in the last step; one call of the model a step.

    b is the variance that the forward process adds between the two times of a step (beta, where they are neighbours)
    and the posterior's variance is b sigma'^2 / sigma^2. Any kind of schedule; the last step ends at a clean sample.

    Args:
        variance: of the noise.

            * "fixed_small": the posterior's.
            * "fixed_large": b.
            * "fixed_large_ddsm": b, and a clip limits only the last step's x0, as in DDSM's public code. (Its table of
              variances has another first entry; that one belongs to the last step, which has no noise.)
            * "fast_ddpm": b, and x0 is clamped to [-1, 1] where the sampler has no clip of its own, as in Fast-DDPM's
              public code.
            * "learned_range": the model returns twice the channels; the second half v gives log variance =
              log small + (v + 1) / 2 (log b - log small) (Nichol and Dhariwal, 2021).
        spacing: of the times, see ``pydenoise.samplers.timesteps``; ``None``: "leading", "karras" for "ve" and
            "linspace" for "flow".
        steps_offset: added to the times of "leading".
    """

    variance: str = "fixed_small"
    spacing: str | None = None
    steps_offset: int = 0

    name = "DDPM"

    def __post_init__(self):
        if self.variance not in VARIANCES:
            raise ValueError(f"variance: expected one of {', '.join(VARIANCES)}, got {self.variance!r}")
        if self.spacing is not None:
            check_spacing(self.spacing)

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        return solver_times(schedule, num_steps, self.spacing, steps_offset=self.steps_offset)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        times = check_times(schedule, timesteps)
        levels = [schedule.level(t) for t in times]
        targets = [*levels[1:], Level.clean()]
        last = len(times) - 1
        rows = [
            ddpm_row(conversion, level, target, self.variance, last=call == last)
            for call, (level, target) in enumerate(zip(levels, targets, strict=True))
        ]
        return Plan.of(times, levels, rows, initial_scale=schedule.initial_scale)


def ddpm_row(
    conversion: Conversion, level: Level, target: Level, variance: str = "fixed_small", *, last: bool = False
) -> list[float]:
    """The row of one ancestral step from ``level`` to ``target``; the ``last`` one has no noise."""
    conversion = _limited(conversion, variance, last)
    large, small = step_variance(level, target), max(posterior_variance(level, target), LEAST_VARIANCE)
    on_sample = level.alpha / target.alpha * (target.sigma / level.sigma) ** 2 if level.sigma else 1.0
    on_x0 = target.alpha * large / level.sigma**2 if level.sigma else 0.0
    noise: dict = {"noise": 0.0 if last else math.sqrt(small if variance == "fixed_small" else large)}
    if variance == "learned_range":
        large = max(large, LEAST_VARIANCE)
        noise = {"noise": 0.0 if last else 1.0, "log_std": (math.log(small) / 2, math.log(large) / 2)}
    if conversion.limits:
        return row(conversion, level, "sample", m=on_x0, sample=on_sample, **noise)
    p, q = conversion.x0(level)
    return row(conversion, level, sample=on_sample + on_x0 * p, output=on_x0 * q, **noise)


def _limited(conversion: Conversion, variance: str, last: bool) -> Conversion:
    """The clamp of x0 that a variance's public code has at this step."""
    if variance == "fast_ddpm" and not conversion.limits:
        return replace(conversion, clip=1.0)
    if variance == "fixed_large_ddsm" and conversion.limits and not last:
        return replace(conversion, clip=None, dynamic=False)
    return conversion
