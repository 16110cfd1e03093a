"""Our solvers and diffusers' schedulers, run with analytic models in float64."""

from collections.abc import Sequence

import torch
from convergence import Analytic, mixture, schedule
from torch import Tensor

from pydenoise.samplers import Sampler
from pydenoise.samplers.levels import Level, NoiseSchedule

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def sampler(
    solver,
    steps: int | None = 10,
    levels: NoiseSchedule | None = None,
    prediction_type: str = "epsilon",
    model: Analytic | None = None,
    **options,
) -> Sampler:
    """A solver of ours; by default on the golden runs' schedule and mixture."""
    levels = schedule() if levels is None else levels
    denoiser = (model or mixture()).denoiser(levels, prediction_type)
    return Sampler(denoiser, levels, solver, steps, prediction_type=prediction_type, backend="reference", **options)


def published_levels() -> NoiseSchedule:
    """The golden runs' levels: alphas_cumprod as float32 products, whose smallest sigma is 3e-4 off."""
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).double())


def schedule_of(scheduler) -> NoiseSchedule:
    """A scheduler's own levels, from its float32 products."""
    return NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double())


def multistep(
    scheduler,
    num_steps: int,
    model: Analytic,
    x: Tensor,
    prediction_type: str = "epsilon",
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """The states [num_steps + 1, ...] of a scheduler that works on x = alpha x0 + sigma noise."""
    scheduler.set_timesteps(num_steps)
    states = [x]
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i].double())
        output = model.output(x, Level(float(alpha), float(sigma)), prediction_type)
        given = {} if noise is None else {"variance_noise": noise[i]}
        x = scheduler.step(output, t, x, return_dict=False, **given)[0]
        states.append(x)
    return torch.stack(states)


def karras_style(
    scheduler, num_steps: int, model: Analytic, x: Tensor, prediction_type: str = "epsilon", **options
) -> Tensor:
    """The result of a scheduler that works on x0 + sigma noise and ends at sigma 0, from a variance-preserving x."""
    scheduler.set_timesteps(num_steps)
    first = float(scheduler.sigmas[0].double())
    x = x * (1 + first**2) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i].double())
        level = Level((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5)
        scheduler.scale_model_input(x, t)  # it warns otherwise; its result is float32
        output = model.output(x * level.alpha, level, prediction_type)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x
