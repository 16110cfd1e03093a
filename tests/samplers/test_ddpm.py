"""DDPM: golden trajectories, the five variances, diffusers' learned range, the distribution it samples, bad input."""

import math
import sys
from pathlib import Path

import pytest
import torch

import pydenoise as pdn
from pydenoise import step_row as C
from pydenoise.samplers.ddim import DDIM
from pydenoise.samplers.ddpm import DDPM, VARIANCES
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import Conversion

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

EXACT = {"rtol": 0, "atol": 1e-12}  # rounding only: the schedules hold the public codes' float32 tables
TIMES = [900.0, 600.0, 300.0, 0.0]


def noise():
    return cv.tensor("an_noise")


def plan(variance, conversion=None, times=TIMES):
    return DDPM(variance).plan(cv.schedule(), times, conversion or Conversion())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_golden(variance):
    got = cv.trajectory(DDPM(variance), noise=noise())
    torch.testing.assert_close(got, cv.tensor(f"df_ddpm_{variance}_N10"), **EXACT)


def _diffusers(monkeypatch, steps, model=None, prediction_type="epsilon", **options):
    diffusers = pytest.importorskip("diffusers")
    module = sys.modules[diffusers.DDPMScheduler.__module__]
    drawn = iter(noise())
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(drawn))
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, **options)
    return cv.diffusers_trajectory(scheduler, steps, model=model, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_clip_as_diffusers(monkeypatch, variance, prediction_type):
    options = {"clip_sample": True, "clip_sample_range": 0.4, "variance_type": variance}
    wanted = _diffusers(monkeypatch, 10, prediction_type=prediction_type, **options)
    got = cv.trajectory(DDPM(variance), clip=0.4, prediction_type=prediction_type, noise=noise())
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("spacing, steps", [("trailing", 7), ("linspace", 12)])
def test_spacings_as_diffusers(monkeypatch, spacing, steps):
    """diffusers' DDPM goes to the next time of the list, as ours does."""
    wanted = _diffusers(monkeypatch, steps, clip_sample=False, timestep_spacing=spacing)
    if spacing == "trailing":  # the last timestep is above 0, and diffusers adds noise there too
        got = cv.trajectory(DDPM(spacing=spacing), steps, noise=noise())
        torch.testing.assert_close(got[:-1], wanted[:-1], **EXACT)
        return
    torch.testing.assert_close(cv.trajectory(DDPM(spacing=spacing), steps, noise=noise()), wanted, **EXACT)


def learned(x, t, **_):
    """epsilon of the mixture, and a v that differs everywhere."""
    epsilon = cv.mixture().denoiser(cv.diffusers_schedule())(x, t)
    return torch.cat([epsilon, torch.tanh(3 * x)], 1)


def test_learned_range_as_diffusers(monkeypatch):
    wanted = _diffusers(monkeypatch, 10, model=learned, clip_sample=False, variance_type="learned_range")
    schedule = cv.diffusers_schedule()
    sampler = pdn.samplers.Sampler(learned, schedule, DDPM("learned_range"), 10, backend="reference")
    got = sampler.sample(cv.start(), noise=noise()[:9], return_trajectory=True).states
    torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("v, same", [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_ends_at_the_fixed_variances(v, same):
    schedule = cv.schedule()
    inner = cv.mixture().denoiser(schedule)

    def model(x, t):
        return torch.cat([inner(x, t), torch.full_like(x, v)], 1)

    sampler = pdn.samplers.Sampler(model, schedule, DDPM("learned_range"), 8, backend="reference")
    got = sampler.sample(cv.start(), noise=noise()[:7])
    torch.testing.assert_close(got, cv.trajectory(DDPM(same), 8, on=schedule, noise=noise())[-1], **EXACT)


def test_learned_range_says_so_in_a_single_step():
    """The only step has no noise, but the model returns its variance all the same."""
    assert (
        plan("learned_range", times=[500.0]).learned_variance and not plan("learned_range", times=[500.0]).needs_noise
    )


def test_standard_deviations():
    """sqrt of 1 - abar_t / abar_n, and of (1 - abar_n) / (1 - abar_t) of it; none in the last step."""
    bar = cv.schedule().alphas_cumprod.tolist()
    large = [math.sqrt(1 - bar[int(t)] / bar[int(n)]) for t, n in zip(TIMES, TIMES[1:], strict=False)]
    small = [
        b * math.sqrt((1 - bar[int(n)]) / (1 - bar[int(t)]))
        for b, t, n in zip(large, TIMES, TIMES[1:], strict=False)
    ]  # fmt: skip
    wanted = {"fixed_small": small, "fixed_large": large, "fixed_large_ddsm": large, "fast_ddpm": large}
    for variance, values in wanted.items():
        assert plan(variance).table[:, C.NOISE].tolist() == pytest.approx([*values, 0.0], rel=1e-12)
    table = plan("learned_range").table
    assert table[:, C.NOISE].tolist() == [1, 1, 1, 0]
    assert table[:-1, C.LOG_LARGE].exp().tolist() == pytest.approx(large, rel=1e-12)
    assert table[:-1, C.LOG_SMALL].exp().tolist() == pytest.approx(small, rel=1e-12)


def test_full_schedule_has_the_betas():
    """On neighbouring timesteps b is beta, and epsilon's mean has the published coefficients."""
    schedule = cv.schedule()
    table = DDPM("fixed_large").plan(schedule, range(999, -1, -1), Conversion()).table.flip(0)
    torch.testing.assert_close(table[1:, C.NOISE] ** 2, schedule.betas[1:], rtol=1e-9, atol=0)
    torch.testing.assert_close(table[:, C.SAMPLE], (1 - schedule.betas).rsqrt(), rtol=1e-9, atol=0)
    wanted = -schedule.betas * (1 - schedule.alphas_cumprod).rsqrt() * (1 - schedule.betas).rsqrt()
    torch.testing.assert_close(table[:, C.OUTPUT], wanted, rtol=1e-9, atol=1e-12)


def test_small_variance_is_ddim_with_eta_1():
    ours = plan("fixed_small").table
    theirs = DDIM(eta=1.0).plan(cv.schedule(), TIMES, Conversion()).table
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_fast_ddpm_clamps_to_one_or_to_the_given_clip():
    assert plan("fast_ddpm").table[:, C.CLIP].tolist() == [1.0] * 4
    assert plan("fast_ddpm", Conversion(clip=0.5)).table[:, C.CLIP].tolist() == [0.5] * 4
    assert bool((plan("fast_ddpm").table[:, C.M_X0] == 1).all())
    got = cv.trajectory(DDPM("fast_ddpm"), noise=noise())
    torch.testing.assert_close(got, cv.trajectory(DDPM("fixed_large"), clip=1.0, noise=noise()), **EXACT)


def test_ddsm_clips_only_the_result():
    """Until the last step the trajectory is the unclipped one, whose last state is then clamped."""
    clipped = cv.trajectory(DDPM("fixed_large_ddsm"), clip=0.5, noise=noise())
    free = cv.trajectory(DDPM("fixed_large"), noise=noise())
    assert float(free[-1].abs().max()) > 0.6
    torch.testing.assert_close(clipped[:-1], free[:-1], **EXACT)
    torch.testing.assert_close(clipped[-1], free[-1].clamp(-0.5, 0.5), **EXACT)


def _variance_error(variance, steps, kind):
    """Of x at the schedule's first level, for Gaussian data: a row is then an affine map of x, plus noise."""
    grid = cv.uniform_grid(steps, kind=kind)
    table = DDPM(variance).plan(grid, grid.times.flip(0).tolist(), Conversion()).table
    data = cv.gaussian().variance
    now = grid.last.alpha**2 * data + grid.last.sigma**2
    for values, time in zip(table[:-1], grid.times.flip(0).tolist(), strict=False):
        level = grid.level(time)
        gain = level.sigma / (level.alpha**2 * data + level.sigma**2)  # of epsilon
        now = (values[C.SAMPLE] + values[C.OUTPUT] * gain) ** 2 * now + values[C.NOISE] ** 2
    return float((now / (grid.first.alpha**2 * data + grid.first.sigma**2) - 1).abs().mean())


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_variance_of_the_samples_converges(kind, variance):
    """To that of the data, at first order: half the error with twice the steps."""
    few, many = (_variance_error(variance, steps, kind) for steps in (256, 512))
    assert many < 0.02 and 0.95 < math.log2(few / many) < 1.05


def test_noise_is_the_same_for_the_same_seed():
    schedule = cv.schedule()
    sampler = pdn.samplers.Sampler(cv.mixture().denoiser(schedule), schedule, DDPM(), 5, backend="reference")
    first, second = (sampler.sample(shape=(2, 2, 4, 4), seed=7, dtype=torch.float64) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sampler.sample(shape=(2, 2, 4, 4), seed=8, dtype=torch.float64))


@pytest.mark.parametrize("make, message", [
    (lambda: DDPM("learned"), f"variance: expected one of {', '.join(VARIANCES)}, got 'learned'"),
    (lambda: DDPM(spacing="even"), "spacing: expected one of"),
    (lambda: DDPM().timesteps(cv.schedule(), 0), "num_steps: expected at least 1"),
    (lambda: DDPM().timesteps(cv.schedule(), 2000), "num_steps: expected at most 1000"),
    (lambda: plan("fixed_small", times=[0.0, 300.0]), "timesteps: expected descending"),
    (lambda: plan("fixed_small", times=[1000.0]), "timesteps: .* from 0 to 999"),
    (lambda: DDPM().plan(cv.schedule().zero_terminal_snr(), [999], Conversion()), "prediction_type: 'epsilon' says"),
    (lambda: DDPM(spacing="trailing").timesteps(NoiseSchedule.flow(), 10), "spacing: 'trailing' counts timesteps"),
])  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
