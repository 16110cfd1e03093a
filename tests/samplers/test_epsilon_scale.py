"""Epsilon scaling of a sampler, and samplers with other arguments."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.dpm_solver import DPMSolverPP  # noqa: E402
from pydenoise.samplers.evodiff import EVODiff  # noqa: E402
from pydenoise.samplers.pndm import PNDM  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
SCALES = [1.0 + 0.02 * k for k in range(8)]


def divided(calls: list):
    """The mixture's epsilon, divided by the scale of its call."""
    inner = cv.mixture().denoiser(cv.schedule())

    def denoise(x, t):
        calls.append(t)
        return inner(x, t) / SCALES[len(calls) - 1]

    return denoise


@pytest.mark.parametrize("solver", [DDIM(), DDPM(), DPMSolverPP(3), PNDM("plms")])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"clip": 0.5, "clip_rederives": True}])
def test_epsilon_is_divided(solver, options):
    steps = 8 if solver.name != PNDM("plms").name else 7
    plain = cv.mixture().denoiser(cv.schedule())
    scaled = Sampler(plain, cv.schedule(), solver, steps, epsilon_scale=SCALES, **options)
    wanted = Sampler(divided([]), cv.schedule(), solver, steps, **options).sample(cv.start(), seed=1)
    torch.testing.assert_close(scaled.sample(cv.start(), seed=1), wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(scaled.replace(epsilon_scale=None).sample(cv.start(), seed=1), wanted)


def test_one_scale_guidance_and_later_steps():
    plain = cv.mixture().denoiser(cv.schedule())
    one = Sampler(plain, cv.schedule(), DDIM(), 8, epsilon_scale=1.05)
    other = Sampler(lambda x, t: plain(x, t) / 1.05, cv.schedule(), DDIM(), 8)
    torch.testing.assert_close(one.sample(cv.start()), other.sample(cv.start()), rtol=0, atol=1e-12)
    each = Sampler(plain, cv.schedule(), DDIM(), 8, epsilon_scale=SCALES)
    states = each.sample(cv.start(), return_trajectory=True).states
    torch.testing.assert_close(each.from_step(3).sample(states[3]), states[-1], rtol=0, atol=1e-12)


def test_replace():
    run = Sampler(cv.mixture().denoiser(cv.schedule()), cv.schedule(), DDIM(), 8, clip=0.5)
    other = run.replace(solver=DDPM())
    assert other.timesteps == run.timesteps and other.conversion.clip == 0.5 and isinstance(other.solver, DDPM)
    assert run.replace(num_steps=4).plan.calls == 4 and run.replace(clip=None).conversion.clip is None
    with pytest.raises(TypeError, match="steps"):
        run.replace(steps=3)


@pytest.mark.parametrize("options, message", [
    ({"epsilon_scale": 0.0}, "epsilon_scale: expected finite numbers above 0"),
    ({"epsilon_scale": [1.0]}, "epsilon_scale: expected a number, or one for each of 8 calls, got 1"),
    ({"epsilon_scale": 1.0, "prediction_type": "sample"}, "epsilon_scale: expected a model of epsilon"),
    ({"epsilon_scale": 1.0, "solver": EVODiff()}, "epsilon_scale: the rows of .* depend on the data"),
])  # fmt: skip
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(lambda x, t: x, cv.schedule(), **({"solver": DDIM(), "num_steps": 8} | options))
