"""What solvers are tested with: distributions whose denoisers are known exactly, golden data, orders of convergence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pydenoise.samplers.levels import Level, NoiseSchedule

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "samplers.npz"
STEPS = (64, 128)  # orders are read between these numbers of steps


@cache
def golden() -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN)


def tensor(name: str) -> Tensor:
    """An array of the golden file in float64."""
    return torch.from_numpy(np.asarray(golden()[name], dtype=np.float64))


class Analytic:
    """A distribution of x0 whose posterior mean given a noisy sample is known."""

    def x0(self, x: Tensor, level: Level) -> Tensor:
        """E[x0 | x] for x = alpha x0 + sigma noise."""
        raise NotImplementedError

    def epsilon(self, x: Tensor, level: Level) -> Tensor:
        """E[noise | x]."""
        raise NotImplementedError

    def output(self, x: Tensor, level: Level, prediction_type: str = "epsilon") -> Tensor:
        """What a perfect model of this prediction type returns."""
        if prediction_type == "epsilon":
            return self.epsilon(x, level)
        if prediction_type == "sample":
            return self.x0(x, level)
        if prediction_type == "v_prediction":
            return level.alpha * self.epsilon(x, level) - level.sigma * self.x0(x, level)
        return self.epsilon(x, level) - self.x0(x, level)  # flow

    def denoiser(
        self, level_of: NoiseSchedule | Callable[[float], Level], prediction_type: str = "epsilon"
    ) -> Callable[..., Tensor]:
        """``denoiser(x, t, **conditioning)``, t a number or [B]; ``level_of`` is a schedule or gives a time's level."""
        level = level_of.level if isinstance(level_of, NoiseSchedule) else level_of

        def denoise(x: Tensor, t: Tensor | float, **conditioning: object) -> Tensor:
            times = t.reshape(-1).tolist() if isinstance(t, Tensor) else [float(t)]
            if len(set(times)) == 1:
                return self.output(x, level(times[0]), prediction_type)
            each = [self.output(x[i : i + 1], level(time), prediction_type) for i, time in enumerate(times)]
            return torch.cat(each)

        return denoise


@dataclass(frozen=True)
class Gaussian(Analytic):
    """Independent normal numbers: ``mean`` and ``variance`` have the shape of a sample without the batch."""

    mean: Tensor
    variance: Tensor

    def x0(self, x: Tensor, level: Level) -> Tensor:
        mean, variance = self.mean.to(x), self.variance.to(x)
        gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
        return mean + gain * (x - level.alpha * mean)

    def epsilon(self, x: Tensor, level: Level) -> Tensor:
        mean, variance = self.mean.to(x), self.variance.to(x)
        return level.sigma * (x - level.alpha * mean) / (level.alpha**2 * variance + level.sigma**2)

    def flow(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """Where the probability-flow ODE takes x from ``start`` to ``end``, exactly."""
        mean, variance = self.mean.to(x), self.variance.to(x)
        now, then = (level.alpha**2 * variance + level.sigma**2 for level in (start, end))
        return end.alpha * mean + (x - start.alpha * mean) * (then / now).sqrt()


@dataclass(frozen=True)
class Mixture(Analytic):
    """Gaussian components with one variance each: ``means`` [K, ...], ``variances`` and ``weights`` [K]."""

    means: Tensor
    variances: Tensor
    weights: Tensor

    def _parts(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """(responsibilities, x - alpha mean, variance of x), each [B, K, ...]."""
        means = self.means.to(x).flatten(1)
        away = x.flatten(1)[:, None] - level.alpha * means
        variance = (level.alpha**2 * self.variances.to(x) + level.sigma**2)[None, :, None]
        size = means.shape[1]
        log = self.weights.to(x).log() - 0.5 * (away**2 / variance).sum(2) - 0.5 * size * variance[..., 0].log()
        share = (log - log.amax(1, keepdim=True)).exp()  # torch's softmax would wake all threads for four numbers
        return (share / share.sum(1, keepdim=True))[..., None], away, variance

    def x0(self, x: Tensor, level: Level) -> Tensor:
        share, away, variance = self._parts(x, level)
        each = self.means.to(x).flatten(1) + level.alpha * self.variances.to(x)[:, None] / variance * away
        return (share * each).sum(1).view_as(x)

    def epsilon(self, x: Tensor, level: Level) -> Tensor:
        share, away, variance = self._parts(x, level)
        return (level.sigma * share * away / variance).sum(1).view_as(x)


@cache
def gaussian() -> Gaussian:
    """The diagonal Gaussian of the golden file, samples [B, 2, 4, 4]."""
    return Gaussian(tensor("an_gauss_mu"), tensor("an_gauss_s2"))


@cache
def mixture() -> Mixture:
    """The mixture of four Gaussians of the golden file, samples [B, 2, 4, 4]."""
    return Mixture(tensor("an_gmm_mu"), tensor("an_gmm_s2"), tensor("an_gmm_pi"))


@cache
def schedule() -> NoiseSchedule:
    """The schedule of the golden trajectories: linear betas in float64."""
    return NoiseSchedule.from_betas(tensor("an_betas"))


@cache
def diffusers_schedule() -> NoiseSchedule:
    """The same as diffusers has it, betas and products in float32: what its trajectories agree with to 1e-12."""
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))


@cache
def public_schedule() -> NoiseSchedule:
    """The same as PNDM's public code has it, and those made from it: betas in float64, products in float32."""
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - tensor("an_betas").float(), 0))


def start() -> Tensor:
    """x_T of the golden trajectories [3, 2, 4, 4]."""
    return tensor("an_xT")


def trajectory(
    solver: object,
    num_steps: int = 10,
    *,
    on: NoiseSchedule | None = None,
    level_of: NoiseSchedule | Callable[[float], Level] | None = None,
    prediction_type: str = "epsilon",
    model: Analytic | None = None,
    noise: Tensor | None = None,
    all_calls: bool = False,
    x: Tensor | None = None,
    **options,
) -> Tensor:
    """States [steps + 1, B, ...] of a run from ``start()`` on the reference backend in float64.

    On ``diffusers_schedule()`` with the mixture unless told otherwise; ``level_of`` is what the model takes the levels
    from, ``noise`` [>= calls with noise, B, ...] is z, ``all_calls`` adds what every call of the model leads to.
    """
    from pydenoise import step_row
    from pydenoise.samplers.runtime import Sampler

    on = diffusers_schedule() if on is None else on
    denoiser = (model or mixture()).denoiser(level_of or on, prediction_type)
    sampler = Sampler(denoiser, on, solver, num_steps, prediction_type=prediction_type, backend="reference", **options)
    needed = int((sampler.plan.table[:, step_row.NOISE] != 0).sum())
    x = start() if x is None else x
    states = [x]
    run = sampler.sample(
        x,
        noise=noise[:needed] if needed else None,
        return_trajectory=True,
        callback=lambda info: states.append(info.sample.clone()),
    )
    return torch.stack(states) if all_calls else run.states


def diffusers_trajectory(
    scheduler: object, num_steps: int, *, prediction_type: str = "epsilon", model: Callable | None = None, **step
) -> Tensor:
    """The states after every call of a diffusers scheduler whose betas are ``diffusers_schedule()``'s, as above.

    ``noise`` among the arguments of ``step`` is given call by call as ``variance_noise``. Its tables become float64, so
    that its coefficients do not round.
    """
    for table in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).double())
    noise = step.pop("noise", None)
    model = mixture().denoiser(diffusers_schedule(), prediction_type) if model is None else model
    scheduler.set_timesteps(num_steps)
    states = [start()]
    for call, t in enumerate(scheduler.timesteps):
        given = {} if noise is None else {"variance_noise": noise[call]}
        output = model(states[-1], t)
        states.append(scheduler.step(output, t, states[-1], **step, **given).prev_sample)
    return torch.stack(states)


# --------------------------------------------------------------------------------------------------------------- order


def continuous_level(t: float, beta_min: float = 0.1, beta_max: float = 20.0) -> Level:
    """The variance-preserving level at time t in (0, 1] of beta(t) = beta_min + t (beta_max - beta_min)."""
    log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
    return Level(math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))


def uniform_grid(num_steps: int, begin: float = 0.8, end: float = 0.05, kind: str = "vp") -> NoiseSchedule:
    """A schedule whose levels are num_steps + 1 equal steps of log(alpha / sigma).

    Sampling at the times ``num_steps ... 1`` with the first level as the end of the last step takes exactly these
    steps. ``begin`` and ``end`` are times of ``continuous_level``. For "ve" and "flow" the ratios sigma / alpha are the
    same, so that the flow is; take the times from ``schedule.times``.
    """
    high, low = continuous_level(begin).log_snr, continuous_level(end).log_snr
    lambdas = [low + (high - low) * k / num_steps for k in range(num_steps + 1)]
    levels = [Level.of_log_snr(value, kind) for value in lambdas]
    alphas, sigmas = torch.tensor(levels, dtype=torch.float64).unbind(1)
    return NoiseSchedule(kind, alphas.contiguous(), sigmas.contiguous())


def error(
    run: Callable[[NoiseSchedule, list[float], Tensor], Tensor],
    num_steps: int,
    *,
    begin: float = 0.8,
    end: float = 0.05,
    kind: str = "vp",
) -> float:
    """Mean absolute error of ``run(schedule, times, x) -> result`` against the exact flow of ``gaussian()``.

    ``times`` descend to the last but one level of ``schedule``; the run ends at ``schedule.first``.
    """
    grid = uniform_grid(num_steps, begin, end, kind)
    times = grid.times.flip(0)[:-1].tolist()
    x = start() * grid.initial_scale if kind == "ve" else start()
    exact = gaussian().flow(x, grid.last, grid.first)
    return float((run(grid, times, x) - exact).abs().mean())


def order(run: Callable[[NoiseSchedule, list[float], Tensor], Tensor], **options) -> float:
    """log2 of the ratio of the errors at 64 and at 128 steps."""
    few, many = (error(run, steps, **options) for steps in STEPS)
    return math.log2(few / many)


def run_with(solver: object, *, model: Analytic | None = None, prediction_type: str = "epsilon", **options) -> Callable:
    """The ``run`` of ``error`` and ``order`` for a solver, on the reference backend in float64."""
    from pydenoise.samplers.runtime import Sampler

    model = gaussian() if model is None else model

    def run(grid: NoiseSchedule, times: list[float], x: Tensor) -> Tensor:
        denoiser = model.denoiser(grid, prediction_type)
        sampler = Sampler(
            denoiser, grid, solver, timesteps=times, prediction_type=prediction_type, backend="reference", **options
        )
        return sampler.sample(x)

    return run
