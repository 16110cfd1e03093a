"""``pydenoise.accelerate(..., precision="int8")``: calibrate, choose schemes, swap, record, compare, report."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pydenoise import recording
from pydenoise.nn.shared_projection import share_projections
from pydenoise.nn.timestep_scales import TimestepScales
from pydenoise.ops import registry
from pydenoise.quantization import Calibration, Scheme, calibrate, resolve_scheme
from pydenoise.quantization.arguments import Arguments, timesteps_of
from pydenoise.surgery import int8_blocks
from pydenoise.surgery.chains import Untraceable
from pydenoise.surgery.example import Example, compare, time_side_by_side
from pydenoise.surgery.graphs import GraphSurgeon
from pydenoise.surgery.int8_graph import Int8GraphSurgeon
from pydenoise.surgery.int8_plans import Int8Plans
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.report import AccelerationReport, Kept, Swap

_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma")  # numbers that change from call to call
_SLOW_SNR_SAMPLES = 1 << 16  # of each layer's input, where the calibration is only there to measure


class Int8Acceleration:
    """One call of ``accelerate`` with precision "int8"; the arguments are those of :func:`pydenoise.accelerate`."""

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        keep: tuple[str, ...],
        inplace: bool,
        calibration: Calibration | Iterable | None,
        scheme: Scheme | str,
        target_db: float,
        float_below: float | None,
        record: bool,
    ):
        self.original, self.example, self.keep, self.inplace = model, example, keep, inplace
        self.scheme = resolve_scheme(scheme)
        self.given, self.record = calibration, record
        self.thresholds = {"target_db": target_db, "float_below": float_below}
        self.notes: list[str] = []
        Policy(model, "int8", keep)  # bad patterns raise before anything runs

    def run(self, measure: bool) -> tuple[nn.Module, AccelerationReport]:
        try:
            self.expected = self.example.run(self.original)
        except Exception as error:
            raise ValueError(
                f"example_inputs: the model cannot run this example ({type(error).__name__}: {error})"
            ) from error
        self.calibration, measured_only = self._calibrated()
        twin = copy.deepcopy(self.original) if measure and self.inplace else self.original
        model, swapped, kept, plans, mode = self._swapped(measured_only)
        report = AccelerationReport(
            type(self.original).__name__, "int8", mode, swapped, kept, self.notes, layers=plans.layers,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        if not plans.layers:
            warnings.warn("accelerate: no layer of this model was quantized; the report says why", stacklevel=4)
        self._attach_timesteps(model)
        self._compare(model, report)
        self._recorded(model)
        if measure and swapped:
            report.original_ms, report.accelerated_ms, report.speedup, report.rounds = time_side_by_side(
                twin, model, self.example
            )
        return model, report

    # ------------------------------------------------------------------------------------------------- calibration

    def _calibrated(self) -> tuple[Calibration, bool]:
        """The calibration, and whether it is only the example's: then it measures, and scales stay dynamic."""
        if isinstance(self.given, Calibration):
            self.given.check(self.original)
            return self.given, False
        if self.given is not None:
            if isinstance(self.given, (Tensor, dict, str)) or not isinstance(self.given, Iterable):
                raise TypeError(
                    "calibration: expected a Calibration, or an iterable of batches (each a tensor, a tuple of "
                    f"positional arguments or a dict of keyword arguments), got {type(self.given).__name__}"
                )
            return calibrate(self.original, self.given, scheme=self.scheme), False
        if isinstance(self.scheme, Scheme) and not (self.scheme.is_dynamic and self._needs_nothing()):
            raise ValueError(f"calibration: scheme {self.scheme} needs calibration batches, got None")
        batch = Arguments(self.example.args, self.example.kwargs)
        return (
            calibrate(self.original, [batch], timestep_argument=None, sample_elements=_SLOW_SNR_SAMPLES),
            True,
        )

    def _needs_nothing(self) -> bool:
        return self.scheme.smooth is None and not self.scheme.bias_correction

    def _plans(self, model: nn.Module, measured_only: bool) -> Int8Plans:
        policy = Policy(model, "int8", self.keep)
        scheme = self.calibration.scheme if self.scheme == "auto" else self.scheme
        return Int8Plans(policy, self.calibration, scheme, measured_only=measured_only, **self.thresholds)

    # --------------------------------------------------------------------------------------------------------- ways

    def _swapped(self, measured_only: bool) -> tuple[nn.Module, list[Swap], list[Kept], Int8Plans, str]:
        """The int8 model by the first way that fits: blocks of a U-Net, a graph of convolutions, single modules."""
        if int8_blocks.has_blocks(self.original):
            skips = int8_blocks.skip_channels(self.original, lambda: self.example.run(self.original))
            model = self.original if self.inplace else copy.deepcopy(self.original)
            plans = self._plans(model, measured_only)
            surgeon = int8_blocks.BlockSurgeon(model, plans, skips, _float_dtype())
            surgeon.operate()
            share_projections(model)
            return model, surgeon.swapped, [*surgeon.kept, *plans.kept], plans, "blocks"
        if not self.inplace:
            try:
                return self._graph(measured_only)
            except Untraceable as error:
                self._note(f"another way was taken, because the model could not be rewritten as a graph: {error}")
        model = self.original if self.inplace else copy.deepcopy(self.original)
        plans = self._plans(model, measured_only)
        swapped, kept = int8_blocks.swap_layers(model, plans)
        return model, swapped, [*kept, *plans.kept], plans, "modules"

    def _graph(self, measured_only: bool) -> tuple[nn.Module, list[Swap], list[Kept], Int8Plans, str]:
        options = ("fp32", self.keep)
        surgeon = GraphSurgeon(self.original, *self.example.fresh(), options, stay_narrow=False)
        model = surgeon.operate(self._differs).eval()
        plans = self._plans(self.original, measured_only)
        second = Int8GraphSurgeon(model, plans, surgeon.swapped)
        model = second.operate()
        return model, surgeon.swapped, [*surgeon.kept, *second.kept, *plans.kept], plans, "graph"

    def _differs(self, output: object) -> str | None:
        errors = compare(output, self.expected)
        if isinstance(errors, str):
            return errors
        return f"relative error {errors.relative:.1e}" if errors.relative > 1e-4 else None

    # ----------------------------------------------------------------------------------------------------- finishing

    def _attach_timesteps(self, model: nn.Module) -> None:
        """Switch the scales of "per_timestep" layers at each call, in front of the model's forward."""
        argument = self.calibration.timestep_argument
        if argument is None or len(self.calibration.timesteps) < 2:
            return
        scales = TimestepScales(model, self.calibration.timesteps)
        if not any(layer.scheme.granularity == "per_timestep" for layer in scales._layers):
            return
        model.add_module("timestep_scales", scales)
        model.register_forward_pre_hook(SelectScales(argument), with_kwargs=True)

    def _compare(self, model: nn.Module, report: AccelerationReport) -> None:
        """Run the example; the result's structure is the original's, and its error is part of the report."""
        before = registry.fallbacks.copy()
        actual = self.example.run(model)
        report.fallbacks = dict(registry.fallbacks - before)
        errors = compare(actual, self.expected)
        if isinstance(errors, str):
            raise RuntimeError(f"accelerate: the int8 model gives another result: {errors}")
        report.error, report.snr_db = errors, output_snr(actual, self.expected)
        if report.snr_db is not None and report.snr_db < 20:
            self._note(f"the output's signal over noise on the example is only {report.snr_db:.1f} dB")

    def _recorded(self, model: nn.Module) -> None:
        """Record the forward, if replays give exactly what the model gives; else say why not."""
        if not self.record:
            return
        reason = recording.unavailable()
        if reason is None and any(not t.is_cpu for t in [*model.parameters(), *model.buffers()]):
            reason = "the model is not on the CPU"
        if reason is None:
            forward = recording.record_forward(model, _TIMESTEPS)
            reason = self._replays_wrongly(model, forward)
            if reason is None:
                return
            recording.release_forward(model)
        self._note(f"the forward is not recorded: {reason}")

    def _replays_wrongly(self, model: nn.Module, forward: recording.RecordedForward) -> str | None:
        """Why recordings cannot be used, or ``None``: two other inputs must give what the model itself gives."""
        for seed in (0, 1, 2):
            args, kwargs = _perturbed(self.example, seed)
            with torch.no_grad():
                replayed = model(*args, **kwargs)
                own = _without_recording(model, forward, args, kwargs)
            if forward.refusals:
                return forward.refusals[0]
            errors = compare(replayed, own)
            if isinstance(errors, str) or errors.max_abs != 0.0:
                return "its replays differ from the model: its forward depends on more than its arguments"
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class SelectScales:
    """Forward pre-hook of a model with :class:`TimestepScales`: tells them the call's timestep."""

    def __init__(self, argument: str | int):
        self.argument = argument

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        value = kwargs.get(self.argument) if isinstance(self.argument, str) else None
        if value is None:
            value = timesteps_of_call(model, args, kwargs, self.argument)
        model.timestep_scales.select(value)


def timesteps_of_call(model: nn.Module, args: tuple, kwargs: dict, argument: str | int) -> Tensor:
    """The timestep among the arguments of a call of ``model``, whose forward may be a recorded one."""
    forward = model.__dict__.pop("forward", None)
    try:
        return timesteps_of(model, Arguments(args, kwargs), argument)
    finally:
        if forward is not None:
            model.forward = forward


def output_snr(actual: object, expected: object) -> float | None:
    """Signal over noise in dB over all floating tensors of two outputs; ``None`` without any, or without error."""
    signal = noise = 0.0
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if isinstance(e, Tensor) and e.is_floating_point():
            signal += e.double().square().sum().item()
            noise += (a.double() - e.double()).square().sum().item()
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _float_dtype() -> torch.dtype | None:
    """The dtype of float layers inside int8 blocks: bfloat16 where the processor multiplies it, else their own."""
    from pydenoise import _native

    library = _native.extension()
    return torch.bfloat16 if library.loaded and library.module.active_isa() == "avx512bf16" else None


def _perturbed(example: Example, seed: int) -> tuple[tuple, dict]:
    """The example with other numbers of the same shapes."""
    generator = torch.Generator().manual_seed(seed)

    def change(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value * (1 + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype))

    return pytree.tree_map(change, example.fresh())


def _without_recording(model: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
    """The model's own result, with its hooks."""
    del model.forward
    try:
        return model(*args, **kwargs)
    finally:
        model.forward = forward
