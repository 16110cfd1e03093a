"""What a solver is: for every call of the model a time and a row of coefficients, made before sampling begins.

A solver writes its formula as rows (``row``) in terms of the canonical output m (epsilon or x0), of earlier ones, of
the sample and of noise; ``Conversion`` says how m comes from what the model returns. ``sampler_step`` runs a row in one
launch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers.levels import Level, NoiseSchedule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
Affine = tuple[float, float]  # (on the sample, on the output)


@dataclass(frozen=True)
class Conversion:
    """How a model's output becomes epsilon or x0; all affine in the sample and the output.

    Args:
        prediction_type: what the model returns: "epsilon" (the noise), "v_prediction" (alpha epsilon - sigma x0),
            "sample" (x0) or "flow" (epsilon - x0, on a schedule with alpha = 1 - sigma).
        clip: x0 is clamped to [-clip, clip]; ``None``: not.
        clip_rederives: after a clamp epsilon is derived again from x0, so that both fit the sample.
        dynamic: x0 is limited by dynamic thresholding instead of ``clip`` (the sampler computes the threshold).
    """

    prediction_type: str = "epsilon"
    clip: float | None = None
    clip_rederives: bool = False
    dynamic: bool = False

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            allowed = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type: expected one of {allowed}, got {self.prediction_type!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {self.clip}")

    @property
    def limits(self) -> bool:
        """Whether x0 is clamped."""
        return self.dynamic or self.clip is not None

    def x0(self, level: Level) -> Affine:
        """x0 = a x + b out, before any clamp."""
        alpha, sigma = level.alpha, level.sigma
        if self.prediction_type == "epsilon":
            if alpha == 0:
                raise ValueError(
                    "prediction_type: 'epsilon' says nothing of x0 where alpha is 0 (a schedule of zero terminal SNR); "
                    "such models predict 'v_prediction' or 'sample'"
                )
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "v_prediction":
            # alpha x - sigma v; the division is 1 where alpha^2 + sigma^2 is
            norm = alpha**2 + sigma**2
            return alpha / norm, -sigma / norm
        if self.prediction_type == "sample":
            return 0.0, 1.0
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)

    def epsilon(self, level: Level) -> Affine:
        """epsilon = a x + b out, of the x0 before any clamp. Where sigma is 0 and the output does not say it: 0."""
        alpha, sigma = level.alpha, level.sigma
        if self.prediction_type == "epsilon":
            return 0.0, 1.0
        if self.prediction_type == "v_prediction":
            norm = alpha**2 + sigma**2
            return sigma / norm, alpha / norm
        if self.prediction_type == "sample":
            return (1 / sigma, -alpha / sigma) if sigma else (0.0, 0.0)
        return 1 / (alpha + sigma), alpha / (alpha + sigma)


def row(
    conversion: Conversion,
    level: Level,
    canonical: str | Affine | None = None,
    *,
    sample: float = 0.0,
    base: float = 0.0,
    output: float = 0.0,
    m: float = 0.0,
    history: Mapping[int, float] | None = None,
    noise: float = 0.0,
    log_std: tuple[float, float] | None = None,
    slot: int = -1,
    kept: Mapping[str | int, float] | None = None,
) -> list[float]:
    """One row for a model call at ``level``: the numbers of ``pydenoise/step_row.py``'s columns.

    Args:
        canonical: what m is: "epsilon", "sample" (x0), a pair (on the sample, on the output), or ``None`` (no m).
        sample, base, output, m, history, noise: coefficients of x'; ``history`` by slot, of what the slots held before.
        log_std: where the model gives a variance: its smallest and largest logarithm of the standard deviation.
        slot: where m is kept.
        kept: coefficients of the second result, by "sample", "base", "m", "out" and slot.
    """
    values = [0.0] * C.WIDTH
    values[C.CLIP] = math.inf if conversion.clip is None or conversion.dynamic else conversion.clip
    values[C.GUIDANCE] = values[C.INPUT_SCALE] = 1.0
    values[C.SLOT] = float(slot)
    if isinstance(canonical, str) or canonical is None:
        _canonical(values, conversion, level, canonical)
    else:
        values[C.M_SAMPLE], values[C.M_OUTPUT] = canonical
    values[C.SAMPLE], values[C.BASE], values[C.OUTPUT], values[C.M], values[C.NOISE] = sample, base, output, m, noise
    if log_std is not None:
        values[C.LOG_SMALL], values[C.LOG_LARGE] = log_std
    for place, coefficient in (history or {}).items():
        values[C.HISTORY + _slot(place)] += coefficient
    names = {"sample": C.KEPT_SAMPLE, "base": C.KEPT_BASE, "m": C.KEPT_M, "out": C.KEPT_OUT}
    for place, coefficient in (kept or {}).items():
        values[names[place] if isinstance(place, str) else C.KEPT_HISTORY + _slot(place)] += coefficient
    return [float(value) for value in values]


def _slot(place: int) -> int:
    if not 0 <= place < C.SLOTS:
        raise ValueError(f"history: expected slots from 0 to {C.SLOTS - 1}, got {place}")
    return place


def _canonical(values: list[float], conversion: Conversion, level: Level, canonical: str | None) -> None:
    if canonical not in (None, "epsilon", "sample"):
        raise ValueError(f"canonical: expected 'epsilon', 'sample', a pair or None, got {canonical!r}")
    try:
        values[C.X0_SAMPLE], values[C.X0_OUTPUT] = conversion.x0(level)
    except ValueError:
        if canonical == "sample" or conversion.limits:
            raise  # otherwise only a preview would want it
    if canonical == "sample":
        values[C.M_X0] = 1.0
    elif canonical == "epsilon" and conversion.limits and conversion.clip_rederives and level.sigma:
        values[C.M_SAMPLE], values[C.M_X0] = 1 / level.sigma, -level.alpha / level.sigma
    elif canonical == "epsilon":
        values[C.M_SAMPLE], values[C.M_OUTPUT] = conversion.epsilon(level)


@dataclass(frozen=True)
class Plan:
    """A run of a solver: one row for every call of the model.

    Args:
        times: what the model is told at each call.
        levels: the noise level of the sample at each call.
        table: float64 [calls, 32].
        ends: whether a call completes a step of the solver, so that x' is a state of the trajectory.
        initial_scale: standard deviation of the starting noise.
        start: a restoration: what ``Sampler.sample`` is given is a degraded sample y, which ``base`` keeps, and the run
            begins at (on y, on noise). Without a sample y is 0.
        working_slots: slots of the history that a control needs, at least.
        predictions: 2: the model returns [B, 2 C, ...], and a row's y is second + GUIDANCE (first - second).
    """

    times: tuple[float, ...]
    levels: tuple[Level, ...]
    table: Tensor
    ends: tuple[bool, ...]
    initial_scale: float = 1.0
    start: tuple[float, float] | None = None
    working_slots: int = 0
    predictions: int = 1

    @classmethod
    def of(
        cls,
        times: Sequence[float],
        levels: Sequence[Level],
        rows: Sequence[Sequence[float]],
        *,
        ends: Sequence[bool] | None = None,
        initial_scale: float = 1.0,
        start: tuple[float, float] | None = None,
        working_slots: int = 0,
        predictions: int = 1,
    ) -> "Plan":
        """From lists; every call ends a step if ``ends`` is not given."""
        table = torch.tensor(list(rows), dtype=torch.float64).reshape(len(times), C.WIDTH)
        finite = table.clone()
        finite[:, C.CLIP] = 0
        if not finite.isfinite().all():
            bad = int((~finite.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"timesteps: no finite coefficients for call {bad} (time {times[bad]})")
        whole = (True,) * len(times) if ends is None else tuple(map(bool, ends))
        return cls(
            tuple(map(float, times)), tuple(levels), table, whole, float(initial_scale), start, working_slots,
            predictions,
        )  # fmt: skip

    def __post_init__(self):
        if not len(self.times) == len(self.levels) == len(self.table) == len(self.ends):
            raise ValueError("plan: expected a time, a level, a row and an end for every call")
        if not self.times:
            raise ValueError("timesteps: expected at least one")

    @property
    def calls(self) -> int:
        """How often the model is called."""
        return len(self.times)

    @cached_property
    def slots(self) -> int:
        """Slots of the history that the rows use."""
        used = self.table[:, [*range(C.HISTORY, C.HISTORY + C.SLOTS)]] != 0
        kept = self.table[:, [*range(C.KEPT_HISTORY, C.KEPT_HISTORY + C.SLOTS)]] != 0
        read = [j + 1 for j in range(C.SLOTS) if bool(used[:, j].any() or kept[:, j].any())]
        return max([self.working_slots, *read, int(self.table[:, C.SLOT].max()) + 1])

    @cached_property
    def uses_base(self) -> bool:
        """Whether a row reads or writes the saved sample, or a restoration keeps its degraded one there."""
        kept = [C.KEPT_SAMPLE, C.KEPT_BASE, C.KEPT_M, C.KEPT_OUT, *range(C.KEPT_HISTORY, C.KEPT_HISTORY + C.SLOTS)]
        return self.start is not None or bool((self.table[:, [C.BASE, *kept]] != 0).any())

    @cached_property
    def learned_variance(self) -> bool:
        """Whether the model returns a variance beside its prediction."""
        return bool((self.table[:, [C.LOG_SMALL, C.LOG_LARGE]] != 0).any())

    @cached_property
    def needs_noise(self) -> bool:
        """Whether a row adds noise."""
        return bool(self.noisy_calls)

    @cached_property
    def noisy_calls(self) -> tuple[int, ...]:
        """The calls whose rows add noise."""
        return tuple((self.table[:, C.NOISE] != 0).nonzero()[:, 0].tolist())


Launch = Callable[..., Tensor]


class Control:
    """What a solver does beside its table, for coefficients that depend on the data; one object per run."""

    statistics = "none"

    def time(self, call: int) -> Tensor | None:
        """The times that the model is told at ``call``, where they differ from the plan's: [B], or [B, frames]."""
        return None

    def apply(self, call: int, launch: Launch) -> None:
        """Take the model's output at ``call`` into the sample.

        ``launch(rows=None, table=None, output=True, statistics="none", noise=None, out=None) -> sums`` runs
        ``sampler_step`` once: row ``call`` of the plan's table without arguments; ``output=False`` leaves the model's
        output out, ``noise`` is z, ``out`` receives x' in place of the sample.
        """
        launch()


@dataclass(frozen=True)
class Run:
    """What a control is made for: one batch of one plan."""

    plan: Plan
    schedule: NoiseSchedule
    conversion: Conversion
    shape: torch.Size
    dtype: torch.dtype  # of coefficients
    device: torch.device
    preview: bool = False  # whether the predicted clean sample is wanted


class Solver:
    """How a table of coefficients is made. Subclasses are frozen dataclasses of their options."""

    name = "solver"

    @property
    def fixed_rows(self) -> bool:
        """Whether every call of the model is followed by its row of the plan, whatever the data."""
        return type(self).control is Solver.control

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """The times of ``num_steps`` steps, descending."""
        raise NotImplementedError

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """The rows for these times."""
        raise NotImplementedError

    def control(self, run: Run) -> Control | None:
        """What happens beside the table; ``None`` for a solver that is its table."""
        return None
