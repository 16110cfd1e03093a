"""Resfusion: restoration by a diffusion whose noise takes the residual along, entered half-way.

Source: Shi et al., "Resfusion: Denoising Diffusion Probabilistic Models for Image Restoration Based on Prior Residual
Noise", NeurIPS 2024. With the residual R = y - x0 of a degraded image y a level is
x_t = a x0 + (1 - a) R + s epsilon, a = sqrt(alphas_cumprod). Where a = 1/2 the first two terms are y / 2, so that a run
can begin there, without knowing x0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pydenoise.samplers._stages import Row, Stages, clamp, keep_sample
from pydenoise.samplers.ddim import posterior_variance, step_variance
from pydenoise.samplers.levels import Level, NoiseSchedule, check_count
from pydenoise.samplers.plan import Control, Conversion, Plan, Run, Solver, row
from pydenoise.samplers.timesteps import check_times, trailing

HEADS = ("residual_noise", "sample", "residual")
_FAR = 0.01  # how far from 1/2 the last level's a may be
_SAMPLE = 0  # a slot of the stages


def resfusion_schedule(num_timesteps: int = 12) -> NoiseSchedule:
    """LinearPro with truncation: linear betas, scaled by 1000 / T, as far as the level that sampling begins at.

    That is the level with a nearest to 1/2. If the first one below is more than 0.01 below, it is moved to 1/2. Of
    T = 12 timesteps 5 are left, of 100 there are 37.
    """
    total = check_count("num_timesteps", num_timesteps)
    betas = torch.linspace(1e-4, 0.02, total, dtype=torch.float64) * (1000 / total)
    alphas = torch.cumprod((1 - betas).clamp(min=0), 0).sqrt()
    below = (alphas < 0.5).nonzero()
    if not len(below) or not float(betas[0]) < 1:
        raise ValueError(f"num_timesteps: the betas of {total} timesteps do not pass a = 1/2")
    alphas = alphas[: int(below[0]) + 1]
    if alphas[-1] < 0.5 - _FAR:
        alphas[-1] = 0.5
    return NoiseSchedule.from_alphas_cumprod(alphas[: int((alphas - 0.5).abs().argmin()) + 1] ** 2)


@dataclass(frozen=True)
class Resfusion(Solver):
    """Ancestral steps of x - R, which is an ordinary diffusion of x0 - R; one call of the model a step.

    ``Sampler(denoiser, resfusion_schedule(12), Resfusion(), 5).sample(y)`` restores y [B, ...]: it begins at
    a y + s z. A network that sees y as well gets it as conditioning (``ConcatCondition``). The sampler's ``clip``
    clamps x0.

    Args:
        head: what the model returns: "residual_noise", epsilon + (1 - sqrt(1 - beta)) s / beta R; "sample", x0;
            "residual", R.
    """

    head: str = "residual_noise"

    name = "Resfusion"

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(map(repr, HEADS))}, got {self.head!r}")

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """All timesteps of ``resfusion_schedule``, or fewer, equally spaced from the last."""
        return trailing(_entered_half_way(schedule), num_steps)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        _check_conversion(conversion)
        times = check_times(_entered_half_way(schedule), timesteps)
        last = schedule.num_timesteps - 1
        if times[0] != last:
            raise ValueError(f"timesteps: expected {last} first, where a is 1/2, got {times[0]:g}")
        if any(t != int(t) for t in times):
            raise ValueError(f"timesteps: expected whole numbers, got {times[:8]}")
        steps = self._steps(schedule, times)
        levels = [step.level for step in steps]
        rows = [self._row(step, conversion) for step in steps]
        start = (levels[0].alpha, levels[0].sigma)
        return Plan.of(times, levels, rows, initial_scale=start[1], start=start, working_slots=1)

    def control(self, run: Run) -> Control | None:
        if self.head == "sample" or (run.conversion.clip is None and not run.preview):
            return None  # the row's own x0 is the right one
        steps = self._steps(run.schedule, run.plan.times)
        return Stages(run, [self._stages(step, run.conversion.clip) for step in steps])

    def _steps(self, schedule: NoiseSchedule, times: Sequence[float]) -> list["_Step"]:
        ends = [schedule.level(t) for t in times[1:]] + [Level.clean()]
        before = [Level.clean() if t == 0 else schedule.level(t - 1) for t in times]
        levels = [schedule.level(t) for t in times]
        return [_Step(*parts) for parts in zip(levels, ends, before, strict=True)]

    def _row(self, step: "_Step", conversion: Conversion) -> Row:
        on_sample, on_base, on_x0 = step.mean()
        if self.head == "sample":
            kind = Conversion("sample", clip=conversion.clip)
            return row(kind, step.level, "sample", m=on_x0, sample=on_sample, base=on_base, noise=step.std)
        if self.head == "residual_noise" and step.target == step.before:
            # The same numbers, without y: the residual noise is what DDPM takes epsilon for.
            ratio = step.level.alpha / step.target.alpha
            variance = step_variance(step.level, step.target)
            return row(Conversion("sample"), step.level, sample=1 / ratio,
                       output=-variance / (step.level.sigma * ratio), noise=step.std)  # fmt: skip
        p, q, r = step.x0(self.head)
        return row(Conversion("sample"), step.level, sample=on_sample + on_x0 * p, base=on_base + on_x0 * q,
                   output=on_x0 * r, noise=step.std)  # fmt: skip

    def _stages(self, step: "_Step", clip: float | None) -> list[Row]:
        on_sample, on_base, on_x0 = step.mean()
        p, q, r = step.x0(self.head)
        return [
            keep_sample(_SAMPLE, sample=p, base=q, output=r),
            clamp("sample", clip, m=on_x0, history={_SAMPLE: on_sample}, base=on_base, noise=step.std),
        ]


@dataclass(frozen=True)
class _Step:
    level: Level
    target: Level
    before: Level  # the level one timestep below: the residual noise is defined by that beta

    @property
    def std(self) -> float:
        return math.sqrt(posterior_variance(self.level, self.target))

    def mean(self) -> tuple[float, float, float]:
        """The posterior's mean of x': its coefficients (on x, on y, on x0), R being y - x0."""
        level, target = self.level, self.target
        old = level.alpha / target.alpha * (target.sigma / level.sigma) ** 2
        new = target.alpha * step_variance(level, target) / level.sigma**2
        return old, 1 - new - old, 2 * new + old - 1

    def x0(self, head: str) -> tuple[float, float, float]:
        """x0 as a combination of (x, y, output)."""
        if head == "sample":
            return 0.0, 0.0, 1.0
        if head == "residual":
            return 0.0, 1.0, -1.0
        (a, s), ratio = self.level, self.level.alpha / self.before.alpha
        share = (1 - ratio) * s**2 / step_variance(self.level, self.before)  # s times R's part of the residual noise
        whole = 2 * a - 1 + share
        return 1 / whole, (share - (1 - a)) / whole, -s / whole


def _entered_half_way(schedule: NoiseSchedule) -> NoiseSchedule:
    if schedule.kind != "vp":
        raise ValueError(f"schedule: Resfusion needs a 'vp' schedule (resfusion_schedule), got {schedule.kind!r}")
    if abs(schedule.last.alpha - 0.5) > _FAR + 1e-9:
        raise ValueError(
            f"schedule: expected sqrt(alphas_cumprod) to end at 1/2 (resfusion_schedule), got {schedule.last.alpha:.4g}"
        )
    return schedule


def _check_conversion(conversion: Conversion) -> None:
    if conversion.prediction_type != "epsilon":
        raise ValueError(
            "prediction_type: Resfusion's own option head says what the model returns, got "
            f"{conversion.prediction_type!r}"
        )
    if conversion.dynamic or conversion.clip_rederives:
        raise ValueError("dynamic_threshold and clip_rederives: Resfusion has neither; clip clamps x0")
