"""``pydenoise.accelerate(..., precision="int8")``: calibrate, choose schemes, swap, record, compare, report."""

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pydenoise import _native, recording
from pydenoise.nn.shared_projection import share_projections
from pydenoise.nn.timestep_scales import PER_TIMESTEP
from pydenoise.ops import registry
from pydenoise.quantization import Calibration, Scheme, calibrate, resolve_scheme
from pydenoise.quantization.arguments import Arguments
from pydenoise.quantization.observers import kind_of
from pydenoise.surgery import int8_attach, int8_blocks, modules
from pydenoise.surgery.chains import Untraceable
from pydenoise.surgery.example import Example, compare, time_side_by_side
from pydenoise.surgery.graphs import GraphSurgeon
from pydenoise.surgery.int8_graph import Int8GraphSurgeon
from pydenoise.surgery.int8_plans import Int8Plans
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.recipe import Recipe, describe, recipe_of
from pydenoise.surgery.report import AccelerationReport, Errors, Kept, Swap
from pydenoise.surgery.watch import Watch

_REPORT_SAMPLES = 1 << 16  # numbers kept of each layer's input, where the calibration is only there to measure
_LOW_SNR = 20.0  # dB of the output, below which the report says so


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
        if recipe_of(model) is not None:
            raise ValueError("model: is an int8 model already; accelerate the float model")
        self.original, self.example, self.keep, self.inplace = model, example, keep, inplace
        # A model that is a single convolution has no place to put another layer.
        self.model = nn.Sequential(model).eval() if isinstance(model, nn.Conv2d) and not inplace else model
        self.scheme, self.named = resolve_scheme(scheme), isinstance(scheme, str)
        if isinstance(self.scheme, Scheme) and self.scheme.is_float:
            raise ValueError("scheme: 'float' leaves nothing to quantize; name layers in keep")
        self.given, self.record = calibration, record
        self.thresholds = {"target_db": target_db, "float_below": float_below}
        self.notes: list[str] = []
        self._policy(self.model)  # bad patterns raise before anything runs

    def run(self, measure: bool) -> tuple[nn.Module, AccelerationReport]:
        try:
            self.expected = self.example.run(self.original)
        except Exception as error:
            raise ValueError(
                f"example_inputs: the model cannot run this example ({type(error).__name__}: {error})"
            ) from error
        if not any(kind_of(module) for module in self.model.modules()):
            return self._unchanged()
        self.calibration, self.measured_only = self._calibrated()
        self.seen = int8_blocks.watch(self.model, lambda: self.example.run(self.model))
        model, report = self._swapped()
        if not report.layers:
            warnings.warn("accelerate: no layer of this model was quantized; the report says why", stacklevel=3)
        self._attach_timesteps(model)
        self._compare(model, report)
        twin = self.original
        if self.inplace:  # all went well on a copy: its parts move into the caller's model
            twin = copy.copy(self.original)
            self.original.__dict__.update(model.__dict__)
            model = self.original
        self._record(model)
        if measure and report.swapped:
            report.original_ms, report.accelerated_ms, report.speedup, report.rounds = time_side_by_side(
                twin, model, self.example
            )
        return model, report

    def _report(self, mode: str, swapped: list[Swap], kept: list[Kept], plans: Int8Plans | None) -> AccelerationReport:
        """The report, with the lists that later steps add to."""
        name, layers = type(self.original).__name__, [] if plans is None else plans.layers
        threads = torch.get_num_threads()
        return AccelerationReport(name, "int8", mode, swapped, kept, self.notes, layers=layers, threads=threads)

    def _unchanged(self) -> tuple[nn.Module, AccelerationReport]:
        warnings.warn("accelerate: the model has no Conv2d or Linear layer to quantize", stacklevel=4)
        policy = self._policy(self.original)
        leaves = [(n, m) for n, m in self.original.named_modules() if n and not any(True for _ in m.children())]
        report = self._report("unchanged", [], [modules.keep_entry(n, m, policy) for n, m in leaves], None)
        report.error = Errors(0.0, 0.0)
        return self.original if self.inplace else copy.deepcopy(self.original), report

    # ------------------------------------------------------------------------------------------------- calibration

    def _calibrated(self) -> tuple[Calibration, bool]:
        """The calibration, and whether it is only the example's: then it measures, and scales stay dynamic."""
        if self.given is None:
            return self._measured(), True
        if isinstance(self.given, Calibration):
            self.given.check(self.model)
            self._fit_buckets(self.given)
            return self.given, False
        if isinstance(self.given, (Tensor, dict, str)) or not isinstance(self.given, Iterable):
            raise TypeError(
                "calibration: expected a Calibration, or an iterable of batches (each a tensor, a tuple of "
                f"positional arguments or a dict of keyword arguments), got {type(self.given).__name__}"
            )
        return calibrate(self.model, self.given, scheme=self.scheme), False

    def _measured(self) -> Calibration:
        """Statistics of the example's own inputs."""
        if isinstance(self.scheme, Scheme) and not (self.scheme.is_dynamic and self._needs_nothing()):
            raise ValueError(f"calibration: scheme {self.scheme} needs calibration batches, got None")
        batch = Arguments(self.example.args, self.example.kwargs)
        try:
            return calibrate(self.model, [batch], timestep_argument=None, sample_elements=_REPORT_SAMPLES)
        except ValueError as error:
            raise ValueError(f"example_inputs: {str(error).removeprefix('batches: ')}") from error

    def _fit_buckets(self, calibration: Calibration) -> None:
        """A preset takes the calibration's buckets; a scheme of the caller's own must have as many."""
        if not isinstance(self.scheme, Scheme) or self.scheme.granularity != PER_TIMESTEP:
            return
        buckets = len(calibration.timesteps)
        if calibration.timestep_argument is None:
            raise ValueError(f"calibration: has no timesteps, and scheme {self.scheme} needs them")
        if self.named:
            self.scheme = replace(self.scheme, buckets=buckets)
        elif self.scheme.buckets != buckets:
            raise ValueError(f"scheme: has {self.scheme.buckets} buckets of timesteps, the calibration {buckets}")

    def _needs_nothing(self) -> bool:
        return self.scheme.smooth is None and not self.scheme.bias_correction

    def _policy(self, model: nn.Module) -> Policy:
        return Policy(model, "int8", self.keep)

    def _plans(self, model: nn.Module) -> Int8Plans:
        scheme = self.calibration.scheme if self.scheme == "auto" else self.scheme
        return Int8Plans(
            self._policy(model), self.seen.outer, self.calibration, scheme, measured_only=self.measured_only,
            **self.thresholds,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- ways

    def _swapped(self) -> tuple[nn.Module, AccelerationReport]:
        """The int8 model by the first way that fits: blocks of a U-Net, a graph of convolutions, single modules."""
        if int8_blocks.has_blocks(self.model):
            return self._blocks()
        if not self.inplace:
            try:
                return self._graph()
            except Untraceable as error:
                self._note(f"another way was taken, because the model could not be rewritten as a graph: {error}")
        model = copy.deepcopy(self.model)
        plans = self._plans(model)
        swapped, kept = int8_blocks.swap_convs(model, plans)
        return self._done(model, "modules", swapped, kept, plans)

    def _blocks(self) -> tuple[nn.Module, AccelerationReport]:
        model = copy.deepcopy(self.model)
        plans, dtype = self._plans(model), _float_dtype()
        surgeon = int8_blocks.BlockSurgeon(model, plans, self.seen.skips, dtype)
        surgeon.operate()
        share_projections(model)
        dtype_name = None if dtype is None else str(dtype)
        return self._done(
            model, "blocks", surgeon.swapped, surgeon.kept, plans, skips=self.seen.skips, shortcut_dtype=dtype_name
        )

    def _graph(self) -> tuple[nn.Module, AccelerationReport]:
        surgeon = GraphSurgeon(self.model, *self.example.fresh(), self._policy, stay_narrow=False)
        model = surgeon.operate(self._differs).eval()
        plans = self._plans(self.model)
        second = Int8GraphSurgeon(model, plans, surgeon.swapped, surgeon.sources)
        model = second.operate()
        try:
            example = describe((self.example.args, self.example.kwargs))
        except TypeError:  # then a checkpoint cannot say how to trace the model again
            example = None
        return self._done(model, "graph", surgeon.swapped, [*surgeon.kept, *second.kept], plans, example=example)

    def _done(
        self, model: nn.Module, mode: str, swapped: list[Swap], kept: list[Kept], plans: Int8Plans, **options: object
    ) -> tuple[nn.Module, AccelerationReport]:
        """The model with its recipe, and the report so far."""
        classes = {swap.name: swap.replacement for swap in swapped}
        model.int8_recipe = Recipe(type(self.original).__name__, mode, self.keep, plans.choices, classes, **options)
        return model, self._report(mode, swapped, [*kept, *plans.kept], plans)

    def _differs(self, output: object) -> str | None:
        errors = compare(output, self.expected)
        if isinstance(errors, str):
            return errors
        return f"relative error {errors.relative:.1e}" if errors.relative > 1e-4 else None

    # ----------------------------------------------------------------------------------------------------- finishing

    def _attach_timesteps(self, model: nn.Module) -> None:
        argument, timesteps = self.calibration.timestep_argument, self.calibration.timesteps
        if int8_attach.attach_timesteps(model, timesteps, argument):
            model.int8_recipe.timestep = (argument, timesteps.edges)

    def _compare(self, model: nn.Module, report: AccelerationReport) -> None:
        """Run the example; the result's structure is the original's, and its error is part of the report."""
        before = registry.fallbacks.copy()
        with Watch(model, report.swapped):
            actual = self.example.run(model)
        report.fallbacks = dict(registry.fallbacks - before)
        errors = compare(actual, self.expected)
        if isinstance(errors, str):
            raise RuntimeError(f"accelerate: the int8 model gives another result: {errors}")
        report.error, report.snr_db = errors, output_snr(actual, self.expected)
        if report.snr_db is not None and report.snr_db < _LOW_SNR:
            self._note(f"the output's signal over noise on the example is only {report.snr_db:.1f} dB")

    def _record(self, model: nn.Module) -> None:
        """Record the forward, if replays give exactly what the model gives; else say why not."""
        if not self.record:
            return
        reason = int8_attach.why_not_recorded(model)
        if reason is None:
            forward = int8_attach.record(model)
            reason = self._replays_wrongly(model, forward)
            if reason is None:
                model.int8_recipe.recorded = True
                return
            recording.release_forward(model)
        self._note(f"the forward is not recorded: {reason}")

    def _replays_wrongly(self, model: nn.Module, forward: recording.RecordedForward) -> str | None:
        """Why recordings cannot be used, or ``None``: other inputs must give what the model itself gives."""
        for seed in (0, 1, 2):
            args, kwargs = _perturbed(self.example, seed)
            with torch.no_grad():
                replayed = model(*args, **kwargs)
                del model.forward
                own = model(*args, **kwargs)
                model.forward = forward
            if forward.refusals:
                return forward.refusals[0]
            errors = compare(replayed, own)
            if isinstance(errors, str) or errors.max_abs != 0.0:
                return "its replays differ from the model: its forward depends on more than its arguments"
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


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
    return torch.bfloat16 if _native.multiplies_bfloat16() else None


def _perturbed(example: Example, seed: int) -> tuple[tuple, dict]:
    """The example with other numbers of the same shapes."""
    generator = torch.Generator().manual_seed(seed)

    def change(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        factor = 1 + 0.1 * torch.randn(value.shape, generator=generator)
        return value * factor.to(value.device, value.dtype)

    return pytree.tree_map(change, example.fresh())
