"""The Time-Shift Sampler: each sample is told, or brought to, the time whose noise its variance has.

Source: Li et al., "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps", ICLR 2024.
What a sampler passes on has not quite the noise that its time says. Among the times near the next one, that one is
taken whose noise variance 1 - alphas_cumprod is nearest to the variance of the sample: a choice for each sample, made
on the device from sums that the step before left behind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers.ddim import DDIM, ddim_row
from pydenoise.samplers.ddpm import DDPM, ddpm_row
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Control, Conversion, Launch, Plan, Run, Solver
from pydenoise.samplers.pndm import PNDM, one_step

VARIANTS = ("paper", "repo")
Call = tuple[float, Level, list[float], bool]  # time, level, row, whether the step ends


@dataclass(frozen=True)
class TimeShift(Solver):
    """Shifted time steps around DDIM, DDPM or PNDM ("s" and "f"), on a "vp" schedule.

    Times are shifted from the second step on, where the step's time is above ``cutoff``; to whole times, if the
    sampler's are.

    Args:
        solver: DDIM(), DDPM() or PNDM("s" or "f") whose steps these are.
        window: candidates lie up to window // 2 to both sides. They stay inside the schedule and between the times of
            the step, so that every step goes on.
        cutoff: times at and below are not shifted.
        variant: "paper": the sample takes the time that its variance says as its own, which the model is told and the
            step starts from. "repo", the public code: the time and start of a step stay, and its end is shifted, to a
            time near the planned end whose noise is nearest to the sample's.

    The public code's settings: window 5 and cutoff 550 with PNDM. Its pnm_solver has the times 1 + k (T // N) without
    the largest, and ends at the first level (``set_alpha_to_one=False``).
    """

    solver: Solver = field(default_factory=DDIM)
    window: int = 5
    cutoff: float = 550.0
    variant: str = "paper"

    name = "Time-Shift"

    def __post_init__(self):
        if not isinstance(self.solver, (DDIM, DDPM, PNDM)):
            raise TypeError(f"solver: expected DDIM(), DDPM() or PNDM(), got {type(self.solver).__name__}")
        if isinstance(self.solver, PNDM) and not (self.solver.variant in ("s", "f") and self.solver.index == "paper"):
            raise ValueError(
                f"solver: expected PNDM of variant 's' or 'f' and index 'paper', got variant={self.solver.variant!r}, "
                f"index={self.solver.index!r}"
            )
        if isinstance(self.solver, DDIM) and self.solver.target != "next":
            raise ValueError(f"solver: expected DDIM(target='next'), got target={self.solver.target!r}")
        if isinstance(self.window, bool) or not hasattr(self.window, "__index__"):
            raise TypeError(f"window: expected an int, got {type(self.window).__name__}")
        if self.window < 2:
            raise ValueError(f"window: expected at least 2, which is one candidate to each side, got {self.window}")
        if isinstance(self.cutoff, bool) or not isinstance(self.cutoff, (int, float)):
            raise TypeError(f"cutoff: expected a number, got {type(self.cutoff).__name__}")
        if not 0 <= self.cutoff < math.inf:
            raise ValueError(f"cutoff: expected a finite number from 0, got {self.cutoff}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {self.variant!r}")

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        return self.solver.timesteps(schedule, num_steps)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        if schedule.kind != "vp":
            raise ValueError(
                f"schedule: TimeShift compares variances with those of a 'vp' schedule, got {schedule.kind!r}"
            )
        return self.solver.plan(schedule, timesteps, conversion)

    def control(self, run: Run) -> Control:
        if math.prod(run.shape[1:]) < 2:
            raise ValueError(f"x: expected at least two numbers in each sample for a variance, got {tuple(run.shape)}")
        # Runs of one sampler have one plan: its shifted rows are made once.
        made = self.__dict__.get("_made")
        if made is None or made[0] is not run.plan or made[1:3] != (run.dtype, run.device):
            made = (run.plan, run.dtype, run.device, _Shifts(self, run).steps())
            object.__setattr__(self, "_made", made)
        steps = made[3]
        moves = any(step.times is not None for step in steps.values())
        return (_ShiftedTimes if moves else _Shifted)(run, steps)


@dataclass(frozen=True)
class _Step:
    """A step that can be shifted: its candidates, and the rows of its calls for each of them."""

    first: int  # the number of its first call
    candidates: int
    halfway: Tensor  # float64 [candidates - 1]: variances halfway between those of neighbouring candidates
    table: Tensor  # [calls * candidates, 32]
    times: Sequence[Tensor] | None  # of each call [candidates]; None: those of the plan


class _Shifts:
    """The shifted rows of a run."""

    def __init__(self, solver: TimeShift, run: Run):
        self._solver, self._run = solver, run
        plan = run.plan
        self._firsts = [0, *(call + 1 for call, ends in enumerate(plan.ends[:-1]) if ends)]
        self._times = [plan.times[call] for call in self._firsts]
        self._whole = all(t == round(t) for t in plan.times)

    def steps(self) -> dict[int, _Step]:
        """By the number of the step."""
        made = {}
        for number in range(1, len(self._times)):
            centre, low, high = self._range(number)
            if centre > self._solver.cutoff:
                candidates = self._candidates(centre, low, high)
                made[number] = self._step(number, candidates)
        return made

    def _range(self, number: int) -> tuple[float, float, float]:
        """(the time that is shifted, what bounds its candidates from below and from above)."""
        before, own = self._times[number - 1 : number + 1]
        after = self._times[number + 1] if number + 1 < len(self._times) else -1.0
        if self._solver.variant == "paper":
            return own, after, before
        last = self._times[number + 2] if number + 2 < len(self._times) else -1.0
        return after, last, own

    def _candidates(self, centre: float, low: float, high: float) -> list[float]:
        half, top = self._solver.window // 2, self._run.schedule.num_timesteps - 1
        near = (centre + offset for offset in range(-half, half + 1))
        return [t for t in near if low < t < high and 0 <= t <= top]

    def _step(self, number: int, candidates: Sequence[float]) -> _Step:
        run, first = self._run, self._firsts[number]
        each = [self._calls(number, t) for t in candidates]
        calls = list(zip(*each, strict=True))  # by call, then by candidate
        table = torch.tensor([row for call in calls for _, _, row, _ in call], dtype=torch.float64)
        table[:, C.INPUT_SCALE] = run.plan.table[first : first + len(calls), C.INPUT_SCALE].repeat_interleave(
            len(candidates)
        )
        times = torch.tensor([[time for time, _, _, _ in call] for call in calls], dtype=torch.float64)
        planned = torch.tensor(run.plan.times[first : first + len(calls)], dtype=torch.float64)
        variances = torch.tensor([run.schedule.level(t).sigma ** 2 for t in candidates], dtype=torch.float64)
        halfway = (variances[1:] + variances[:-1]) / 2
        told = times.to(torch.int64 if self._whole else torch.float64).to(run.device).unbind(0)
        moved = bool((times != planned[:, None]).any())
        return _Step(first, len(candidates), halfway.to(run.device), table.to(run.device, run.dtype),
                     told if moved else None)  # fmt: skip

    def _calls(self, number: int, shifted: float) -> list[Call]:
        """The calls of a step whose start ("paper") or end ("repo") is ``shifted``."""
        times = list(self._times)
        times[number + (self._solver.variant == "repo")] = shifted
        solver, run = self._solver.solver, self._run
        if isinstance(solver, PNDM):
            return one_step(solver, run.schedule, times, number, run.conversion, whole=self._whole)
        last = number + 1 == len(times)
        level = run.schedule.level(times[number])
        if isinstance(solver, DDIM):
            final = Level.clean() if solver.set_alpha_to_one else run.schedule.first
            target = final if last else run.schedule.level(times[number + 1])
            values = ddim_row(run.conversion, level, target, solver.eta)
        else:
            target = Level.clean() if last else run.schedule.level(times[number + 1])
            values = ddpm_row(run.conversion, level, target, solver.variance, last=last)
        return [(times[number], level, values, True)]


class _Shifted(Control):
    """Takes the rows of the candidate that fits a sample's variance."""

    statistics = "moments"

    def __init__(self, run: Run, steps: dict[int, _Step]):
        self._ends, self._size = run.plan.ends, math.prod(run.shape[1:])
        firsts = {step.first: step for step in steps.values()}
        self._by_call: list[_Step | None] = []
        current = None
        for call, begins in enumerate((True, *run.plan.ends[:-1])):
            current = firsts.get(call) if begins else current
            self._by_call.append(current)
        self._choice: Tensor | None = None  # int64 [B], the candidate of each sample

    def apply(self, call: int, launch: Launch) -> None:
        step = self._by_call[call]
        following = self._by_call[call + 1] if call + 1 < len(self._by_call) else None
        wanted = self._ends[call] and following is not None
        chosen: dict = {"statistics": "moments"} if wanted else {}
        if step is not None and self._choice is not None:
            before = (call - step.first) * step.candidates
            chosen |= {"rows": self._choice + before if before else self._choice, "table": step.table}
        sums = launch(**chosen)
        if wanted:
            self._choice = self._nearest(sums, following.halfway)
        elif self._ends[call]:
            self._choice = None

    def _nearest(self, sums: Tensor, halfway: Tensor) -> Tensor:
        """The candidate nearest to the unbiased variance of each sample; the earlier one of two as near."""
        total, squares = sums.unbind(1)
        centred = torch.addcmul(squares, total, total, value=-1 / self._size)
        return torch.bucketize(centred / (self._size - 1), halfway)


class _ShiftedTimes(_Shifted):
    """The model is told the candidate's times as well."""

    def time(self, call: int) -> Tensor | None:
        step = self._by_call[call]
        if step is None or step.times is None or self._choice is None:
            return None
        return step.times[call - step.first].take(self._choice)
