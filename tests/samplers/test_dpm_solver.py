"""DPM-Solver++: golden trajectories, diffusers side by side, orders of convergence, exactness for polynomials."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pydenoise import step_row as C
from pydenoise.samplers import DPMSolverPP, NoiseSchedule, Sampler
from pydenoise.samplers.levels import Level
from pydenoise.samplers.plan import Conversion

sys.path.insert(0, str(Path(__file__).parent))
import convergence  # noqa: E402
import side_by_side  # noqa: E402
from convergence import error, gaussian, golden, mixture, order, run_with, schedule, start, tensor  # noqa: E402
from side_by_side import published_levels, sampler  # noqa: E402

diffusers = pytest.importorskip("diffusers")
FLOAT32 = 1.1e-6  # diffusers computes in float32
KINDS = (("vp", "epsilon"), ("ve", "sample"), ("flow", "flow"))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_golden(number, final):
    # The golden runs took their coefficients from float32 tables and called the model at float64 levels.
    solver = DPMSolverPP(number, final=final)
    run = Sampler(mixture().denoiser(schedule()), published_levels(), solver, 10, backend="reference")
    assert list(run.plan.times) == golden()[f"df_dpmpp_{final}_N10_t"].tolist()
    states = run.sample(start(), return_trajectory=True).states
    assert_close(states, tensor(f"df_dpmpp{number}m_{final}_N10"), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("conv_gauss_0.8_0.05_l_DDIM", DPMSolverPP(1)),
        ("conv_gauss_0.8_0.05_l_DPM++2M", DPMSolverPP(2)),
        ("conv_gauss_0.8_0.05_l_DPM++3M", DPMSolverPP(3)),
        ("conv3_gauss_0.8_0.05_F1_eulerstart", DPMSolverPP(3)),
        ("conv3_gauss_0.8_0.05_F2_eulerstart", DPMSolverPP(3, exact_d2=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_golden_errors(name, solver):
    """The errors that independent float64 code makes; at 256 steps they are differences of 1e-7."""
    solver = DPMSolverPP(solver.order, exact_d2=solver.exact_d2, final="sigma_min", lower_order_final=False)
    for steps, expected in zip(golden()["conv_N"][:4], golden()[name][:4], strict=True):
        assert error(run_with(solver), int(steps)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
@pytest.mark.parametrize(
    ("solver", "low", "high"),
    [
        (DPMSolverPP(1, final="sigma_min"), 0.97, 1.03),
        (DPMSolverPP(2, final="sigma_min"), 1.85, 2.15),
        (DPMSolverPP(2, "heun", final="sigma_min"), 1.85, 2.15),
        (DPMSolverPP(3, final="sigma_min"), 1.85, 2.25),
        (DPMSolverPP(3, exact_d2=True, final="sigma_min"), 2.8, 4.2),
    ],
    ids=["1", "2 midpoint", "2 heun", "3 as published", "3 exact"],
)
def test_order_of_convergence(solver, low, high, kind):
    assert low < order(run_with(solver, prediction_type=kind[1]), kind=kind[0]) < high


# -------------------------------------------------------------------------------------------------- against diffusers


def theirs(steps=10, prediction_type="epsilon", noise=None, model=None, **options):
    scheduler = diffusers.DPMSolverMultistepScheduler(**side_by_side.LINEAR, prediction_type=prediction_type, **options)
    states = side_by_side.multistep(scheduler, steps, model or mixture(), start(), prediction_type, noise)
    return states, side_by_side.schedule_of(scheduler)


@pytest.mark.parametrize(
    ("solver", "options", "steps"),
    [
        (DPMSolverPP(2, "heun"), {"solver_type": "heun"}, 10),
        (DPMSolverPP(3, "heun", final="sigma_min"),
         {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"}, 10),
        (DPMSolverPP(2), {}, 20),
        (DPMSolverPP(3, final="sigma_min"), {"solver_order": 3, "final_sigmas_type": "sigma_min"}, 20),
        (DPMSolverPP(3, final="sigma_min", euler_at_final=True),
         {"solver_order": 3, "final_sigmas_type": "sigma_min", "euler_at_final": True}, 20),
        (DPMSolverPP(3, lower_order_final=False), {"solver_order": 3, "lower_order_final": False}, 8),
        (DPMSolverPP(2, spacing="trailing"), {"timestep_spacing": "trailing"}, 10),
        (DPMSolverPP(2, spacing="leading", steps_offset=1), {"timestep_spacing": "leading", "steps_offset": 1}, 10),
        (DPMSolverPP(2, spacing="karras"), {"use_karras_sigmas": True}, 10),
    ],
    ids=["heun", "heun 3", "20 steps", "3, 20 steps", "euler at final", "full order", "trailing", "leading", "karras"],
)  # fmt: skip
def test_options_against_diffusers(solver, options, steps):
    expected, levels = theirs(steps, **options)
    states = sampler(solver, steps, levels).sample(start(), return_trajectory=True).states
    assert_close(states, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_against_diffusers(prediction_type):
    expected, levels = theirs(prediction_type=prediction_type)
    run = sampler(DPMSolverPP(2), levels=levels, prediction_type=prediction_type)
    assert_close(run.sample(start(), return_trajectory=True).states, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("number", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_stochastic_against_diffusers(number, solver_type, final):
    noise = list(tensor("an_noise")[:10])
    expected, levels = theirs(
        noise=noise, algorithm_type="sde-dpmsolver++", solver_order=number, solver_type=solver_type,
        final_sigmas_type=final,
    )  # fmt: skip
    run = sampler(DPMSolverPP(number, solver_type, sde=True, final=final), levels=levels)
    given = noise[:9] if final == "zero" else noise  # the step to no noise adds none
    assert_close(run.sample(start(), noise=given, return_trajectory=True).states, expected, rtol=0, atol=3e-6)


def test_flow_against_diffusers():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, flow_shift=3.0
    )
    x = start()
    expected = side_by_side.multistep(scheduler, 10, mixture(), x, "flow")[-1]
    levels = NoiseSchedule.flow()
    times = (scheduler.sigmas[:-1].double() * 1000).tolist()
    result = sampler(DPMSolverPP(2), 10, levels, "flow", timesteps=times).sample(x)
    assert_close(result, expected, rtol=0, atol=2e-6)


def thresholded(x0, quantile, most):
    """x0 in [-s, s] and divided by s, s the quantile of |x0| in each sample (Saharia et al., 2022)."""
    s = x0.abs().flatten(1).quantile(quantile, 1).clamp(1, most).view(-1, 1, 1, 1)
    return x0.clamp(-s, s) / s


def test_dynamic_thresholding():
    """As a step by hand with 2M, and as diffusers."""
    model, quantile, most = gaussian(), 0.8, 2.5
    run = sampler(DPMSolverPP(2), 5, model=model, dynamic_threshold=quantile, dynamic_max=most)
    x, past, levels = start(), None, [*run.plan.levels, Level.clean()]
    for i, (level, target) in enumerate(zip(levels, levels[1:], strict=False)):
        x0 = thresholded(model.x0(x, level), quantile, most)
        h = target.log_snr - level.log_snr
        slope = 0.0
        if 0 < i < 4:
            slope = (x0 - past) * h / (level.log_snr - levels[i - 1].log_snr)
        x = target.sigma / level.sigma * x - target.alpha * math.expm1(-h) * (x0 + slope / 2)
        past = x0
    assert_close(run.sample(start()), x, rtol=0, atol=1e-12)
    options = {"thresholding": True, "dynamic_thresholding_ratio": quantile, "sample_max_value": most}
    expected, levels = theirs(5, model=model, **options)
    run = sampler(DPMSolverPP(2), 5, levels, model=model, dynamic_threshold=quantile, dynamic_max=most)
    assert_close(run.sample(start()), expected[-1], rtol=0, atol=3e-6)
    assert not torch.allclose(expected[-1], theirs(5, model=model)[0][-1], atol=1e-2), "the threshold changed nothing"


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize(
    "solver", [DPMSolverPP(1), DPMSolverPP(2, "heun"), DPMSolverPP(3, exact_d2=True)], ids=["1", "2 heun", "3 exact"]
)
def test_exact_where_x0_is_a_polynomial(solver, sde):
    """Steps of order k are exact for an x0 that is a polynomial of degree k - 1 in the log SNR, on an uneven grid."""
    degree = solver.order - 1
    levels = schedule()
    times = [900.0, 800.0, 640.0, 570.0, 300.0]
    solver = DPMSolverPP(solver.order, solver.solver_type, solver.exact_d2, sde, final=150.0, lower_order_final=False)

    def x0_at(log_snr):
        return 0.3 + (0.7 * log_snr if degree > 0 else 0.0) + (0.2 * log_snr**2 if degree > 1 else 0.0)

    def denoiser(x, t):
        return torch.full_like(x, x0_at(levels.log_snr(float(t[0]))))

    run = Sampler(denoiser, levels, solver, timesteps=times, prediction_type="sample", backend="reference")
    x = start()
    noise = [torch.zeros_like(x)] * 5 if sde else None
    states = run.sample(x, noise=noise, return_trajectory=True).states
    ends = [levels.level(t) for t in [*times, 150.0]]
    rate = 2 if sde else 1  # x / sigma e^-(rate - 1) lambda has the derivative rate e^(rate lambda) x0
    for i in range(degree, 5):
        level, target = ends[i], ends[i + 1]
        nodes = torch.linspace(level.log_snr, target.log_snr, 2001, dtype=torch.float64)
        decay = (rate * (nodes - target.log_snr)).exp()
        integral = torch.trapezoid(rate * decay * x0_at(nodes), nodes)
        h = target.log_snr - level.log_snr
        expected = target.sigma / level.sigma * math.exp(-(rate - 1) * h) * states[i] + target.alpha * integral
        assert_close(states[i + 1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_noise_of_the_stochastic_solver(number):
    """As much as DDPM's posterior has, whose mean a step of order 1 has as well."""
    levels = schedule()
    plan = DPMSolverPP(number, sde=True, final="sigma_min").plan(levels, [900.0, 500.0, 100.0], Conversion("sample"))
    ends = [*plan.levels, levels.first]
    for i, (level, target) in enumerate(zip(ends, ends[1:], strict=False)):
        stays = (level.alpha / target.alpha) ** 2
        small = (1 - stays) * target.sigma**2 / level.sigma**2
        assert float(plan.table[i, C.NOISE]) == pytest.approx(small**0.5, rel=1e-12)
        assert float(plan.table[i, C.SAMPLE]) == pytest.approx(stays**0.5 * (target.sigma / level.sigma) ** 2)
    assert float(plan.table[0, C.M]) == pytest.approx(ends[1].alpha * (1 - (ends[0].alpha / ends[1].alpha) ** 2)
                                                      / ends[0].sigma**2)  # fmt: skip


def test_begins_at_pure_noise():
    """Zero terminal SNR: lambda is -inf at first, which no difference of later steps may feel as NaN."""
    levels = NoiseSchedule.linear().zero_terminal_snr()
    for number in (1, 2, 3):
        run = sampler(DPMSolverPP(number), 20, levels, "v_prediction", model=gaussian())
        assert run.plan.levels[0].alpha == 0
        result = run.sample(start())
        exact = gaussian().flow(start(), levels.last, Level.clean())
        assert (result - exact).abs().mean() < (0.15 if number == 1 else 0.06)
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of x0"):
        sampler(DPMSolverPP(2), 10, levels)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_flow_from_pure_noise(number):
    """Where alpha is 0 at first, the default of flow models; the mean error falls with the steps."""
    levels = NoiseSchedule.flow()
    exact = gaussian().flow(start(), levels.last, Level.clean())
    few, many = (
        float((sampler(DPMSolverPP(number), steps, levels, "flow", gaussian()).sample(start()) - exact).abs().mean())
        for steps in (10, 40)
    )
    assert many < few / 2 and many < 0.1


def test_float32_is_close_to_float64():
    for solver in (DPMSolverPP(1), DPMSolverPP(2), DPMSolverPP(3)):
        exact = sampler(solver, model=gaussian()).sample(start())
        single = sampler(solver, model=gaussian()).sample(start().float())
        assert single.dtype == torch.float32
        assert (single.double() - exact).abs().max() < 4e-6 * exact.abs().max()


def test_shape_of_the_plan():
    for number in (1, 2, 3):
        plan = sampler(DPMSolverPP(number)).plan
        assert plan.calls == 10 and plan.slots == number - 1 and not plan.uses_base and not plan.needs_noise
        assert all(plan.ends) and plan.initial_scale == 1
    assert sampler(DPMSolverPP(2, sde=True)).plan.needs_noise
    karras = NoiseSchedule.karras()
    assert sampler(DPMSolverPP(2), 10, karras, "sample").plan.initial_scale == 80
    assert sampler(DPMSolverPP(2, final="sigma_min"), 10, karras, "sample").plan.times[0] == pytest.approx(80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order: expected one of 1, 2, 3, got 4"),
        ({"order": True}, "order: expected one of 1, 2, 3"),
        ({"solver_type": "bh1"}, "solver_type: expected one of 'midpoint', 'heun'"),
        ({"order": 1, "solver_type": "heun"}, "solver_type: 'heun' is a variant of steps of order 2"),
        ({"exact_d2": True}, "exact_d2: only order 3 has a second difference, got order 2"),
        ({"final": "one"}, "final: expected 'zero' or 'sigma_min' or a time, got 'one'"),
        ({"spacing": "cubic"}, "spacing: expected one of"),
        ({"spacing": "pndm"}, "spacing: 'pndm' belongs to PNDM"),
        ({"steps_offset": 1}, "steps_offset: only spacing 'leading' has an offset"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverPP(**options)


def test_bad_types_and_times():
    with pytest.raises(TypeError, match="sde: expected a bool, got int"):
        DPMSolverPP(sde=1)
    with pytest.raises(TypeError, match="final: expected a word or a time, got NoneType"):
        DPMSolverPP(final=None)
    with pytest.raises(TypeError, match="steps_offset: expected an int, got float"):
        DPMSolverPP(spacing="leading", steps_offset=1.0)
    with pytest.raises(ValueError, match="timesteps: the last, 0, has no more noise than final='sigma_min'"):
        sampler(DPMSolverPP(final="sigma_min"), None, timesteps=[500.0, 0.0])
    with pytest.raises(ValueError, match="final: spacing 'linspace' ends with the schedule"):
        sampler(DPMSolverPP(final=100.0))
    with pytest.raises(ValueError, match="num_steps"):
        sampler(DPMSolverPP(2), 1001)


def test_final_time():
    levels = convergence.uniform_grid(16)
    for spacing in ("uniform_log_snr", "karras"):
        run = sampler(DPMSolverPP(2, final=3.0, spacing=spacing), 5, levels, model=gaussian())
        assert run.plan.calls == 5 and run.plan.times[0] == 16 and run.plan.times[-1] > 3
    result = sampler(DPMSolverPP(2, final=0.0, spacing="uniform_log_snr"), 16, levels, model=gaussian()).sample(start())
    whole = sampler(DPMSolverPP(2, final="sigma_min"), None, levels, model=gaussian(), timesteps=range(16, 0, -1))
    assert_close(result, whole.sample(start()), rtol=0, atol=1e-10)
