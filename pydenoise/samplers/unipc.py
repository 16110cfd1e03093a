"""UniPC: a predictor whose every result is corrected with the model's next output, at no further call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pydenoise.samplers._path import check_flag, check_one_of, check_times_options, path, times_to
from pydenoise.samplers._phi import scaled_phi
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion, Plan, Solver, row

Terms = dict[str | int, float]  # coefficients of "sample", "base" and of x0, by how many calls back it was made


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC of order 1, 2 or 3 in x0: UniP predicts the next sample, UniC corrects it. One call of the model a step.

    One launch a step: the corrector of this step and the predictor of the next are both linear in the last corrected
    sample (the saved one), in this call's x0 and in earlier ones. The states of a trajectory are the predicted samples,
    which are what the model sees.

    Args:
        order: of the predictor; the corrector has one more. The first steps are of order 1, 2.
        variant: B(h) of the paper: "bh1" (h) or "bh2" (e^h - 1). It matters where a weight is fixed at one half: in the
            predictor of order 2 and the corrector of order 1.
        final: where to end: "zero" (x0; the last step is then of order 1), "sigma_min" (the schedule's least noise) or
            a time. "bh1" has no B(h) at "zero".
        lower_order_final: the last steps are of order ..., 2, 1; the error then falls with the square of the steps,
            otherwise with the power order + 1.
        corrector: without it the method is UniP.
        spacing, steps_offset: which times: a name of ``pydenoise.samplers.timesteps``; ``None``: "linspace", in a "ve"
            schedule "karras".

    Source: Zhao et al., https://arxiv.org/abs/2302.04867, algorithms 5 to 8.
    """

    order: int = 2
    variant: str = "bh2"
    final: str | float = "zero"
    lower_order_final: bool = True
    corrector: bool = True
    spacing: str | None = None
    steps_offset: int = 0

    name = "UniPC"

    def __post_init__(self):
        check_one_of("order", self.order, (1, 2, 3))
        check_one_of("variant", self.variant, ("bh1", "bh2"))
        check_times_options(self.spacing, self.steps_offset, self.final)
        check_flag("lower_order_final", self.lower_order_final)
        check_flag("corrector", self.corrector)
        if self.variant == "bh1" and self.final == "zero":
            raise ValueError(
                "final: 'zero' is an infinite step, for which variant 'bh1' has no B(h); 'bh2' supports it, and "
                "'bh1' supports 'sigma_min' and times"
            )

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """As ``spacing`` says; one of "linspace" and "leading" is left out, where the last step ends."""
        return times_to(schedule, num_steps, self.spacing, self.steps_offset, self.final)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """One row a step: the corrector of what led here, and the predictor of what follows."""
        levels = path(schedule, timesteps, self.final)
        if self.variant == "bh1" and (math.isinf(levels[0].log_snr) or levels[-1].sigma == 0):
            raise ValueError("variant: 'bh1' has no B(h) for a step from pure noise or to a clean sample; 'bh2' has")
        steps = len(timesteps)
        orders = [self._order(i, steps, levels[i + 1]) for i in range(steps)]
        rows = []
        for i, level in enumerate(levels[:-1]):
            state: Terms = {"sample": 1.0}
            if self.corrector and i > 0:
                state = self._corrected(levels[i::-1], orders[i - 1])
            keeps = self.corrector and i + 1 < steps
            predicted = self._predicted([levels[i + 1], *levels[i::-1]], orders[i], state)
            rows.append(self._row(conversion, level, i, predicted, state if keeps else {}))
        return Plan.of(timesteps, levels[:-1], rows, initial_scale=schedule.initial_scale)

    def _order(self, step: int, steps: int, target: Level) -> int:
        if target.sigma == 0:
            return 1
        left = steps - step if self.lower_order_final else self.order
        return min(self.order, left, step + 1)

    def _predicted(self, levels: Sequence[Level], order: int, state: Terms) -> Terms:
        """UniP from levels[1] to levels[0]; x0 are of levels[1], levels[2], ..."""
        target, present = levels[:2]
        h = target.log_snr - present.log_snr
        nodes = [(level.log_snr - present.log_snr) / h for level in levels[2 : order + 1]]
        weights = [self._half(h)] if order == 2 else _weights(nodes, h)
        terms = {place: target.sigma / present.sigma * weight for place, weight in state.items()}
        slopes = [weight / node for weight, node in zip(weights, nodes, strict=True)]
        for back, slope in enumerate([scaled_phi(1, h) - sum(slopes), *slopes]):
            terms[back] = terms.get(back, 0.0) + target.alpha * slope
        return terms

    def _corrected(self, levels: Sequence[Level], order: int) -> Terms:
        """UniC of the step from levels[1] to levels[0], where x0 is now known; the others are of levels[1], ..."""
        target, present = levels[:2]
        h = target.log_snr - present.log_snr
        nodes = [1.0, *((level.log_snr - present.log_snr) / h for level in levels[2 : order + 1])]
        weights = [self._half(h)] if order == 1 else _weights(nodes, h)
        newest, *slopes = [weight / node for weight, node in zip(weights, nodes, strict=True)]
        terms: Terms = {"base": target.sigma / present.sigma, 0: target.alpha * newest}
        terms[1] = target.alpha * (scaled_phi(1, h) - newest - sum(slopes))
        return terms | {back: target.alpha * slope for back, slope in enumerate(slopes, 2)}

    def _half(self, h: float) -> float:
        """B(h) / 2, which the paper takes where one weight is to be found."""
        return (h if self.variant == "bh1" else scaled_phi(1, h)) / 2

    def _row(self, conversion: Conversion, level: Level, i: int, predicted: Terms, kept: Terms) -> list[float]:
        def slot(back: int) -> int:
            return (i - back) % self.order

        past = {slot(back): weight for back, weight in predicted.items() if isinstance(back, int) and back > 0}
        named = {
            "m" if place == 0 else place: weight for place, weight in kept.items() if place in ("base", "sample", 0)
        }
        named |= {slot(back): weight for back, weight in kept.items() if isinstance(back, int) and back > 0}
        return row(
            conversion, level, "sample", sample=predicted.get("sample", 0.0), base=predicted.get("base", 0.0),
            m=predicted[0], history=past, slot=i % self.order, kept=named,
        )  # fmt: skip


def _weights(nodes: Sequence[float], h: float) -> list[float]:
    """c with sum_k c_k nodes_k^(j-1) = j! h phi_(j+1)(-h) for every j; 0 for a node that lies infinitely far."""
    near = torch.tensor([node for node in nodes if math.isfinite(node)], dtype=torch.float64)
    if not len(near):
        return [0.0] * len(nodes)
    powers = torch.arange(len(near), dtype=torch.float64)[:, None]
    right = [math.factorial(j) * scaled_phi(j + 1, h) for j in range(1, len(near) + 1)]
    found = iter(torch.linalg.solve(near**powers, torch.tensor(right, dtype=torch.float64)).tolist())
    return [next(found) if math.isfinite(node) else 0.0 for node in nodes]
