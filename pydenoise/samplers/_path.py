"""The noise levels that a run passes through, and checks of options that several solvers share."""

import math
from collections.abc import Sequence

from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.timesteps import SPACINGS, check_spacing, spaced

FINALS = ("zero", "sigma_min")
TO_A_TIME = ("uniform_log_snr", "karras")  # spacings that can end elsewhere than the schedule


def path(schedule: NoiseSchedule, timesteps: Sequence[float], final: str | float) -> list[Level]:
    """The level at every time and the one to end at; log SNR must rise from each to the next.

    ``final``: "zero" (no noise), "sigma_min" (the schedule's level with the least noise) or a time.
    """
    levels = [schedule.level(t) for t in timesteps]
    levels.append(final_level(schedule, final))
    for number, (level, target) in enumerate(zip(levels, levels[1:], strict=False)):
        if target.log_snr > level.log_snr:
            continue
        if number + 1 < len(timesteps):
            raise ValueError(
                f"timesteps: expected descending times, got {timesteps[number]:g} before {timesteps[number + 1]:g}"
            )
        raise ValueError(f"timesteps: the last, {timesteps[number]:g}, has no more noise than final={final!r}")
    return levels


def final_level(schedule: NoiseSchedule, final: str | float) -> Level:
    """The level that ``final`` names."""
    if final == "zero":
        return Level.clean()
    return schedule.first if final == "sigma_min" else schedule.level(final)


def times_to(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str | None,
    steps_offset: int,
    final: str | float,
    beyond: bool = True,
) -> list[float]:
    """``num_steps`` times of a spacing, the next of which would be ``final``.

    Without a name: "karras" in a "ve" schedule, else "linspace". ``beyond``: the spacings that count have one time
    more, the last, that is left out, as diffusers' multistep schedulers do.
    """  # fmt: skip
    spacing = spacing or ("karras" if schedule.kind == "ve" else "linspace")
    options = {}
    if not isinstance(final, str):
        if spacing not in TO_A_TIME:
            raise ValueError(
                f"final: spacing {spacing!r} ends with the schedule; for a time use one of {', '.join(TO_A_TIME)}, or "
                "give timesteps"
            )
        ratio = math.exp(-schedule.log_snr(final))
        options = {"last": final} if spacing == "uniform_log_snr" else {"sigma_min": ratio}
    drop = final != "zero" or (beyond and spacing in ("linspace", "leading"))
    if spacing == "trailing":
        drop = False
    return spaced(spacing, schedule, num_steps, steps_offset=steps_offset, drop_last=drop, **options)


def check_times_options(spacing: object, steps_offset: object, final: object) -> None:
    """Raise unless these are options of ``times_to``."""
    if spacing is not None:
        check_spacing(spacing)
        if spacing == "pndm":
            names = ", ".join(name for name in SPACINGS if name != "pndm")
            raise ValueError(f"spacing: 'pndm' belongs to PNDM; expected one of {names}")
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, int):
        raise TypeError(f"steps_offset: expected an int, got {type(steps_offset).__name__}")
    if steps_offset and spacing != "leading":
        raise ValueError(f"steps_offset: only spacing 'leading' has an offset, not {spacing!r}")
    if isinstance(final, bool) or not isinstance(final, (str, float, int)):
        raise TypeError(f"final: expected a word or a time, got {type(final).__name__}")
    if isinstance(final, str) and final not in FINALS:
        raise ValueError(f"final: expected {' or '.join(map(repr, FINALS))} or a time, got {final!r}")


def check_one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
