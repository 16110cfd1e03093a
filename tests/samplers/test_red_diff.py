"""RED-diff: the published loss differentiated by autograd, what it finds, every option, bad input."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers import NoiseSchedule  # noqa: E402
from pydenoise.samplers.operators import MRI, Blur, DownSampling, Inpainting  # noqa: E402
from pydenoise.samplers.plan import Conversion  # noqa: E402
from pydenoise.samplers.rddm import residual_schedule  # noqa: E402
from pydenoise.samplers.red_diff import REDDiff  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
KNOWN = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
OPERATORS = {
    "inpainting": Inpainting(KNOWN),
    "down-sampling": DownSampling(2),
    "blur": Blur(torch.tensor([[0.1, 0.2, 0.1], [0.2, 0.4, 0.2]], dtype=torch.float64)),
    "MRI": MRI(KNOWN),
}  # fmt: skip


def published(operator, y, denoiser, schedule, times, noise, conversion, rate=0.1, betas=(0.9, 0.99), weight=0.25,
              pull=1.0):  # fmt: skip
    """The loss written down, differentiated by autograd and minimized by torch's Adam, one sample at a time."""
    results = []
    for i in range(y.shape[0]):
        mu = operator.pinv(y[i : i + 1]).clone().requires_grad_()
        adam = torch.optim.Adam([mu], rate, betas)
        for t, z in zip(times, noise, strict=True):
            level, z = schedule.level(t), z[i : i + 1]
            x = level.alpha * mu.detach() + level.sigma * z
            p, q = conversion.epsilon(level)
            epsilon = p * x + q * denoiser(x, torch.tensor([t]))
            away = (operator(mu) - y[i : i + 1]).abs().square().sum() / operator.measurements(y)
            loss = pull * away / 2 + weight * level.sigma / level.alpha * ((epsilon - z) * mu).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        results.append(mu.detach())
    return torch.cat(results)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_step_is_the_published_one(name, prediction_type):
    operator, schedule = OPERATORS[name], cv.schedule()
    y = operator(cv.tensor("an_clean"))
    y = y + 0.05 * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    denoiser, noise = cv.mixture().denoiser(schedule, prediction_type), cv.tensor("an_noise")[:12]
    solver = REDDiff(denoiser, schedule, operator, 12, prediction_type=prediction_type)
    wanted = published(operator, y, denoiser, schedule, solver.timesteps, noise, Conversion(prediction_type))
    torch.testing.assert_close(solver.solve(y, noise=noise), wanted, rtol=0, atol=1e-9)


def test_options():
    operator, schedule = OPERATORS["down-sampling"], cv.schedule()
    y, noise = operator(cv.tensor("an_clean")), cv.tensor("an_noise")[:3]
    denoiser, times = cv.mixture().denoiser(schedule), [700.0, 300.0, 20.0]
    solver = REDDiff(
        denoiser, schedule, operator, timesteps=times, learning_rate=0.03, betas=(0.8, 0.95), regularization=0.7,
        observation=2.0,
    )  # fmt: skip
    wanted = published(
        operator, y, denoiser, schedule, times, noise, Conversion(), 0.03, (0.8, 0.95), 0.7, 2.0
    )  # fmt: skip
    torch.testing.assert_close(solver.solve(y, noise=noise), wanted, rtol=0, atol=1e-9)
    started = solver.solve(y, x=cv.tensor("an_degraded"), noise=noise)
    assert (started - wanted).abs().max() > 1e-2


def test_it_solves_the_problem():
    """Known pixels and a known prior: the hidden ones come near their mean, far better than H^+ y."""
    schedule, model, operator = cv.schedule(), cv.gaussian(), OPERATORS["inpainting"]
    truth = model.mean + model.variance.sqrt() * 0.5 * cv.start()
    y = operator(truth)
    solver = REDDiff(model.denoiser(schedule), schedule, operator, 200, learning_rate=0.05, observation=4.0)
    found = solver.solve(y, seed=0)
    assert (operator(found) - y).abs().mean() < 0.1
    hidden = ~KNOWN.expand(truth.shape)
    best = (model.mean - truth).expand_as(truth)[hidden].abs().mean()  # nothing measured says more of these pixels
    assert (found - truth)[hidden].abs().mean() < 1.3 * best + 0.02
    assert (found - truth)[hidden].abs().mean() < 0.6 * (operator.pinv(y) - truth)[hidden].abs().mean()


def test_guidance():
    schedule, operator = cv.schedule(), OPERATORS["down-sampling"]
    y, noise = operator(cv.tensor("an_clean")), cv.tensor("an_noise")[:4]
    inner = cv.mixture().denoiser(schedule)

    def denoiser(x, t, gain):
        return inner(x, t) * gain.view(-1, 1, 1, 1)

    ones = torch.ones(3, dtype=torch.float64)
    guided = REDDiff(denoiser, schedule, operator, 4, guidance_scale=3.0)
    got = guided.solve(y, noise=noise, conditioning={"gain": 0.8 * ones}, unconditional={"gain": 0.5 * ones})
    wanted = REDDiff(denoiser, schedule, operator, 4).solve(y, noise=noise, conditioning={"gain": 1.4 * ones})
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_seeds_pieces_callback_and_kinds_of_schedule():
    operator = OPERATORS["down-sampling"]
    y = operator(cv.tensor("an_clean"))
    for schedule in (cv.schedule(), NoiseSchedule.karras(sigma_max=5.0)):
        solver = REDDiff(cv.mixture().denoiser(schedule), schedule, operator, 5)
        told = []
        whole = solver.solve(y, seed=[1, 2, 3], callback=lambda step, mu, told=told: told.append((step, mu.shape)))
        assert told == [(step, (3, 2, 4, 4)) for step in range(5)]
        assert torch.equal(whole, solver.solve(y, seed=[1, 2, 3], max_batch=2))
        assert not torch.equal(whole, solver.solve(y, seed=[1, 2, 4]))
        generated = [solver.solve(y, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
        assert torch.equal(*generated)
    assert REDDiff(lambda x, t: x, schedule, operator, 2).solve(y[:0], seed=0).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    operator, schedule = OPERATORS["inpainting"], cv.schedule()
    y, noise = operator(cv.tensor("an_clean")), cv.tensor("an_noise")[:8]
    solver = REDDiff(cv.gaussian().denoiser(schedule), schedule, operator, 8)
    got = solver.solve(y.to(dtype), noise=[z.to(dtype) for z in noise])
    assert got.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(got.double(), solver.solve(y, noise=noise), rtol=0, atol=tolerance)


def build(**changes):
    given = {"denoiser": lambda x, t: x, "schedule": cv.schedule(), "operator": DownSampling(2), "num_steps": 3}
    given |= changes
    return REDDiff(given.pop("denoiser"), given.pop("schedule"), given.pop("operator"), **given)


def solve(y=None, *, denoiser=lambda x, t: x, **arguments):
    return build(denoiser=denoiser).solve(torch.zeros(2, 1, 2, 2) if y is None else y, **arguments)


@pytest.mark.parametrize("make, error, message", [
    (lambda: build(denoiser=1), TypeError, "denoiser"),
    (lambda: build(schedule="vp"), TypeError, "schedule"),
    (lambda: build(schedule=residual_schedule()), ValueError, "schedule"),
    (lambda: build(schedule=cv.schedule().zero_terminal_snr()), ValueError, "timesteps: a level of pure noise"),
    (lambda: build(operator=lambda x: x), TypeError, "operator"),
    (lambda: build(num_steps=None), ValueError, "num_steps"),
    (lambda: build(num_steps=0), ValueError, "num_steps"),
    (lambda: build(timesteps=[3, 2]), ValueError, "num_steps: expected either"),
    (lambda: build(num_steps=None, timesteps=[2, 3]), ValueError, "timesteps"),
    (lambda: build(prediction_type="noise"), ValueError, "prediction_type"),
    (lambda: build(guidance_scale="2"), TypeError, "guidance_scale"),
    (lambda: build(learning_rate=0), ValueError, "learning_rate"),
    (lambda: build(learning_rate=math.inf), ValueError, "learning_rate"),
    (lambda: build(betas=(0.9, 1.0)), ValueError, "betas"),
    (lambda: build(regularization=-1), ValueError, "regularization"),
    (lambda: build(observation=math.nan), ValueError, "observation"),
    (lambda: solve([1]), TypeError, "y:"),
    (lambda: solve(torch.zeros(2, dtype=torch.int64)), ValueError, "y:"),
    (lambda: solve(x=[1]), TypeError, "x:"),
    (lambda: solve(x=torch.zeros(2, 1, 8, 8)), ValueError, "x: H x has shape"),
    (lambda: solve(noise=[]), ValueError, "noise: expected one"),
    (lambda: solve(noise=[torch.zeros(1)] * 3), ValueError, r"noise\[0\]"),
    (lambda: solve(max_batch=0), ValueError, "max_batch"),
    (lambda: solve(unconditional={}), ValueError, "unconditional"),
    (lambda: solve(denoiser=lambda x, t: x[:1]), ValueError, "denoiser: expected shape"),
    (lambda: solve(denoiser=lambda x, t: None), TypeError, "denoiser"),
    (lambda: solve(denoiser=lambda x, t: x * math.nan), ValueError, "denoiser: the gradient of step 0"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
