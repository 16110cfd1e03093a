"""NoiseShift: the calibrated table finds what a model's times are off by."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.euler import Euler  # noqa: E402
from pydenoise.samplers.levels import NoiseSchedule  # noqa: E402
from pydenoise.samplers.noise_shift import calibrate_noise_shift  # noqa: E402
from pydenoise.samplers.pndm import PNDM  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def clean(count: int = 128) -> torch.Tensor:
    """Samples of the Gaussian."""
    model = cv.gaussian()
    z = torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model.mean + model.variance.sqrt() * z


def late(schedule, offset, told=None):
    """A perfect model, except that its clock is ``offset`` late: it wants t - offset where the noise is that of t."""
    plain = cv.gaussian().denoiser(schedule)

    def denoiser(x, t):
        if told is not None:
            told.append(t)
        return plain(x, (t + offset).clamp(0, 999))

    return denoiser


def test_finds_the_offset_of_a_models_clock():
    schedule, times = NoiseSchedule.linear(), [900.0, 700.0, 500.0, 300.0, 100.0]
    told: list[torch.Tensor] = []
    sampler = Sampler(late(schedule, 20, told), schedule, DDIM(), timesteps=times, backend="reference")
    shift = calibrate_noise_shift(sampler, clean(), repeats=2)
    assert shift.times == tuple(times)
    assert all(abs(found - (t - 20)) <= 6 for found, t in zip(shift.time_table, times, strict=True)), shift.time_table
    assert all(after < before for after, before in zip(shift.errors, shift.errors_before, strict=True))
    assert all(t == round(t) for t in shift.time_table) and told[0].dtype == torch.int64
    # With the table, the sampler's result is nearer to that of a model whose clock is right.
    right = Sampler(late(schedule, 0), schedule, DDIM(), timesteps=times, backend="reference").sample(cv.start())
    options = {"timesteps": times, "backend": "reference"}
    fixed = Sampler(late(schedule, 20), schedule, DDIM(), time_table=shift.time_table, **options).sample(cv.start())
    plain = Sampler(late(schedule, 20), schedule, DDIM(), **options).sample(cv.start())
    assert (fixed - right).abs().mean() < 0.3 * (plain - right).abs().mean()


def test_a_right_clock_stays():
    schedule = NoiseSchedule.linear()
    sampler = Sampler(late(schedule, 0), schedule, DDIM(), timesteps=[800.0, 400.0, 50.0], backend="reference")
    shift = calibrate_noise_shift(sampler, clean(), radius=20)
    assert all(abs(found - t) <= 5 for found, t in zip(shift.time_table, shift.times, strict=True))
    assert all(a <= b for a, b in zip(shift.errors, shift.errors_before, strict=True))


def test_times_do_not_rise():
    """A model that wants one time for two levels: the table is level there, and never rises."""
    schedule = NoiseSchedule.linear()
    plain = cv.gaussian().denoiser(schedule)

    def denoiser(x, t):
        true = 540.0 if 500 < float(t[0]) < 600 else 1080 - float(t[0])  # a clock that runs backwards in places
        return plain(x, min(max(true, 0.0), 999.0))

    sampler = Sampler(denoiser, schedule, DDIM(), timesteps=[560.0, 540.0, 520.0], backend="reference")
    table = calibrate_noise_shift(sampler, clean(32), radius=50).time_table
    assert all(later <= earlier for earlier, later in zip(table, table[1:], strict=False))


def test_solvers_with_several_calls_a_level():
    """Every call at a level is told the level's time."""
    schedule = NoiseSchedule.linear()
    sampler = Sampler(late(schedule, 20), schedule, PNDM("f"), 6, backend="reference")
    shift = calibrate_noise_shift(sampler, clean(32), coarse=5, fine=5)
    assert len(shift.time_table) == sampler.plan.calls
    pairs = {}
    for time, found in zip(shift.times, shift.time_table, strict=True):
        assert pairs.setdefault(time, found) == found
    Sampler(late(schedule, 20), schedule, PNDM("f"), 6, time_table=shift.time_table, backend="reference")


@pytest.mark.parametrize("kind", ["ve", "flow"])
def test_other_kinds_of_schedule(kind):
    schedule = NoiseSchedule.karras() if kind == "ve" else NoiseSchedule.flow()
    plain = cv.gaussian().denoiser(schedule, "sample")
    factor, offset = (1.2, 0.0) if kind == "ve" else (1.0, 30.0)
    times = [3.0, 1.0, 0.3] if kind == "ve" else [800.0, 500.0, 200.0]
    sampler = Sampler(lambda x, t: plain(x, factor * t + offset), schedule, Euler(), timesteps=times,
                      prediction_type="sample", backend="reference")  # fmt: skip
    shift = calibrate_noise_shift(sampler, clean(256))
    for found, time in zip(shift.time_table, times, strict=True):
        wanted = (time - offset) / factor
        assert abs(found - wanted) < (0.06 * wanted if kind == "ve" else 12), (shift.time_table, wanted)


def test_pieces_conditions_and_seeds():
    schedule = NoiseSchedule.linear()
    plain = cv.gaussian().denoiser(schedule)
    sizes = []

    def denoiser(x, t, gain):
        sizes.append(len(x))
        return plain(x, t) * gain[:, None, None, None]

    sampler = Sampler(denoiser, schedule, DDIM(), timesteps=[700.0, 300.0], backend="reference")
    gain = {"gain": torch.linspace(0.9, 1.1, 6, dtype=torch.float64)}
    options = {"conditioning": gain, "coarse": 5, "fine": 3}
    whole = calibrate_noise_shift(sampler, clean(6), **options)
    parts = calibrate_noise_shift(sampler, clean(6), max_batch=4, **options)
    assert parts.time_table == whole.time_table and parts.errors == pytest.approx(whole.errors)
    assert set(sizes) == {6, 4, 2}
    assert calibrate_noise_shift(sampler, clean(6), seed=1, **options).errors != whole.errors


def test_observers_hear_of_the_calls():
    class Observer:
        def __init__(self):
            self.calls = []

        def begin_run(self, times):
            self.calls.append(tuple(times))

        def begin_step(self, step, num_steps):
            self.calls.append(step)

    observer, schedule = Observer(), NoiseSchedule.linear()
    sampler = Sampler(late(schedule, 0), schedule, DDIM(), timesteps=[700.0, 300.0], observers=[observer])
    calibrate_noise_shift(sampler, clean(2), coarse=3, fine=3)
    assert observer.calls == [(700.0, 300.0), 0, 1]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sampler": 3}, TypeError, "sampler"),
        ({"x0": 3}, TypeError, "x0"),
        ({"x0": torch.zeros(0, 2)}, ValueError, "x0"),
        ({"radius": 0}, ValueError, "radius"),
        ({"coarse": 4}, ValueError, "coarse"),
        ({"fine": 1}, ValueError, "fine"),
        ({"repeats": 0}, ValueError, "repeats"),
        ({"max_batch": 0}, ValueError, "max_batch"),
    ],
)
def test_bad_arguments(options, error, message):
    schedule = NoiseSchedule.linear()
    sampler = Sampler(late(schedule, 0), schedule, DDIM(), 4)
    given = {"sampler": sampler, "x0": torch.zeros(2, 2, 4, 4)} | options
    with pytest.raises(error, match=message):
        calibrate_noise_shift(given.pop("sampler"), given.pop("x0"), **given)


@pytest.mark.parametrize("denoiser", [lambda x, t: x[:1], lambda x, t: x * math.nan])
def test_a_bad_model_is_named(denoiser):
    sampler = Sampler(denoiser, NoiseSchedule.linear(), DDIM(), 4)
    with pytest.raises(ValueError, match="denoiser"):
        calibrate_noise_shift(sampler, torch.zeros(2, 2, 4, 4))
