"""Inversion by fixed points: there and back, guidance, kinds of schedule, what is refused."""

import math
import sys
from pathlib import Path

import pytest
import torch

from pydenoise.samplers import DDIM, DPMSolverPP, Euler, FixedPointInversion, NoiseSchedule, Sampler

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
VP = NoiseSchedule.linear()


def sampler(schedule=VP, solver=None, steps=20, data=None, **options):
    denoiser = (data or cv.mixture()).denoiser(schedule, options.get("prediction_type", "epsilon"))
    return Sampler(denoiser, schedule, solver or DDIM(), steps, **({"backend": "reference"} | options))


CASES = {
    "epsilon": (VP, DDIM(), {}),
    "v": (VP, DDIM(), {"prediction_type": "v_prediction"}),
    "sample": (VP, DDIM(), {"prediction_type": "sample"}),
    "euler": (VP, Euler(), {}),
    "sigmas": (NoiseSchedule.karras(sigma_max=5.0), Euler(), {}),
    "scaled input": (NoiseSchedule.karras(sigma_max=5.0), Euler(), {"input_scale": lambda level: 1.0}),
    "flow": (NoiseSchedule.flow(), Euler(), {"prediction_type": "flow", "timesteps": [950, 800, 600, 400, 200, 100]}),
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name):
    schedule, solver, options = CASES[name]
    run = sampler(schedule, solver, None if "timesteps" in options else 20, **options)
    begun = cv.start() * run.plan.initial_scale
    result = run.sample(begun)
    found = FixedPointInversion(run, tolerance=1e-11).invert(result)
    torch.testing.assert_close(run.sample(found.start), result, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.start, begun, rtol=0, atol=1e-6)
    assert len(found.calls) == run.plan.calls and max(found.calls) <= 100


def test_of_a_sample_that_no_run_made():
    """A clean image, far from the mode that a run would choose: what leads there is found all the same."""
    run = sampler(steps=25, data=cv.gaussian())
    image = cv.tensor("an_clean")
    found = FixedPointInversion(run, tolerance=1e-10).invert(image)
    torch.testing.assert_close(run.sample(found.start), image, rtol=0, atol=1e-7)


def test_float32_and_conditions():
    shift = torch.tensor([-0.5, 0.0, 0.5])
    data = cv.gaussian().denoiser(VP)

    def denoise(x, t, y):
        return data(x, t) + 0.1 * y.view(-1, 1, 1, 1)

    run = Sampler(denoise, VP, DDIM(), 20, guidance_scale=2.0)
    told = {"conditioning": {"y": shift}, "unconditional": {"y": 0 * shift}}
    result = run.sample(cv.start().float(), **told)
    found = FixedPointInversion(run, tolerance=1e-5).invert(result, **told)
    torch.testing.assert_close(run.sample(found.start, **told), result, rtol=0, atol=2e-4)
    first_order = FixedPointInversion(run, tolerance=1e3).invert(result, **told)
    assert set(first_order.calls) == {1}
    gap = [float((run.sample(f.start, **told) - result).abs().max()) for f in (found, first_order)]
    assert gap[0] < gap[1] / 50, "one call a step is DDIM's own inversion"


def test_a_step_that_does_not_converge():
    run = sampler(steps=20)
    with pytest.raises(ValueError, match=r"sampler: step \d+ of 20 .* cannot be inverted to tolerance 1e-12: after 2"):
        FixedPointInversion(run, tolerance=1e-12, max_calls=2).invert(cv.start())
    wild = Sampler(lambda x, t: 50 * x, VP, DDIM(), 20, backend="reference")
    with pytest.raises(ValueError, match="more steps or less guidance"):
        FixedPointInversion(wild).invert(cv.start())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: FixedPointInversion(3), TypeError, "sampler"),
        (lambda: FixedPointInversion(sampler(solver=DDIM(eta=1.0))), ValueError, "sampler: DDIM adds noise"),
        (lambda: FixedPointInversion(sampler(solver=DPMSolverPP(2))), ValueError, "sampler: a step of DPM"),
        (lambda: FixedPointInversion(sampler(clip=1.0)), ValueError, "sampler: clip"),
        (lambda: FixedPointInversion(sampler(), tolerance=0), ValueError, "tolerance"),
        (lambda: FixedPointInversion(sampler(), tolerance=math.nan), ValueError, "tolerance"),
        (lambda: FixedPointInversion(sampler(), tolerance="1"), TypeError, "tolerance"),
        (lambda: FixedPointInversion(sampler(), max_calls=0), ValueError, "max_calls"),
        (lambda: FixedPointInversion(sampler()).invert(3), TypeError, "sample:"),
        (lambda: FixedPointInversion(sampler()).invert(torch.zeros(3, dtype=torch.int64)), ValueError, "sample:"),
        (lambda: FixedPointInversion(sampler()).invert(cv.start(), unconditional={}), ValueError, "unconditional"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
