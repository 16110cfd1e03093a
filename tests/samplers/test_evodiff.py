"""EVODiff: golden results on both grids, a plain restatement, and what its dot products may not see."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pydenoise.samplers import DPMSolverPP, EVODiff, NoiseSchedule, Sampler, evodiff
from pydenoise.samplers.levels import Level

sys.path.insert(0, str(Path(__file__).parent))
from convergence import error, gaussian, golden, mixture, run_with, schedule, start, tensor  # noqa: E402
from side_by_side import sampler  # noqa: E402


def dot(a, b):
    return (a * b).flatten(2).sum(2)[:, :, None, None]


def mixed(step, alike):
    return (1 - step["trust"]) * step["base"] + step["trust"] * alike.clamp(-2, 2)


def restated(sigmas, x, x0_of):
    """The states at every level but the first, as the paper has them: with tensors, not with their dot products."""
    count = len(sigmas) - 1
    m1 = x0_of(x, sigmas[0])
    x = sigmas[1] / sigmas[0] * x + (1 - sigmas[1] / sigmas[0]) * m1
    m0, states = x0_of(x, sigmas[1]), [x]
    for s1, s0, s in zip(sigmas, sigmas[1:-1], sigmas[2:-1], strict=False):
        h, q, spread = 1 / s - 1 / s0, s / s0, math.log(s1 / s0) / math.log(s0 / s)
        trust = 0.5 * (1 - ((s + sigmas[-1]) / (sigmas[0] + sigmas[-1])) ** 2)
        step = {"trust": trust, "base": math.sqrt(q / (s0 / s1))}
        euler = q * x + s * h * m0
        r1 = mixed(step, dot(m0, m1) / dot(m1, m1))
        d1, ri = m0 - r1 * m1, torch.sigmoid(r1.abs() / 4) * spread
        mt = x0_of(euler + s * h / (2 * ri) * d1, s)
        d2 = mt - mixed(step, dot(mt, m0) / dot(m0, m0)) * m0
        back, ahead = d1 / (spread * h), spread * d2 / h
        ratio = dot(ahead + back, ahead - back) / dot(ahead - back, ahead - back)
        eta = torch.sigmoid((ratio.clamp(-2, 2) / 2).abs()) / 2
        slope = -eta / spread * d1 + spread * (1 - eta) * d2
        rest = s * h / (2 * ri) * (d1 - slope)
        shift = ((dot(rest, d1) / dot(d1, d1)).clamp(-2, 2) / (h * s)).abs() - 0.5
        zeta = torch.sigmoid(shift)
        if count > 20:
            difference = (m0 - m1) / h
            along = (dot(m0, difference) / dot(difference, difference)).clamp(-2, 2)
            zeta = torch.sigmoid(-shift * torch.sigmoid(along * (2 - q**2)))
        x = euler + s * h / (2 * zeta) * slope
        m1, m0 = m0, mt
        states.append(x)
    s0, s = sigmas[-2:]
    q, h = s / s0, 1 / s - 1 / s0
    share = 1 - 0.5 * math.sqrt(q if q < 0.5 else q - 0.5)
    x = (1 - math.sqrt(s * s0)) * (q * x + s * h * m0) + s * h / 2 * (m0 - share * m1)
    return [*states, x]


def ve_run(sigmas, **options):
    levels = NoiseSchedule.from_sigmas(sigmas)
    return sampler(EVODiff(), None, levels, "sample", timesteps=list(sigmas[:-1]), **options)


@pytest.mark.parametrize("grid", ["logSNR", "edm"])
@pytest.mark.parametrize("steps", [5, 10])
def test_golden(grid, steps):
    sigmas = tensor(f"repo_evodiff_{grid}_{steps}_sigmas").tolist()
    run = ve_run(sigmas)
    assert run.plan.calls == steps
    result = run.sample(start() * sigmas[0])
    assert_close(result, tensor(f"repo_evodiff_{grid}_{steps}"), rtol=0, atol=1e-11)
    assert_close(result, tensor(f"own_evodiff_{grid}_{steps}")[-1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("grid", ["logSNR", "edm"])
def test_own_grids(grid):
    """The public code keeps its sigmas in float32."""
    sigmas = tensor(f"repo_evodiff_{grid}_10_sigmas")
    spacing = {"logSNR": "uniform_log_snr", "edm": "karras"}[grid]
    times = EVODiff(spacing=spacing).timesteps(NoiseSchedule.karras(), 10)
    assert_close(torch.tensor(times, dtype=torch.float64), sigmas[:-1], rtol=3e-6, atol=0)


@pytest.mark.parametrize("steps", [2, 3, 8, 20, 21, 25])
def test_restated(steps):
    """Below and above the 20 steps where zeta changes; two steps have no corrector."""
    sigmas = [*EVODiff().timesteps(NoiseSchedule.karras(), steps), 0.002]
    x = start() * sigmas[0]
    expected = restated(sigmas, x, lambda x, s: mixture().x0(x, Level(1.0, s)))
    assert_close(ve_run(sigmas).sample(x), expected[-1], rtol=0, atol=1e-10)


def test_coefficients_on_a_device(monkeypatch):
    """There they are torch's; on the host NumPy's."""
    sigmas = [*EVODiff().timesteps(NoiseSchedule.karras(), 22), 0.002]
    expected = ve_run(sigmas).sample(start() * 80)
    monkeypatch.setattr(evodiff, "_array", lambda tensor: tensor)
    assert_close(ve_run(sigmas).sample(start() * 80), expected, rtol=0, atol=1e-10)


def test_golden_errors():
    """On a variance-preserving schedule: the plateau that independent float64 code has."""
    for steps, expected in zip(golden()["conv_N"][:4], golden()["conv_gauss_0.8_0.05_l_EVODiff"][:4], strict=True):
        assert error(run_with(EVODiff()), int(steps)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_other_kinds_are_the_same_in_x_over_alpha(kind):
    sigmas = [*EVODiff().timesteps(NoiseSchedule.karras(), 7), 0.002]
    levels = [Level.of_log_snr(-math.log(s), kind) for s in reversed(sigmas)]
    alphas, noise = torch.tensor(levels, dtype=torch.float64).unbind(1)
    grid = NoiseSchedule(kind, alphas.contiguous(), noise.contiguous())
    run = sampler(EVODiff(), None, grid, "flow", timesteps=grid.times.flip(0)[:-1].tolist())
    x = start() * sigmas[0]
    assert_close(run.sample(x * levels[-1].alpha) / levels[0].alpha, ve_run(sigmas).sample(x), rtol=0, atol=1e-10)


def test_states_are_predictions_until_the_end():
    """What the model sees; the first of them and the last are states of the solver too."""
    sigmas = tensor("repo_evodiff_edm_5_sigmas").tolist()
    seen = []

    def denoiser(x, t):
        seen.append(x.clone())
        return mixture().x0(x, Level(1.0, float(t[0])))

    levels = NoiseSchedule.from_sigmas(sigmas)
    run = Sampler(denoiser, levels, EVODiff(), timesteps=sigmas[:-1], prediction_type="sample", backend="reference")
    result = run.sample(start() * 80, return_trajectory=True)
    assert result.states.shape[0] == 6 and len(seen) == 5
    assert_close(result.states[:-1], torch.stack(seen), rtol=0, atol=0)
    own = tensor("own_evodiff_edm_5")
    assert_close(result.states[[1, 5]], own[[0, 4]], rtol=0, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_that_do_not_change(value, dtype):
    """m0 == m1, and all zero: every ratio of dot products is 0 / 0, and nothing may become NaN."""
    levels = NoiseSchedule.karras()
    for steps in (4, 22):
        run = Sampler(lambda x, t: torch.full_like(x, value), levels, EVODiff(), steps, prediction_type="sample",
                      backend="reference")  # fmt: skip
        result = run.sample((start() * 80).to(dtype))
        assert result.isfinite().all() and (result - value).abs().max() < 1.0


def test_channels_and_samples_have_coefficients_of_their_own():
    """Groups are (sample, channel): what one does leaves the others alone."""
    sigmas = [*EVODiff().timesteps(NoiseSchedule.karras(), 6), 0.002]
    levels = NoiseSchedule.from_sigmas(sigmas)
    model = gaussian()  # its elements are independent, so channels meet in the dot products only

    def denoiser(x, t):
        return model.x0(x, Level(1.0, float(t[0])))

    run = Sampler(denoiser, levels, EVODiff(), timesteps=sigmas[:-1], prediction_type="sample", backend="reference")
    x = start() * 80
    changed = x.clone()
    changed[1, 0] *= -1.5
    first, second = run.sample(x), run.sample(changed)
    same = torch.ones(3, 2, dtype=torch.bool)
    same[1, 0] = False
    assert_close(first[same], second[same], rtol=0, atol=0)
    assert (first[1, 0] - second[1, 0]).abs().max() > 1e-4
    assert_close(run.sample(x, max_batch=2), first, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("steps", [10, 20, 25])
def test_float32_is_close_to_float64(steps, backend):
    """Also where x0 hardly changes between steps, so that the square of its change is 1e-7 of its own."""
    sigmas = [*EVODiff().timesteps(NoiseSchedule.karras(), steps), 0.002]
    levels = NoiseSchedule.from_sigmas(sigmas)
    exact = ve_run(sigmas).sample(start() * 80)
    run = Sampler(mixture().denoiser(levels, "sample"), levels, EVODiff(), timesteps=sigmas[:-1],
                  prediction_type="sample", backend=backend)  # fmt: skip
    single = run.sample((start() * 80).float())
    assert (single.double() - exact).abs().max() < 2e-6 * exact.abs().max()


def test_clip_and_guidance_act_on_x0():
    """Guidance of a model with itself changes nothing; a clip far out neither, one close by does."""
    sigmas = [*EVODiff().timesteps(NoiseSchedule.karras(), 6), 0.002]
    x = start() * 80
    plain = ve_run(sigmas).sample(x)
    guided = ve_run(sigmas, guidance_scale=3.0).sample(x, conditioning={}, unconditional={})
    assert_close(guided, plain, rtol=0, atol=1e-10)
    assert_close(ve_run(sigmas, clip=50.0).sample(x), plain, rtol=0, atol=1e-12)
    clipped = ve_run(sigmas, clip=0.5).sample(x)
    sized = restated(sigmas, x, lambda x, s: mixture().x0(x, Level(1.0, s)).clamp(-0.5, 0.5))
    assert_close(clipped, sized[-1], rtol=0, atol=1e-10)
    previews = []
    ve_run(sigmas).sample(x, preview=True, callback=lambda info: previews.append(info.x0.clone()))
    seen = restated(sigmas, x, lambda x, s: mixture().x0(x, Level(1.0, s)))
    assert_close(previews[1], mixture().x0(seen[0], Level(1.0, sigmas[1])), rtol=0, atol=1e-10)


def test_bad_input():
    with pytest.raises(ValueError, match="num_steps: EVODiff needs at least 2 steps, got 1"):
        sampler(EVODiff(), None, timesteps=[500.0])
    with pytest.raises(ValueError, match="timesteps: EVODiff cannot begin at pure noise .time 1000"):
        sampler(EVODiff(), 5, NoiseSchedule.flow(), "flow")
    with pytest.raises(ValueError, match=r"x: EVODiff needs samples \[B, C, ...\], got \(3,\)"):
        sampler(EVODiff(), 5).sample(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="spacing: expected one of"):
        EVODiff(spacing="logSNR")


def test_to_no_noise():
    """``final="zero"`` is the limit of ever smaller ends; the last step then moves past x0 as the formula says."""
    times = EVODiff().timesteps(schedule(), 8)
    result = sampler(EVODiff(final="zero"), None, timesteps=times).sample(start())
    levels = NoiseSchedule.from_sigmas([*[math.exp(-schedule().log_snr(t)) for t in times], 1e-9])
    x = start() / schedule().level(times[0]).alpha
    limit = sampler(EVODiff(), None, levels, "sample", timesteps=levels.times.flip(0)[:-1].tolist()).sample(x)
    assert_close(result, limit, rtol=0, atol=1e-4)
    assert (result - sampler(DPMSolverPP(2), 8).sample(start())).abs().mean() < 0.2
