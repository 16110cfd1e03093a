"""``pydenoise.accelerate``: turn the convolutions of a model into fused layers, and report what was done."""

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pydenoise.nn.fused_conv import FUSED
from pydenoise.ops import registry
from pydenoise.quantization import Calibration, Scheme
from pydenoise.quantization.choose import TARGET_DB
from pydenoise.surgery import chains, layers, modules
from pydenoise.surgery.chains import Untraceable
from pydenoise.surgery.example import Example, compare, dtypes_of, run_float64, time_side_by_side
from pydenoise.surgery.graphs import GraphSurgeon
from pydenoise.surgery.int8 import Int8Acceleration
from pydenoise.surgery.policy import PRECISIONS, Policy
from pydenoise.surgery.report import AccelerationReport, Errors, Kept, Swap
from pydenoise.surgery.watch import Watch

__all__ = ["AccelerationReport", "accelerate"]

# An accelerated model whose relative error on the example exceeds this is taken for wrong, not for imprecise, and a
# more careful way is tried: rounding in these precisions stays far below it in any network that works in them.
_WRONG = {"fp32": 1e-3, "bf16": 0.1}
# The float64 comparison is made where the original's example takes at most this long (float64 is several times slower).
_CHEAP_SECONDS = 1.0


def accelerate(
    model: nn.Module,
    example_inputs: object,
    precision: str = "fp32",
    *,
    calibration: Calibration | Iterable | None = None,
    scheme: Scheme | str = "auto",
    target_db: float = TARGET_DB,
    float_below: float | None = None,
    keep: Iterable[str] = (),
    inplace: bool = False,
    record: bool = True,
    measure: bool = True,
) -> tuple[nn.Module, AccelerationReport]:
    """A faster model for inference, and a report on what became of each layer.

    Chains of convolution, batch normalisation (folded in float64), activation (ReLU, SiLU, GELU, LeakyReLU of slope
    0.01, 0.1 or 0.2) and residual addition become one fused layer each; all else is kept. The model is read through
    ``torch.fx`` (the result is a ``torch.fx.GraphModule`` with the same call signature); where that fails, modules are
    swapped one by one and the model keeps its class. Python values that the forward reads (attributes, arguments left
    at their defaults) are fixed as they are now, as ``torch.fx`` does it.

    Args:
        model: in eval mode. It is not changed, unless ``inplace``; it is run on copies of the example.
        example_inputs: a tensor; a tuple or list of positional arguments; or a dict of keyword arguments. Other sizes
            and batches work afterwards.
        precision: "fp32" (Winograd allowed for 3x3 layers: relative error up to 2e-5 per layer), or "bf16": weights and
            activations of fused layers in bfloat16; outputs have the original's dtypes. "int8": the residual, attention
            and transformer blocks of U-Nets (diffusers' and our own), or the convolutions of other networks, run on
            int8 codes with int8 weights; first and last convolutions and embeddings stay in float.
        calibration: for "int8": batches of the model's own inputs (each a tensor, a tuple or a dict), or a finished
            :class:`pydenoise.quantization.Calibration`. ``None``: scales are computed from each input, per pixel or
            per token, which needs no calibration and is slower.
        scheme: for "int8" with a calibration: a :class:`pydenoise.quantization.Scheme`, a preset's name, or "auto": for
            each layer the cheapest whose output reaches ``target_db`` of signal over noise on the calibration samples,
            else the best, or float if even that is below ``float_below``.
        keep: names or glob patterns of modules to leave alone, with all that is inside them.
        inplace: swap modules inside ``model`` and return it: its class, methods and forward stay, so functional
            activations and residuals are not fused.
        record: for "int8" on a CPU: record the forward once per input shape and replay it without Python (see
            :mod:`pydenoise.recording`), where replays are exact.
        measure: time both models side by side on the example (about two seconds at most for small models).

    Returns:
        The accelerated model, in eval mode, and an :class:`AccelerationReport`. With nothing to swap: an unchanged
        copy, and a ``UserWarning``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``; ``example_inputs`` or ``keep`` is of a wrong type.
        ValueError: unknown ``precision``; ``model`` in training mode; a ``keep`` pattern that matches nothing;
            an example that the model itself cannot run (the model's own error is the cause).
    """
    _check(model, precision)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    example = Example(example_inputs)
    if precision != "int8" and calibration is not None:
        raise ValueError(f"calibration: belongs to precision 'int8', got it with {precision!r}")
    with torch.inference_mode(False), torch.no_grad():  # fused weights are ordinary tensors
        if precision == "int8":
            return Int8Acceleration(
                model, example, keep=keep, inplace=inplace, calibration=calibration, scheme=scheme,
                target_db=target_db, float_below=float_below, record=record,
            ).run(measure)  # fmt: skip
        return _Acceleration(model, example, precision, keep, inplace).run(measure)


def _check(model: object, precision: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in training mode; call model.eval() first")


@dataclass
class _Result:
    """One way of acceleration, tried on the example."""

    model: nn.Module
    swapped: list[Swap]
    kept: list[Kept]
    mode: str
    error: Errors
    fallbacks: dict[str, int]


class _Acceleration:
    """One call of ``accelerate``: takes the first way that works, from the fastest to the most careful."""

    def __init__(self, model: nn.Module, example: Example, precision: str, keep: tuple, inplace: bool):
        self.original, self.example, self.inplace = model, example, inplace
        # A model that is a single convolution has no place to put another layer.
        alone = layers.conv_dims(model) is not None and not inplace
        self.model = nn.Sequential(model).eval() if alone else model
        self.options = (precision, keep)
        self.precision = precision
        self._policy(self.model)  # bad patterns raise before anything runs
        self.notes: list[str] = []

    def run(self, measure: bool) -> tuple[nn.Module, AccelerationReport]:
        start = time.perf_counter()
        try:
            self.expected = self.example.run(self.original)
        except Exception as error:
            raise ValueError(
                f"example_inputs: the model cannot run this example ({type(error).__name__}: {error})"
            ) from error
        seconds = time.perf_counter() - start
        result = next(filter(None, (self._try(*way) for way in self._ways())), None) or self._unchanged()
        report = AccelerationReport(
            type(self.original).__name__, self.precision, result.mode, result.swapped, result.kept, self.notes,
            result.error, fallbacks=result.fallbacks, threads=torch.get_num_threads(),
        )  # fmt: skip
        if not result.swapped:
            warnings.warn("accelerate: no layer of this model was swapped; the report says why", stacklevel=3)
        self._note_precision(result)
        if seconds < _CHEAP_SECONDS:
            self._compare_float64(report, result)
        if measure and result.swapped:
            twin = self.original if not self.inplace else self._pristine
            report.original_ms, report.accelerated_ms, report.speedup, report.rounds = time_side_by_side(
                twin, result.model, self.example
            )
        return result.model, report

    def _policy(self, model: nn.Module) -> Policy:
        return Policy(model, *self.options)

    # ------------------------------------------------------------------------------------------------- the ways

    def _ways(self) -> Iterator[tuple[str, Callable]]:
        """(mode, function that returns model, swapped, kept), from the fastest way to the most careful."""
        if self.inplace:
            self._pristine = copy.deepcopy(self.model)
        else:
            yield "graph", lambda: self._graph(stay_narrow=True)
            if self.precision == "bf16":
                yield "graph", lambda: self._graph(stay_narrow=False)
        yield "modules", lambda: self._modules(follow=True, keep_layout=False)
        yield "modules", lambda: self._modules(follow=True, keep_layout=True)
        yield "modules", lambda: self._modules(follow=False, keep_layout=True)

    def _graph(self, stay_narrow: bool) -> tuple[nn.Module, list[Swap], list[Kept]]:
        surgeon = GraphSurgeon(self.model, *self.example.fresh(), self._policy, stay_narrow)
        model = surgeon.operate(self._differs)
        return model.eval(), surgeon.swapped, surgeon.kept

    def _differs(self, output: object) -> str | None:
        """Why ``output`` is not the original's, or ``None``; for a plain torch rerun of the original."""
        errors = compare(output, self.expected)
        if isinstance(errors, str):
            return errors
        return f"relative error {errors.relative:.1e}" if errors.relative > 1e-4 else None

    def _modules(self, follow: bool, keep_layout: bool) -> tuple[nn.Module, list[Swap], list[Kept]]:
        model = copy.deepcopy(self.model)
        self._module_options = (follow, keep_layout)
        return (model, *self._swap_modules(model, follow, keep_layout))

    def _swap_modules(self, model: nn.Module, follow: bool, keep_layout: bool) -> tuple[list[Swap], list[Kept]]:
        try:
            graph = chains.trace(model, *self.example.fresh()) if follow else None
        except Untraceable as error:
            graph = None
            self._note(f"the model cannot be traced, so only nn.Sequential tells what follows what ({error})")
        policy = self._policy(model)
        return modules.swap_modules(model, policy, graph, follow=follow, keep_layout=keep_layout)

    def _try(self, mode: str, make: Callable) -> _Result | None:
        """The way's result on the example, or ``None``, with a note on why it is not taken."""
        try:
            model, swapped, kept = make()
        except Untraceable as error:
            self._note(f"another way was taken, because the model could not be rewritten as a graph: {error}")
            return None
        if not swapped:
            return self._unchanged(kept)
        before = registry.fallbacks.copy()
        try:
            with Watch(model, swapped):
                output = self.example.run(model)
        except Exception as error:  # the model's own code may depend on what a swap changes: a type, a layout
            self._note(f"another way was taken, because the accelerated model failed: {type(error).__name__}: {error}")
            return None
        errors = compare(output, self.expected)
        if isinstance(errors, str) or errors.relative > _WRONG[self.precision]:
            text = errors if isinstance(errors, str) else f"relative error {errors.relative:.1e}"
            self._note(f"another way was taken, because the accelerated model gave another result: {text}")
            return None
        if dtypes_of(output) != dtypes_of(self.expected):
            self._note("another way was taken, because the accelerated model gave other dtypes")
            return None
        fallbacks = dict(registry.fallbacks - before)
        if self.inplace:  # the same once more, on the caller's model
            model = self.original
            self._swap_modules(model, *self._module_options)
        elif mode == "modules" and self.model is self.original:
            self._note("the model keeps its class and its own forward; residuals are added by its own code")
        return _Result(model, swapped, kept, mode, errors, fallbacks)

    def _unchanged(self, kept: list[Kept] | None = None) -> _Result:
        model = self.original if self.inplace else copy.deepcopy(self.original)
        if kept is None:
            policy = self._policy(self.model)
            kept = [
                modules.keep_entry(name, module, policy)
                for name, module in self.model.named_modules()
                if name and not any(True for _ in module.children())
            ]
        return _Result(model, [], kept, "unchanged", Errors(0.0, 0.0), {})

    # --------------------------------------------------------------------------------------------------- report

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _note_precision(self, result: _Result) -> None:
        winograd = sum("winograd" in swap.kernel for swap in result.swapped)
        if winograd:
            self._note(f"{winograd} layers use Winograd, whose relative error per layer is up to 2e-5 in float32")
        if any(type(m) in FUSED.values() and m.keep_layout for m in result.model.modules()):
            self._note("fused layers copy their outputs to contiguous memory, because the model's code depends on it")

    def _compare_float64(self, report: AccelerationReport, result: _Result) -> None:
        pristine = self._pristine if self.inplace else self.original
        try:
            exact = run_float64(pristine, self.example)
        except Exception as error:  # models that fix dtypes in their code
            self._note(f"no float64 comparison: the model does not run in float64 ({type(error).__name__})")
            return
        ours, own = (compare(output, exact) for output in (self.example.run(result.model), self.expected))
        if isinstance(ours, Errors) and isinstance(own, Errors):
            report.error_float64, report.original_error_float64 = ours, own
