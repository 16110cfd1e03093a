"""A sampler's step as a CUDA graph: captured once, replayed for every call.

Row, time and noise are read at a number that lies on the device and counts itself up, so one graph serves all calls;
networks that change from call to call (an observer's ``graph_key``) have a graph for each of their forms.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

WARM_UP = 2  # calls before a capture: libraries choose their algorithms in them


class Graphs:
    """The graphs of one loop's buffers, by denoiser and by the shapes of its keyword arguments."""

    def __init__(self, loop):
        self._loop = loop
        self._index = torch.zeros(1, dtype=torch.int64, device=loop.device)
        self._kept: dict[tuple, tuple[Callable, Mapping, dict]] = {}

    def body(self, denoiser: Callable[..., Tensor], conditions: Mapping[str, object]) -> None:
        """One call of the model and its update, without a word to the host."""
        loop = self._loop
        t = loop.times.index_select(0, self._index)[0]
        output, other = loop.split(denoiser(loop.input, t, **conditions), 0)
        loop.launch(self._index, self._index + 1, output, other)
        self._index.add_(1)

    def step(self, denoiser: Callable, conditions: Mapping[str, object], observers: Sequence) -> Callable[[int], None]:
        """A function that replays the graph of a call; graphs that are missing are captured first."""
        key = (id(denoiser), _signature(conditions))
        if key not in self._kept:
            while len(self._kept) >= 2:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = (denoiser, _static(conditions), {})
        own, static, graphs = self._kept[key]
        _copy(static, conditions)
        calls = range(self._loop.setting.plan.calls)
        for call in calls:
            form = tuple(observer.graph_key(call) for observer in observers)
            if form not in graphs:
                for observer in observers:
                    observer.begin_step(call, calls.stop)
                graphs[form] = self._capture(own, static)
        self._index.zero_()

        def replay(call: int) -> None:
            graphs[tuple(observer.graph_key(call) for observer in observers)].replay()

        return replay

    def _capture(self, denoiser: Callable, conditions: Mapping[str, object]):
        """A graph of ``body``; the buffers are as before."""
        loop = self._loop
        kept = [t for t in (loop.sample, loop.history, loop.base, loop.model_input, loop.faults) if t is not None]
        saved = [t.clone() for t in kept]
        side = torch.cuda.Stream(loop.device)
        side.wait_stream(torch.cuda.current_stream(loop.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._index.zero_()
                self.body(denoiser, conditions)
        torch.cuda.current_stream(loop.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._index.zero_()
        with torch.cuda.graph(graph):
            self.body(denoiser, conditions)
        for tensor, value in zip(kept, saved, strict=True):
            tensor.copy_(value)
        return graph


def _signature(value: object) -> object:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device)
    if isinstance(value, Mapping):
        return tuple((key, _signature(inner)) for key, inner in sorted(value.items()))
    return id(value) if getattr(value, "__hash__", None) is None else value


def _static(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _static(inner) for key, inner in value.items()}
    return value


def _copy(to: object, value: object) -> None:
    if isinstance(value, Tensor):
        to.copy_(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _copy(to[key], inner)
