"""EVODiff: a two-step solver whose weights come from how the model's last outputs lie to each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._path import check_times_options, path, times_to
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Control, Conversion, Launch, Plan, Run, Solver, row

FEW_STEPS = 20  # up to so many, zeta does not look at the difference of the outputs
LARGEST = 2.0  # of a ratio of dot products
SMALLEST = 1e-12  # below this share of its terms the square of a difference is rounding

Array = Tensor | np.ndarray  # a number for each group
Terms = dict[str, float | Array]  # coefficients of "base" and of x0: "t" the newest, "0" and "1" the two before it


@dataclass(frozen=True)
class EVODiff(Solver):
    """EVODiff of order 2 on x0: one call of the model a step, weights that reduce the variance of the step.

    Its weights are functions of dot products of the last three x0 over each channel of each sample, so samples are
    [B, C, ...]. A call is three launches: one takes how x0 changes, one its dot products, one corrects the last
    prediction and makes the next. Where two outputs are the same, so that a ratio would be 0 / 0, it is 0. The states
    of a trajectory are the predicted samples, which are what the model sees. Meant for few steps: it does not converge
    with more.

    Args:
        final: where to end: "sigma_min" (the schedule's least noise), "zero" or a time.
        spacing: which times: a name of ``pydenoise.samplers.timesteps``; the public code has "uniform_log_snr" and
            "karras".

    Source: Li et al., EVODiff: Entropy-aware Variance Optimized Diffusion Inference, https://arxiv.org/abs/2509.26096,
    and its public code for sigmoids and clamps; of a "vp" or "flow" schedule the same in x / alpha.
    """

    final: str | float = "sigma_min"
    spacing: str = "uniform_log_snr"

    name = "EVODiff"

    def __post_init__(self):
        check_times_options(self.spacing, 0, self.final)

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """As ``spacing`` says; where its last time is the end, it is left out."""
        return times_to(schedule, num_steps, self.spacing, 0, self.final)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """Row 0: an Euler step, kept. The others leave in the sample's place what x0 differs by from the one before."""
        levels = path(schedule, timesteps, self.final)
        if len(timesteps) < 2:
            raise ValueError(f"num_steps: EVODiff needs at least 2 steps, got {len(timesteps)}")
        if levels[0].alpha == 0:
            raise ValueError(
                f"timesteps: EVODiff cannot begin at pure noise (time {timesteps[0]:g}); DPMSolverPP and UniPC can"
            )
        step = _Step.between(levels, 1)
        first = row(
            conversion, levels[0], "sample", sample=step.ratio * levels[1].alpha / levels[0].alpha,
            m=step.gain * levels[1].alpha, slot=0, kept={"out": 1.0},
        )  # fmt: skip
        rows = [first]
        for call, level in enumerate(levels[1:-1], 1):
            rows.append(row(conversion, level, "sample", m=1.0, history={(call - 1) % 2: -1.0}))
        return Plan.of(timesteps, levels[:-1], rows, initial_scale=schedule.initial_scale)

    def control(self, run: Run) -> Control:
        """Weights from dot products."""
        if len(run.shape) < 2:
            raise ValueError(f"x: EVODiff needs samples [B, C, ...], got {tuple(run.shape)}")
        return _Balance(run, path(run.schedule, run.plan.times, self.final))


class _Step(NamedTuple):
    """Constants of the step to a level, in x / alpha and s = sigma / alpha."""

    ratio: float  # s / s0
    gain: float  # 1 - ratio: what the Euler step takes of x0
    spread: float  # log(s1 / s0) / log(s0 / s), the step before in units of this one
    trust: float  # weight of the data-dependent ratio against base
    base: float
    inverse: float  # 1 / s - 1 / s0

    @classmethod
    def between(cls, levels: Sequence[Level], number: int) -> "_Step":
        """To ``levels[number]``."""
        noise = [level.sigma / level.alpha for level in levels]
        s, s0 = noise[number], noise[number - 1]
        ratio = s / s0
        if number < 2 or s == 0:
            return cls(ratio, 1 - ratio, math.nan, math.nan, math.nan, math.nan)
        s1 = noise[number - 2]
        trust = (1 - ((s + noise[-1]) / (noise[0] + noise[-1])) ** 2) / 2
        spread = math.log(s1 / s0) / math.log(s0 / s)
        return cls(ratio, 1 - ratio, spread, trust, math.sqrt(ratio / (s0 / s1)), 1 / s - 1 / s0)

    def mixed(self, alike: Array) -> Array:
        """How much of an x0 the next one repeats: what the steps alone say, mixed with what the data do."""
        return (1 - self.trust) * self.base + self.trust * alike


class _Products(NamedTuple):
    """Dot products [groups] of the newest x0 (t) and the two before it (0, 1)."""

    tt: Array
    t0: Array
    t1: Array
    p00: Array
    p01: Array
    p11: Array


class _Balance(Control):
    """Three launches a call: the change of x0, its dot products, then the step with the coefficients that they give.

    Dot products of x0 itself would not do: kernels add up float32, and where x0 hardly changes, the square of its
    change would be their rounding.
    """

    statistics = "dots"

    def __init__(self, run: Run, levels: Sequence[Level]):
        self._levels, self._calls = levels, run.plan.calls
        self._steps = [_Step.between(levels, max(n, 1)) for n in range(len(levels))]
        batch, channels = run.shape[:2]
        self._groups = torch.arange(batch * channels, device=run.device).view(batch, channels)
        self._row_of_all = [torch.full_like(self._groups, number) for number in range(2)]
        self._measure = self._own_table(2, run)  # m is the change; what is left is x0 again, from the change and slot k
        self._measure[:, C.SAMPLE] = 1.0
        self._measure[0, C.HISTORY] = self._measure[1, C.HISTORY + 1] = 1.0
        self._measure[:, C.SLOT] = -1
        self._table = self._own_table(batch * channels, run)
        self._input_scale = run.plan.table[:, C.INPUT_SCALE].tolist()
        self._past: tuple[Array, Array, Array] | None = None  # <m0, m0>, <m0, m1>, <m1, m1> of the call before
        self._leading: Array | None = None  # r1 of the last prediction

    @staticmethod
    def _own_table(rows: int, run: Run) -> Tensor:
        """Rows whose m and x0 are what lies in the sample's place."""
        table = torch.zeros(rows, C.WIDTH, dtype=run.dtype, device=run.device)
        table[:, C.CLIP] = math.inf
        table[:, [C.INPUT_SCALE, C.X0_SAMPLE, C.M_SAMPLE]] = 1.0
        return table

    def apply(self, call: int, launch: Launch) -> None:
        """See ``Control``."""
        if call == 0:
            square = _array(launch(rows=self._row_of_all[0], statistics="dots")[:, 0].clone())
            self._past = (square, square, square)  # only the first is looked at before there are three x0
            return
        if self._past is None:
            raise ValueError(f"call: EVODiff cannot be entered at call {call}; give the times from there on")
        launch()
        newest = (call - 1) % 2
        sums = _array(launch(rows=self._row_of_all[newest], table=self._measure, output=False, statistics="dots"))
        p = self._products(sums[:, 0], sums[:, 1 + newest], sums[:, 1 + call % 2] if call > 1 else None)
        alike = _ratio(p.t0, p.p00, 0.0)
        state: Terms = {"base": 1.0} if call == 1 else self._corrected(call, p, alike)
        last = call + 1 == self._calls
        after = self._last(call, state) if last else self._predicted(call, state, alike)
        self._fill(call, after, {} if last or call == 1 else state, -1 if last else call % 2)
        launch(rows=self._groups, table=self._table, output=False)
        self._past = (p.tt, p.t0, p.p00)

    def _products(self, square: Array, on_0: Array, on_1: Array | None) -> _Products:
        """Of the x0, from those of the change: with itself, with m0 and, from the third x0 on, with m1."""
        p00, p01, p11 = self._past
        t1 = p01 if on_1 is None else p01 + on_1
        return _Products(p00 + 2 * on_0 + square, p00 + on_0, t1, p00, p01, p11)

    def _corrected(self, call: int, p: _Products, alike: Array) -> Terms:
        """The state at this call's level, from the one before, now that x0 at its prediction is known."""
        step, level, before = self._steps[call], self._levels[call], self._levels[call - 1]
        r1, r2, spread = self._leading, step.mixed(alike), step.spread
        first = p.p00 - 2 * r1 * p.p01 + r1**2 * p.p11  # of D1 = m0 - r1 m1 with itself
        second = p.tt - 2 * r2 * p.t0 + r2**2 * p.p00  # of D2 = mt - r2 m0 with itself
        cross = p.t0 - r2 * p.p00 - r1 * p.t1 + r1 * r2 * p.p01
        backward, forward = first / spread**2, second * spread**2
        balance = _ratio(forward - backward, forward + backward - 2 * cross, SMALLEST * (forward + backward))
        eta = _sigmoid(abs(balance / 2)) / 2
        on_first, on_second = -eta / spread, spread * (1 - eta)  # the slope in D1 and D2
        slope_on_first = on_first * first + on_second * cross
        size = SMALLEST * (p.p00 + r1**2 * p.p11)
        scale = step.gain / (2 * _sigmoid(abs(r1) / 4) * spread)
        shift = _ratio(scale * (first - slope_on_first), first, size) / step.gain
        weight = step.gain / (2 * self._zeta(step, abs(shift) - 0.5, p))
        alpha = level.alpha
        return {
            "base": alpha * step.ratio / before.alpha,
            "t": alpha * weight * on_second,
            "0": alpha * (step.gain + weight * (on_first - on_second * r2)),
            "1": alpha * weight * -on_first * r1,
        }

    def _zeta(self, step: "_Step", shift: Array, p: _Products) -> Array:
        if self._calls <= FEW_STEPS:
            return _sigmoid(shift)
        square = p.p00 - 2 * p.p01 + p.p11
        along = _ratio(step.inverse * (p.p00 - p.p01), square, SMALLEST * (p.p00 + p.p11))
        return _sigmoid(-shift * _sigmoid(along * (2 - step.ratio**2)))

    def _predicted(self, call: int, state: Terms, alike: Array) -> Terms:
        """The prediction at the next level, from the state at this one."""
        step, alpha = self._steps[call + 1], self._levels[call + 1].alpha
        self._leading = step.mixed(alike)
        weight = step.gain / (2 * _sigmoid(abs(self._leading) / 4) * step.spread)
        keep = alpha * step.ratio / self._levels[call].alpha
        return _sum(keep, state, {"t": alpha * (step.gain + weight), "0": -alpha * weight * self._leading})

    def _last(self, call: int, state: Terms) -> Terms:
        """The result, from the state at the last call's level."""
        step, level, end = self._steps[call + 1], self._levels[call], self._levels[call + 1]
        shrink = 1 - math.sqrt(end.sigma / end.alpha * level.sigma / level.alpha)
        share = 1 - math.sqrt(step.ratio if step.ratio < 0.5 else step.ratio - 0.5) / 2
        on_newest, on_before = step.gain * (shrink + 0.5), -step.gain * share / 2
        keep = shrink * end.alpha * step.ratio / level.alpha
        return _sum(keep, state, {"t": end.alpha * on_newest, "0": end.alpha * on_before})

    def _fill(self, call: int, after: Terms, kept: Terms, slot: int) -> None:
        """Coefficients into the table's rows; x0 of this call, "t", is m, and goes to ``slot``."""
        table, slots = _array(self._table), {"0": (call - 1) % 2, "1": call % 2}
        table[:, C.SLOT] = slot
        table[:, C.INPUT_SCALE] = self._input_scale[call]
        for terms, on_base, on_m, on_history in (
            (after, C.BASE, C.M, C.HISTORY),
            (kept, C.KEPT_BASE, C.KEPT_M, C.KEPT_HISTORY),
        ):
            table[:, on_base], table[:, on_m] = terms.get("base", 0.0), terms.get("t", 0.0)
            for name, slot in slots.items():
                table[:, on_history + slot] = terms.get(name, 0.0)


def _array(tensor: Tensor) -> Array:
    """On the host NumPy's view of it, whose calls on a few numbers cost a fifth of torch's."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + (np if isinstance(x, np.ndarray) else torch).exp(-x))


def _ratio(over: Array, under: Array, smallest: Array | float) -> Array:
    """over / under within the largest ratio; 0 where ``under`` is not above ``smallest``."""
    library = np if isinstance(under, np.ndarray) else torch
    enough = under > smallest
    return library.clip(library.where(enough, over, 0.0) / library.where(enough, under, 1.0), -LARGEST, LARGEST)


def _sum(factor: float, terms: Terms, others: Terms) -> Terms:
    """factor * terms + others."""
    return {name: factor * terms.get(name, 0.0) + others.get(name, 0.0) for name in (*terms, *others)}
