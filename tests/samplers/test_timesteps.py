"""Spacings of timesteps: what NumPy expressions of the public codes give, both ends, bad values."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from pydenoise.samplers import timesteps as spacing
from pydenoise.samplers.levels import NoiseSchedule

sys.path.insert(0, str(Path(__file__).parent))
import convergence  # noqa: E402

LINEAR = NoiseSchedule.linear()
COUNTS = (1, 2, 3, 7, 10, 15, 30, 50, 333, 999, 1000)


@pytest.mark.parametrize("key", ["df_ddim_N10_t", "df_dpmpp_zero_N10_t"])
def test_golden(key):
    wanted = convergence.tensor(key).tolist()
    dpm = "dpmpp" in key
    got = spacing.linspace(LINEAR, 10, drop_last=True) if dpm else spacing.leading(LINEAR, 10)
    assert got == wanted


@pytest.mark.parametrize("steps", COUNTS)
def test_leading(steps):
    assert spacing.leading(LINEAR, steps) == (np.arange(steps) * (1000 // steps))[::-1].tolist()
    if (steps - 1) * (1000 // steps) < 999:
        shifted = spacing.leading(LINEAR, steps, offset=1)
        assert shifted == [t + 1 for t in spacing.leading(LINEAR, steps)]


@pytest.mark.parametrize("steps", COUNTS)
def test_trailing(steps):
    wanted = np.round(np.arange(1000, 0, -1000 / steps)).astype(int)[:steps] - 1
    assert spacing.trailing(LINEAR, steps) == wanted.tolist() and spacing.trailing(LINEAR, steps)[0] == 999


@pytest.mark.parametrize("steps", COUNTS[1:-1])
def test_linspace(steps):
    assert spacing.linspace(LINEAR, steps) == np.linspace(0, 999, steps).round()[::-1].tolist()
    assert spacing.linspace(LINEAR, steps, drop_last=True) == np.linspace(0, 999, steps + 1).round()[:0:-1].tolist()


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_quadratic(steps):
    wanted = [int(value) for value in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert spacing.quadratic(LINEAR, steps) == wanted[::-1]


def test_quadratic_repeats_no_timestep():
    """floor(u^2) has 0 twice for 50 steps."""
    times = spacing.quadratic(LINEAR, 50)
    assert len(times) == 50 and times[-4:] == [3.0, 2.0, 1.0, 0.0]
    assert all(later < earlier for earlier, later in zip(times, times[1:], strict=False))


def test_pndm_has_more_where_the_stride_does_not_divide():
    assert spacing.pndm(LINEAR, 10) == spacing.leading(LINEAR, 10)
    assert len(spacing.pndm(LINEAR, 15)) == 16 and spacing.pndm(LINEAR, 15)[:2] == [990.0, 924.0]


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.karras(), NoiseSchedule.flow(), LINEAR.zero_terminal_snr()])
def test_uniform_log_snr(schedule):
    times = spacing.uniform_log_snr(schedule, 12)
    assert times[0] == float(schedule.times[-1]) and times[-1] == float(schedule.times[0])
    values = [schedule.log_snr(t) for t in times]
    values = values[1:] if math.isinf(values[0]) else values
    np.testing.assert_allclose(np.diff(values), (values[-1] - values[0]) / (len(values) - 1), rtol=1e-9)
    assert spacing.uniform_log_snr(schedule, 11, drop_last=True) == times[:-1]


def test_uniform_log_snr_between_given_times():
    times = spacing.uniform_log_snr(LINEAR, 5, first=800, last=50)
    assert (times[0], times[-1]) == (800.0, 50.0)


def test_karras():
    """On alpha = 1 these are the sigmas of the paper; golden: those of EVODiff's public code, built in float32."""
    schedule = NoiseSchedule.karras()
    wanted = convergence.tensor("repo_evodiff_edm_10_sigmas")
    np.testing.assert_allclose(spacing.karras(schedule, 11), wanted, rtol=2e-7)
    ratios = [math.exp(-LINEAR.log_snr(t)) for t in spacing.karras(LINEAR, 6)]
    np.testing.assert_allclose(np.diff(np.array(ratios) ** (1 / 7), 2), 0, atol=1e-9)
    assert spacing.karras(LINEAR, 5, sigma_min=0.1, sigma_max=10.0)[0] == LINEAR.time_of(-math.log(10))


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("name", [name for name in spacing.SPACINGS if name != "pndm"])
def test_every_spacing_has_its_number_of_descending_times(name, steps):
    times = spacing.spaced(name, LINEAR, steps)
    assert len(times) == steps and spacing.check_times(LINEAR, times) == times


def test_defaults_of_the_kinds():
    karras, flow = NoiseSchedule.karras(), NoiseSchedule.flow()
    assert spacing.solver_times(LINEAR, 4, None, steps_offset=1) == [751.0, 501.0, 251.0, 1.0]
    assert spacing.solver_times(karras, 4, None) == spacing.karras(karras, 4)
    assert spacing.solver_times(flow, 4, None) == spacing.linspace(flow, 4)
    assert spacing.solver_times(karras, 4, None, ends_clean=False) == spacing.karras(karras, 5)[:-1]
    assert spacing.solver_times(LINEAR, 4, "trailing") == spacing.trailing(LINEAR, 4)


@pytest.mark.parametrize("make, message", [
    (lambda: spacing.leading(LINEAR, 0), "num_steps: expected at least 1, got 0"),
    (lambda: spacing.leading(LINEAR, -3), "num_steps: expected at least 1"),
    (lambda: spacing.trailing(LINEAR, 1001), "num_steps: expected at most 1000 for 1000 timesteps, got 1001"),
    (lambda: spacing.linspace(LINEAR, 1000, drop_last=True), "num_steps: expected at most 999"),
    (lambda: spacing.karras(LINEAR, 1001), "num_steps: expected at most 1000"),
    (lambda: spacing.uniform_log_snr(LINEAR, 1001), "num_steps: expected at most 1000"),
    (lambda: spacing.pndm(LINEAR, 1001), "num_steps: expected at most 1000"),
    (lambda: spacing.leading(LINEAR, 10, offset=100), "steps_offset: 100 moves timestep 900 past the last one, 999"),
    (lambda: spacing.spaced("trailing", LINEAR, 10, steps_offset=1), "steps_offset: only spacing 'leading'"),
    (lambda: spacing.spaced("log", LINEAR, 10), "spacing: expected one of leading, trailing, .*, got 'log'"),
    (lambda: spacing.leading(NoiseSchedule.karras(), 10), "spacing: 'leading' counts timesteps of a 'vp' schedule"),
    (lambda: spacing.karras(LINEAR, 5, rho=0), "rho: expected a number above 0"),
    (lambda: spacing.karras(LINEAR, 5, sigma_min=3.0, sigma_max=2.0), "sigma_min: expected 0 < sigma_min < sigma_max"),
    (lambda: spacing.karras(NoiseSchedule.flow(), 5), "sigma_max: needed for a schedule that ends in pure noise"),
    (lambda: spacing.uniform_log_snr(LINEAR, 5, first=10, last=20), "first: expected a time above last"),
    (lambda: spacing.check_times(LINEAR, []), "timesteps: expected at least one"),
    (lambda: spacing.check_times(LINEAR, [5, 5]), "timesteps: expected descending times, got 5 before 5"),
    (lambda: spacing.check_times(LINEAR, [5, 7]), "timesteps: expected descending times, got 5 before 7"),
    (lambda: spacing.check_times(LINEAR, [5, math.nan]), "timesteps: expected descending"),
    (lambda: spacing.check_times(LINEAR, [1000, 5]), "timesteps: t: expected a time from 0 to 999"),
    (lambda: spacing.check_times(LINEAR, [5, -1]), "timesteps: t: expected a time from 0 to 999"),
])  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types():
    with pytest.raises(TypeError, match="num_steps: expected an int, got float"):
        spacing.leading(LINEAR, 10.0)
    with pytest.raises(TypeError, match="steps_offset: expected an int"):
        spacing.leading(LINEAR, 10, offset=1.5)
