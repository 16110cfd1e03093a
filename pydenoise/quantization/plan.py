"""The int8 numbers of one layer: what a module of :mod:`pydenoise.nn` is filled with."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pydenoise.quantization import numbers, simulation
from pydenoise.quantization.bias import bias_correction
from pydenoise.quantization.observers import LayerStatistics, kind_of
from pydenoise.quantization.schemes import Scheme
from pydenoise.quantization.search import search_range
from pydenoise.quantization.smoothing import input_channel_amax, scale_input_channels, smoothing_factors
from pydenoise.quantization.weights import quantize_weight

_SEARCH_VALUES = 1 << 14  # samples of one range that a clip search looks at


@dataclass(frozen=True)
class LayerPlan:
    """A quantized layer in numbers. Tensors are on the device of the layer they were made from.

    Attributes:
        name, kind: of the layer; "conv2d" or "linear". scheme: what was asked for.
        weight: int8, of the float weight's shape. weight_scale: float32 [C_out].
        bias: float32 [C_out] or ``None``; with the bias correction, if the scheme has it.
        input_scale, input_zero_point: float32 and int32, 0-d ("per_tensor") or [buckets] ("per_timestep"); ``None``
            where they are computed from each input. The zero point is ``None`` where symmetric, too.
        channel_scale: float32 [C_in] that the input is multiplied by before it is quantized (1 / the smoothing
            factors), or ``None``.
    """

    name: str
    kind: str
    scheme: Scheme
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    channel_scale: Tensor | None = None


def plan_layer(
    layer: nn.Module,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    name: str | None = None,
    *,
    factors: Tensor | None = None,
    samples: list[simulation.Sample] | None = None,
) -> LayerPlan:
    """Quantize one layer as ``scheme`` says.

    Args:
        layer: ``nn.Conv2d`` or ``nn.Linear`` with finite weights.
        statistics: of its input, from a calibration. ``None`` is enough for a dynamic scheme without ``smooth`` and
            ``bias_correction``.
        scheme: not "float". "per_pixel" and "per_token" stand for each other, by the kind of layer.
        name: of the layer; default: that of the statistics.
        factors: [C_in], positive: divide the input's channels by these, in place of those of ``scheme.smooth`` (layers
            that read one tensor must share them to share its codes).
        samples: ``sample_outputs(layer, statistics)``, where they are at hand.

    Raises:
        TypeError: another kind of layer. ValueError: a float scheme; statistics that are missing, empty, of another
            layer or of another number of buckets; weights that are not finite.
    """
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"layer: expected a Conv2d or Linear, got {type(layer).__name__}")
    if scheme.is_float:
        raise ValueError("scheme: a float layer has no plan")
    name = name or (statistics.name if statistics is not None else "")
    scheme = scheme.for_kind(kind)
    _check_statistics(layer, kind, statistics, scheme, name)
    weight, groups = layer.weight.detach().float(), getattr(layer, "groups", 1)
    if factors is not None:
        _check_factors(factors, statistics)
        factors = factors.detach().float().to(weight.device)
    elif scheme.smooth is not None:
        amax = statistics.channel_amax.to(weight.device)
        factors = smoothing_factors(amax, input_channel_amax(weight, groups), scheme.smooth)
    if factors is not None:
        weight = scale_input_channels(weight, factors, groups)
    codes, weight_scale = quantize_weight(weight, clip=scheme.weight_clip)
    bias = None if layer.bias is None else layer.bias.detach().float().clone()
    scale, zero_point = (None, None) if scheme.is_dynamic else input_parameters(statistics, scheme, factors)
    device = weight.device
    plan = LayerPlan(
        name, kind, scheme, codes, weight_scale, bias,
        None if scale is None else scale.to(device), None if zero_point is None else zero_point.to(device),
        None if factors is None else 1.0 / factors,
    )  # fmt: skip
    return corrected(plan, layer, statistics, samples) if scheme.bias_correction else plan


def input_parameters(
    statistics: LayerStatistics, scheme: Scheme, factors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a layer's input for a static scheme, after division by ``factors`` [C] if given.

    Returns (float32, int32 or ``None``): 0-d for "per_tensor", [buckets] for "per_timestep". A bucket that no batch
    fell into takes the numbers of the nearest that one did.
    """
    divisor = 1.0 if factors is None else factors.cpu()
    low, high = (statistics.channel_low / divisor).amin(1), (statistics.channel_high / divisor).amax(1)
    per_tensor = scheme.granularity == "per_tensor"
    if per_tensor:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    else:
        nearest = _nearest_seen(statistics.seen)
        low, high = low[nearest], high[nearest]
    if scheme.clip == "search":
        groups = [range(len(statistics.counts))] if per_tensor else [[bucket] for bucket in nearest.tolist()]
        low, high = search_range(_search_values(statistics, groups, factors), low, high, scheme.symmetric)
    scale, zero_point = numbers.range_parameters(low, high, scheme.symmetric)
    if per_tensor:
        return scale[0], None if zero_point is None else zero_point[0]
    return scale, zero_point


def corrected(
    plan: LayerPlan, layer: nn.Module, statistics: LayerStatistics, samples: list[simulation.Sample] | None = None
) -> LayerPlan:
    """``plan`` with the mean error that it makes on the samples taken out by its bias."""
    known = simulation.sample_outputs(layer, statistics) if samples is None else samples
    pairs = ((expected, simulation.simulate(plan, layer, x, bucket)) for bucket, x, expected in known)
    shift = bias_correction(pairs, 1 if plan.kind == "conv2d" else -1)
    return replace(plan, bias=shift if plan.bias is None else plan.bias + shift)


def _check_statistics(
    layer: nn.Module, kind: str, statistics: LayerStatistics | None, scheme: Scheme, name: str
) -> None:
    if statistics is None:
        if not scheme.is_dynamic or scheme.smooth is not None or scheme.bias_correction:
            raise ValueError(f"statistics: layer {name!r} was not calibrated, and {scheme} needs it")
        return
    channels = layer.in_channels if kind == "conv2d" else layer.in_features
    if statistics.kind != kind or statistics.channels != channels:
        raise ValueError(
            f"statistics: of a {statistics.kind} layer of {statistics.channels} channels, the layer {name!r} is a "
            f"{kind} of {channels}"
        )
    if not statistics.seen.any():
        raise ValueError(f"statistics: layer {name!r} was never called during calibration")
    if scheme.granularity == "per_timestep" and scheme.buckets != len(statistics.counts):
        raise ValueError(f"scheme: has {scheme.buckets} buckets, the calibration {len(statistics.counts)}")


def _check_factors(factors: Tensor, statistics: LayerStatistics | None) -> None:
    channels = len(factors) if statistics is None else statistics.channels
    if tuple(factors.shape) != (channels,):
        raise ValueError(f"factors: expected [{channels}], got {list(factors.shape)}")
    if not (torch.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError("factors: expected positive, finite numbers")


def _nearest_seen(seen: Tensor) -> Tensor:
    """[buckets]: for each bucket the nearest one that was seen (the lower of two)."""
    filled = seen.nonzero().flatten()
    distance = (torch.arange(len(seen)).unsqueeze(1) - filled.unsqueeze(0)).abs()
    return filled[distance.argmin(1)]


def _search_values(statistics: LayerStatistics, groups: list, factors: Tensor | None) -> Tensor:
    """[rows, n] samples, a row for each group of buckets, filled up with NaN."""
    rows = []
    for buckets in groups:
        parts = []
        for sample in (item for bucket in buckets for item in statistics.samples(bucket)):
            if factors is not None:
                shape = (-1, 1, 1) if statistics.kind == "conv2d" else (-1,)
                sample = sample / factors.cpu().reshape(shape)
            parts.append(sample.flatten())
        values = torch.cat(parts) if parts else torch.empty(0)
        rows.append(values[:: max(1, -(-values.numel() // _SEARCH_VALUES))])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
