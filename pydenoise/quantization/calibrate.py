"""Run a float model on batches and learn what its layers' inputs look like."""

import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from pydenoise.quantization.arguments import Arguments, find_timestep, timesteps_of
from pydenoise.quantization.calibration import Calibration, fingerprint
from pydenoise.quantization.observers import SAMPLE_ELEMENTS, LayerStatistics, Observers, kind_of
from pydenoise.quantization.schemes import DEFAULT_BUCKETS, Scheme, resolve_scheme
from pydenoise.quantization.timesteps import NUM_TRAIN_TIMESTEPS, TimestepBuckets


def calibrate(
    model: nn.Module,
    batches: Iterable,
    *,
    layers: str | Iterable[str] | None = None,
    scheme: Scheme | str = "auto",
    timestep_argument: str | int | None = "auto",
    buckets: int | TimestepBuckets | None = None,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
    sample_elements: int = SAMPLE_ELEMENTS,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Run ``model`` on ``batches`` in full precision and collect statistics of the inputs of its layers.

    Args:
        model: in eval mode; fp32, bf16 or fp16. It is not changed.
        batches: what the model takes, one call each: a tensor; a tuple or list of positional arguments; a dict of
            keyword arguments; or :class:`Arguments` of both. An iterator is read once. See
            :func:`trajectory_batches` for a diffusion model's own inputs.
        layers: names or glob patterns of modules (with all inside them); ``None``: every Conv2d and Linear.
        scheme: what the calibration is for: a :class:`Scheme`, a preset's name, or "auto" (chosen per layer later, by
            :func:`choose`). It is stored with the calibration.
        timestep_argument: name or position of the timestep among forward's arguments: a number, or a tensor with one
            for each row of the batch. "auto": a parameter called timestep, timesteps or t, if there is one.
            ``None``: the model has none.
        buckets: ranges of timesteps with statistics of their own: a number (of equal ranges of
            0 .. ``num_train_timesteps``) or :class:`TimestepBuckets`. Default: as ``scheme`` says, 10 for "auto"; 1 for
            a model without timesteps.
        sample_elements: numbers kept of each layer's inputs, as float32 on the CPU; more if a bucket would get none.
        seed: of the choice of samples. progress: count batches on stderr.

    Returns:
        A :class:`Calibration`. Layers that no batch called are in its ``uncalled``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: training mode; no batches; no layer to calibrate, or none that was called; a pattern that matches
            nothing; NaN or infinity in a layer's input (the message names the layer); a timestep argument that the
            model or a batch lacks; a "per_timestep" scheme for a model without timesteps.
    """
    _check_model(model)
    scheme = resolve_scheme(scheme)
    argument = find_timestep(model, timestep_argument)
    ranges = _bucket_ranges(scheme, argument, buckets, num_train_timesteps)
    chosen = select_layers(model, layers)
    statistics = {
        name: LayerStatistics.of(name, module, len(ranges), sample_elements, seed + index)
        for index, (name, module) in enumerate(chosen.items())
    }
    count = 0
    with Observers((chosen[name], statistics[name]) for name in chosen) as observers, torch.no_grad():
        for batch in batches:
            call = Arguments.of(batch, "batches")
            where = torch.zeros(1, dtype=torch.int64)
            if argument is not None:
                where = ranges(timesteps_of(model, call, argument))
            args, kwargs = call.fresh()
            with observers.watching(where):  # a generator of batches may run the model as well: that is not observed
                model(*args, **kwargs)
            count += 1
            if progress:
                print(f"\rcalibrating: batch {count}", end="", file=sys.stderr, flush=True)
    if progress and count:
        print(file=sys.stderr)
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    called = {name: item for name, item in statistics.items() if item.counts.sum() > 0}
    if not called:
        raise ValueError("batches: no layer of the model was called; is the model compiled, or its forward replaced?")
    uncalled = tuple(name for name in statistics if name not in called)
    return Calibration(
        type(model).__name__, called, scheme, ranges, argument, count, uncalled,
        {name: fingerprint(chosen[name]) for name in called},
    )  # fmt: skip


def select_layers(model: nn.Module, layers: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The Conv2d and Linear modules of ``model`` that ``layers`` names (names or glob patterns), by name.

    Raises:
        TypeError: a pattern that is no str. ValueError: one that matches nothing, or no such layer at all.
    """
    found = {name: module for name, module in model.named_modules() if kind_of(module) is not None}
    if layers is None:
        if not found:
            raise ValueError("model: has no Conv2d or Linear layer")
        return found
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers: expected names or glob patterns (str), got {type(pattern).__name__}")
        matched = {name for name in found if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not matched:
            known = ", ".join(list(found)[:8])
            raise ValueError(f"layers: {pattern!r} matches no Conv2d or Linear of the model; it has {known}, ...")
        chosen |= matched
    if not chosen:
        raise ValueError("layers: expected at least one name")
    return {name: module for name, module in found.items() if name in chosen}


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    training = next((name or "it" for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(f"model: expected a model in eval mode, {training} is in training mode; call model.eval()")


def _bucket_ranges(
    scheme: Scheme | str, argument: str | int | None, buckets: int | TimestepBuckets | None, num_train_timesteps: int
) -> TimestepBuckets:
    per_timestep = isinstance(scheme, Scheme) and scheme.granularity == "per_timestep"
    if argument is None:
        if per_timestep:
            raise ValueError("scheme: per_timestep needs a model with timesteps; name its timestep_argument")
        if isinstance(buckets, TimestepBuckets) or (buckets or 1) != 1:
            raise ValueError("buckets: the model has no timesteps; name its timestep_argument")
        return TimestepBuckets()
    if buckets is None:
        buckets = scheme.buckets if isinstance(scheme, Scheme) else DEFAULT_BUCKETS
    ranges = buckets if isinstance(buckets, TimestepBuckets) else TimestepBuckets.uniform(buckets, num_train_timesteps)
    if per_timestep and scheme.buckets != len(ranges):
        raise ValueError(f"buckets: the scheme has {scheme.buckets}, got {len(ranges)}")
    return ranges
