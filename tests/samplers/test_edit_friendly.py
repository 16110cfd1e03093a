"""Edit-friendly inversion: the golden noise, exact reconstruction, edits."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.edit_friendly import EditFriendly  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
TIMES = [900.0 - 100 * k for k in range(10)]


def sampler(eta: float = 1.0, denoiser=None, timesteps=TIMES, prediction_type="epsilon", **options) -> Sampler:
    schedule = cv.public_schedule()
    denoiser = denoiser or cv.mixture().denoiser(schedule, prediction_type)
    return Sampler(
        denoiser, schedule, DDIM(eta=eta), timesteps=timesteps, prediction_type=prediction_type, **options
    )  # fmt: skip


def shifted(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    """The mixture's epsilon, with every mean moved by ``shift`` [B]."""
    schedule = cv.public_schedule()
    level = schedule.level(float(t[0]))
    moved = x - level.alpha * shift.to(x).view(-1, 1, 1, 1)
    return cv.mixture().epsilon(moved, level)


def test_the_golden_noise_and_states():
    found = EditFriendly(sampler(), last="zero").invert(
        cv.tensor("an_clean"), noise=cv.tensor("own_editfriendly_noise")
    )
    torch.testing.assert_close(found.noise.flip(0), cv.tensor("own_editfriendly_zs"), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.states, cv.tensor("own_editfriendly_rec"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"prediction_type": "v_prediction"}, {"epsilon_scale": 1.01}])
def test_the_image_comes_back(eta, dtype, options):
    x0 = cv.tensor("an_clean").to(dtype)
    found = EditFriendly(sampler(eta, **options)).invert(x0, **({"seed": 3} if eta else {}))
    again = found.reconstruct(return_trajectory=True)
    assert torch.equal(again.states, found.states), "the same rows on the same states"
    assert float((again.sample - x0).abs().max()) < 1e-6


def test_states_are_those_of_the_forward_process():
    x0 = cv.tensor("an_clean")
    run = sampler()
    found = EditFriendly(run).invert(x0, seed=1)
    for k, level in enumerate(run.plan.levels):
        noise = (found.states[k] - level.alpha * x0) / level.sigma
        # the last level has hardly any noise, and its number in float64 little meaning
        assert abs(float(noise.mean())) < 0.4 and 0.7 < float(noise.std()) < 1.3
    assert torch.equal(found.states, EditFriendly(run).invert(x0, seed=1).states)
    assert not torch.equal(found.states, EditFriendly(run).invert(x0, seed=2).states)


def test_without_noise_states_are_those_of_ddim_inversion():
    """On a fine grid it is the flow of the ODE, and what the steps miss is small."""
    times = [float(t) for t in range(999, -1, -3)]
    run = sampler(0.0, cv.gaussian().denoiser(cv.public_schedule()), times)
    x0 = cv.gaussian().mean + 0.3 * cv.start()
    found = EditFriendly(run).invert(x0)
    exact = cv.gaussian().flow(x0, run.plan.levels[-1], run.plan.levels[0])
    assert float((found.states[0] - exact).abs().max()) < 0.05
    assert float(found.noise.abs().max()) < 0.05
    torch.testing.assert_close(run.sample(found.states[0]), x0, rtol=0, atol=0.05)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_edits(eta):
    run = sampler(eta, shifted)
    x0 = cv.tensor("an_clean")
    source, target = {"shift": torch.zeros(3)}, {"shift": torch.full((3,), 0.5)}
    found = EditFriendly(run).invert(x0, conditioning=source, **({"seed": 0} if eta else {}))
    assert float((found.edit(source) - x0).abs().max()) < 1e-6
    whole, late = found.edit(target), found.edit(target, skip=9)
    assert float((whole - x0).mean()) == pytest.approx(0.5, abs=0.1), "the means of the other condition"
    assert float((late - x0).abs().mean()) < float((whole - x0).abs().mean()) / 5, "skipping keeps the image"
    assert torch.equal(found.edit(target, max_batch=2), whole)
    states = found.edit(target, skip=4, return_trajectory=True).states
    assert len(states) == 7 and torch.equal(states[0], found.states[4])


def test_guidance_of_inversion_and_edit():
    run = sampler(1.0, shifted, guidance_scale=2.0)
    x0 = cv.tensor("an_clean")
    given = {"conditioning": {"shift": torch.full((3,), 0.1)}, "unconditional": {"shift": torch.zeros(3)}}
    found = EditFriendly(run).invert(x0, seed=0, **given)
    assert float((found.reconstruct(**given) - x0).abs().max()) < 1e-6
    assert float((found.edit(**given, guidance_scale=2.0) - x0).abs().max()) < 1e-6
    far = [float((found.edit(**given, guidance_scale=w) - x0).mean()) for w in (1.0, 3.0, 6.0)]
    assert far[0] < 0 < far[1] < far[2], "more guidance goes further to the condition"
    down = [2.0 + k / 10 for k in range(10)]
    listed = EditFriendly(sampler(0.0, shifted, guidance_scale=down)).invert(x0, **given)
    assert float((listed.reconstruct(**given) - x0).abs().max()) < 1e-6


@pytest.mark.parametrize("make, error, message", [
    (lambda: EditFriendly(3), TypeError, "sampler: expected a Sampler"),
    (lambda: EditFriendly(sampler(0.5)), ValueError, "sampler: expected the solver DDIM"),
    (lambda: EditFriendly(sampler().replace(solver=DDPM())), ValueError, "sampler: expected the solver DDIM"),
    (lambda: EditFriendly(sampler(dynamic_threshold=0.9)), ValueError, "sampler: dynamic_threshold"),
    (lambda: EditFriendly(sampler(), last="none"), ValueError, "last: expected one of"),
    (lambda: EditFriendly(sampler()).invert(3), TypeError, "x0: expected a tensor"),
    (lambda: EditFriendly(sampler()).invert(torch.full((1, 2, 4, 4), torch.nan)), ValueError, "x0: expected a finite"),
    (lambda: EditFriendly(sampler()).invert(torch.ones(1, 2, 4, 4, dtype=torch.int64)), ValueError, "x0: expected"),
    (lambda: EditFriendly(sampler(0.0)).invert(torch.ones(1, 2, 4, 4), seed=1), ValueError, "noise: DDIM inversion"),
    (lambda: EditFriendly(sampler()).invert(torch.ones(1, 2, 4, 4), seed=1, noise=[]), ValueError, "noise: expected e"),
    (lambda: EditFriendly(sampler()).invert(torch.ones(1, 2, 4, 4), noise=[]), ValueError, "noise: expected one"),
    (lambda: EditFriendly(sampler()).invert(torch.ones(1, 2, 4, 4), noise=torch.ones(10, 1)), ValueError, "noise.0"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("options, message", [
    ({"skip": 10}, "skip: expected less than 10"),
    ({"skip": -1}, "skip: expected at least 0"),
    ({"seed": 1}, "seed: an edit begins"),
    ({"x": torch.ones(1)}, "x: an edit begins"),
])  # fmt: skip
def test_bad_edits(options, message):
    found = EditFriendly(sampler()).invert(cv.tensor("an_clean"), seed=0)
    with pytest.raises(ValueError, match=message):
        found.edit(**options)
