"""UniPC: golden trajectories, diffusers side by side, orders of convergence, exactness for polynomials."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pydenoise import step_row as C
from pydenoise.samplers import NoiseSchedule, Sampler, UniPC
from pydenoise.samplers.levels import Level

sys.path.insert(0, str(Path(__file__).parent))
import side_by_side  # noqa: E402
from convergence import gaussian, golden, mixture, order, run_with, schedule, start, tensor  # noqa: E402
from side_by_side import published_levels, sampler  # noqa: E402

diffusers = pytest.importorskip("diffusers")
KINDS = (("vp", "epsilon"), ("ve", "sample"), ("flow", "flow"))


@pytest.mark.parametrize(("variant", "final"), [("bh1", "sigma_min"), ("bh2", "zero")])
def test_golden(variant, final):
    # The golden runs took their coefficients from float32 tables and called the model at float64 levels.
    solver = UniPC(2, variant, final=final)
    run = Sampler(mixture().denoiser(schedule()), published_levels(), solver, 10, backend="reference")
    assert list(run.plan.times) == golden()["df_dpmpp_zero_N10_t"].tolist()
    states = run.sample(start(), return_trajectory=True).states
    assert_close(states, tensor(f"df_unipc2_{variant}_N10"), rtol=0, atol=1.1e-6)


@pytest.mark.parametrize(
    ("solver", "options", "steps"),
    [
        (UniPC(1), {"solver_order": 1}, 10),
        (UniPC(3), {"solver_order": 3}, 10),
        (UniPC(3, "bh1", final="sigma_min"),
         {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 20),
        (UniPC(3, final="sigma_min", lower_order_final=False),
         {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, 12),
        (UniPC(2, "bh1", final="sigma_min", lower_order_final=False),
         {"solver_type": "bh1", "lower_order_final": False, "final_sigmas_type": "sigma_min"}, 12),
        (UniPC(3, corrector=False), {"solver_order": 3, "disable_corrector": list(range(10))}, 10),
        (UniPC(2, spacing="trailing"), {"timestep_spacing": "trailing"}, 10),
        (UniPC(2, spacing="leading", steps_offset=1), {"timestep_spacing": "leading", "steps_offset": 1}, 10),
        (UniPC(2, spacing="karras"), {"use_karras_sigmas": True}, 10),
    ],
    ids=["1", "3", "3 bh1", "3 full order", "2 bh1 full order", "predictor", "trailing", "leading", "karras"],
)  # fmt: skip
def test_options_against_diffusers(solver, options, steps):
    scheduler = diffusers.UniPCMultistepScheduler(**side_by_side.LINEAR, **options)
    expected = side_by_side.multistep(scheduler, steps, mixture(), start())
    states = sampler(solver, steps, side_by_side.schedule_of(scheduler)).sample(start(), return_trajectory=True).states
    assert_close(states, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_against_diffusers(prediction_type):
    scheduler = diffusers.UniPCMultistepScheduler(**side_by_side.LINEAR, prediction_type=prediction_type)
    expected = side_by_side.multistep(scheduler, 10, mixture(), start(), prediction_type)
    run = sampler(UniPC(2), 10, side_by_side.schedule_of(scheduler), prediction_type)
    assert_close(run.sample(start(), return_trajectory=True).states, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("number", [2, 3])
def test_flow_against_diffusers(number):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=number
    )
    expected = side_by_side.multistep(scheduler, 10, mixture(), start(), "flow")[-1]
    times = (scheduler.sigmas[:-1].double() * 1000).tolist()
    assert times[0] < 1000, "diffusers keeps off pure noise"
    run = sampler(UniPC(number), None, NoiseSchedule.flow(), "flow", timesteps=times)
    assert_close(run.sample(start()), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"order": 1, "corrector": False}, 0.97, 1.03),
        ({"order": 1}, 1.85, 2.15),
        ({"order": 2, "corrector": False}, 1.85, 2.15),
        ({"order": 2}, 2.85, 3.15),
        ({"order": 3, "corrector": False}, 2.8, 3.4),
        ({"order": 3}, 3.6, 4.2),
    ],
    ids=["UniP-1", "UniPC-1", "UniP-2", "UniPC-2", "UniP-3", "UniPC-3"],
)
def test_order_of_convergence(options, low, high, variant, kind):
    """The corrector adds one to the predictor's order; lower orders at the end would take that away."""
    solver = UniPC(**options, variant=variant, final="sigma_min", lower_order_final=False)
    assert low < order(run_with(solver, prediction_type=kind[1]), kind=kind[0]) < high


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_correctors_are_exact_where_x0_is_a_polynomial(variant):
    """UniC-p is exact for an x0 of degree p in the log SNR, UniP-3 for one of degree 2: on an uneven grid."""
    levels, times, final = schedule(), [900.0, 800.0, 640.0, 570.0, 300.0], 150.0
    ends = [levels.level(t) for t in [*times, final]]

    def x0_at(log_snr):
        return 0.3 + 0.7 * log_snr + 0.2 * log_snr**2 - 0.1 * log_snr**3

    def denoiser(x, t):
        return torch.full_like(x, x0_at(levels.log_snr(float(t[0]))))

    solver = UniPC(3, variant, final=final, lower_order_final=False)
    run = Sampler(denoiser, levels, solver, timesteps=times, prediction_type="sample", backend="reference")
    plan = run.plan
    corrected, past = start(), [None] * 3
    for i, (level, row) in enumerate(zip(plan.levels, plan.table, strict=True)):
        m = x0_at(level.log_snr)
        if 0 < i < 4:  # a corrector of order i + 1 or 3, from the sample corrected before
            kept = float(row[C.KEPT_BASE]) * corrected + float(row[C.KEPT_M]) * m
            kept = kept + sum(float(row[C.KEPT_HISTORY + j]) * h for j, h in enumerate(past) if h is not None)
            if i == 3:
                assert_close(kept, exact(x0_at, ends[i - 1], level, corrected), rtol=0, atol=1e-6)
            corrected = kept
        past[int(row[C.SLOT])] = m
    states = run.sample(start(), return_trajectory=True).states
    assert states.isfinite().all()


def exact(x0_at, level, target, x):
    """x' of dx / dlambda = ... for an x0 that is known as a function of lambda."""
    nodes = torch.linspace(level.log_snr, target.log_snr, 4001, dtype=torch.float64)
    integral = torch.trapezoid((nodes - target.log_snr).exp() * x0_at(nodes), nodes)
    return target.sigma / level.sigma * x + target.alpha * integral


def test_one_launch_a_step():
    """A row holds the corrector, whose result is kept, and the predictor; there is a slot for each x0 that it reads."""
    plan = sampler(UniPC(3), 6).plan
    assert plan.calls == 6 and plan.slots == 3 and plan.uses_base and all(plan.ends) and not plan.needs_noise
    first, second, last = plan.table[0], plan.table[1], plan.table[-1]
    assert float(first[C.KEPT_SAMPLE]) == 1 and float(first[C.BASE]) == 0
    assert float(second[C.SAMPLE]) == 0 and float(second[C.BASE]) != 0 and float(second[C.KEPT_M]) != 0
    kept = [C.KEPT_SAMPLE, C.KEPT_BASE, C.KEPT_M, C.KEPT_OUT, *range(C.KEPT_HISTORY, C.WIDTH)]
    assert not last[kept].any(), "nothing reads what the last step would keep"
    assert not sampler(UniPC(2, corrector=False)).plan.uses_base


def test_begins_at_pure_noise():
    levels = NoiseSchedule.linear().zero_terminal_snr()
    exact_flow = gaussian().flow(start(), levels.last, Level.clean())
    for number in (1, 2, 3):
        result = sampler(UniPC(number), 20, levels, "v_prediction", model=gaussian()).sample(start())
        assert (result - exact_flow).abs().mean() < 0.06
    with pytest.raises(ValueError, match="variant: 'bh1' has no B.h. for a step from pure noise"):
        sampler(UniPC(2, "bh1", final="sigma_min"), 20, levels, "v_prediction")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_flow_from_pure_noise(number):
    """Where alpha is 0 at first, the default of flow models; the mean error falls with the steps."""
    levels = NoiseSchedule.flow()
    exact = gaussian().flow(start(), levels.last, Level.clean())
    few, many = (
        float((sampler(UniPC(number), steps, levels, "flow", gaussian()).sample(start()) - exact).abs().mean())
        for steps in (10, 40)
    )
    assert many < few / 2 and many < 0.1


def test_float32_is_close_to_float64():
    for number in (1, 2, 3):
        exact_run = sampler(UniPC(number), model=gaussian()).sample(start())
        single = sampler(UniPC(number), model=gaussian()).sample(start().float())
        assert (single.double() - exact_run).abs().max() < 4e-6 * exact_run.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "order: expected one of 1, 2, 3, got 0"),
        ({"variant": "bh3"}, "variant: expected one of 'bh1', 'bh2', got 'bh3'"),
        ({"variant": "bh1"}, "final: 'zero' is an infinite step.*'bh2' supports it, and 'bh1' supports 'sigma_min'"),
        ({"final": "sigma_max"}, "final: expected 'zero' or 'sigma_min' or a time"),
        ({"spacing": "karass"}, "spacing: expected one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        UniPC(**options)
    with pytest.raises(TypeError, match="corrector: expected a bool"):
        UniPC(corrector=None)


def test_bh1_to_a_clean_time_is_refused():
    levels = NoiseSchedule.flow()
    solver = UniPC(2, "bh1", final=0)
    with pytest.raises(ValueError, match="variant: 'bh1' has no B.h."):
        sampler(solver, None, levels, "flow", timesteps=[900.0, 500.0])
    assert math.isinf(levels.level(0).log_snr)
