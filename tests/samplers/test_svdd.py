"""SVDD: a plain restatement, the tilted distribution of a Gaussian, rewards and their failures."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers._noise import initial_noise  # noqa: E402
from pydenoise.samplers._seeds import sample_keys  # noqa: E402
from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.dpm_solver import DPMSolverPP  # noqa: E402
from pydenoise.samplers.euler import EulerAncestral  # noqa: E402
from pydenoise.samplers.levels import NoiseSchedule  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402
from pydenoise.samplers.svdd import SVDD  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def sampler(solver=None, num_steps=6, model=None, **options) -> Sampler:
    schedule = cv.schedule()
    return Sampler((model or cv.mixture()).denoiser(schedule), schedule, solver or DDPM(), num_steps, **options)


def brightness(x0: Tensor) -> Tensor:
    return x0.flatten(1).mean(1)


def nearness(x: Tensor, t: Tensor) -> Tensor:
    """A value function that looks at the time as well."""
    return -(x - 0.001 * t.view(-1, 1, 1, 1)).flatten(1).square().sum(1)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(eta=0.5), EulerAncestral(spacing="trailing")])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_one_candidate_is_the_sampler(solver, clip):
    run = sampler(solver, clip=clip)
    x = cv.start()
    for method, reward in (("pm", brightness), ("mc", nearness)):
        got = SVDD(run, reward, candidates=1, method=method).sample(x, seed=3)
        assert torch.equal(got, run.sample(x, seed=3))


@pytest.mark.parametrize("alpha", [None, 0.1])
@pytest.mark.parametrize("method", ["pm", "mc"])
def test_plain_restatement(method, alpha):
    """Every step by hand: DDPM's mean and deviation, M noises, the value of each candidate, the one that goes on."""
    chosen: list[tuple[int, Tensor, Tensor]] = []
    run, x, many, seed = sampler(), cv.start(), 4, 11
    svdd = SVDD(run, brightness if method == "pm" else nearness, method=method, candidates=many, alpha=alpha)
    got = svdd.sample(x, seed=seed, on_selection=lambda *told: chosen.append(told))
    model, keys = cv.mixture(), sample_keys(seed, None, 3, x.device)
    levels = [run.schedule.level(t) for t in run.timesteps]
    for call, (level, target) in enumerate(zip(levels, levels[1:], strict=False)):
        now, then = level.alpha**2, target.alpha**2
        b = 1 - now / then
        mean = (then**0.5 * b * model.x0(x, level) + (1 - b) ** 0.5 * (1 - then) * x) / (1 - now)
        std = math.sqrt(b * (1 - then) / (1 - now))
        candidates = [
            mean + std * initial_noise(x.shape, keys, 1.0, x.dtype, "reference", call + 1 + 2**16 * j)
            for j in range(many)
        ]
        if method == "pm":
            values = torch.stack([brightness(model.x0(one, target)) for one in candidates], 1)
        else:
            values = torch.stack([nearness(one, torch.full((3,), run.timesteps[call + 1])) for one in candidates], 1)
        number, told, best = chosen[call]
        assert number == call
        torch.testing.assert_close(told, values)
        assert alpha is not None or torch.equal(best, values.argmax(1))
        x = torch.stack(candidates)[best, torch.arange(3)]
    assert len(chosen) == 5
    torch.testing.assert_close(got, model.x0(x, levels[-1]))


def test_choices_have_the_softmax_for_probabilities():
    values = torch.tensor([0.0, 0.1, 0.3])
    seen = []
    run = sampler(num_steps=2)
    svdd = SVDD(run, lambda x0: values.repeat_interleave(len(x0) // 3).to(x0), candidates=3, alpha=0.2)
    svdd.sample(shape=(4000, 2, 4, 4), seed=0, on_selection=lambda call, told, best: seen.append(best))
    share = torch.bincount(seen[0], minlength=3) / 4000
    torch.testing.assert_close(share, (values / 0.2).softmax(0), rtol=0, atol=0.025)


def test_samples_of_the_tilted_gaussian():
    """For Gaussian data and a linear reward a x the target p exp(reward / alpha) is normal, its mean moved by a s^2 /
    alpha and its deviation the same, and r(x0(x_t)) is the exact soft value up to a constant."""
    mean, variance, slope, alpha = 0.3, 0.25, 1.0, 0.5
    data = cv.Gaussian(torch.full((1,), mean, dtype=torch.float64), torch.full((1,), variance, dtype=torch.float64))
    run = sampler(num_steps=25, model=data)
    found = SVDD(run, lambda x0: slope * x0[:, 0], candidates=40, alpha=alpha).sample(shape=(3000, 1), seed=1)
    plain = run.sample(shape=(3000, 1), seed=1)
    # DDPM of 25 steps has a deviation of its own; the shift goes with its square
    assert float(plain.mean()) == pytest.approx(mean, abs=0.03)
    wanted = mean + slope * float(plain.var()) / alpha
    assert float(found.mean()) == pytest.approx(wanted, abs=0.05)
    assert float(found.std()) == pytest.approx(float(plain.std()), abs=0.05)


def test_the_best_is_better_than_a_drawn_one_and_that_better_than_none():
    run, given = sampler(num_steps=10), {"shape": (64, 2, 4, 4), "seed": 2}
    rewards = [float(brightness(run.sample(**given)).mean())]
    for alpha in (0.02, None):
        rewards.append(float(brightness(SVDD(run, brightness, candidates=8, alpha=alpha).sample(**given)).mean()))
    assert rewards[0] + 0.02 < rewards[1] < rewards[2]


def test_calls_of_the_denoiser():
    calls = []
    schedule, inner = cv.schedule(), cv.mixture().denoiser(cv.schedule())

    def counted(x, t):
        calls.append(x.shape[0])
        return inner(x, t)

    run = Sampler(counted, schedule, DDPM(), 5)
    x = cv.start()
    SVDD(run, brightness, candidates=7).sample(x, seed=0)
    assert calls == [3, 21, 21, 21, 21], "the chosen one's output serves the next step"
    calls.clear()
    SVDD(run, nearness, method="mc", candidates=7).sample(x, seed=0)
    assert calls == [3] * 5
    calls.clear()
    SVDD(run, brightness, candidates=7).sample(x, seed=0, max_batch=10)
    assert max(calls) == 10 and sum(calls) == 3 + 4 * 21


def test_seeds_pieces_and_dtypes():
    svdd = SVDD(sampler(), brightness, candidates=5, alpha=0.1)
    seeds = [3, 4, 5]
    whole = svdd.sample(shape=(3, 2, 4, 4), seed=seeds)
    torch.testing.assert_close(svdd.sample(shape=(3, 2, 4, 4), seed=seeds, max_batch=4), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(svdd.sample(shape=(1, 2, 4, 4), seed=[4]), whole[1:2], rtol=0, atol=1e-6)
    assert svdd.sample(cv.start().bfloat16(), seed=0).dtype == torch.bfloat16


def test_guidance_conditions_and_other_schedules():
    grid = NoiseSchedule.karras(sigma_max=10.0)
    inner = cv.gaussian().denoiser(grid, "sample")

    def conditional(x, t, shift):
        return inner(x, t) + shift.view(-1, 1, 1, 1)

    run = Sampler(conditional, grid, EulerAncestral(), 6, prediction_type="sample", guidance_scale=2.0,
                  input_scale=lambda level: 1.0)  # fmt: skip
    shift = torch.tensor([0.0, 0.2, 0.4])
    given = {"conditioning": {"shift": shift}, "unconditional": {"shift": torch.zeros(3)}, "shape": (3, 2, 4, 4)}
    assert torch.equal(SVDD(run, brightness, candidates=1).sample(**given, seed=0), run.sample(**given, seed=0))

    wanted = torch.tensor([1.0, -1.0, 1.0])
    better = SVDD(run, lambda x0, sign: sign * brightness(x0), candidates=16).sample(
        **given, seed=0, reward_conditioning={"sign": wanted}
    )
    moved = (brightness(better) - brightness(run.sample(**given, seed=0))) * wanted
    assert bool((moved > 0.02).all()), "each sample has its own reward"


def test_conditions_of_a_single_sample_are_given_to_every_candidate():
    seen = []

    def conditional(x, t, image, scale):
        seen.append((x.shape[0], image.shape[0]))
        return cv.mixture().denoiser(cv.schedule())(x + 0 * torch.stack([x, image])[1], t) * scale

    run = Sampler(conditional, cv.schedule(), DDPM(), 3)
    given = {"image": torch.zeros(1, 2, 4, 4), "scale": torch.tensor(1.0)}
    SVDD(run, brightness, candidates=4).sample(shape=(1, 2, 4, 4), seed=0, conditioning=given)
    assert seen == [(1, 1), (4, 4), (4, 4)]


class Observer:
    """Counts what it is told; or says that it changes the sample."""

    def __init__(self, changes_sample=False):
        self.changes_sample, self.runs, self.told = changes_sample, 0, []

    def begin_run(self, times):
        self.runs += 1

    def begin_step(self, call, calls):
        self.told.append((call, calls))


def test_observers_are_told_of_every_evaluation():
    observer = Observer()
    SVDD(sampler(num_steps=3, observers=[observer]), brightness, candidates=2).sample(cv.start(), seed=0)
    assert observer.runs == 1 and observer.told == [(0, 3), (1, 3), (2, 3)]


def failing(value):
    return SVDD(sampler(), lambda x0: value, candidates=2).sample(cv.start(), seed=0)


@pytest.mark.parametrize("make, error, message", [
    (lambda: SVDD(3, brightness), TypeError, "sampler: expected a Sampler"),
    (lambda: SVDD(sampler(), 3), TypeError, "reward: expected a callable"),
    (lambda: SVDD(sampler(), brightness, method="tds"), ValueError, "method: expected one of"),
    (lambda: SVDD(sampler(DDIM()), brightness), ValueError, "sampler: expected a solver without history"),
    (lambda: SVDD(sampler(DPMSolverPP(2, sde=True)), brightness), ValueError, "sampler: expected a solver without"),
    (lambda: SVDD(sampler(observers=[Observer(True)]), brightness), ValueError, "sampler: an observer that changes"),
    (lambda: SVDD(sampler(dynamic_threshold=0.9), brightness), ValueError, "sampler: dynamic_threshold"),
    (lambda: SVDD(sampler(), brightness, candidates=0), ValueError, "candidates: expected at least 1"),
    (lambda: SVDD(sampler(), brightness, candidates=2**15), ValueError, "candidates: expected less"),
    (lambda: SVDD(sampler(), brightness, alpha=0.0), ValueError, "alpha: expected a finite number above 0"),
    (lambda: SVDD(sampler(), brightness, alpha="1"), TypeError, "alpha: expected a number"),
    (lambda: SVDD(sampler(), brightness).sample(), ValueError, "x: expected either x or shape"),
    (lambda: SVDD(sampler(), brightness).sample(3), TypeError, "x: expected a tensor"),
    (lambda: SVDD(sampler(), brightness).sample(torch.ones(1, dtype=torch.int64)), ValueError, "x: expected a float"),
    (lambda: SVDD(sampler(), brightness).sample(cv.start(), max_batch=0), ValueError, "max_batch: expected"),
    (lambda: failing(torch.full((6,), math.nan)), ValueError, "reward: NaN after step 1 of 6, for 6 of 6"),
    (lambda: failing(torch.ones(3)), ValueError, r"reward: expected shape \(6,\)"),
    (lambda: failing(1.0), TypeError, "reward: expected a tensor"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
