"""Denoising MCMC: the integrators and the chain restated, the stationary distribution of a Gaussian, options."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers._noise import initial_noise  # noqa: E402
from pydenoise.samplers._seeds import SeedStream, sample_keys  # noqa: E402
from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.dmcmc import DMCMC  # noqa: E402
from pydenoise.samplers.levels import Level, NoiseSchedule  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
GRID = NoiseSchedule.karras(sigma_max=10.0)
SIGMAS = torch.linspace(0.3, 2.0, 12, dtype=torch.float64)


def exact_x0(model, x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x], every sample at its own level."""
    return torch.cat([model.x0(x[i : i + 1], Level(1.0, float(s))) for i, s in enumerate(sigma)])


def sampler(prediction_type="sample", model=None, **options) -> Sampler:
    return Sampler(
        (model or cv.mixture()).denoiser(lambda s: Level(1.0, s), prediction_type), GRID, DDIM(), 6,
        prediction_type=prediction_type, **options,
    )  # fmt: skip


def classifier(x: Tensor) -> Tensor:
    """Levels whose deviation is that of the sample."""
    deviation = x.flatten(1).std(1, keepdim=True).to(torch.float64)
    return -((deviation - (0.5 + SIGMAS**2).sqrt()) ** 2)


def karras(model, x: Tensor, sigma: Tensor, steps: int, churned=None, least=0.01, rho=7.0) -> Tensor:
    """Heun's method as its paper writes it, in a loop."""
    shape = (-1, 1, 1, 1)
    share = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    grid = (sigma ** (1 / rho) + share * (least ** (1 / rho) - sigma ** (1 / rho))) ** rho
    grid = torch.cat([grid, torch.zeros_like(grid[:1])])
    for i in range(steps):
        now, then = grid[i], grid[i + 1]
        if churned is not None:
            gamma = min(80.0 / steps, math.sqrt(2) - 1) * ((now >= 0.05) & (now <= 1.0))
            raised = now * (1 + gamma)
            x = x + (raised**2 - now**2).sqrt().view(shape) * 1.007 * churned[i]
            now = raised
        slope = (x - exact_x0(model, x, now)) / now.view(shape)
        moved = x + (then - now).view(shape) * slope
        if i + 1 < steps:
            other = (moved - exact_x0(model, moved, then)) / then.view(shape)
            moved = x + (then - now).view(shape) * (slope + other) / 2
        x = moved
    return x


def restated(own: DMCMC, x: Tensor, seed: int, skip: int, eta: float, results: int, churn: bool) -> list[Tensor]:
    """The whole of it by hand, with the numbers of its noise."""
    model, seeds = cv.mixture(), SeedStream(seed, None, len(x))
    keys, count, found = sample_keys(seeds.of(0), None, len(x), x.device), 0, []
    sigma = SIGMAS[classifier(x).argmax(1)]
    for number in range(results):
        best, least = x, torch.full((len(x),), math.inf, dtype=torch.float64)
        for _ in range(skip):
            count += 1
            score = (exact_x0(model, x, sigma) - x) / sigma.view(-1, 1, 1, 1) ** 2
            z = initial_noise(x.shape, keys, 1.0, x.dtype, "reference", count)
            x = x + eta / 2 * score + math.sqrt(eta) * z
            sigma = SIGMAS[classifier(x).argmax(1)]
            best = torch.where((sigma < least).view(-1, 1, 1, 1), x, best)
            least = torch.minimum(sigma, least)
        noise = None
        if churn:
            drawn = sample_keys(seeds.of(number + 1), None, len(x), x.device)
            numbers = [2**31, *range(2, 20, 2)]  # a step's noise is drawn by the second call of the step before it
            noise = [initial_noise(x.shape, drawn, 1.0, x.dtype, "reference", n) for n in numbers]
        clean = karras(model, best, least, 5, noise)
        found.append(exact_x0(model, clean, torch.full((len(x),), 0.01)))
    return found


@pytest.mark.parametrize("integrator", ["kar1", "kar2"])
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction", "flow"])
def test_plain_restatement(integrator, prediction_type):
    own = DMCMC(sampler(prediction_type), classifier, sigmas=SIGMAS, skip=4, step=0.3, integrator=integrator, burn_in=0)
    x = cv.start()
    got = own.sample(3, x, seed=5)
    assert got.shape == (3, *x.shape)
    for one, wanted in zip(got, restated(own, x, 5, 4, 0.3, 3, integrator == "kar2"), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-8)


def test_stationary_distribution():
    """x and sigma of the joint distribution of a Gaussian stay there, and results have the data's moments."""
    variance = 0.4
    sigmas = torch.tensor([0.5, 0.8, 1.2, 1.8], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def exact(x):
        total = variance + sigmas**2
        return weights.log() - 0.5 * total.log() - (x.double() - 0.5) ** 2 / (2 * total)

    def denoiser(x, t):
        gain = (variance / (variance + t**2))[:, None]
        return 0.5 + gain * (x - 0.5)

    run = Sampler(denoiser, GRID, DDIM(), 5, prediction_type="sample")
    seen: list[Tensor] = []

    def told(x):
        seen.append(x)
        return exact(x)

    own = DMCMC(run, told, sigmas=sigmas, step=0.05, skip=60, choice="draw", burn_in=0, num_steps=12)
    generator = torch.Generator().manual_seed(0)
    level = sigmas[torch.multinomial(weights, 20000, replacement=True, generator=generator)]
    x = 0.5 + (variance + level**2).sqrt() * torch.randn(20000, dtype=torch.float64, generator=generator)
    own.sample(1, x[:, None].float(), seed=0)
    wanted = float((weights * (variance + sigmas**2)).sum())
    assert float(seen[-1].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(seen[-1].var()) == pytest.approx(wanted, rel=0.06)
    single = DMCMC(run, exact, sigmas=sigmas, step=0.05, skip=1, choice="draw", burn_in=0, num_steps=12, tweedie=None)
    result = single.sample(1, x[:, None].float(), seed=0)[0]
    assert float(result.mean()) == pytest.approx(0.5, abs=0.02), "without a choice among states: the data itself"
    assert float(result.std()) == pytest.approx(variance**0.5, rel=0.03)


def test_calls_and_times():
    calls: list[Tensor] = []
    inner = exact_x0

    def counted(x, t):
        calls.append(t.clone())
        return inner(cv.mixture(), x, t)

    run = Sampler(counted, GRID, DDIM(), 6, prediction_type="sample")
    own = DMCMC(run, classifier, sigmas=SIGMAS, skip=3, num_steps=4, burn_in=5)
    x = cv.start().float()
    own.sample(2, x, seed=0)
    assert len(calls) == 5 + 2 * (3 + 2 * 4 - 1 + 1)
    first = calls[5 + 3]
    assert first.shape == (3,) and torch.isin(first, SIGMAS.float()).all(), "each from the sigma that was chosen"
    assert torch.allclose(calls[5 + 3 + 6], torch.full((3,), 0.01)), "the last of a grid"
    calls.clear()
    own.sample(1, shape=(3, 2, 4, 4), seed=0)
    assert len(calls) == 6 + 5 + 3 + 8, "the sampler's steps, the burn-in, the walk, the integration"
    calls.clear()
    DMCMC(run, classifier, sigmas=SIGMAS, skip=3, num_steps=1, tweedie=None, burn_in=0).sample(1, x, seed=0)
    assert len(calls) == 3 + 1


def test_chains_go_on_and_seeds_repeat():
    own = DMCMC(sampler(), classifier, sigmas=SIGMAS, skip=2, num_steps=3, burn_in=1)
    given = {"shape": (3, 2, 4, 4), "seed": [1, 2, 3]}
    whole = own.sample(3, **given)
    assert torch.equal(whole[:2], torch.stack(list(itertools.islice(own.chain(**given), 2))))
    assert not torch.equal(whole[0], whole[1])
    torch.testing.assert_close(own.sample(3, shape=(1, 2, 4, 4), seed=[2])[:, 0], whole[:, 1], rtol=0, atol=1e-5)
    assert own.sample(1, cv.start().bfloat16(), seed=0).dtype == torch.bfloat16


def test_guidance_and_clip():
    def conditional(x, t, shift):
        return exact_x0(cv.mixture(), x, t) + shift.view(-1, 1, 1, 1)

    run = Sampler(conditional, GRID, DDIM(), 6, prediction_type="sample", guidance_scale=3.0)
    options = {"sigmas": SIGMAS, "skip": 3, "burn_in": 1, "step": 0.2}
    zero, tenth = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64)
    got = DMCMC(run, classifier, **options).sample(
        1, cv.start(), seed=0, conditioning={"shift": tenth}, unconditional={"shift": zero}
    )
    plain = Sampler(conditional, GRID, DDIM(), 6, prediction_type="sample")
    wanted = DMCMC(plain, classifier, **options).sample(1, cv.start(), seed=0, conditioning={"shift": 3 * tenth})
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    clipped = DMCMC(sampler(clip=0.4), classifier, **options).sample(1, cv.start(), seed=0)
    assert float(clipped.abs().max()) <= 0.4


class Observer:
    def begin_step(self, call, calls):
        """Told of every call of a run."""


RUN = sampler()
VP = Sampler(lambda x, t: x, NoiseSchedule.linear(), DDIM(), 4)


@pytest.mark.parametrize("make, error, message", [
    (lambda: DMCMC(3, classifier), TypeError, "sampler: expected a Sampler"),
    (lambda: DMCMC(VP, classifier), ValueError, "sampler: expected a 've' schedule"),
    (lambda: DMCMC(sampler(dynamic_threshold=0.9), classifier), ValueError, "sampler: dynamic_threshold"),
    (lambda: DMCMC(sampler(guidance_scale=[1.0, 2, 3, 4, 5, 6]), classifier), ValueError, "one guidance_scale"),
    (lambda: DMCMC(sampler(observers=[Observer()]), classifier), ValueError, "sampler: observers count"),
    (lambda: DMCMC(RUN, 3), TypeError, "classifier: expected a callable"),
    (lambda: DMCMC(RUN, classifier, choice="best"), ValueError, "choice: expected one of"),
    (lambda: DMCMC(RUN, classifier, integrator="kar3"), ValueError, "integrator: expected one of"),
    (lambda: DMCMC(RUN, classifier, step=0.0), ValueError, "step: expected a finite number above 0"),
    (lambda: DMCMC(RUN, classifier, tweedie=-1.0), ValueError, "tweedie: expected a finite number"),
    (lambda: DMCMC(RUN, classifier, skip=0), ValueError, "skip: expected at least 1"),
    (lambda: DMCMC(RUN, classifier, burn_in=-1), ValueError, "burn_in: expected at least 0"),
    (lambda: DMCMC(RUN, classifier, num_steps=0), ValueError, "num_steps: expected at least 1"),
    (lambda: DMCMC(RUN, classifier, churn=-1.0), ValueError, "churn: expected finite numbers"),
    (lambda: DMCMC(RUN, classifier, churn_range=(1.0, 0.1)), ValueError, "churn: expected finite numbers"),
    (lambda: DMCMC(RUN, classifier, sigmas=[0.0, 1.0]), ValueError, "sigmas: expected finite numbers above 0"),
    (lambda: DMCMC(RUN, classifier).chain(), ValueError, "x: expected either x or shape"),
    (lambda: DMCMC(RUN, classifier).chain(3), TypeError, "x: expected a floating-point tensor"),
    (lambda: DMCMC(RUN, classifier).sample(0, cv.start()), ValueError, "num: expected at least 1"),
    (lambda: DMCMC(RUN, classifier).sample(1, cv.start()), ValueError, "classifier: expected logits of shape"),
    (lambda: DMCMC(RUN, lambda x: torch.full((3, 12), math.nan), sigmas=SIGMAS).sample(1, cv.start()), ValueError,
     "classifier: NaN"),
    (lambda: DMCMC(RUN, classifier, sigmas=SIGMAS, step=1e200).sample(1, cv.start()), ValueError, "not finite"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_default_levels_are_those_of_the_public_code():
    sigmas = DMCMC(RUN, classifier).sigmas
    assert len(sigmas) == 1000 and float(sigmas[0]) == pytest.approx(10.0)
    assert float(sigmas[-1]) == pytest.approx(0.01 * 1000**0.001)
