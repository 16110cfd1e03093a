"""Pseudo numerical methods (Liu, Ren, Lin and Zhao, 2022): classical schemes whose increments are DDIM steps.

The "transfer" phi(x, e, t, t') is the DDIM step from t to t' with noise e. Multistep and Runge-Kutta schemes combine
several e, and one transfer takes the step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Affine, Conversion, Plan, Solver, row
from pydenoise.samplers.timesteps import check_spacing, check_times, solver_times

VARIANTS = ("s", "f", "fon", "plms", "prk")
INDICES = ("paper", "repo")
COMBINED = ("epsilon", "output")
# Weights of e_0 (this call's), e_-1, e_-2, e_-3: Adams-Bashforth of orders 1 to 4.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
RING = 3  # slots of e_-1, e_-2, e_-3; the oldest is read and replaced in the same launch
STAGES = (RING, RING + 1)  # slots of the second and third stage of a Runge-Kutta step
RUNGE_KUTTA_STEPS = 3
DIFFUSERS = ("plms", "prk")
LEAST_STEPS = {"s": 2, "f": 4, "fon": 4, "plms": 1, "prk": 4}


@dataclass(frozen=True)
class PNDM(Solver):
    """PNDM on any kind of schedule ("fon" and ``index="repo"``: "vp" only); noise-free.

    Args:
        variant: how the steps begin, and what follows.

            * "s": one step with two calls, the rest Adams-Bashforth of order 2. N + 1 calls; second order.
            * "f": three pseudo Runge-Kutta steps with four calls each, the rest Adams-Bashforth of order 4. N + 9
              calls; second order in all, since the transfer is, with a small constant.
            * "fon": as "f", with the classical increments: the slope is a transfer by one timestep. (With index="repo"
              the slopes of the Runge-Kutta stages are taken at the step's start, as the public code does.)
            * "plms": orders 1 to 4 of Adams-Bashforth after a first step with two calls, as diffusers with
              ``skip_prk_steps=True``. N + 1 calls.
            * "prk": as "f", with half steps in whole timesteps, as diffusers with ``skip_prk_steps=False``.
        index: "paper": time t has the level t. "repo": level t + 1 rounded down, and the last step ends at time -1, so
            at level 0, as in PNDM's public code ("s", "f" and "fon").
        set_alpha_to_one: whether the last step ends at a clean sample, or at the schedule's first level. ``None``: as
            each public code has it: not with "plms", "prk" and ``index="repo"``; clean otherwise.
        combine: what is combined of several calls: "epsilon", or the model's "output" itself, which then becomes
            epsilon by the level and sample at the start of the step. That is what diffusers does with v-prediction.
        spacing: of the times, see ``pydenoise.samplers.timesteps``; ``None``: "leading", "karras" for "ve" and
            "linspace" for "flow". "pndm" is that of PNDM's public code.
        steps_offset: added to the times of "leading".

    A clamp of x0 always changes epsilon with it; "fon" and ``combine="output"`` take none.
    """

    variant: str = "f"
    index: str = "paper"
    set_alpha_to_one: bool | None = None
    combine: str = "epsilon"
    spacing: str | None = None
    steps_offset: int = 0

    name = "PNDM"

    def __post_init__(self):
        for option, allowed in (("variant", VARIANTS), ("index", INDICES), ("combine", COMBINED)):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option}: expected one of {', '.join(allowed)}, got {getattr(self, option)!r}")
        if self.index == "repo" and self.variant in DIFFUSERS:
            raise ValueError(f"index: 'repo' belongs to the variants s, f and fon, not to {self.variant!r}")
        if self.combine == "output" and self.variant == "fon":
            raise ValueError("combine: 'output' belongs to the variants s, f, plms and prk; 'fon' combines increments")
        if self.spacing is not None:
            check_spacing(self.spacing)

    @property
    def ends_clean(self) -> bool:
        """``set_alpha_to_one``, decided."""
        if self.set_alpha_to_one is None:
            return self.variant not in DIFFUSERS and self.index == "paper"
        return self.set_alpha_to_one

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        return solver_times(
            schedule, num_steps, self.spacing, steps_offset=self.steps_offset, ends_clean=self.ends_clean
        )

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        times = check_times(schedule, timesteps)
        if len(times) < LEAST_STEPS[self.variant]:
            raise ValueError(
                f"num_steps: PNDM(variant={self.variant!r}) needs at least {LEAST_STEPS[self.variant]} steps, "
                f"got {len(times)}"
            )
        if conversion.limits and (self.combine == "output" or self.variant == "fon"):
            option = "combine='output'" if self.combine == "output" else "variant='fon'"
            raise ValueError(f"clip: PNDM({option}) never forms the x0 that a clip or threshold limits")
        return _Rows(self, schedule, times, _rederiving(conversion)).plan()


def entered(solver: PNDM, schedule: NoiseSchedule, times: Sequence[float], conversion: Conversion) -> Plan:
    """A plan for a run that begins in the middle of another's ``times``, one call each, as image-to-image does.

    Adams-Bashforth of orders 1 to 4 from the start, without the two calls of the first step. A first time that is there
    twice, being that of such a step's second call, leaves the sample as it is at its first call.
    """
    if solver.variant != "plms":
        raise ValueError(f"begin_index: PNDM(variant={solver.variant!r}) has to run from its start; 'plms' has not")
    waits = len(times) > 1 and times[0] == times[1]
    rows = _Rows(solver, schedule, check_times(schedule, times[waits:]), _rederiving(conversion))
    if waits:
        level = schedule.level(times[0])
        rows.prepend(times[0], level, row(conversion, level, sample=1.0))
    return rows.plan(two_calls=False)


def transfer(level: Level, target: Level) -> Affine:
    """The DDIM step from ``level`` to ``target``: x' = (first) x + (second) epsilon."""
    if level.alpha == 0:
        raise ValueError(
            "timesteps: alpha is 0 at the first time (zero terminal SNR), where PNDM's transfer has no bound; "
            "start at a lower time or use DDIM"
        )
    ratio = target.alpha / level.alpha
    return ratio, target.sigma - ratio * level.sigma


def one_step(
    solver: PNDM, schedule: NoiseSchedule, times: Sequence[float], step: int, conversion: Conversion, *, whole: bool
) -> list[tuple[float, Level, list[float], bool]]:
    """(time, level, row, whether the step ends) of each call of step ``step`` of the plan for ``times``.

    ``whole``: half steps are rounded down to whole times.
    """
    return _Rows(solver, schedule, times, _rederiving(conversion), whole).one(step)


def _rederiving(conversion: Conversion) -> Conversion:
    # Only epsilon enters: a clamp that left it as it was would do nothing.
    return Conversion(conversion.prediction_type, conversion.clip, conversion.limits, conversion.dynamic)


class _Rows:
    """The rows of one plan, call by call."""

    def __init__(
        self, solver: PNDM, schedule: NoiseSchedule, times: Sequence[float], conversion: Conversion, whole: bool = False
    ):
        self._solver, self._schedule, self._conversion, self._whole = solver, schedule, conversion, whole
        self._times = [*times, -1.0]  # the last is the end's: only its level counts, and the increments of "fon"
        self._stored, self._ring = 0, 1 if solver.variant == "s" else RING
        self._calls: list[tuple[float, Level, list[float], bool]] = []
        discrete = solver.variant in ("fon", "prk") or solver.index == "repo"
        if discrete and schedule.kind != "vp":
            name = "index: 'repo'" if solver.index == "repo" else f"variant: {solver.variant!r}"
            raise ValueError(f"{name} counts timesteps of a 'vp' schedule, this one is {schedule.kind!r}")
        if solver.index == "repo" and times[0] + 1 > schedule.num_timesteps - 1:
            raise ValueError(
                f"timesteps: index='repo' reads one level further; expected at most {schedule.num_timesteps - 2}, "
                f"got {times[0]:g}"
            )

    def plan(self, *, two_calls: bool = True) -> Plan:
        """All steps; ``two_calls``: where the variant begins with such a step."""
        for step in range(len(self._times) - 1):
            self._step_of(step, two_calls)
        times, levels, rows, ends = zip(*self._calls, strict=True)
        return Plan.of(times, levels, rows, ends=ends, initial_scale=self._schedule.initial_scale)

    def one(self, step: int) -> list[tuple[float, Level, list[float], bool]]:
        """(time, level, row, whether the step ends) of each call of one step."""
        self._stored = step  # every step before has left one e in the history
        self._step_of(step)
        return self._calls

    def prepend(self, time: float, level: Level, values: list[float]) -> None:
        """A call before the first step, which ends none."""
        self._calls.insert(0, (time, level, values, False))

    # ------------------------------------------------------------------------------------------------------- the steps

    def _step_of(self, step: int, two_calls: bool = True) -> None:
        variant = self._solver.variant
        if variant in ("f", "fon", "prk") and step < RUNGE_KUTTA_STEPS:
            self._runge_kutta(step)
        elif step == 0 and two_calls and len(self._times) > 2:
            self._two_calls()
        else:
            order = 2 if variant == "s" else 4
            self._multistep(step, ADAMS_BASHFORTH[min(self._stored + 1, order) - 1])

    def _two_calls(self) -> None:
        """To the next time; there again, and from the start with the mean of both."""
        now, then = self._times[:2]
        self._call(now, now, then, {}, 1.0, keep=True, store=True, ends=False)
        self._call(then, now, then, {self._slot(1): 0.5}, 0.5, from_base=True)

    def _multistep(self, step: int, weights: Sequence[float]) -> None:
        now, then = self._times[step : step + 2]
        past = {self._slot(back): weight for back, weight in enumerate(weights) if back}
        self._call(now, now, then, past, weights[0], store=True)

    def _runge_kutta(self, step: int) -> None:
        """Four stages from the sample where the step began; only the first one's e enters the history."""
        now, then = self._times[step : step + 2]
        first, middle = self._middle(now, then)
        second, third = STAGES
        self._call(now, now, first, {}, 1.0, keep=True, store=True, ends=False)
        past = {self._slot(1): 1 / 6, second: 1 / 3, third: 1 / 3}
        if self._solver.variant == "fon" and self._solver.index == "repo":
            return self._stages_at_start(now, middle, then, past)
        self._call(middle, now, middle, {}, 1.0, from_base=True, slot=second, ends=False)
        self._call(middle, now, then, {}, 1.0, from_base=True, slot=third, ends=False)
        self._call(then, now, then, past, 1 / 6, from_base=True)

    def _stages_at_start(self, now: float, middle: float, then: float, past: Mapping[int, float]) -> None:
        """The later stages of "fon" in its public code: increments of the sample and level where the step began.

        They are (rate base + gain epsilon), so epsilon is kept; the first stage's increment lies in the history.
        """
        on_sample, gain = transfer(self._level(now), self._level(now - 1))
        rate, whole = on_sample - 1, now - then
        second, third = STAGES
        for time, reach, slot in ((middle, now - middle, second), (middle, whole, third)):
            stage = {"base": 1 + reach * rate, "m": reach * gain}
            self._add(time, "epsilon", stage, slot=slot, ends=False)
        weights = {place: whole * weight * (gain if place in STAGES else 1) for place, weight in past.items()}
        later = 1 / 3 + 1 / 3 + 1 / 6
        last = {"base": 1 + whole * later * rate, "m": whole * gain / 6, "history": weights}
        self._add(then, "epsilon", last)

    def _middle(self, now: float, then: float) -> tuple[float, float]:
        """(where the first stage ends, what the model is told of the middle)."""
        if self._solver.variant == "prk":
            # The half of an odd stride is rounded down, from the start for one and from the end for the other.
            half = (now - then) // 2
            return now - half, then + half
        middle = (now + then) / 2
        middle = float(math.floor(middle)) if self._whole else middle
        return middle, middle

    # --------------------------------------------------------------------------------------------------------- one row

    def _call(
        self, time: float, start: float, end: float, past: Mapping[int, float], weight: float, *,
        from_base: bool = False, keep: bool = False, store: bool = False, slot: int = -1, ends: bool = True,
    ) -> None:  # fmt: skip
        """The model at ``time``, then a step from ``start`` to ``end`` with ``weight`` e + sum ``past``.

        ``from_base``: the step starts at the saved sample; ``keep``: this sample is saved; ``store``: e enters the
        history; ``slot``: where else e is put.
        """
        if store:
            slot = self._stored % self._ring
            self._stored += 1
        on_sample, scale, canonical = self._step(time, start, end)
        coefficients = {
            "base" if from_base else "sample": on_sample,
            "m": scale * weight,
            "history": {place: scale * value for place, value in past.items()},
        }
        self._add(time, canonical, coefficients, slot=slot, kept={"sample": 1.0} if keep else None, ends=ends)

    def _add(
        self, time: float, canonical: str | Affine, coefficients: Mapping, *, slot: int = -1,
        kept: Mapping[str, float] | None = None, ends: bool = True,
    ) -> None:  # fmt: skip
        level = self._level(time)
        values = row(self._conversion, level, canonical, slot=slot, kept=kept, **coefficients)
        self._calls.append((time, level, values, ends))

    def _step(self, time: float, start: float, end: float) -> tuple[float, float, str | Affine]:
        """(on the sample, on the combination, what is combined)."""
        if self._solver.variant == "fon":
            return 1.0, start - end, self._increment(time)
        source = self._level(start)
        on_sample, on_epsilon = transfer(source, self._level(end))
        if self._solver.combine == "epsilon":
            return on_sample, on_epsilon, "epsilon"
        r, u = self._conversion.epsilon(source)
        return on_sample + on_epsilon * r, on_epsilon * u, (0.0, 1.0)

    def _increment(self, time: float) -> Affine:
        """transfer by one timestep, less the sample it starts from."""
        level = self._level(time)
        on_sample, on_epsilon = transfer(level, self._level(time - 1))
        r, u = self._conversion.epsilon(level)
        return on_sample - 1 + on_epsilon * r, on_epsilon * u

    def _level(self, time: float) -> Level:
        if time < 0:
            return Level.clean() if self._solver.ends_clean else self._schedule.first
        if self._solver.index == "repo":
            return self._schedule.level(math.floor(time) + 1)
        return self._schedule.level(time)

    def _slot(self, back: int) -> int:
        """Where the e of ``back`` stored calls ago lies."""
        return (self._stored - back) % self._ring
