"""The probability-flow ODE against PNDM's public code and a reference of tight tolerance."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.levels import Level, NoiseSchedule  # noqa: E402
from pydenoise.samplers.pf_ode import PFODE  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def continuous_level(t: float) -> Level:
    """The continuous limit of the linear betas, by the time that the model is told."""
    low, high = cv.tensor("an_pf_betas01").tolist()
    t = t / 999
    log_alpha = 1000 * (-(t**2) * (high - low) / 4 - t * low / 2)
    return Level(math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))


def test_pndms_equation_meets_its_public_code_and_the_reference():
    denoiser = cv.mixture().denoiser(continuous_level)
    loose = PFODE(variable="time").solve(denoiser, cv.schedule(), cv.start())
    tight = PFODE(1e-8, 1e-8, variable="time").solve(denoiser, cv.schedule(), cv.start())
    reference = cv.tensor("an_pf_gmm_reference")
    torch.testing.assert_close(tight.sample, reference, rtol=0, atol=1e-6)
    # Both integrations are only as good as their tolerance: each is this near to the reference.
    torch.testing.assert_close(tight.sample, cv.tensor("repo_pndm_PF_tol1e-5"), rtol=0, atol=2.9e-5)
    torch.testing.assert_close(loose.sample, reference, rtol=0, atol=5e-5)
    assert loose.calls < 100 < tight.calls and len(loose.times) == loose.calls
    assert loose.times[0] == 999 and all(0.999 <= t <= 999 for t in loose.times)


# Pure noise, where "flow" begins, has no log SNR, and epsilon says nothing of x0 there.
CASES = [
    (kind, variable, prediction_type)
    for kind in ("vp", "ve", "flow")
    for variable in ("log_snr", "time")
    for prediction_type in ("epsilon", "sample", "v_prediction", "flow")
    if kind != "flow" or (variable == "time" and prediction_type != "epsilon")
]


@pytest.mark.parametrize("kind, variable, prediction_type", CASES)
def test_exact_flow_of_a_gaussian(kind, variable, prediction_type):
    schedules = {"vp": NoiseSchedule.linear(), "ve": NoiseSchedule.karras(), "flow": NoiseSchedule.flow()}
    schedule = schedules[kind]
    end = 50.0 if kind == "flow" else 0.002 if kind == "ve" else 20.0
    model, x = cv.gaussian(), cv.start() * schedule.initial_scale
    if kind == "vp" and variable == "time":
        level, start, stop = continuous_level, continuous_level(999), continuous_level(end)
    else:
        level, start, stop = schedule.level, schedule.last, schedule.level(end)
    ode = PFODE(1e-9, 1e-9, method="DOP853", variable=variable, end=end)
    got = ode.sample(model.denoiser(level, prediction_type), schedule, x, prediction_type=prediction_type)
    torch.testing.assert_close(got, model.flow(x, start, stop), rtol=1e-5, atol=1e-5)


def test_guidance_shapes_dtypes_and_seeds():
    schedule, model = NoiseSchedule.linear(), cv.gaussian()
    plain = model.denoiser(schedule)
    seen = []

    def denoiser(x, t, scale):
        seen.append((tuple(x.shape), x.dtype, t.dtype, tuple(t.shape)))
        return plain(x.double(), t).to(x.dtype) * scale[:, None, None, None]

    def ones(value):
        return {"scale": torch.full((2,), value)}

    options = {"shape": (2, 2, 4, 4), "seed": 3, "conditioning": ones(1.0), "unconditional": ones(0.5)}
    guided = PFODE(1e-4, 1e-4).sample(denoiser, schedule, guidance_scale=1.0, **options)
    assert seen[0] == ((4, 2, 4, 4), torch.float32, torch.float32, (4,)) and guided.dtype == torch.float32
    alone = PFODE(1e-4, 1e-4).sample(denoiser, schedule, shape=(2, 2, 4, 4), seed=3, conditioning=ones(1.0))
    torch.testing.assert_close(guided, alone)
    other = PFODE(1e-4, 1e-4).sample(denoiser, schedule, shape=(2, 2, 4, 4), seed=4, conditioning=ones(1.0))
    assert not torch.equal(other, alone)


def test_missing_scipy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=r"pydenoise\[ode\]"):
        PFODE().sample(lambda x, t: x, NoiseSchedule.linear(), torch.zeros(1, 2))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: PFODE(rtol=0.0), ValueError, "rtol"),
        (lambda: PFODE(atol="small"), TypeError, "atol"),
        (lambda: PFODE(method="Euler"), ValueError, "method"),
        (lambda: PFODE(variable="t"), ValueError, "variable"),
        (lambda: PFODE(max_calls=0), ValueError, "max_calls"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "options, arguments, error, message",
    [
        ({}, {"denoiser": 3}, TypeError, "denoiser"),
        ({}, {"schedule": 3}, TypeError, "schedule"),
        ({}, {"x": None}, ValueError, "x:"),
        ({}, {"x": torch.zeros(2, dtype=torch.int64)}, ValueError, "x:"),
        ({}, {"prediction_type": "x"}, ValueError, "prediction_type"),
        ({}, {"guidance_scale": 2.0}, ValueError, "unconditional"),
        ({}, {"denoiser": lambda x, t: x[:1]}, ValueError, "call 0"),
        ({}, {"denoiser": lambda x, t: x * math.nan}, ValueError, "call 0"),
        ({}, {"denoiser": lambda x, t: (x,)}, TypeError, "denoiser"),
        ({"max_calls": 3}, {}, RuntimeError, "max_calls"),
        ({"variable": "time"}, {"schedule": NoiseSchedule.cosine()}, ValueError, "linear betas"),
        ({"end": 999.0}, {}, ValueError, "end"),
        ({"variable": "log_snr"}, {"schedule": NoiseSchedule.flow()}, ValueError, "log_snr"),
        ({}, {"schedule": NoiseSchedule.linear().zero_terminal_snr()}, ValueError, "log_snr"),
    ],
)
def test_bad_arguments(options, arguments, error, message):
    given = {"denoiser": lambda x, t: x, "schedule": NoiseSchedule.linear(), "x": torch.zeros(2, 3)} | arguments
    with pytest.raises(error, match=message):
        PFODE(**options).sample(**given)
