"""One More Step: the start that it makes, and the run from there."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.levels import NoiseSchedule  # noqa: E402
from pydenoise.samplers.one_more_step import OneMoreStep  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def sampler(solver=None, num_steps=4, **options) -> Sampler:
    schedule = cv.schedule()
    return Sampler(cv.gaussian().denoiser(schedule), schedule, solver or DDIM(), num_steps, **options)


@pytest.mark.parametrize("sigma, key", [("paper", "own_oms_x"), ("repo", "own_oms_x_repo_quirk")])
def test_start_is_the_golden_one(sigma, key):
    step = OneMoreStep(sampler(), lambda x: cv.tensor("own_oms_v"), sigma=sigma)
    x = step.start(cv.start(), noise=cv.tensor("own_oms_z"))
    torch.testing.assert_close(x, cv.tensor(key), rtol=0, atol=1e-12)


def test_the_run_starts_there():
    run = sampler(backend="reference")
    v = cv.tensor("own_oms_v")
    step = OneMoreStep(run, lambda x, gain: gain[:, None, None, None] * v)
    network = {"gain": torch.ones(3)}
    begun = step.start(cv.start(), conditioning=network, seed=5)
    whole = step.sample(cv.start(), network_conditioning=network, seed=5, return_trajectory=True)
    assert torch.equal(whole.states[0], begun) and torch.equal(whole.sample, run.sample(begun))
    noise = (begun + run.schedule.last.alpha * v) / run.schedule.last.sigma
    assert abs(float(noise.mean())) < 0.4 and abs(float(noise.std()) - 1) < 0.3
    drawn = step.sample(shape=(3, 2, 4, 4), dtype=torch.float64, network_conditioning=network, seed=5)
    assert torch.equal(drawn, whole.sample), "this network looks at nothing, and a seed gives the same z"


def test_mean_brightness_is_reached():
    """What it is for: data of a mean that a start from pure noise does not know of. The exact v at SNR 0 is -E[x0]."""
    schedule = NoiseSchedule.scaled_linear()
    mean = torch.full((1, 2, 4, 4), 3.0, dtype=torch.float64)
    data = cv.Gaussian(mean[0], torch.full((2, 4, 4), 0.01, dtype=torch.float64))
    plain = Sampler(data.denoiser(schedule), schedule, DDIM(spacing="trailing"), 20, backend="reference")
    x = torch.randn(64, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network_calls = []

    def network(x):
        network_calls.append(x.shape)
        return -mean.expand_as(x)

    start = OneMoreStep(plain, network).start(x, seed=1)
    level = schedule.last
    assert float(start.mean()) == pytest.approx(3 * level.alpha, abs=0.05)
    assert float(x.mean()) == pytest.approx(0, abs=0.05) and 3 * level.alpha > 0.15
    assert network_calls == [x.shape], "one evaluation more"


def test_guidance_pieces_and_seeds():
    def network(x, scale):
        return x * scale[:, None, None, None]

    run = sampler(DDPM(), backend="reference")
    step = OneMoreStep(run, network, guidance_scale=2.0)
    given = {"conditioning": {"scale": torch.ones(3)}, "unconditional": {"scale": torch.zeros(3)}}
    z = cv.tensor("own_oms_z")
    level = run.schedule.last
    expected = -level.alpha * 2 * cv.start() + level.sigma * z
    torch.testing.assert_close(step.start(cv.start(), noise=z, **given), expected)
    torch.testing.assert_close(step.start(cv.start(), noise=z, max_batch=2, **given), expected)
    seeds = {"seed": [7, 8, 9]}
    whole = step.start(cv.start(), **seeds, **given)
    assert torch.equal(whole, step.start(cv.start(), max_batch=1, **seeds, **given))
    names = {f"network_{name}": value for name, value in given.items()}
    samples = step.sample(shape=(3, 2, 4, 4), dtype=torch.float64, **seeds, **names)
    assert torch.equal(samples, step.sample(shape=(3, 2, 4, 4), dtype=torch.float64, max_batch=2, **seeds, **names))
    generated = [
        step.sample(cv.start(), generator=torch.Generator().manual_seed(s), **names) for s in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(generated[0], generated[1]) and not torch.equal(generated[0], generated[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    v, z = cv.tensor("own_oms_v").to(dtype), cv.tensor("own_oms_z").to(dtype)
    x = OneMoreStep(sampler(), lambda x: v).start(cv.start().to(dtype), noise=z)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert x.dtype == dtype
    torch.testing.assert_close(x.double(), cv.tensor("own_oms_x"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sampler": 3}, TypeError, "sampler"),
        ({"network": 3}, TypeError, "network"),
        ({"sigma": "variance"}, ValueError, "sigma"),
        ({"guidance_scale": "much"}, TypeError, "guidance_scale"),
    ],
)
def test_bad_options(options, error, message):
    given = {"sampler": sampler(), "network": lambda x: x} | options
    with pytest.raises(error, match=message):
        OneMoreStep(given.pop("sampler"), given.pop("network"), **given)


def test_other_kinds_of_schedule():
    flow = Sampler(lambda x, t: x, NoiseSchedule.flow(), DDIM(), 4, prediction_type="flow")
    with pytest.raises(ValueError, match="vp"):
        OneMoreStep(flow, lambda x: x)


@pytest.mark.parametrize(
    "network, arguments, error, message",
    [
        (lambda x: x, {"x": 3}, TypeError, "x:"),
        (lambda x: x, {"x": torch.zeros(2, dtype=torch.int64)}, ValueError, "x:"),
        (lambda x: x, {"noise": torch.zeros(1)}, ValueError, "noise"),
        (lambda x: x, {"max_batch": 0}, ValueError, "max_batch"),
        (lambda x: x[:1], {}, ValueError, "network"),
        (lambda x: None, {}, TypeError, "network"),
        (lambda x: x * math.nan, {}, ValueError, "network"),
        (lambda x: x, {"unconditional": {}}, ValueError, "unconditional"),
    ],
)
def test_bad_arguments(network, arguments, error, message):
    with pytest.raises(error, match=message):
        OneMoreStep(sampler(), network).start(**({"x": torch.zeros(2, 2, 4, 4)} | arguments))


def test_x_or_shape():
    with pytest.raises(ValueError, match="x:"):
        OneMoreStep(sampler(), lambda x: x).sample()
