"""Fast-DDPM: its timesteps, its training, and its sampler against the public code."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.fast_ddpm import ConcatCondition, FastDDPM, fast_ddpm_loss  # noqa: E402
from pydenoise.samplers.levels import NoiseSchedule  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


@pytest.mark.parametrize("name", ["uniform", "nonuniform"])
def test_timesteps_are_the_papers(name):
    times = FastDDPM(name).timesteps(NoiseSchedule.linear(), 10)
    assert times == sorted(cv.tensor(f"own_fastddpm_{name}10_t").tolist(), reverse=True)


def test_other_numbers_of_timesteps():
    linear = NoiseSchedule.linear()
    assert FastDDPM("uniform").timesteps(linear, 5) == [999, 799, 599, 399, 199, 0]
    # Of five steps two lie evenly in [0, 699), the others evenly in [699, 999].
    assert FastDDPM("nonuniform").timesteps(linear, 5) == [999, 849, 699, 350, 0]
    assert len(FastDDPM("nonuniform").timesteps(linear, 20)) == 20
    short = NoiseSchedule.linear(500)
    assert FastDDPM("nonuniform").timesteps(short, 10)[0] == 499 and FastDDPM("uniform").timesteps(short, 10)[0] == 499


def test_uniform_trajectory_is_the_public_code():
    # The public code computes its levels in float64, of betas in float64; the model that it was run on, in float32.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()
    of_model = NoiseSchedule.from_alphas_cumprod((1 - betas).cumprod(0).double())
    sampler = Sampler(cv.mixture().denoiser(of_model), cv.schedule(), FastDDPM("uniform"), 10, backend="reference")
    states = sampler.sample(cv.start(), return_trajectory=True).states
    assert len(states) == 12, "eleven evaluations"
    torch.testing.assert_close(states, cv.tensor("repo_fastddpm_uniform"), rtol=0, atol=1e-8)


def test_other_solvers_at_its_timesteps():
    schedule, solver = cv.schedule(), FastDDPM("nonuniform", DDPM("fast_ddpm"))
    denoiser, noise = cv.mixture().denoiser(schedule), cv.tensor("an_noise")[:9]
    own = Sampler(denoiser, schedule, solver, 10, backend="reference").sample(cv.start(), noise=noise)
    times = solver.timesteps(schedule, 10)
    plain = Sampler(denoiser, schedule, DDPM("fast_ddpm"), timesteps=times, backend="reference")
    assert torch.equal(own, plain.sample(cv.start(), noise=noise))


def test_training_times_are_antithetic_sampling_times():
    schedule, solver = NoiseSchedule.linear(), FastDDPM("nonuniform")
    generator = torch.Generator().manual_seed(0)
    times = solver.training_times(schedule, 10, 7, generator=generator)
    steps = solver.timesteps(schedule, 10)[::-1]
    places = [steps.index(float(t)) for t in times]
    assert times.dtype == torch.int64 and len(times) == 7
    assert [places[k] + places[k + 4] for k in range(3)] == [9, 9, 9]
    many = solver.training_times(schedule, 10, 2000, generator=generator)
    assert set(many.tolist()) == {int(t) for t in steps}
    assert len(solver.training_times(schedule, 10, 1)) == 1


def test_loss():
    schedule = NoiseSchedule.linear()
    x0, noise, times = cv.tensor("an_clean"), cv.tensor("an_noise")[0], torch.tensor([99, 499, 999])
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    seen = []

    def denoiser(x, t, bias):
        seen.append((x, t))
        return weight * x + bias

    loss = fast_ddpm_loss(denoiser, x0, schedule, times, noise=noise, conditioning={"bias": 0.25})
    bar = schedule.alphas_cumprod[times][:, None, None, None]
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    torch.testing.assert_close(seen[0][0], x)
    torch.testing.assert_close(loss, (noise - 0.5 * x - 0.25).square().sum((1, 2, 3)).mean())
    loss.backward()
    assert weight.grad is not None
    drawn = [fast_ddpm_loss(lambda x, t: x, x0, schedule, times, generator=torch.Generator().manual_seed(s))
             for s in (1, 1, 2)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_conditional():
    """[condition, x] as channels, through the sampler, with one condition for all samples and with one for each."""
    schedule, plain = cv.schedule(), cv.mixture().denoiser(cv.schedule())

    def network(x, t):
        assert x.shape[1] == 5
        return plain(x[:, 3:], t) + 0.01 * x[:, :1]

    sampler = Sampler(ConcatCondition(network), schedule, FastDDPM(), 10, backend="reference")
    each = torch.arange(3.0, dtype=torch.float64).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    several = sampler.sample(cv.start(), conditioning={"condition": each})
    one = sampler.sample(cv.start(), conditioning={"condition": each[2:]})
    torch.testing.assert_close(several[2], one[2])
    assert not torch.allclose(several[1], one[1])


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: FastDDPM("linear"), ValueError, "schedule"),
        (lambda: FastDDPM(solver=3), TypeError, "solver"),
        (lambda: FastDDPM(solver=FastDDPM()), TypeError, "solver"),
        (lambda: FastDDPM().timesteps(NoiseSchedule.flow(), 10), ValueError, "vp"),
        (lambda: FastDDPM().timesteps(NoiseSchedule.linear(), 0), ValueError, "num_steps"),
        (lambda: FastDDPM().timesteps(NoiseSchedule.linear(), 900), ValueError, "num_steps"),
        (lambda: FastDDPM("nonuniform").timesteps(NoiseSchedule.linear(), 1), ValueError, "num_steps"),
        (lambda: FastDDPM().training_times(NoiseSchedule.linear(), 10, 0), ValueError, "batch"),
        (
            lambda: fast_ddpm_loss(lambda x, t: x, torch.zeros(2, 3), NoiseSchedule.linear(), torch.tensor([5])),
            ValueError,
            "times",
        ),
        (
            lambda: fast_ddpm_loss(lambda x, t: x[:1], torch.zeros(2, 3), NoiseSchedule.linear(), torch.tensor([5, 5])),
            ValueError,
            "denoiser",
        ),
        (lambda: ConcatCondition(3), TypeError, "model"),
        (
            lambda: ConcatCondition(lambda x, t: x)(torch.zeros(2, 1, 4, 4), torch.zeros(2), condition=3),
            TypeError,
            "condition",
        ),
        (
            lambda: ConcatCondition(lambda x, t: x)(
                torch.zeros(2, 1, 4, 4), torch.zeros(2), condition=torch.zeros(2, 1, 8, 8)
            ),
            ValueError,
            "condition",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_default_is_ddim():
    assert FastDDPM().solver == DDIM()
