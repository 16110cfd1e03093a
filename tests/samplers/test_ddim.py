"""DDIM: golden trajectories, diffusers' options, other kinds of schedule, first order, bad input."""

import sys
from pathlib import Path

import pytest
import torch

import pydenoise as pdn
from pydenoise.samplers.ddim import DDIM, ddim_row, posterior_variance, step_variance
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

EXACT = {
    "rtol": 0,
    "atol": 1e-12,
}  # the golden runs with their float32 tables of alphas_cumprod differ by rounding only
FLOAT32 = {"rtol": 0, "atol": 2e-6}  # diffusers computes coefficients from float32 scalars here
NOISE = "an_noise"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_golden(prediction_type):
    got = cv.trajectory(DDIM(), prediction_type=prediction_type)
    torch.testing.assert_close(got, cv.tensor(f"df_ddim_{prediction_type}_N10"), **EXACT)


def test_golden_with_noise():
    got = cv.trajectory(DDIM(eta=1.0), noise=cv.tensor(NOISE))
    torch.testing.assert_close(got, cv.tensor("df_ddim_eta1_N10"), **EXACT)


def test_golden_of_pndm_and_fast_ddpm_codes():
    """PNDM's DDIM reads levels one timestep further; here such a schedule, whose level before the first is its end."""
    public = cv.public_schedule()
    shifted = NoiseSchedule.from_alphas_cumprod(public.alphas_cumprod[1:])
    times = [900.0 - 100 * k for k in range(10)]
    sampler = pdn.samplers.Sampler(
        cv.mixture().denoiser(shifted), shifted, DDIM(), timesteps=times, backend="reference"
    )
    states = sampler.sample(cv.start(), return_trajectory=True).states
    torch.testing.assert_close(states[:-1], cv.tensor("repo_pndm_DDIM_N10")[:-1], **EXACT)
    assert sampler.plan.calls == int(cv.golden()["own_pndm_DDIM_N10_nfe"])


def test_on_another_schedule_of_the_model():
    """The model's own float64 levels in place of the table's: what float32 tables cost."""
    got = cv.trajectory(DDIM(), on=cv.diffusers_schedule(), level_of=cv.schedule())
    torch.testing.assert_close(got[-1], cv.tensor("df_ddim_epsilon_N10")[-1], rtol=0, atol=3.3e-7)


OPTIONS = {
    "trailing": ({"timestep_spacing": "trailing"}, {"spacing": "trailing"}, 10),
    "trailing, uneven": ({"timestep_spacing": "trailing"}, {"spacing": "trailing", "target": "stride"}, 30),
    "linspace": ({"timestep_spacing": "linspace"}, {"spacing": "linspace", "target": "stride"}, 12),
    "offset": ({"steps_offset": 1}, {"steps_offset": 1}, 20),
    "first level": ({"set_alpha_to_one": False}, {"set_alpha_to_one": False}, 10),
    "first level, offset": ({"set_alpha_to_one": False, "steps_offset": 1},
                            {"set_alpha_to_one": False, "steps_offset": 1}, 10),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_diffusers_options(name):
    diffusers = pytest.importorskip("diffusers")
    theirs, ours, steps = OPTIONS[name]
    theirs = diffusers.DDIMScheduler(clip_sample=False, beta_schedule="linear", **theirs)
    torch.testing.assert_close(cv.trajectory(DDIM(**ours), steps), cv.diffusers_trajectory(theirs, steps), **EXACT)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rederives", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_clip_as_diffusers(prediction_type, rederives, eta):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.4, prediction_type=prediction_type)
    wanted = cv.diffusers_trajectory(
        theirs, 10, prediction_type=prediction_type, eta=eta, use_clipped_model_output=rederives,
        noise=cv.tensor(NOISE) if eta else None,
    )  # fmt: skip
    got = cv.trajectory(
        DDIM(eta=eta), prediction_type=prediction_type, clip=0.4, clip_rederives=rederives, noise=cv.tensor(NOISE)
    )
    assert float((got[-1] - cv.trajectory(DDIM(eta=eta), noise=cv.tensor(NOISE))[-1]).abs().max()) > 1e-2
    torch.testing.assert_close(got, wanted, **EXACT)


def test_zero_terminal_snr_as_diffusers():
    """The first step has no signal: only x0 enters. diffusers forms these betas in float32, hence the tolerance."""
    diffusers = pytest.importorskip("diffusers")
    schedule = cv.schedule().zero_terminal_snr()
    theirs = diffusers.DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    model = cv.mixture().denoiser(schedule, "v_prediction")
    wanted = cv.diffusers_trajectory(theirs, 10, model=model)
    got = cv.trajectory(DDIM(spacing="trailing"), on=schedule, prediction_type="v_prediction")
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_zero_terminal_snr_needs_a_prediction_of_the_sample():
    schedule = cv.schedule().zero_terminal_snr()
    with pytest.raises(ValueError, match="prediction_type: 'epsilon' says nothing of x0 where alpha is 0"):
        DDIM().plan(schedule, [999, 500], Conversion("epsilon"))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_kinds_of_schedule_are_the_same_process(eta):
    """The same ratios sigma / alpha: the samples differ by their scale alone."""
    results = {}
    for kind in ("vp", "ve", "flow"):
        grid = cv.uniform_grid(12, kind=kind)
        x = cv.start() * (grid.last.alpha + 0)
        noise = [cv.tensor(NOISE)[i] for i in range(12)]
        sampler = pdn.samplers.Sampler(
            cv.gaussian().denoiser(grid), grid, DDIM(eta=eta, set_alpha_to_one=False), backend="reference",
            timesteps=grid.times.flip(0)[:-1].tolist(),
        )  # fmt: skip
        results[kind] = sampler.sample(x, noise=noise if eta else None) / grid.first.alpha
    torch.testing.assert_close(results["ve"], results["vp"], rtol=0, atol=1e-11)
    torch.testing.assert_close(results["flow"], results["vp"], rtol=0, atol=1e-11)


def test_variances_are_the_published_ones():
    """1 - abar_t / abar_n and (1 - abar_n) / (1 - abar_t) of it."""
    schedule = cv.schedule()
    bar = schedule.alphas_cumprod
    b = 1 - float(bar[500] / bar[400])
    now, then = schedule.level(500), schedule.level(400)
    assert step_variance(now, then) == pytest.approx(b, rel=1e-12)
    assert posterior_variance(now, then) == pytest.approx(b * float((1 - bar[400]) / (1 - bar[500])), rel=1e-12)
    assert posterior_variance(now, Level.clean()) == 0


def test_without_noise_nothing_changes():
    """A perfect epsilon model of one point reaches it in a single step from anywhere."""
    level = Level.of_log_snr(-1.0)
    x0, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    row = torch.tensor([ddim_row(Conversion(), level, Level.clean())], dtype=torch.float64)
    got = pdn.functional.sampler_step(level.alpha * x0 + level.sigma * z, z, row, backend="reference")
    torch.testing.assert_close(got, x0)


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_first_order(kind, prediction_type):
    order = cv.order(cv.run_with(DDIM(set_alpha_to_one=False), prediction_type=prediction_type), kind=kind)
    assert 0.97 < order < 1.03


@pytest.mark.parametrize("steps, index", [(8, 0), (16, 1)])
def test_errors_are_the_golden_ones(steps, index):
    got = cv.error(cv.run_with(DDIM(set_alpha_to_one=False)), steps)
    assert got == pytest.approx(float(cv.tensor("conv_gauss_0.8_0.05_l_DDIM")[index]), rel=1e-9)


@pytest.mark.parametrize("make, message", [
    (lambda: DDIM(eta=1.5), "eta: expected a number from 0 to 1, got 1.5"),
    (lambda: DDIM(eta=float("nan")), "eta: expected a number from 0 to 1"),
    (lambda: DDIM(spacing="even"), "spacing: expected one of leading, .*, got 'even'"),
    (lambda: DDIM(target="previous"), "target: expected one of next, stride"),
    (lambda: DDIM().timesteps(cv.schedule(), 0), "num_steps: expected at least 1"),
    (lambda: DDIM().timesteps(cv.schedule(), 1001), "num_steps: expected at most 1000"),
    (lambda: DDIM(steps_offset=200).timesteps(cv.schedule(), 10), "steps_offset: 200 moves"),
    (lambda: DDIM(spacing="leading").timesteps(NoiseSchedule.karras(), 10), "spacing: 'leading' counts timesteps"),
    (lambda: DDIM().plan(cv.schedule(), [10, 20], Conversion()), "timesteps: expected descending times"),
    (lambda: DDIM().plan(cv.schedule(), [10, 10], Conversion()), "timesteps: expected descending times"),
    (lambda: DDIM().plan(cv.schedule(), [2000, 10], Conversion()), "timesteps: .* from 0 to 999"),
    (lambda: DDIM(target="stride").plan(NoiseSchedule.karras(), [5.0, 1.0], Conversion()), "target: 'stride' counts"),
])  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types():
    with pytest.raises(TypeError, match="eta: expected a number, got str"):
        DDIM(eta="1")
    with pytest.raises(TypeError, match="num_steps: expected an int, got float"):
        DDIM().timesteps(cv.schedule(), 10.0)
