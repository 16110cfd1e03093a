"""Exact gradients of a run from a few stored states; every call of the model is repeated on the way back.

States are stored and recomputed by the binomial schedule, which needs the fewest repetitions for a number of states:
Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26, 2000.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from math import comb

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._differentiable import Model, Sums
from pydenoise.samplers._loop import CallState, Loop
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._row_gradient import Limit, transposed_row
from pydenoise.samplers.plan import Control

Action = tuple[str, int, int]


def reversal(begin: int, end: int, slots: int, stored: Container[int]) -> Iterator[Action]:
    """How to go back over the calls from ``end`` to ``begin`` with ``slots`` states, the one at ``begin`` among them.

    Yields ("store", a, b): from the state at a compute that at b and keep it; ("reverse", a, b): from the state at a
    compute that at b and go back over call b; ("drop", b, b). What is in ``stored`` needs no computing.
    """
    length = end - begin
    if length == 1 or slots == 1:
        yield from (("reverse", begin, call) for call in reversed(range(begin, end)))
        return
    middle = begin + _advance(length, slots)
    if middle not in stored:
        yield "store", begin, middle
    yield from reversal(middle, end, slots - 1, stored)
    yield "drop", middle, middle
    yield from reversal(begin, middle, slots, stored)


def _advance(length: int, slots: int) -> int:
    """How far from the beginning of ``length`` calls the next state lies."""
    repeats = 0  # comb(slots + repeats, slots) calls can be reversed with so many repetitions of each
    while comb(slots + repeats, slots) < length:
        repeats += 1
    right = comb(slots + repeats - 2, slots - 1) if repeats else 0
    return max(1, min(comb(slots + repeats - 1, slots), length - right))


def first_states(calls: int, slots: int) -> list[int]:
    """The calls before which the run itself stores the state: those that the way back asks for first."""
    places, begin = [0], 0
    while slots > 1 and calls - begin > 1:
        begin += _advance(calls - begin, slots)
        slots -= 1
        places.append(begin)
    return places


class Checkpoint:
    """A run and the way back through it.

    Args:
        loop: buffers and rows; other runs use them in between.
        noise: z by call, where given; else ``keys`` make it.
        slots: states that are kept at a time.
    """

    def __init__(
        self, loop: Loop, model: Model, observers: Sequence[object], keys: Tensor | None,
        noise: Mapping[int, Tensor] | None, slots: int,
    ):  # fmt: skip
        self._loop, self._model, self._observers, self._keys, self._slots = loop, model, observers, keys, slots
        self._noise = None if noise is None else {call: z.detach() for call, z in noise.items()}
        self._noise_wanted = noise is not None and any(z.requires_grad for z in noise.values())
        self._states: dict[int, CallState] = {}

    def forward(self, x: Tensor, after: Callable[[int], None]) -> Tensor:
        """The sample."""
        places = set(first_states(self._calls, self._slots))

        def store(call: int) -> None:
            after(call)
            if call + 1 in places:
                self._states[call + 1] = self._loop.snapshot()

        with torch.inference_mode(False), torch.no_grad():
            self._loop.begin(x.detach(), self._keys, self._noise)
            self._states[0] = self._loop.snapshot()
            self._run(0, self._calls, store)
            self._seen = self._model.seen
            return self._loop.sample.clone()

    @property
    def _calls(self) -> int:
        return self._loop.setting.plan.calls

    def _run(self, begin: int, end: int, after=lambda call: None) -> None:
        run = self._model.watched, {}, self._noise, Control(), self._observers, after, False
        self._loop.run(*run, range(begin, end))

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients with respect to the start, the given noise, the conditioning and the parameters."""
        loop, states = self._loop, self._states
        exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grads = states[0].map(lambda tensor: torch.zeros_like(tensor, dtype=exact))
        grads.sample = grad.to(exact, memory_format=torch.contiguous_format)
        sums, on_noise = Sums(self._model), []
        with torch.inference_mode(False), torch.no_grad():
            for action, source, target in reversal(0, self._calls, self._slots, states):
                if action == "drop":
                    del states[target]
                    continue
                loop.restore(states[source], source, self._keys)
                self._run(source, target)
                if action == "store":
                    states[target] = loop.snapshot()
                    continue
                grads, z = self._reverse(target, grads, sums)
                if self._noise is not None and target in self._noise:
                    on_noise.append(z if self._noise_wanted else None)
            on_x = grads.sample
            if (start := loop.setting.plan.start) is not None:  # of a restoration, start[0] x + start[1] z
                on_x = start[0] * on_x
                if self._noise is not None:
                    on_noise.append(start[1] * grads.sample if self._noise_wanted else None)
            if grads.base is not None:  # the run begins with base = x
                on_x = on_x + grads.base
        return [on_x, *reversed(on_noise), *sums.values]

    def _reverse(self, call: int, grads: CallState, sums: Sums) -> tuple[CallState, Tensor]:
        """Gradients before ``call``, whose state the loop holds, from those after it."""
        loop, exact = self._loop, grads.sample.dtype
        for observer in self._observers:
            observer.begin_step(call, self._calls)
        x, output = self._model(loop.input, loop.time_of(call))
        if call == self._calls - 1:
            self._model.check_same(output, self._seen)
        with torch.enable_grad():
            given, other = loop.split(output, call)
        parts = [part.detach().to(exact) for part in (given, other) if part is not None]
        variance = z = None
        if loop.setting.plan.learned_variance:
            parts, variance = [p.chunk(2, 1)[0] for p in parts], parts[0].chunk(2, 1)[1]
            if loop.table[call, C.NOISE] != 0:
                z = self._noise_of(call, exact)
        row = loop.table[call].tolist()
        limit = Limit(row[C.CLIP], loop.setting.quantile, loop.setting.most)
        found = transposed_row(
            row, loop.sample.to(exact), parts[0], parts[1] if other is not None else None, grads, limit, variance, z
        )  # fmt: skip
        on_given, on_other = found.prediction, found.other
        if variance is not None:
            on_given = torch.cat([on_given, found.variance], 1)
            on_other = None if other is None else torch.cat([on_other, torch.zeros_like(found.variance)], 1)
        pairs = [(o, g) for o, g in ((given, on_given), (other, on_other)) if o is not None]
        on_input, rest = self._model.backward(x, [o for o, _ in pairs], [g for _, g in pairs])
        sums.add(rest)
        copies = on_input.to(exact).view(loop.copies, *loop.sample.shape).sum(0)
        found.state.sample.add_(copies, alpha=loop.input_scale(call))
        return found.state, found.noise

    def _noise_of(self, call: int, dtype: torch.dtype) -> Tensor:
        if self._noise is not None:
            return self._noise[call].to(dtype)
        shape = tuple(self._loop.sample.shape)
        return initial_noise(shape, self._keys, 1.0, dtype, self._loop.setting.backend, call + 1)
