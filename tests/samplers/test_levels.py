"""Noise schedules: the published formulas, levels between timesteps, inverses, bad values."""

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydenoise.samplers.levels import Level, NoiseSchedule

sys.path.insert(0, str(Path(__file__).parent))
import convergence  # noqa: E402

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_snr": NoiseSchedule.linear().zero_terminal_snr(),
    "karras": NoiseSchedule.karras(),
    "flow": NoiseSchedule.flow(),
    "shifted": NoiseSchedule.flow(shift=3.0),
}
SIZES = {"vp": lambda a, s: a**2 + s**2, "ve": lambda a, s: a, "flow": lambda a, s: a + s}


def close(a, b, tolerance=1e-13):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
                               rtol=tolerance, atol=tolerance)  # fmt: skip


def test_linear_is_the_golden_schedule():
    close(SCHEDULES["linear"].alphas_cumprod, convergence.tensor("an_abar"))
    close(SCHEDULES["linear"].betas, convergence.tensor("an_betas"))
    close(convergence.schedule().alphas_cumprod, convergence.tensor("an_abar"))


def test_published_ends():
    """beta_0 and beta_T of the two linear schedules; the cosine's alphas_cumprod in the middle."""
    close(SCHEDULES["linear"].betas[[0, -1]], [1e-4, 0.02])
    close(SCHEDULES["scaled_linear"].betas[[0, -1]], [0.00085, 0.012])
    middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    close(SCHEDULES["cosine"].alphas_cumprod[499], middle, 1e-12)
    close(SCHEDULES["cosine"].betas[-1], 0.999, 1e-12)
    close(NoiseSchedule.karras(5, 0.002, 80).sigmas[[0, -1]], [0.002, 80.0])
    close(NoiseSchedule.karras(3, 1.0, 2.0, rho=7.0).sigmas[1], ((1 + 2 ** (1 / 7)) / 2) ** 7)
    close(NoiseSchedule.flow(4).sigmas, [0.25, 0.5, 0.75, 1.0])
    close(NoiseSchedule.flow(4, shift=3.0).sigmas, [0.5, 0.75, 0.9, 1.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_level_has_its_kind_and_rises(name):
    schedule = SCHEDULES[name]
    close(SIZES[schedule.kind](schedule.alphas, schedule.sigmas), torch.ones(schedule.num_timesteps))
    assert bool((schedule.sigmas.diff() > 0).all()) and bool((schedule.times.diff() > 0).all())
    assert schedule.first == schedule.level(float(schedule.times[0]))
    assert schedule.initial_scale == (schedule.last.sigma if schedule.kind == "ve" else 1.0)
    for index in (0, 1, schedule.num_timesteps // 2, schedule.num_timesteps - 1):
        level = schedule.level(float(schedule.times[index]))
        close(level, (schedule.alphas[index], schedule.sigmas[index]))


def test_whole_timesteps_are_exact():
    schedule = SCHEDULES["linear"]
    for t in (0, 1, 500, 999):
        assert schedule.level(t) == Level(float(schedule.alphas[t]), float(schedule.sigmas[t]))


def test_between_timesteps_log_snr_is_linear():
    schedule = SCHEDULES["linear"]
    below, above = schedule.log_snr(700), schedule.log_snr(701)
    close(schedule.log_snr(700.25), 0.75 * below + 0.25 * above)


def test_next_to_pure_noise_the_angle_is_linear():
    """log(alpha / sigma) of the last timestep is -inf, so nothing can be linear in it."""
    schedule = SCHEDULES["zero_snr"]
    level = schedule.level(998.5)
    before = schedule.level(998)
    close(math.atan2(level.sigma, level.alpha), (math.atan2(before.sigma, before.alpha) + math.pi / 2) / 2)


def test_zero_terminal_snr():
    plain, rescaled = SCHEDULES["linear"], SCHEDULES["zero_snr"]
    assert rescaled.last == Level(0.0, 1.0)
    close(rescaled.alphas[0], plain.alphas[0])
    # Equation of Lin et al.: alpha shifted by its last value, then scaled.
    first, last = plain.alphas[0], plain.alphas[-1]
    close(rescaled.alphas, (plain.alphas - last) * first / (first - last))
    close(rescaled.zero_terminal_snr().alphas, rescaled.alphas)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(SCHEDULES)), share=st.floats(0, 1))
def test_time_of_undoes_log_snr(name, share):
    schedule = SCHEDULES[name]
    low, high = float(schedule.times[0]), float(schedule.times[-1])
    t = low + share * (high - low)
    close(schedule.time_of(schedule.log_snr(t)), t, 1e-9)


def test_time_of_ends():
    schedule = SCHEDULES["linear"]
    assert schedule.time_of(schedule.log_snr(0)) == 0.0 and schedule.time_of(schedule.log_snr(999)) == 999.0
    assert schedule.time_of(schedule.log_snr(0) * (1 + 1e-12)) == 0.0  # rounding
    assert SCHEDULES["zero_snr"].time_of(-math.inf) == 999.0
    assert SCHEDULES["karras"].time_of(0.0) == 1.0
    assert SCHEDULES["flow"].time_of(0.0) == 500.0
    with pytest.raises(ValueError, match="log_snr: expected .* the ends of the schedule"):
        schedule.time_of(20.0)


@settings(max_examples=40, deadline=None)
@given(log_snr=st.floats(-30, 30), kind=st.sampled_from(["vp", "ve", "flow"]))
def test_level_of_log_snr(log_snr, kind):
    level = Level.of_log_snr(log_snr, kind)
    close(SIZES[kind](*level), 1.0)
    close(level.log_snr, log_snr, 1e-12)


def test_clean_and_pure_levels():
    assert Level.clean() == (1.0, 0.0) and Level.clean().log_snr == math.inf
    assert Level(0.0, 1.0).log_snr == -math.inf


def test_add_noise():
    schedule = SCHEDULES["linear"]
    x, z = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    times = torch.tensor([0, 10, 999])
    got = schedule.add_noise(x, z, times)
    assert got.dtype == x.dtype
    for i, t in enumerate(times.tolist()):
        level = schedule.level(t)
        torch.testing.assert_close(got[i], level.alpha * x[i] + level.sigma * z[i])
        torch.testing.assert_close(schedule.add_noise(x, z, t)[i], got[i])
    with pytest.raises(ValueError, match="noise: expected shape"):
        schedule.add_noise(x, z[:2], 5)
    with pytest.raises(ValueError, match="t: expected a number or shape"):
        schedule.add_noise(x, z, times[:2])


def test_index_of():
    assert SCHEDULES["linear"].index_of(10.7) == 10
    schedule = NoiseSchedule.from_sigmas([0.1, 1.0, 10.0])
    assert [schedule.index_of(t) for t in (0.05, 0.1, 0.9, 1.0, 50.0)] == [0, 0, 0, 1, 2]


def test_sigmas_in_either_order_and_own_memory():
    given_sigmas = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    schedule = NoiseSchedule.from_sigmas(given_sigmas)
    assert schedule.sigmas.tolist() == [0.1, 1.0, 10.0]
    rising = torch.tensor([0.1, 1.0], dtype=torch.float64)
    held = NoiseSchedule.from_sigmas(rising)
    rising[0] = 7
    assert held.sigmas[0] == 0.1


def test_copies():
    schedule = SCHEDULES["linear"]
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert copied.level(12.5) == schedule.level(12.5) and repr(copied) == repr(schedule)
    assert "'vp', 1000 levels" in repr(schedule)


@pytest.mark.parametrize("make, message", [
    (lambda: NoiseSchedule.from_betas([0.1, 1.0]), "betas: expected numbers between 0 and 1"),
    (lambda: NoiseSchedule.from_betas([0.0, 0.1]), "betas: expected numbers between 0 and 1"),
    (lambda: NoiseSchedule.from_betas([]), "betas: expected one dimension and at least one"),
    (lambda: NoiseSchedule.from_betas([[0.1]]), "betas: expected one dimension"),
    (lambda: NoiseSchedule.from_betas([math.nan]), "betas: expected finite"),
    (lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.0]), r"alphas_cumprod: expected .*\(0, 1\].*zero_terminal"),
    (lambda: NoiseSchedule.from_alphas_cumprod([1.1, 0.5]), r"alphas_cumprod: expected numbers in \(0, 1\]"),
    (lambda: NoiseSchedule.from_alphas_cumprod([0.9, -0.5]), r"alphas_cumprod: expected numbers in \(0, 1\]"),
    (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.9]), "alphas_cumprod: expected every number to be less"),
    (lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.9]), "alphas_cumprod: expected every number to be less"),
    (lambda: NoiseSchedule.from_sigmas([0.0, 1.0]), "sigmas: expected numbers above 0"),
    (lambda: NoiseSchedule.from_sigmas([1.0, 3.0, 2.0]), "sigmas: expected numbers that only rise or only fall"),
    (lambda: NoiseSchedule.linear(0), "num: expected at least 1, got 0"),
    (lambda: NoiseSchedule.linear(10, beta_end=1.5), "beta_end: expected a finite number between 0 and 1"),
    (lambda: NoiseSchedule.scaled_linear(10, beta_start=-1), "beta_start: expected"),
    (lambda: NoiseSchedule.cosine(s=0), "s: expected a finite number above 0"),
    (lambda: NoiseSchedule.cosine(max_beta=1), "max_beta: expected"),
    (lambda: NoiseSchedule.karras(sigma_min=0), "sigma_min: expected"),
    (lambda: NoiseSchedule.karras(sigma_min=5, sigma_max=2), "sigma_max: expected a finite number above 5"),
    (lambda: NoiseSchedule.karras(rho=0), "rho: expected"),
    (lambda: NoiseSchedule.flow(shift=0), "shift: expected"),
    (lambda: NoiseSchedule.flow().zero_terminal_snr(), "zero_terminal_snr: expected a schedule of kind 'vp'"),
    (lambda: NoiseSchedule.flow().betas, "betas: only a schedule of kind 'vp'"),
    (lambda: NoiseSchedule.karras().alphas_cumprod, "alphas_cumprod: only a schedule of kind 'vp'"),
    (lambda: NoiseSchedule("edm", torch.ones(1), torch.ones(1)), "kind: expected one of vp, ve, flow"),
    (lambda: SCHEDULES["linear"].level(999.5), "t: expected a time from 0 to 999"),
    (lambda: SCHEDULES["linear"].level(-1), "t: expected a time from 0 to 999"),
    (lambda: SCHEDULES["linear"].level(math.nan), "t: expected a time"),
    (lambda: SCHEDULES["karras"].level(math.inf), "t: expected a time"),
    (lambda: SCHEDULES["flow"].level(1001), "t: expected a time from 0 to 1000"),
    (lambda: Level.of_log_snr(0.0, "edm"), "kind: expected one of"),
])  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make, message", [
    (lambda: NoiseSchedule.from_betas("abc"), "betas: expected a sequence of numbers, got str"),
    (lambda: NoiseSchedule.linear(10.5), "num: expected an int, got float"),
    (lambda: NoiseSchedule.linear(True), "num: expected an int, got bool"),
    (lambda: NoiseSchedule.flow(shift="3"), "shift: expected a number, got str"),
    (lambda: SCHEDULES["linear"].level("5"), "t: expected a number, got str"),
])  # fmt: skip
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()
