"""The example call of a model: run it, compare results, time two models side by side."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pydenoise.quantization.arguments import Arguments
from pydenoise.surgery import layers
from pydenoise.surgery.report import Errors


class Example:
    """``example_inputs`` of ``accelerate``: see :class:`pydenoise.quantization.Arguments`."""

    def __init__(self, inputs: object):
        self._call = Arguments.of(inputs, "example_inputs")
        self.args, self.kwargs = self._call.args, self._call.kwargs

    def fresh(self, dtype: torch.dtype | None = None) -> tuple[tuple, dict]:
        """Copies of the arguments (a model may write into them), floating tensors in ``dtype`` if it is given."""
        return self._call.fresh(dtype)

    def run(self, model: nn.Module, dtype: torch.dtype | None = None) -> object:
        """``model``'s output on the example, without gradients."""
        args, kwargs = self.fresh(dtype)
        with torch.no_grad():
            return model(*args, **kwargs)


def compare(actual: object, expected: object) -> Errors | str:
    """Errors over all floating tensors of two outputs, or a sentence on how their structures differ."""
    got, got_tree = pytree.tree_flatten(actual)
    want, want_tree = pytree.tree_flatten(expected)
    if got_tree != want_tree:
        return "the outputs have another structure"
    absolute, relative = 0.0, 0.0
    for a, e in zip(got, want, strict=True):
        if not isinstance(e, Tensor):
            continue
        if not isinstance(a, Tensor) or a.shape != e.shape:
            return f"an output is {tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__}, not {tuple(e.shape)}"
        if e.numel() == 0:
            continue
        a, e = a.double(), e.double()
        finite = torch.isfinite(e)
        if not torch.equal(torch.isfinite(a), finite):
            return "an output is not finite in the same places"
        error = (a - e)[finite].abs().max().item() if finite.any() else 0.0
        scale = e[finite].abs().max().item() if finite.any() else 0.0
        absolute = max(absolute, error)
        relative = max(relative, error / scale if scale else (0.0 if error == 0.0 else float("inf")))
    return Errors(absolute, relative)


def dtypes_of(output: object) -> list[torch.dtype]:
    """The dtypes of all tensors of an output, in order."""
    return [leaf.dtype for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def run_float64(model: nn.Module, example: Example) -> object:
    """The output of a float64 copy of ``model``; raises whatever a model that fixes its dtypes raises."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if layers.weighted_dims(child) is not None:
                parent._modules[name] = child.fold()
    return example.run(twin.double(), torch.float64)


def time_side_by_side(
    original: nn.Module, accelerated: nn.Module, example: Example, budget: float = 2.0, most: int = 15
) -> tuple[float, float, float, int]:
    """Median milliseconds of both, median of their ratios, and rounds; interleaved, in alternating order."""
    calls = [(model, *example.fresh()) for model in (original, accelerated)]
    cuda = any(p.is_cuda for p in original.parameters())
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        _timed(calls[1], cuda)
        start = time.perf_counter()
        while len(times[0]) < 3 or (len(times[0]) < most and time.perf_counter() - start < budget):
            for which in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
                times[which].append(_timed(calls[which], cuda))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios), len(ratios)


def _timed(call: tuple[Callable, tuple, dict], cuda: bool) -> float:
    model, args, kwargs = call
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(*args, **kwargs)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
