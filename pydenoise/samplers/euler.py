"""Euler, ancestral Euler and Heun: steps of the probability-flow ODE in its own coordinates.

The ODE of a "ve" schedule is dx / dsigma = epsilon. A "vp" one has the same ODE in x / alpha and sigma / alpha, and a
"flow" one dx / dsigma = epsilon - x0. Karras et al. (2022) call a model with x0; so do the formulas here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydenoise.samplers._path import check_times_options, path, times_to
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion, Plan, Solver, row


def _euler(conversion: Conversion, level: Level, target: Level, **others) -> list[float]:
    """alpha' x0 + sigma' epsilon, the same in all coordinates, with the epsilon that fits x0 and the sample."""
    on_sample = target.sigma / level.sigma
    on_x0 = target.alpha - level.alpha * on_sample
    return row(conversion, level, "sample", sample=on_sample, m=on_x0, **others)


@dataclass(frozen=True)
class _Spaced(Solver):
    """The options of all three: where to end, and which times."""

    final: str | float = "zero"
    spacing: str | None = None
    steps_offset: int = 0

    def __post_init__(self):
        check_times_options(self.spacing, self.steps_offset, self.final)

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """As ``spacing`` says; with ``final="zero"`` the last time of the spacing is a step, else it is the end."""
        return times_to(schedule, num_steps, self.spacing, self.steps_offset, self.final, beyond=False)


@dataclass(frozen=True)
class Euler(_Spaced):
    """Euler's method for the probability-flow ODE; one call of the model a step.

    The same numbers as DDIM without noise, in every kind of schedule; with ``clip`` epsilon is derived again from the
    clamped x0.

    Args:
        final: where to end: "zero" (x0), "sigma_min" (the schedule's least noise) or a time.
        spacing, steps_offset: which times: a name of ``pydenoise.samplers.timesteps``; ``None``: "linspace", in a "ve"
            schedule "karras".

    Source: Karras et al., https://arxiv.org/abs/2206.00364, section 3.
    """

    name = "Euler"

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """One row a step."""
        levels = path(schedule, timesteps, self.final)
        rows = [_euler(conversion, level, target) for level, target in zip(levels, levels[1:], strict=False)]
        return Plan.of(timesteps, levels[:-1], rows, initial_scale=schedule.initial_scale)


@dataclass(frozen=True)
class EulerAncestral(_Spaced):
    """Euler steps to less noise than the next level has, and the rest of its noise anew; one call a step.

    In x / alpha and s = sigma / alpha, for each kind of schedule: new noise of s_up = eta s' sqrt(1 - (s' / s)^2),
    after a step to sqrt(s'^2 - s_up^2).

    Args:
        eta: from 0 (Euler) to 1: how much of the noise is new.
        final, spacing, steps_offset: as in ``Euler``.

    Source: Crowson, k-diffusion (2022); with eta = 1 the ancestral sampler of Ho et al., https://arxiv.org/abs/2006.11239.
    """

    eta: float = 1.0

    name = "Euler ancestral"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.eta, (bool, str)) or not hasattr(self.eta, "__float__"):
            raise TypeError(f"eta: expected a number, got {type(self.eta).__name__}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a number from 0 to 1, got {self.eta}")

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """One row a step."""
        levels = path(schedule, timesteps, self.final)
        rows = []
        for level, target in zip(levels, levels[1:], strict=False):
            ratio = math.exp(level.log_snr - target.log_snr)  # s' / s
            new = target.sigma * self.eta * math.sqrt(1 - ratio**2)
            down = Level(target.alpha, target.sigma * math.sqrt(1 - self.eta**2 * (1 - ratio**2)))
            rows.append(_euler(conversion, level, down, noise=new))
        return Plan.of(timesteps, levels[:-1], rows, initial_scale=schedule.initial_scale)


@dataclass(frozen=True)
class Heun(_Spaced):
    """Heun's method for the probability-flow ODE: order 2, two calls of the model a step.

    A step to no noise, where the slope is not defined, is one of Euler with one call, and so is a step from pure noise
    in a "vp" schedule, where x / alpha is infinite. ``num_steps`` counts steps: calls are 2 num_steps - 1 with
    ``final="zero"``.

    In x / alpha the first steps of a "vp" schedule are long: from sigma / alpha = 157 with 1000 linear betas. With a
    trained model and fewer than about 20 calls the second slope then carries the first one's error on and samples
    come out wrong; ``spacing="karras"``, more steps, or DPM-Solver++ are the remedies.

    Args:
        final, spacing, steps_offset: as in ``Euler``.

    Source: Karras et al., https://arxiv.org/abs/2206.00364, algorithm 1.
    """

    name = "Heun"

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """Two rows a step: Euler's, which keeps the sample and x0, and the one with the mean slope."""
        levels = path(schedule, timesteps, self.final)
        times = [*timesteps, self._final_time(schedule)]
        calls: list[tuple[float, Level, list[float], bool]] = []
        for i, (level, target) in enumerate(zip(levels, levels[1:], strict=False)):
            if target.sigma == 0 or (level.alpha == 0 and schedule.kind != "flow"):
                calls.append((times[i], level, _euler(conversion, level, target), True))
                continue
            predictor = _euler(conversion, level, target, slot=0, kept={"sample": 1.0})
            calls.append((times[i], level, predictor, False))
            calls.append((times[i + 1], target, _mean_slope(schedule.kind, conversion, level, target), True))
        called, at, rows, ends = zip(*calls, strict=True)
        return Plan.of(called, at, rows, ends=ends, initial_scale=schedule.initial_scale)

    def _final_time(self, schedule: NoiseSchedule) -> float:
        """What the model is told at the end; at no noise it is not called."""
        if isinstance(self.final, str):
            return float(schedule.times[0])
        return float(self.final)


def _mean_slope(kind: str, conversion: Conversion, level: Level, target: Level) -> list[float]:
    """From the saved sample with the mean of its slope and of that at the predicted sample.

    With y = c x and a time s: y' = y + (s' - s) ((y - x0) / s + (y' - x0') / s') / 2, where c = 1 and s = sigma in
    "flow", c = 1 / alpha and s = sigma / alpha otherwise.
    """
    unit = (1.0, 1.0) if kind == "flow" else (level.alpha, target.alpha)  # 1 / c
    ratio = target.sigma / level.sigma * unit[0] / unit[1]  # s' / s
    first, second = (ratio - 1) / 2, (1 - 1 / ratio) / 2
    return row(
        conversion, target, "sample", sample=second, base=unit[1] / unit[0] * (1 + first),
        m=-unit[1] * second, history={0: -unit[1] * first},
    )  # fmt: skip
