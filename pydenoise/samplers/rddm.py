"""Residual denoising diffusion models: restoration that begins at the degraded image.

Source: Liu et al., "Residual Denoising Diffusion Models", CVPR 2024. A level is x_t = x0 + A_t R + B_t epsilon with the
residual R = y - x0 of a degraded image y; A grows from 0 to 1, so that the last level is y with a little noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pydenoise import step_row as C
from pydenoise.samplers._stages import Row, Stages, clamp, keep_sample, of_two
from pydenoise.samplers.levels import Level, NoiseSchedule, check_count
from pydenoise.samplers.plan import Control, Conversion, Plan, Run, Solver, row
from pydenoise.samplers.timesteps import check_times

HEADS = ("both", "residual", "noise")
_SAMPLE, _RESIDUAL = 0, 1  # slots of the stages


def residual_schedule(num_timesteps: int = 1000, sum_scale: float = 0.01) -> NoiseSchedule:
    """The levels of RDDM, as a schedule of kind "residual": alpha = 1 - A, sigma = B.

    The steps of A fall linearly to the last, those of B^2 grow linearly; their sums are 1 and ``sum_scale``.

    Args:
        num_timesteps: T.
        sum_scale: B^2 of the last level: 0.01 for restoration, 1 for generation (from noise alone, y = 0).
    """
    total = check_count("num_timesteps", num_timesteps)
    if isinstance(sum_scale, bool) or not isinstance(sum_scale, (int, float)):
        raise TypeError(f"sum_scale: expected a number, got {type(sum_scale).__name__}")
    if not 0 < sum_scale < math.inf:
        raise ValueError(f"sum_scale: expected a finite number above 0, got {sum_scale}")
    done = torch.arange(1, total + 1, dtype=torch.float64)
    left = total - done
    whole = total * (total + 1)
    return NoiseSchedule("residual", left * (left + 1) / whole, (sum_scale * done * (done + 1) / whole).sqrt())


def residual_schedule_of(schedule: NoiseSchedule) -> NoiseSchedule:
    """A "vp" schedule as a residual one: A = 1 - alpha, B = sigma, with which y = 0 gives the same process."""
    if not isinstance(schedule, NoiseSchedule) or schedule.kind != "vp":
        raise ValueError(f"schedule: expected a 'vp' schedule, got {schedule!r}")
    return NoiseSchedule("residual", schedule.alphas, schedule.sigmas)


@dataclass(frozen=True)
class RDDM(Solver):
    """x' = x - (A - A') R - (B - sqrt(B'^2 - s^2)) epsilon + s z, s^2 = eta (B^2 - B'^2) B'^2 / B^2.

    ``Sampler(denoiser, residual_schedule(), RDDM(), 5).sample(y)`` restores y [B, ...]: it begins at y + B z with the
    last level's B. With ``shape`` in place of y it generates, from noise alone (y = 0). A network that sees y as well
    gets it as conditioning (``ConcatCondition``). One call of the model a step.

    With the sampler's ``clip`` x0 is clamped where it enters a step: in the last one, and with the head "noise", whose
    residual is y - x0, in all of them. The public code has clip=1 and clip_residual=1.

    Args:
        head: what the model returns: "both", R and epsilon in the two halves of [B, 2 C, ...]; "residual", R, from
            which epsilon = (x - y + (1 - A) R) / B; "noise", epsilon, from which x0 = (x - A y - B epsilon) / (1 - A),
            on a schedule whose last A is below 1 (``residual_schedule_of``).
        eta: 0 (deterministic) to 1, where all timesteps give the posterior's mean and variance.
        clip_residual: a predicted R is clamped to [-clip_residual, clip_residual] (heads "both" and "residual").
    """

    head: str = "both"
    eta: float = 0.0
    clip_residual: float | None = None

    name = "RDDM"

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(map(repr, HEADS))}, got {self.head!r}")
        if isinstance(self.eta, bool) or not isinstance(self.eta, (int, float)):
            raise TypeError(f"eta: expected a number, got {type(self.eta).__name__}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a number from 0 to 1, got {self.eta}")
        if self.clip_residual is None:
            return
        if isinstance(self.clip_residual, bool) or not isinstance(self.clip_residual, (int, float)):
            raise TypeError(f"clip_residual: expected a number or None, got {type(self.clip_residual).__name__}")
        if not self.clip_residual > 0:
            raise ValueError(f"clip_residual: expected a positive number or None, got {self.clip_residual}")
        if self.head == "noise":
            raise ValueError("clip_residual: the head 'noise' predicts no residual; clip limits its x0")

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """The integer parts of num_steps + 1 equally spaced numbers from T - 1 to -1, without that -1."""
        total = _residual(schedule).num_timesteps
        if check_count("num_steps", num_steps) > total:
            raise ValueError(f"num_steps: expected at most {total} for {total} timesteps, got {num_steps}")
        # total k / num_steps in whole numbers: a rounded quotient can fall to the other side of an integer
        return [float(total * k // num_steps - 1) for k in range(num_steps, 0, -1)]

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        _check_conversion(conversion)
        times = check_times(_residual(schedule), timesteps)
        if times[0] != schedule.num_timesteps - 1:
            raise ValueError(
                f"timesteps: expected {schedule.num_timesteps - 1} first, the level that a degraded sample begins at, "
                f"got {times[0]:g}"
            )
        levels = [schedule.level(t) for t in times]
        steps = self._steps(levels)
        rows = [self._row(step) for step in steps]
        return Plan.of(
            times, levels, rows, initial_scale=levels[0].sigma, start=(1.0, levels[0].sigma),
            working_slots=1 if self.head == "noise" else 2, predictions=2 if self.head == "both" else 1,
        )  # fmt: skip

    def control(self, run: Run) -> Control | None:
        if self.head == "both" and len(run.shape) < 2:
            raise ValueError(f"x: expected [B, C, ...], for a model that returns [B, 2 C, ...], got {tuple(run.shape)}")
        if run.conversion.clip is None and self.clip_residual is None and not run.preview:
            return None
        return Stages(run, [self._stages(step, run.conversion.clip) for step in self._steps(run.plan.levels)])

    def _steps(self, levels: Sequence[Level]) -> list["_Step"]:
        targets = [*levels[1:], Level.clean()]
        return [_Step.of(level, target, self.eta) for level, target in zip(levels, targets, strict=True)]

    def _row(self, step: "_Step") -> Row:
        """Without clamps: one combination of x, y and the output."""
        a, b, change, direction = step.level.alpha, step.level.sigma, step.change, step.direction
        if self.head == "both":
            return of_two(row(Conversion("sample"), step.level, sample=1.0, noise=step.std), -change, -direction)
        if self.head == "residual":
            part = direction / b
            weights = {"sample": 1 - part, "base": part, "output": -change - part * a}
        else:
            _check_noise_head(a)
            weights = {"sample": 1 + change / a, "base": -change / a, "output": -change * b / a - direction}
        return row(Conversion("sample"), step.level, noise=step.std, **weights)

    def _stages(self, step: "_Step", clip: float | None) -> list[Row]:
        """The same with clamps; before the last stage the sample is x0."""
        a, b, change, direction = step.level.alpha, step.level.sigma, step.change, step.direction
        if self.head == "noise":
            _check_noise_head(a)
            last = {"history": {_SAMPLE: 1.0}, "base": -change, "m": change, "output": -direction}
            first = [keep_sample(_SAMPLE, sample=1 / a, base=-(1 - a) / a, output=-b / a)]
        elif self.head == "residual":
            part = direction / b
            last = {"history": {_SAMPLE: 1 - part, _RESIDUAL: -change - part * a}, "base": part}
            first = [
                clamp("output", self.clip_residual, sample=1.0, slot=_RESIDUAL),
                keep_sample(_SAMPLE, base=1.0, history={_RESIDUAL: -1.0}),
            ]
        else:
            last = {"history": {_SAMPLE: 1.0, _RESIDUAL: -change}, "output": -direction}
            first = [
                clamp("output", self.clip_residual, sample=1.0, slot=_RESIDUAL),
                keep_sample(_SAMPLE, sample=1.0, history={_RESIDUAL: -(1 - a)}, output=-b),
            ]
        last = {"m": 1.0} if step.ends else last | {"noise": step.std}
        stages = [*first, clamp("sample", clip, **last)]
        if self.head == "both":  # the first stage reads the residual, the others epsilon
            for stage in stages[1:]:
                stage[C.GUIDANCE] = 0.0
        return stages


@dataclass(frozen=True)
class _Step:
    """The numbers of a step: what R and epsilon are multiplied by, and the standard deviation of the noise."""

    level: Level
    change: float  # A - A'
    direction: float  # B - sqrt(B'^2 - s^2)
    std: float
    ends: bool

    @classmethod
    def of(cls, level: Level, target: Level, eta: float) -> "_Step":
        if not level.sigma > target.sigma or not level.alpha < target.alpha:
            raise ValueError("schedule: expected levels whose residual and noise both grow with the time")
        variance = eta * (level.sigma**2 - target.sigma**2) * target.sigma**2 / level.sigma**2
        direction = level.sigma - math.sqrt(target.sigma**2 - variance)
        return cls(level, target.alpha - level.alpha, direction, math.sqrt(variance), target.sigma == 0)


def _residual(schedule: NoiseSchedule) -> NoiseSchedule:
    if schedule.kind != "residual":
        raise ValueError(f"schedule: RDDM needs one of kind 'residual' (residual_schedule), got {schedule.kind!r}")
    return schedule


def _check_conversion(conversion: Conversion) -> None:
    if conversion.prediction_type != "epsilon":
        raise ValueError(
            f"prediction_type: RDDM's own option head says what the model returns, got {conversion.prediction_type!r}"
        )
    if conversion.dynamic or conversion.clip_rederives:
        raise ValueError("dynamic_threshold and clip_rederives: RDDM has neither; its clamps are clip, clip_residual")


def _check_noise_head(alpha: float) -> None:
    if alpha == 0:
        raise ValueError(
            "head: where A is 1, at the last level of this schedule, noise says nothing of x0; for the head 'noise' "
            "use residual_schedule_of(schedule)"
        )
