"""RDDM: golden trajectories, exact networks, the posterior, heads, clamps, bad input."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers import DDIM, Level, NoiseSchedule, Sampler, calibrate_noise_shift  # noqa: E402
from pydenoise.samplers._stepper import Stepper  # noqa: E402
from pydenoise.samplers.plan import Conversion  # noqa: E402
from pydenoise.samplers.rddm import RDDM, residual_schedule, residual_schedule_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
EXACT = {"rtol": 0, "atol": 1e-12}
HEADS = ("both", "residual", "noise")


def oracle(x0, y, schedule, head="both"):
    """The network that knows x0: of the sample that it sees it returns the residual and the noise."""

    def denoiser(x, t):
        level = schedule.level(float(t[0]))
        residual = (y - x0).to(x)
        noise = (x - y + level.alpha * residual) / level.sigma
        return {"both": torch.cat([residual, noise], 1), "residual": residual, "noise": noise}[head]

    return denoiser


def wrong(schedule, head="both"):
    """Predictions that fit nothing, and are large: what clamps are for."""

    def denoiser(x, t):
        residual, noise = (2.5 * x).sin() + 0.8 * x.roll(1, -1), (1.7 * x).cos() + 0.01 * float(t[0] % 7)
        return {"both": torch.cat([residual, noise], 1), "residual": residual, "noise": noise}[head]

    return denoiser


def golden_pair():
    return cv.tensor("an_clean"), cv.tensor("an_degraded")


def schedule_of(head, **options):
    return residual_schedule_of(cv.schedule()) if head == "noise" else residual_schedule(**options)


def published(x, y, schedule, times, denoiser, *, head, eta=0.0, clip=None, clip_residual=None, noise=()):
    """The steps written down once more, in plain torch: states and predicted x0, in order."""

    def limited(value, limit):
        return value if limit is None else value.clamp(-limit, limit)

    states, predicted, noise = [x], [], list(noise)
    for at, t in enumerate(times):
        level = schedule.level(t)
        a, b = 1 - level.alpha, level.sigma
        out = denoiser(x, torch.tensor([t]))
        if head == "both":
            residual, epsilon = out.chunk(2, 1)
            residual = limited(residual, clip_residual)
            x0 = limited(x - a * residual - b * epsilon, clip)
        elif head == "residual":
            residual = limited(out, clip_residual)
            epsilon = (x - y - (a - 1) * residual) / b
            x0 = limited(y - residual, clip)
        else:
            epsilon = out
            x0 = limited((x - a * y - b * epsilon) / (1 - a), clip)
            residual = y - x0
        if at + 1 == len(times):
            x = x0
        else:
            following = schedule.level(times[at + 1])
            a_next, b_next = 1 - following.alpha, following.sigma
            variance = eta * (b**2 - b_next**2) * b_next**2 / b**2
            x = x - (a - a_next) * residual - (b - (b_next**2 - variance) ** 0.5) * epsilon
            x = x + (variance**0.5 * noise.pop(0) if variance else 0)
        states.append(x)
        predicted.append(x0)
    return torch.stack(states), torch.stack(predicted)


def test_schedule():
    schedule = residual_schedule(1000, 0.01)
    steps = torch.arange(1000, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(1 - schedule.alphas, (steps / steps.sum()).cumsum(0), **EXACT)
    torch.testing.assert_close(schedule.sigmas**2, 0.01 * (steps.flip(0) / steps.sum()).cumsum(0), **EXACT)
    assert schedule.last == (0.0, pytest.approx(0.1)) and schedule.initial_scale == pytest.approx(0.1)
    assert schedule.index_of(7) == 7 and schedule.times[-1] == 999
    assert residual_schedule_of(cv.schedule()).level(500) == cv.schedule().level(500)


@pytest.mark.parametrize("key, tolerance", [("own_rddm_ddim5", 1e-12), ("repo_rddm_ddim5", 2e-8)])
@pytest.mark.parametrize("clip, clip_residual", [(None, None), (1.0, 1.0)])
def test_golden(key, tolerance, clip, clip_residual):
    """The public code has its tables in float32."""
    x0, y = golden_pair()
    schedule = residual_schedule()
    sampler = Sampler(oracle(x0, y, schedule), schedule, RDDM(clip_residual=clip_residual), 5, clip=clip)
    run = sampler.sample(y, noise=cv.tensor("repo_rddm_ddim5_noise"), return_trajectory=True)
    assert list(sampler.timesteps) == cv.tensor("own_rddm_ddim5_t").tolist()[:-1]
    torch.testing.assert_close(run.states, cv.tensor(key), rtol=0, atol=tolerance)
    torch.testing.assert_close(run.sample, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_exact_networks_return_x0(head, eta, steps):
    x0, y = golden_pair()
    schedule = schedule_of(head)
    sampler = Sampler(oracle(x0, y, schedule, head), schedule, RDDM(head, eta), steps)
    torch.testing.assert_close(sampler.sample(y, seed=1), x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_float32_on_the_compiled_kernel(head):
    x0, y = (v.float() for v in golden_pair())
    schedule = schedule_of(head)
    for options in ({}, {"clip": 1.0}):
        got = Sampler(oracle(x0, y, schedule, head), schedule, RDDM(head), 5, **options).sample(y, seed=1)
        torch.testing.assert_close(got, x0, rtol=0, atol=2e-3 if head == "noise" else 1e-5)


CLAMPS = [("both", None, None), ("both", 0.6, 0.4), ("both", 0.6, None), ("both", None, 0.4), ("residual", None, None),
          ("residual", 0.6, 0.4), ("residual", 0.6, None), ("noise", None, None), ("noise", 0.6, None)]  # fmt: skip


@pytest.mark.parametrize("head, clip, clip_residual", CLAMPS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("preview", [False, True])
def test_every_step_is_the_published_one(head, clip, clip_residual, eta, preview):
    _, y = golden_pair()
    schedule = schedule_of(head, sum_scale=0.5)
    sampler = Sampler(wrong(schedule, head), schedule, RDDM(head, eta, clip_residual), 6, clip=clip)
    noise = cv.tensor("an_noise")[: 1 + len(sampler.plan.noisy_calls)]
    previews = []
    run = sampler.sample(
        y, noise=noise, return_trajectory=True, preview=preview,
        callback=lambda info: previews.append(info.x0.clone()) if preview else None,
    )  # fmt: skip
    states, predicted = published(
        y + schedule.last.sigma * noise[0], y, schedule, sampler.timesteps, wrong(schedule, head), head=head, eta=eta,
        clip=clip, clip_residual=clip_residual, noise=noise[1:],
    )  # fmt: skip
    torch.testing.assert_close(run.states, states, rtol=1e-9, atol=1e-9)
    if preview:
        torch.testing.assert_close(torch.stack(previews), predicted, rtol=1e-8, atol=1e-8)
    if clip is not None:
        unclipped = Sampler(wrong(schedule, head), schedule, RDDM(head, eta), 6).sample(y, noise=noise)
        assert (unclipped - run.sample).abs().max() > 1e-2, "the clamps do something here"


def test_all_timesteps_with_noise_are_the_posterior():
    """(B'^2 x + (beta^2 A' - B'^2 alpha) R + beta^2 x0) / B^2, the mean of x' given x and x0."""
    schedule = residual_schedule(8, 0.3)
    x, residual, epsilon = cv.tensor("an_noise")[:3]
    for t in range(1, 8):
        now, then = schedule.level(t), schedule.level(t - 1)
        a, a_next, b, b_next = 1 - now.alpha, 1 - then.alpha, now.sigma, then.sigma
        x0 = x - a * residual - b * epsilon
        new = b**2 - b_next**2
        mean = (b_next**2 * x + (new * a_next - b_next**2 * (a - a_next)) * residual + new * x0) / b**2
        states, _ = published(
            x, None, schedule, [t, t - 1], lambda *_: torch.cat([residual, epsilon], 1), head="both", eta=1.0,
            noise=[torch.zeros_like(x)],
        )  # fmt: skip
        torch.testing.assert_close(states[1], mean, **EXACT)


def test_generation_is_ddim():
    """With y = 0 and the levels of a "vp" schedule the head "noise" is DDIM."""
    vp, noise = cv.schedule(), cv.start()[None]
    denoiser = cv.mixture().denoiser(vp)
    sampler = Sampler(denoiser, residual_schedule_of(vp), RDDM("noise"), 10)
    got = sampler.sample(torch.zeros_like(noise[0]), noise=noise)
    wanted = Sampler(denoiser, vp, DDIM(), timesteps=sampler.timesteps).sample(noise[0] * vp.last.sigma)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    drawn = sampler.sample(shape=(2, 2, 4, 4), dtype=torch.float64, seed=3)
    assert torch.equal(drawn, sampler.sample(torch.zeros(2, 2, 4, 4, dtype=torch.float64), seed=3))


def test_batches_seeds_and_conditions():
    x0, y = golden_pair()
    schedule = residual_schedule()

    def denoiser(x, t, condition):
        return torch.cat([condition - 0.9 * x, 0.1 * x], 1)

    sampler = Sampler(denoiser, schedule, RDDM(eta=1.0), 5, clip=1.0)
    given = {"conditioning": {"condition": y}, "seed": [4, 5, 6]}
    whole = sampler.sample(y, **given)
    assert torch.equal(whole, sampler.sample(y, max_batch=1, **given))
    assert not torch.equal(whole, sampler.sample(y, **given | {"seed": [7, 8, 9]}))
    assert sampler.sample(y[:0], conditioning={"condition": y[:0]}, seed=0).shape == (0, 2, 4, 4)
    assert y.equal(golden_pair()[1]), "the degraded sample is not changed"


def test_guidance_of_one_head():
    _, y = golden_pair()
    schedule = residual_schedule()

    def denoiser(x, t, gain):
        return gain.view(-1, 1, 1, 1) * x

    for clip in (None, 0.7):
        guided = Sampler(denoiser, schedule, RDDM("residual"), 4, guidance_scale=3.0, clip=clip)
        ones = torch.ones(3, dtype=torch.float64)
        got = guided.sample(y, seed=2, conditioning={"gain": 0.2 * ones}, unconditional={"gain": 0.1 * ones})
        plain = Sampler(denoiser, schedule, RDDM("residual"), 4, clip=clip)
        wanted = plain.sample(y, seed=2, conditioning={"gain": 0.4 * ones})
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("make, error, message", [
    (lambda: RDDM("noises"), ValueError, "head: expected one of 'both', 'residual', 'noise'"),
    (lambda: RDDM(eta=2), ValueError, "eta"),
    (lambda: RDDM(eta="1"), TypeError, "eta"),
    (lambda: RDDM(clip_residual=0), ValueError, "clip_residual"),
    (lambda: RDDM(clip_residual="1"), TypeError, "clip_residual"),
    (lambda: RDDM("noise", clip_residual=1.0), ValueError, "clip_residual"),
    (lambda: residual_schedule(0), ValueError, "num_timesteps"),
    (lambda: residual_schedule(10.0), TypeError, "num_timesteps"),
    (lambda: residual_schedule(10, 0), ValueError, "sum_scale"),
    (lambda: residual_schedule(10, "1"), TypeError, "sum_scale"),
    (lambda: residual_schedule_of(NoiseSchedule.flow()), ValueError, "schedule"),
    (lambda: residual_schedule().level(1.5), ValueError, "t: expected a whole timestep"),
    (lambda: residual_schedule().time_of(0.0), ValueError, "log_snr: a 'residual' schedule"),
    (lambda: Level.of_log_snr(0.0, "residual"), ValueError, "kind: a 'residual' schedule"),
    (lambda: residual_schedule().alphas_cumprod, ValueError, "alphas_cumprod"),
    (lambda: calibrate_noise_shift(Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5), torch.zeros(1, 2)),
     ValueError, "sampler: the levels of RDDM"),
    (lambda: RDDM().timesteps(residual_schedule(), 1001), ValueError, "num_steps: expected at most 1000"),
    (lambda: RDDM().timesteps(residual_schedule(), 0), ValueError, "num_steps"),
    (lambda: RDDM().plan(residual_schedule(), [500, 100], Conversion()), ValueError, "timesteps: expected 999 first"),
    (lambda: RDDM().plan(residual_schedule(), [999, 999], Conversion()), ValueError, "timesteps"),
    (lambda: RDDM().timesteps(NoiseSchedule.linear(), 5), ValueError, "schedule: RDDM needs"),
    (lambda: RDDM("noise").plan(residual_schedule(), [999], Conversion()), ValueError, "head: where A is 1"),
    (lambda: RDDM().plan(residual_schedule(), [999], Conversion("sample")), ValueError, "prediction_type"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5, dynamic_threshold=0.9), ValueError, "dynamic"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5, guidance_scale=2.0), ValueError,
     "guidance_scale: .* two predictions"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5, learned_variance=True), ValueError,
     "learned_variance"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5).from_step(2), ValueError, "timesteps"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5).sample(torch.zeros(3), seed=0), ValueError, "x:"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5).sample(torch.zeros(3, 2), seed=0), ValueError,
     r"denoiser: expected shape \(3, 4\)"),
    (lambda: Sampler(lambda x, t: x, residual_schedule(), RDDM(), 5).sample(
        torch.zeros(1, 2), noise=[]), ValueError, "noise: expected one tensor for each of 1 calls .*the start is one"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pipelines_of_diffusers_do_not_know_it():
    schedule, solver = residual_schedule(), RDDM()
    plan = solver.plan(schedule, [999.0], Conversion())
    with pytest.raises(ValueError, match="solver: RDDM begins at a degraded sample"):
        Stepper(plan, schedule, solver, Conversion())
