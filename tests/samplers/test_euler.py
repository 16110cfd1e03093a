"""Euler, ancestral Euler and Heun on all three kinds of schedule, against diffusers and plain restatements."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pydenoise import step_row as C
from pydenoise.samplers import DPMSolverPP, Euler, EulerAncestral, Heun, NoiseSchedule, Sampler
from pydenoise.samplers.levels import Level

sys.path.insert(0, str(Path(__file__).parent))
import side_by_side  # noqa: E402
from convergence import gaussian, mixture, order, run_with, schedule, start, tensor  # noqa: E402
from side_by_side import sampler  # noqa: E402

diffusers = pytest.importorskip("diffusers")
KINDS = (("vp", "epsilon"), ("ve", "sample"), ("flow", "flow"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
def test_order_of_convergence(kind):
    options = {"kind": kind[0]}
    assert 0.97 < order(run_with(Euler(final="sigma_min"), prediction_type=kind[1]), **options) < 1.03
    assert 0.97 < order(run_with(EulerAncestral(final="sigma_min", eta=0.0), prediction_type=kind[1]), **options) < 1.03
    assert 1.85 < order(run_with(Heun(final="sigma_min"), prediction_type=kind[1]), **options) < 2.15


# -------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("solver", "name", "options"),
    [
        (Euler(), "EulerDiscreteScheduler", {}),
        (Euler(spacing="trailing"), "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        (Euler(spacing="leading", steps_offset=1), "EulerDiscreteScheduler",
         {"timestep_spacing": "leading", "steps_offset": 1}),
        (Euler(spacing="karras"), "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        (Heun(), "HeunDiscreteScheduler", {}),
        (Heun(spacing="trailing"), "HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
        (Heun(spacing="karras"), "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
    ids=["Euler", "Euler trailing", "Euler leading", "Euler karras", "Heun", "Heun trailing", "Heun karras"],
)  # fmt: skip
def test_against_diffusers(solver, name, options, prediction_type):
    scheduler = getattr(diffusers, name)(**side_by_side.LINEAR, **options, prediction_type=prediction_type)
    expected = side_by_side.karras_style(scheduler, 10, mixture(), start(), prediction_type)
    run = sampler(solver, 10, side_by_side.schedule_of(scheduler), prediction_type)
    assert run.plan.calls == len(scheduler.timesteps)
    assert_close(run.sample(start()), expected, rtol=0, atol=5e-6)


def test_clip_against_diffusers():
    """A clamped x0 with the slope that follows from it."""
    options = {"clip_sample": True, "clip_sample_range": 0.5, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.HeunDiscreteScheduler(**options)
    expected = side_by_side.karras_style(scheduler, 10, gaussian(), start())
    levels = side_by_side.schedule_of(scheduler)
    result = sampler(Heun(), 10, levels, model=gaussian(), clip=0.5).sample(start())
    assert_close(result, expected, rtol=0, atol=5e-6)
    assert (result - sampler(Heun(), 10, levels, model=gaussian()).sample(start())).abs().max() > 0.1


def test_ancestral_against_diffusers():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**side_by_side.LINEAR)
    generator = torch.Generator().manual_seed(3)
    expected = side_by_side.karras_style(scheduler, 10, mixture(), start(), generator=generator)
    generator.manual_seed(3)
    noise = [torch.randn(start().shape, generator=generator, dtype=torch.float64) for _ in range(10)]
    run = sampler(EulerAncestral(), 10, side_by_side.schedule_of(scheduler))
    assert_close(run.sample(start(), noise=noise[:9]), expected, rtol=0, atol=5e-6)


def test_flow_against_diffusers():
    """diffusers' Euler for flow models; Heun's is below."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = start()
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i].double())
        x = scheduler.step(mixture().output(x, Level(1 - sigma, sigma), "flow"), t, x, return_dict=False)[0]
    levels = NoiseSchedule.flow(shift=3.0)
    times = (scheduler.sigmas[:-1].double() * 1000).tolist()
    assert times[0] == 1000
    result = sampler(Euler(), None, levels, "flow", timesteps=times).sample(start())
    assert_close(result, x, rtol=0, atol=3e-6)


# -------------------------------------------------------------------------------------------------------- restatements


def test_heun_as_karras_algorithm_1():
    """On its own grid, with no noise at the end, where the last step is Euler's."""
    count, model = 9, gaussian()
    sigmas = [(80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(count)] + [0.0]
    x = start() * 80
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - model.x0(x, Level(1.0, now))) / now
        guess = x + (then - now) * slope
        if then > 0:
            slope = (slope + (guess - model.x0(guess, Level(1.0, then))) / then) / 2
        x = x + (then - now) * slope
    run = sampler(Heun(), count, NoiseSchedule.karras(), "sample", model=model)
    assert run.plan.initial_scale == 80 and run.plan.calls == 2 * count - 1
    assert run.plan.ends == (False, True) * (count - 1) + (True,)
    assert_close(run.sample(start() * 80), x, rtol=0, atol=1e-11)
    states = run.sample(start() * 80, return_trajectory=True).states
    assert states.shape[0] == count + 1
    assert_close(states[-1], x, rtol=0, atol=1e-11)


def test_heun_of_a_flow_averages_velocities():
    """Also from pure noise, where alpha is 0."""
    model, levels = mixture(), NoiseSchedule.flow()
    times = [1000.0, 800.0, 450.0, 200.0]
    x = start()
    for now, then in zip(times, [*times[1:], 0.0], strict=False):
        now, then = now / 1000, then / 1000
        velocity = model.output(x, Level(1 - now, now), "flow")
        guess = x + (then - now) * velocity
        if then > 0:
            velocity = (velocity + model.output(guess, Level(1 - then, then), "flow")) / 2
        x = x + (then - now) * velocity
    result = sampler(Heun(), None, levels, "flow", timesteps=times).sample(start())
    assert_close(result, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
def test_euler_is_the_first_order_of_others(kind):
    levels = {"vp": schedule(), "ve": NoiseSchedule.karras(), "flow": NoiseSchedule.flow()}[kind[0]]
    x = start() * levels.initial_scale
    times = Euler().timesteps(levels, 7)
    results = [
        sampler(solver, None, levels, kind[1], timesteps=times).sample(x)
        for solver in (Euler(), DPMSolverPP(1), EulerAncestral(eta=0.0))
    ]
    assert_close(results[1], results[0], rtol=0, atol=1e-11)
    assert_close(results[2], results[0], rtol=0, atol=1e-11)


def test_ancestral_step_is_ddpm():
    """With eta = 1, on a variance-preserving schedule: mean and variance of the posterior of Ho et al., equation 7."""
    levels = schedule()
    plan = sampler(EulerAncestral(final="sigma_min"), None, levels, "sample", timesteps=[900.0, 500.0, 100.0]).plan
    ends = [*plan.levels, levels.first]
    for row, level, target in zip(plan.table, ends, ends[1:], strict=False):
        beta = 1 - (level.alpha / target.alpha) ** 2
        assert float(row[C.M]) == pytest.approx(target.alpha * beta / level.sigma**2)
        assert float(row[C.SAMPLE]) == pytest.approx(math.sqrt(1 - beta) * target.sigma**2 / level.sigma**2)
        assert float(row[C.NOISE]) == pytest.approx(math.sqrt(beta) * target.sigma / level.sigma)


def test_part_of_the_noise():
    """eta = 0.5 by hand, in x / alpha."""
    model, levels, noise = mixture(), NoiseSchedule.karras(), tensor("an_noise")
    times = Euler().timesteps(levels, 6)
    x = start() * 80
    for i, (now, then) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        up = 0.5 * math.sqrt(then**2 * (now**2 - then**2) / now**2)
        x = x + (math.sqrt(then**2 - up**2) - now) / now * (x - model.x0(x, Level(1.0, now))) + up * noise[i]
    run = sampler(EulerAncestral(eta=0.5), 6, levels, "sample")
    assert_close(run.sample(start() * 80, noise=noise[:5]), x, rtol=0, atol=1e-11)


def test_begins_at_pure_noise():
    levels = NoiseSchedule.linear().zero_terminal_snr()
    exact = gaussian().flow(start(), levels.last, Level.clean())
    for solver, bound in ((Euler(), 0.2), (Heun(), 0.03)):
        run = sampler(solver, 30, levels, "v_prediction", model=gaussian())
        assert (run.sample(start()) - exact).abs().mean() < bound
    assert run.plan.ends[:3] == (True, False, True), "the first step of Heun is Euler's"
    noisy = sampler(EulerAncestral(), 30, levels, "v_prediction", model=gaussian()).sample(start(), seed=0)
    assert noisy.isfinite().all()


def test_final_levels():
    levels = NoiseSchedule.karras()
    low = sampler(Heun(final="sigma_min"), 5, levels, "sample")
    assert low.plan.calls == 10 and low.plan.times[0] == pytest.approx(80) and low.plan.times[-1] == 0.002
    exact = gaussian().flow(start() * 80, Level(1.0, 80.0), Level(1.0, 1.0))
    few, many = (sampler(Heun(final=1.0), steps, levels, "sample", model=gaussian()) for steps in (5, 10))
    assert few.plan.times[-1] == 1.0 and few.plan.calls == 10
    errors = [float((run.sample(start() * 80) - exact).abs().mean()) for run in (few, many)]
    assert errors[1] < errors[0] / 3 < 0.05


def test_float32_is_close_to_float64():
    for solver in (Euler(), Heun(), EulerAncestral(eta=0.0)):
        exact = sampler(solver, model=gaussian()).sample(start())
        single = sampler(solver, model=gaussian()).sample(start().float())
        assert (single.double() - exact).abs().max() < 4e-6 * exact.abs().max()


def test_streams():
    """What a launch reads and writes: Euler x and output; Heun the saved x and one x0 as well."""
    euler, heun = sampler(Euler()).plan, sampler(Heun()).plan
    assert euler.slots == 0 and not euler.uses_base and not euler.needs_noise
    assert heun.slots == 1 and heun.uses_base and not heun.needs_noise
    assert sampler(EulerAncestral()).plan.needs_noise and not sampler(EulerAncestral(eta=0)).plan.needs_noise


def test_bad_input():
    with pytest.raises(ValueError, match="eta: expected a number from 0 to 1, got 1.5"):
        EulerAncestral(eta=1.5)
    with pytest.raises(TypeError, match="eta: expected a number, got str"):
        EulerAncestral(eta="half")
    for solver in (Euler, EulerAncestral, Heun):
        with pytest.raises(ValueError, match="final: expected 'zero' or 'sigma_min' or a time, got 'last'"):
            solver(final="last")
        with pytest.raises(ValueError, match="spacing: expected one of"):
            solver(spacing="even")
        with pytest.raises(ValueError, match="timesteps: the last, 0.002, has no more noise than final='sigma_min'"):
            sampler(solver(final="sigma_min"), None, NoiseSchedule.karras(), "sample", timesteps=[80.0, 0.002])
    with pytest.raises(ValueError, match="spacing: 'leading' counts timesteps of a 'vp' schedule"):
        sampler(Euler(spacing="leading"), 10, NoiseSchedule.karras(), "sample")
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of x0"):
        Sampler(lambda x, t: x, NoiseSchedule.linear().zero_terminal_snr(), Heun(), 5)
