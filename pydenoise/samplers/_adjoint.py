"""Gradients of a run by the adjoint of the probability-flow ODE, with memory that no number of steps changes.

Sources: Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018 (the adjoint equation); Pan et al.,
"AdjointDPM", ICLR 2024 (for diffusion models, with their solvers: state and gradient in variables whose equations have
no linear part, integrated backwards together).

With tau = sigma / (alpha + sigma) and y = x / (alpha + sigma) the probability-flow ODE of every kind of schedule is
dy/dtau = v = epsilon - x0, and neither end of a schedule is singular. A gradient a = dL/dy obeys da/dtau = -(dv/dy)^T
a, and that of a parameter p is minus the integral of a^T dv/dp over rising tau. All three are integrated from the end
of the run to its start over the run's own levels, by an Adams predictor and corrector of orders 2 and 3 with the actual
steps and one call of the model for each level; y is computed anew on the way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._differentiable import Model, Sums
from pydenoise.samplers._loop import CallState, Loop
from pydenoise.samplers.levels import Level
from pydenoise.samplers.plan import Control, Conversion, Plan


def tau(level: Level) -> float:
    """sigma / (alpha + sigma): 0 without noise, 1 in pure noise."""
    return level.sigma / (level.alpha + level.sigma)


def ideal_run(plan: Plan, conversion: Conversion) -> list[complex]:
    """The sample before every call and after the last, alpha + i sigma, with a model that knows x0 = 1 and epsilon = i.

    A solver of the probability-flow ODE follows its levels exactly then; the last is the one at which it ends.
    """
    first = plan.levels[0]
    x = base = complex(first.alpha, first.sigma)
    history, states = [0j] * C.SLOTS, [x]
    for row, level in zip(plan.table.tolist(), plan.levels, strict=True):
        (on_x, on_output), (e_on_x, e_on_output) = conversion.x0(level), conversion.epsilon(level)
        output = (1 - on_x * x) / on_output if on_output else (1j - e_on_x * x) / e_on_output
        x0 = row[C.X0_SAMPLE] * x + row[C.X0_OUTPUT] * output
        m = row[C.M_SAMPLE] * x + row[C.M_OUTPUT] * output + row[C.M_X0] * x0
        past = sum(c * h for c, h in zip(row[C.HISTORY :], history, strict=False))
        new = row[C.SAMPLE] * x + row[C.BASE] * base + row[C.OUTPUT] * output + row[C.M] * m + past
        if any(row[column] for column in (*range(C.KEPT_SAMPLE, C.KEPT_HISTORY + C.SLOTS),)):
            past = sum(c * h for c, h in zip(row[C.KEPT_HISTORY :], history, strict=False))
            base = row[C.KEPT_SAMPLE] * x + row[C.KEPT_BASE] * base + row[C.KEPT_M] * m + row[C.KEPT_OUT] * new + past
        if row[C.SLOT] >= 0:
            history[int(row[C.SLOT])] = m
        x = new
        states.append(x)
    return states


def last_step(plan: Plan, conversion: Conversion) -> tuple[int, Level]:
    """(the call that the last step begins with, the level at which the run ends).

    Raises:
        ValueError: rows that do not follow the probability-flow ODE.
    """
    states = ideal_run(plan, conversion)
    begins = [call for call in range(plan.calls) if call == 0 or plan.ends[call - 1]]
    for call in begins:
        level = plan.levels[call]
        if abs(states[call] - complex(level.alpha, level.sigma)) > 1e-5 * abs(states[call]):
            raise ValueError("differentiable: 'adjoint' is for solvers of the probability-flow ODE; use 'checkpoint'")
    return begins[-1], Level(states[-1].real, states[-1].imag)


@dataclass(frozen=True)
class _Node:
    """A level that the way back calls the model at, as ``call`` of the run did."""

    call: int
    level: Level

    @property
    def tau(self) -> float:
        return tau(self.level)

    @property
    def scale(self) -> float:
        return self.level.alpha + self.level.sigma


def nodes_of(plan: Plan, last: int) -> list[_Node]:
    """The levels of the calls up to ``last``, each once, tau rising."""
    found: dict[float, _Node] = {}
    for call, level in enumerate(plan.levels[: last + 1]):
        found[tau(level)] = _Node(call, level)
    least = tau(plan.levels[last])
    return [found[at] for at in sorted(found) if at >= least]


def weights(places: Sequence[float], begin: float, end: float) -> list[float]:
    """Those w with which sum w_j p(places_j) is the integral of p, for polynomials through up to three places."""
    powers = range(len(places))
    moments = torch.tensor([(end - begin) ** (k + 1) / (k + 1) for k in powers], dtype=torch.float64)
    system = torch.tensor([[(place - begin) ** k for place in places] for k in powers], dtype=torch.float64)
    scale = torch.tensor([(end - begin) ** k for k in powers], dtype=torch.float64)  # keeps the system well-conditioned
    return torch.linalg.solve(system / scale[:, None], moments / scale).tolist()


def interval_weights(places: Sequence[float]) -> list[tuple[list[float], list[float]]]:
    """For every interval between two places: weights of the predictor, newest place first, and of the corrector."""
    found = []
    for n in range(len(places) - 1):
        back = [places[n], places[n - 1]] if n else [places[n]]
        ends = places[n], places[n + 1]
        found.append((weights(back, *ends), weights([places[n + 1], *back], *ends)))
    return found


class Adjoint:
    """A run and the way back through the ODE that it solves.

    Args:
        loop: buffers and rows; other runs use them in between.
    """

    def __init__(self, loop: Loop, model: Model, observers: Sequence[object], conversion: Conversion):
        self._loop, self._model, self._observers, self._conversion = loop, model, observers, conversion
        self._last, self._end = last_step(loop.setting.plan, conversion)
        self._state: Tensor | None = None

    def forward(self, x: Tensor, after: Callable[[int], None]) -> Tensor:
        """The sample."""
        loop, calls = self._loop, range(self._loop.setting.plan.calls)
        with torch.inference_mode(False), torch.no_grad():
            loop.begin(x, None)
            run = self._model.watched, {}, None, Control(), self._observers, after, False
            loop.run(*run, calls[: self._last])
            self._state = loop.sample.clone()
            loop.run(*run, calls[self._last : self._last + 1])
            self._seen = self._model.seen
            loop.run(*run, calls[self._last + 1 :])
            return loop.sample.clone()

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients with respect to the start, the conditioning and the parameters."""
        exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            nodes, sums = nodes_of(self._loop.setting.plan, self._last), Sums(self._model)
            first = nodes[0]
            a = grad.to(exact) * (self._end.alpha + self._end.sigma)
            step = tau(self._end) - first.tau  # the last step, as one of Euler
            y = self._state.to(exact) / first.scale
            a = a - step * self._slopes(first, y, a, sums, step)[1]
            a = self._integrate(nodes, y, a, sums)
        return [a / nodes[-1].scale, *sums.values]

    def _integrate(self, nodes: list[_Node], y: Tensor, a: Tensor, sums: Sums) -> Tensor:
        """a at the last node, from y and a at the first."""
        steps = interval_weights([node.tau for node in nodes])
        of_node = [0.0] * len(nodes)  # each node's share in the integrals of the parameters
        for n, (_, corrector) in enumerate(steps):
            for back, weight in enumerate(corrector):
                of_node[n + 1 - back] -= weight
        if not steps:
            return a
        past = [self._slopes(nodes[0], y, a, sums, of_node[0])]
        for n, (predictor, corrector) in enumerate(steps):
            guess = _moved(y, a, predictor, past)
            past.insert(0, self._slopes(nodes[n + 1], *guess, sums, of_node[n + 1]))
            y, a = _moved(y, a, corrector, past)
            del past[2:]
        return a

    def _slopes(self, node: _Node, y: Tensor, a: Tensor, sums: Sums, weight: float) -> tuple[Tensor, Tensor]:
        """(dy/dtau, da/dtau) at a node; ``weight`` times a^T dv/dp is added to the sums."""
        loop, call, level = self._loop, node.call, node.level
        x = node.scale * y
        loop.restore(CallState(x.to(loop.sample.dtype), loop.base, loop.history), call, loop.keys)
        for observer in self._observers:
            observer.begin_step(call, loop.setting.plan.calls)
        leaf, output = self._model(loop.input, loop.time_of(call))
        if call == self._last:
            self._model.check_same(output, self._seen)
        with torch.enable_grad():
            given, other = loop.split(output, call)
        (x0_x, x0_output), (e_x, e_output) = self._conversion.x0(level), self._conversion.epsilon(level)
        on_x, on_output = e_x - x0_x, e_output - x0_output
        outputs, shares = [given], [1.0]
        if other is not None:
            guidance = loop.setting.guidance[call]
            outputs, shares = [given, other], [guidance, 1 - guidance]
        mixed = sum(share * part.detach().to(x.dtype) for share, part in zip(shares, outputs, strict=True))
        on_input, rest = self._model.backward(leaf, outputs, [on_output * share * a for share in shares])
        sums.add(rest, weight)
        on_input = on_input.to(x.dtype).view(loop.copies, *x.shape).sum(0) * loop.input_scale(call)
        return on_x * x + on_output * mixed, -node.scale * (on_x * a + on_input)


def _moved(y: Tensor, a: Tensor, shares: Sequence[float], slopes: Sequence[tuple[Tensor, Tensor]]):
    """y and a further by the shares of their slopes, newest first."""
    for share, (of_y, of_a) in zip(shares, slopes, strict=True):
        y, a = y + share * of_y, a + share * of_a
    return y, a
