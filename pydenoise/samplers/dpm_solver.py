"""DPM-Solver++: multistep solvers that are exact in the linear part and extrapolate x0 in log SNR."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydenoise.samplers._path import check_flag, check_one_of, check_times_options, path, times_to
from pydenoise.samplers._phi import scaled_phi
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion, Plan, Solver, row

FEW_STEPS = 15  # with fewer, the last steps are of a lower order


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ of order 1, 2 or 3, multistep: one call of the model a step; as an ODE or as an SDE.

    Args:
        order: of the multistep method; the first steps are of order 1, 2.
        solver_type: "midpoint" or "heun": two ways to weight the slope of order 2.
        exact_d2: order 3 with the second difference doubled. The published one is h^2 m'' / 2 where its coefficient
            takes h^2 m'', so that the published method converges with order 2, and this one with order 3.
        sde: the stochastic solver (SDE-DPM-Solver++), with noise at every step.
        final: where to end: "zero" (x0; the last step is then of order 1), "sigma_min" (the schedule's least noise) or
            a time.
        lower_order_final: with fewer than 15 steps, the last step is of order 1 and the one before of at most 2.
        euler_at_final: the last step is of order 1 in any case.
        spacing, steps_offset: which times: a name of ``pydenoise.samplers.timesteps``; ``None``: "linspace", in a "ve"
            schedule "karras".

    Order 3 of the SDE follows the same derivation as the ODE's; diffusers 0.42 has another sign in its last term.

    Source: Lu et al., https://arxiv.org/abs/2211.01095, algorithm 2 and appendix B.
    """

    order: int = 2
    solver_type: str = "midpoint"
    exact_d2: bool = False
    sde: bool = False
    final: str | float = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    spacing: str | None = None
    steps_offset: int = 0

    name = "DPM-Solver++"

    def __post_init__(self):
        check_one_of("order", self.order, (1, 2, 3))
        check_one_of("solver_type", self.solver_type, ("midpoint", "heun"))
        for flag in ("exact_d2", "sde", "lower_order_final", "euler_at_final"):
            check_flag(flag, getattr(self, flag))
        check_times_options(self.spacing, self.steps_offset, self.final)
        if self.exact_d2 and self.order != 3:
            raise ValueError(f"exact_d2: only order 3 has a second difference, got order {self.order}")
        if self.solver_type == "heun" and self.order == 1:
            raise ValueError("solver_type: 'heun' is a variant of steps of order 2, got order 1")

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """As ``spacing`` says; one of "linspace" and "leading" is left out, where the last step ends."""
        return times_to(schedule, num_steps, self.spacing, self.steps_offset, self.final)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """One row a step; slots of the history in turn."""
        levels = path(schedule, timesteps, self.final)
        steps = len(timesteps)
        slots = max(self.order - 1, 1)
        rows = []
        for i in range(steps):
            order = self._order(i, steps, levels[i + 1])
            on_sample, on_x0, noise = self._weights([levels[i + 1], *levels[i::-1][:order]], order)
            rows.append(
                row(
                    conversion, levels[i], "sample", sample=on_sample, m=on_x0[0],
                    history={(i - back) % slots: on_x0[back] for back in range(1, order)},
                    noise=noise, slot=i % slots if self.order > 1 else -1,
                )
            )  # fmt: skip
        return Plan.of(timesteps, levels[:-1], rows, initial_scale=schedule.initial_scale)

    def _order(self, step: int, steps: int, target: Level) -> int:
        lowers = self.lower_order_final and steps < FEW_STEPS
        if step == steps - 1 and (lowers or self.euler_at_final or target.sigma == 0):
            return 1
        if step == steps - 2 and lowers:
            return min(self.order, step + 1, 2)
        return min(self.order, step + 1)

    def _weights(self, levels: Sequence[Level], order: int) -> tuple[float, list[float], float]:
        """Coefficients (of the sample, of x0 from the newest back, of noise) of a step from levels[1] to levels[0].

        ``levels`` go back in time: the target, the present and those of the earlier x0.
        """
        target, present = levels[:2]
        h = target.log_snr - present.log_snr
        reach = 2 * h if self.sde else h  # the SDE forgets twice as fast
        weights = [scaled_phi(1, reach)]
        if order > 1:
            newest, older = self._differences([level.log_snr for level in levels], reach, order)
            weights = [weights[0] + newest, older - newest, -older][:order]
        on_sample = target.sigma / present.sigma
        noise = 0.0
        if self.sde:
            on_sample *= math.exp(-h)
            noise = target.sigma * math.sqrt(-math.expm1(-2 * h))
        return on_sample, [target.alpha * weight for weight in weights], noise

    def _differences(self, log_snrs: Sequence[float], reach: float, order: int) -> tuple[float, float]:
        """Weights of m0 - m1 and of m1 - m2. Where an x0 lies infinitely far back, its difference has none."""
        h, h0 = log_snrs[0] - log_snrs[1], log_snrs[1] - log_snrs[2]
        if order == 2:
            slope = scaled_phi(1, reach) / 2 if self.solver_type == "midpoint" else scaled_phi(2, reach)
            return slope * h / h0, 0.0
        h1 = log_snrs[2] - log_snrs[3]
        slope, bend = scaled_phi(2, reach), scaled_phi(3, reach) * (2 if self.exact_d2 else 1)
        share = (slope * h0 + bend * h) / (h0 + h1)
        return (slope + share) * h / h0, -share * h / h1
