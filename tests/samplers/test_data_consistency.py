"""Data consistency: what samples agree with, conversions, guidance, bad input."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers import DDIM, DPMSolverPP, NoiseSchedule, Sampler  # noqa: E402
from pydenoise.samplers.data_consistency import DataConsistency  # noqa: E402
from pydenoise.samplers.operators import MRI, DownSampling, FunctionOperator, Inpainting  # noqa: E402
from pydenoise.samplers.plan import Conversion  # noqa: E402
from pydenoise.samplers.rddm import residual_schedule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
KNOWN = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
OPERATORS = {"inpainting": Inpainting(KNOWN), "MRI": MRI(KNOWN), "down-sampling": DownSampling(2)}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("solver", [DDIM(), DDIM(eta=1.0), DPMSolverPP(2)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samples_agree_with_the_measurement(name, solver, prediction_type):
    operator, schedule = OPERATORS[name], cv.schedule()
    y = operator(cv.tensor("an_clean"))
    denoiser = DataConsistency(
        cv.mixture().denoiser(schedule, prediction_type), schedule, operator, prediction_type=prediction_type
    )
    sampler = Sampler(denoiser, schedule, solver, 10, prediction_type=prediction_type)
    got = sampler.sample(cv.start(), conditioning={"measurement": y}, seed=0)
    torch.testing.assert_close(operator(got), y, rtol=0, atol=1e-9)
    free = Sampler(denoiser.denoiser, schedule, solver, 10, prediction_type=prediction_type).sample(cv.start(), seed=0)
    assert (operator(free) - y).abs().max() > 0.1


def test_what_is_not_measured_is_the_denoisers():
    """Pixels of this mean and variance are independent: the known ones change nothing of the others."""
    operator, schedule, model = OPERATORS["inpainting"], cv.schedule(), cv.gaussian()
    denoiser = DataConsistency(model.denoiser(schedule), schedule, operator)
    y = operator(cv.tensor("an_clean"))
    got = Sampler(denoiser, schedule, DDIM(), 10).sample(cv.start(), conditioning={"measurement": y})
    free = Sampler(model.denoiser(schedule), schedule, DDIM(), 10).sample(cv.start())
    torch.testing.assert_close(got, torch.where(KNOWN, y, free), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_x0_is_moved_by_the_weight(kind, prediction_type, weight):
    schedule = {"vp": cv.schedule(), "ve": NoiseSchedule.karras(), "flow": NoiseSchedule.flow()}[kind]
    t = {"vp": 400, "ve": 2.0, "flow": 300.0}[kind]
    operator, conversion = DownSampling(2), Conversion(prediction_type)
    if kind == "flow" and prediction_type == "epsilon":
        with pytest.raises(ValueError, match="prediction_type"):
            DataConsistency(lambda x, t: x, schedule, operator)
        return
    denoiser = DataConsistency(lambda x, t: x.sin(), schedule, operator, prediction_type=prediction_type, weight=weight)
    x, y = cv.start(), operator(cv.tensor("an_clean"))
    p, q = conversion.x0(schedule.level(t))
    x0 = p * x + q * x.sin()
    wanted = x0 + weight * operator.pinv(y - operator(x0))
    got = p * x + q * denoiser(x, torch.full((3,), t), measurement=y)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(denoiser(x, t, measurement=y), denoiser(x, torch.tensor([t] * 3), measurement=y))


def test_without_noise_nothing_changes():
    denoiser = DataConsistency(lambda x, t: x.sin(), NoiseSchedule.karras(), DownSampling(2))
    x = cv.start()
    assert torch.equal(denoiser(x, 0.0, measurement=torch.zeros(1, 2, 2, 2)), x.sin())


def test_guidance_pieces_and_one_measurement_for_all():
    schedule, operator = cv.schedule(), OPERATORS["inpainting"]
    inner = cv.mixture().denoiser(schedule)
    y = operator(cv.tensor("an_clean")[:1])
    denoiser = DataConsistency(lambda x, t, gain: inner(x, t) * gain.view(-1, 1, 1, 1), schedule, operator)
    sampler = Sampler(denoiser, schedule, DDIM(), 6, guidance_scale=2.0)
    ones = torch.ones(3, dtype=torch.float64)
    given = {
        "conditioning": {"measurement": y, "gain": ones}, "unconditional": {"measurement": y, "gain": 0.5 * ones},
    }  # fmt: skip
    got = sampler.sample(cv.start(), **given)
    torch.testing.assert_close(operator(got), y.expand(3, -1, -1, -1), rtol=0, atol=1e-9)
    assert torch.equal(got, sampler.sample(cv.start(), max_batch=1, **given))


def test_conjugate_gradients_serve_too():
    schedule, matrix = cv.schedule(), torch.randn(9, 32, generator=torch.Generator().manual_seed(2)).double()
    operator = FunctionOperator(lambda x: x.flatten(1) @ matrix.T, lambda y: (y @ matrix).view(-1, 2, 4, 4))
    y = operator(cv.tensor("an_clean"))
    denoiser = DataConsistency(cv.mixture().denoiser(schedule), schedule, operator)
    got = Sampler(denoiser, schedule, DDIM(), 6).sample(cv.start(), conditioning={"measurement": y})
    torch.testing.assert_close(operator(got), y, rtol=0, atol=1e-4)


def test_float32_on_the_compiled_kernel():
    schedule, operator = cv.schedule(), OPERATORS["MRI"]
    y = operator(cv.tensor("an_clean").float())
    denoiser = DataConsistency(cv.mixture().denoiser(schedule), schedule, operator)
    got = Sampler(denoiser, schedule, DPMSolverPP(2), 8).sample(
        cv.start().float(), conditioning={"measurement": y}
    )  # fmt: skip
    assert got.dtype == torch.float32
    torch.testing.assert_close(operator(got), y, rtol=0, atol=1e-4)


def build(**changes):
    given = {"denoiser": lambda x, t: x, "schedule": cv.schedule(), "operator": DownSampling(2)} | changes
    return DataConsistency(given.pop("denoiser"), given.pop("schedule"), given.pop("operator"), **given)


@pytest.mark.parametrize("make, error, message", [
    (lambda: build(denoiser=1), TypeError, "denoiser"),
    (lambda: build(schedule="vp"), TypeError, "schedule"),
    (lambda: build(schedule=residual_schedule()), ValueError, "schedule"),
    (lambda: build(operator=lambda x: x), TypeError, "operator: .* FunctionOperator"),
    (lambda: build(prediction_type="noise"), ValueError, "prediction_type"),
    (lambda: build(schedule=cv.schedule().zero_terminal_snr()), ValueError, "prediction_type"),
    (lambda: build(weight=2), ValueError, "weight"),
    (lambda: build(weight="1"), TypeError, "weight"),
    (lambda: build()(torch.zeros(2, 1, 4, 4), 3, measurement=None), TypeError, "measurement"),
    (lambda: build()(torch.zeros(2, 1, 4, 4), 3, measurement=torch.zeros(3, 1, 2, 2)), ValueError, "measurement"),
    (lambda: build()(torch.zeros(2, 1, 4, 4), 3, measurement=torch.zeros(2, 1, 2, 1)), ValueError, "measurement"),
    (lambda: build(denoiser=lambda x, t: x[:1])(torch.zeros(2, 1, 4, 4), 3, measurement=torch.zeros(1, 1, 2, 2)),
     ValueError, "denoiser"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
