"""Resfusion: golden trajectories, the truncated schedule, exact networks, heads, clamps, bad input."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers import NoiseSchedule, Sampler  # noqa: E402
from pydenoise.samplers.plan import Conversion  # noqa: E402
from pydenoise.samplers.resfusion import Resfusion, resfusion_schedule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
HEADS = ("residual_noise", "sample", "residual")


def ratio_of(schedule, t):
    """sqrt(1 - beta_t)."""
    return schedule.level(t).alpha / (schedule.level(t - 1).alpha if t else 1.0)


def oracle(x0, y, schedule, head="residual_noise"):
    """The network that knows x0, of whatever sample it sees."""

    def denoiser(x, t):
        t = float(t[0])
        (a, s), ratio = schedule.level(t), ratio_of(schedule, t)
        residual = (y - x0).to(x)
        noise = (x - a * x0 - (1 - a) * residual) / s
        mixed = noise + (1 - ratio) * s / (1 - ratio**2) * residual
        return {"residual_noise": mixed, "sample": x0.to(x), "residual": residual}[head]

    return denoiser


def wrong(x, t):
    return (2.5 * x).sin() + 0.8 * x.roll(1, -1) + 0.01 * float(t[0])


def golden_pair():
    return cv.tensor("an_clean"), cv.tensor("an_degraded")


def published(y, schedule, times, denoiser, head, noise, clip=None):
    """Ancestral steps of x - R, written down once more: states and predicted x0, in order."""
    noise = list(noise)
    x = schedule.last.alpha * y + schedule.last.sigma * noise.pop(0)
    states, predicted = [x], []
    for at, t in enumerate(times):
        (a, s), ratio = schedule.level(t), ratio_of(schedule, t)
        out = denoiser(x, torch.tensor([t]))
        if head == "residual_noise":
            # x = a x0 + (1 - a) R + s (out - w R) with R = y - x0, solved for x0
            w = (1 - ratio) * s / (1 - ratio**2)
            x0 = (x - s * out - (1 - a - s * w) * y) / (a - (1 - a - s * w))
        else:
            x0 = out if head == "sample" else y - out
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        residual = y - x0
        a_next, s_next = schedule.level(times[at + 1]) if at + 1 < len(times) else (1.0, 0.0)
        beta = 1 - (a / a_next) ** 2
        mean = a_next * beta / s**2 * (x0 - residual) + a / a_next * (s_next / s) ** 2 * (x - residual)
        std = (beta * s_next**2 / s**2) ** 0.5
        x = mean + residual + (std * noise.pop(0) if s_next else 0)
        states.append(x)
        predicted.append(x0)
    return torch.stack(states), torch.stack(predicted)


@pytest.mark.parametrize("total, left", [(12, 5), (20, 8), (100, 37)])
def test_schedule(total, left):
    schedule = resfusion_schedule(total)
    assert schedule.num_timesteps == left and abs(schedule.last.alpha - 0.5) < 0.01
    if total != 20:
        assert left == int(cv.golden()[f"repo_resfusion_T{total}_Tacc"])
        table = cv.tensor(f"repo_resfusion_T{total}_alphas_hat")[:left]
        torch.testing.assert_close(schedule.alphas_cumprod, table, rtol=0, atol=1e-6)


@pytest.mark.parametrize("total", [12, 100])
def test_golden(total):
    """The public code runs in float32."""
    x0, y = golden_pair()
    schedule = resfusion_schedule(total)
    sampler = Sampler(oracle(x0, y, schedule), schedule, Resfusion(), schedule.num_timesteps)
    noise = cv.tensor(f"repo_resfusion_T{total}_noise")
    run = sampler.sample(y, noise=noise[: sampler.plan.calls], return_trajectory=True)
    torch.testing.assert_close(run.states, cv.tensor(f"repo_resfusion_T{total}"), rtol=0, atol=2e-6)
    torch.testing.assert_close(run.sample, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("total, steps", [(12, 5), (12, 2), (20, 1), (100, 37), (100, 9)])
def test_exact_networks_return_x0(head, total, steps):
    x0, y = golden_pair()
    schedule = resfusion_schedule(total)
    got = Sampler(oracle(x0, y, schedule, head), schedule, Resfusion(head), steps).sample(y, seed=1)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("steps", [8, 3])
@pytest.mark.parametrize("preview", [False, True])
def test_every_step_is_the_published_one(head, clip, steps, preview):
    _, y = golden_pair()
    schedule = resfusion_schedule(20)
    sampler = Sampler(wrong, schedule, Resfusion(head), steps, clip=clip)
    noise, previews = cv.tensor("an_noise")[:steps], []
    run = sampler.sample(
        y, noise=noise, return_trajectory=True, preview=preview,
        callback=lambda info: previews.append(info.x0.clone()) if preview else None,
    )  # fmt: skip
    states, predicted = published(y, schedule, sampler.timesteps, wrong, head, noise, clip)
    torch.testing.assert_close(run.states, states, rtol=1e-10, atol=1e-10)
    if preview:
        torch.testing.assert_close(torch.stack(previews), predicted, rtol=1e-9, atol=1e-9)
    if clip is not None:
        unclipped = Sampler(wrong, schedule, Resfusion(head), steps).sample(y, noise=noise)
        assert (unclipped - run.sample).abs().max() > 1e-2


def test_all_steps_need_one_row_without_y():
    """The residual noise is what plain DDPM steps take epsilon for: nothing else is read."""
    schedule = resfusion_schedule(12)
    sampler = Sampler(wrong, schedule, Resfusion(), 5)
    columns = sampler.plan.table[:, [9, 11, *range(16, 22)]]  # base, m and history
    assert not columns.any()


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}])
def test_float32_batches_and_seeds(options):
    x0, y = (v.float() for v in golden_pair())
    schedule = resfusion_schedule(12)
    sampler = Sampler(oracle(x0, y, schedule), schedule, Resfusion(), 5, **options)
    torch.testing.assert_close(sampler.sample(y, seed=1), x0, rtol=0, atol=1e-5)
    free = Sampler(wrong, schedule, Resfusion(), 5, **options)
    whole = free.sample(y, seed=[1, 2, 3])
    assert torch.equal(whole, free.sample(y, seed=[1, 2, 3], max_batch=2))
    assert not torch.equal(whole, free.sample(y, seed=[1, 2, 4]))


@pytest.mark.parametrize("make, error, message", [
    (lambda: Resfusion("noise"), ValueError, "head: expected one of 'residual_noise', 'sample', 'residual'"),
    (lambda: resfusion_schedule(0), ValueError, "num_timesteps"),
    (lambda: resfusion_schedule(2.0), TypeError, "num_timesteps"),
    (lambda: Resfusion().timesteps(resfusion_schedule(12), 6), ValueError, "num_steps"),
    (lambda: Resfusion().timesteps(NoiseSchedule.linear(), 6), ValueError, "schedule: expected .* to end at 1/2"),
    (lambda: Resfusion().timesteps(NoiseSchedule.flow(), 6), ValueError, "schedule: Resfusion needs"),
    (lambda: Resfusion().plan(resfusion_schedule(12), [3, 1], Conversion()), ValueError, "timesteps: expected 4 first"),
    (lambda: Resfusion().plan(resfusion_schedule(12), [4, 1.5], Conversion()), ValueError, "timesteps: .* whole"),
    (lambda: Resfusion().plan(resfusion_schedule(12), [4], Conversion("sample")), ValueError, "prediction_type"),
    (lambda: Sampler(wrong, resfusion_schedule(12), Resfusion(), 5, dynamic_threshold=0.9), ValueError, "dynamic"),
    (lambda: Sampler(wrong, resfusion_schedule(12), Resfusion(), 5).sample(torch.zeros(1, 2), noise=[]), ValueError,
     "noise"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
