"""DDIM (Song, Meng and Ermon, 2021): the model's noise carried over to the next level, with some of it drawn anew."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion, Plan, Solver, row
from pydenoise.samplers.timesteps import check_spacing, check_times, solver_times

TARGETS = ("next", "stride")


@dataclass(frozen=True)
class DDIM(Solver):
    """x' = alpha' x0 + sqrt(sigma'^2 - s^2) epsilon + s z, one call of the model for each step; first order.

    s = eta times the standard deviation of the ancestral sampler, so eta = 1 on neighbouring timesteps is DDPM with its
    small variance. Any kind of schedule. A clamp of x0 leaves epsilon as the model gave it, unless the sampler has
    ``clip_rederives`` (diffusers' ``use_clipped_model_output``).

    Args:
        eta: 0 (deterministic) to 1.
        spacing: of the times, see ``pydenoise.samplers.timesteps``; ``None``: "leading", "karras" for "ve" and
            "linspace" for "flow".
        steps_offset: added to the times of "leading".
        set_alpha_to_one: whether the last step ends at a clean sample, or at the schedule's first level.
        target: where a step ends: at the "next" time of the list, or a "stride" of num_timesteps // num_steps below its
            own, as in diffusers. They differ where the spacing is not "leading".
    """

    eta: float = 0.0
    spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    target: str = "next"

    name = "DDIM"

    def __post_init__(self):
        if isinstance(self.eta, bool) or not isinstance(self.eta, (int, float)):
            raise TypeError(f"eta: expected a number, got {type(self.eta).__name__}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a number from 0 to 1, got {self.eta}")
        if self.spacing is not None:
            check_spacing(self.spacing)
        if self.target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {self.target!r}")

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        return solver_times(
            schedule, num_steps, self.spacing, steps_offset=self.steps_offset, ends_clean=self.set_alpha_to_one
        )

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        times = check_times(schedule, timesteps)
        levels = [schedule.level(t) for t in times]
        final = Level.clean() if self.set_alpha_to_one else schedule.first
        targets = [*levels[1:], final] if self.target == "next" else _strides(schedule, times, final)
        rows = [ddim_row(conversion, level, target, self.eta) for level, target in zip(levels, targets, strict=True)]
        return Plan.of(times, levels, rows, initial_scale=schedule.initial_scale)


def ddim_row(conversion: Conversion, level: Level, target: Level, eta: float = 0.0) -> list[float]:
    """The row of one DDIM step from ``level`` to ``target``."""
    std = eta * math.sqrt(posterior_variance(level, target)) if eta else 0.0
    direction = math.sqrt(max(target.sigma**2 - std**2, 0.0))
    if conversion.limits:
        on_x0, (on_sample, on_output) = target.alpha, conversion.epsilon(level)
        if conversion.clip_rederives and level.sigma:
            on_x0 -= direction * level.alpha / level.sigma
            on_sample, on_output = 1 / level.sigma, 0.0
        return row(
            conversion, level, "sample", m=on_x0, sample=direction * on_sample, output=direction * on_output, noise=std
        )
    x0, epsilon = conversion.x0(level), conversion.epsilon(level)
    sample, output = (target.alpha * p + direction * r for p, r in zip(x0, epsilon, strict=True))
    return row(conversion, level, sample=sample, output=output, noise=std)


def posterior_variance(level: Level, target: Level) -> float:
    """Variance of x' at ``target`` given x at ``level`` and x0: b sigma'^2 / sigma^2, b as in ``step_variance``."""
    return step_variance(level, target) * target.sigma**2 / level.sigma**2 if level.sigma else 0.0


def step_variance(level: Level, target: Level) -> float:
    """Variance b of x at ``level`` given x' at ``target``: sigma^2 - (alpha / alpha')^2 sigma'^2."""
    return max(level.sigma**2 - (level.alpha / target.alpha * target.sigma) ** 2, 0.0)


def _strides(schedule: NoiseSchedule, times: Sequence[float], final: Level) -> list[Level]:
    if schedule.kind != "vp":
        raise ValueError(f"target: 'stride' counts timesteps of a 'vp' schedule, this one is {schedule.kind!r}")
    stride = schedule.num_timesteps // len(times)
    return [schedule.level(t - stride) if t >= stride else final for t in times]
