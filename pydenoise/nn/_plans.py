"""From what a user says about a layer to the layer's int8 numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pydenoise.quantization import (
    LayerPlan,
    LayerStatistics,
    Scheme,
    plan_layer,
    quantize_weight,
    range_parameters,
    resolve_scheme,
)
from pydenoise.quantization.observers import kind_of


@dataclass(frozen=True)
class Request:
    """One layer of a block that asks for its plan.

    Attributes:
        names: of the float layers inside the block that it computes: ("conv1",), or several with one input that are
            computed as one, ("to_q", "to_k", "to_v").
        layer: the float ``Conv2d`` or ``Linear`` to be planned: of one name, the layer itself or a part of it.
        channels: (start, stop) where ``layer`` reads only these channels of the named layer's input (a shortcut split
            along a skip connection), else ``None``.
    """

    names: tuple[str, ...]
    layer: nn.Module
    channels: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        part = "" if self.channels is None else f"[{self.channels[0]}:{self.channels[1]}]"
        return "+".join(self.names) + part


Choice = LayerPlan | Scheme | str
Plans = Choice | Mapping[str, Choice] | Callable[[Request], Choice]


def definite_scheme(scheme: Scheme | str) -> Scheme:
    """A scheme from itself or its preset's name. Raises ``ValueError`` for "auto"."""
    scheme = resolve_scheme(scheme)
    if isinstance(scheme, str):
        raise ValueError(f"scheme: {scheme!r} is chosen from a calibration; a layer needs a definite scheme")
    return scheme


def ask(plans: Plans, request: Request) -> Choice:
    """What ``plans`` says of one layer: a :class:`LayerPlan`, or a :class:`Scheme` that needs no calibration.

    ``plans`` is one scheme for all layers of the block, a mapping from their names (several computed as one: the first
    name's), or a function of the :class:`Request`.
    """
    if isinstance(plans, Mapping):
        if request.names[0] not in plans:
            known = ", ".join(map(repr, plans)) or "none"
            raise ValueError(f"plans: has no entry for layer {request.names[0]!r}; it has {known}")
        choice = plans[request.names[0]]
    elif isinstance(plans, (LayerPlan, Scheme, str)):
        choice = plans
    elif callable(plans):
        choice = plans(request)
    else:
        raise TypeError(f"plans: expected a scheme, a mapping or a function, got {type(plans).__name__}")
    return choice if isinstance(choice, LayerPlan) else definite_scheme(choice)


@dataclass(frozen=True)
class Within:
    """``plans`` as seen from the block ``prefix`` inside a larger one: asks for the layers by their longer names."""

    plans: Plans
    prefix: str

    def __call__(self, request: Request) -> Choice:
        return ask(self.plans, replace(request, names=tuple(f"{self.prefix}.{name}" for name in request.names)))


def label(plans: Plans, request: Request) -> str:
    """The layer's name from the outermost block, for messages."""
    prefix = ""
    while isinstance(plans, Within):
        plans, prefix = plans.plans, f"{plans.prefix}.{prefix}"
    return prefix + request.name


def keeps_float(choice: Choice) -> bool:
    """Whether the layer is to stay in floating point."""
    return isinstance(choice, Scheme) and choice.is_float


def plan_of(
    layer: nn.Module,
    choice: Choice,
    name: str,
    statistics: LayerStatistics | None = None,
    input_range: tuple | None = None,
) -> LayerPlan | None:
    """The plan of ``layer``; ``None`` for weights on the meta device, whose numbers are still to be loaded.

    Args:
        layer: ``Conv2d`` or ``Linear``. choice: its plan, or a scheme.
        statistics: of its input, for schemes that need them.
        input_range: (low, high) instead: numbers for "per_tensor", [buckets] for "per_timestep".

    Raises:
        ValueError: the plan is of another layer, or the scheme needs what was not given; the message names the layer.
    """
    if isinstance(choice, LayerPlan):
        if statistics is not None or input_range is not None:
            raise ValueError(f"{name}: a LayerPlan is complete: give no statistics or input_range beside it")
        if tuple(choice.weight.shape) != tuple(layer.weight.shape):
            raise ValueError(
                f"{name}: the plan is of another layer: of weight {tuple(choice.weight.shape)}, "
                f"this one has {tuple(layer.weight.shape)}"
            )
        return choice
    scheme = definite_scheme(choice).for_kind(kind_of(layer))
    if layer.weight.is_meta:
        return None
    try:
        if input_range is not None:
            return _ranged_plan(layer, scheme, name, input_range)
        return plan_layer(layer, statistics, scheme, name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _ranged_plan(layer: nn.Module, scheme: Scheme, name: str, input_range: tuple) -> LayerPlan:
    if scheme.is_dynamic:
        raise ValueError(f"input_range: {scheme.granularity} scales come from the input itself")
    if scheme.smooth is not None or scheme.bias_correction or scheme.clip != "minmax":
        raise ValueError(f"input_range: {scheme} needs the statistics of a calibration")
    device = layer.weight.device
    low, high = (torch.as_tensor(end, dtype=torch.float32, device=device) for end in input_range)
    shape = (scheme.buckets,) if scheme.granularity == "per_timestep" else ()
    if tuple(low.shape) != shape or tuple(high.shape) != shape:
        raise ValueError(
            f"input_range: expected {'numbers' if shape == () else f'[{scheme.buckets}] each'}, "
            f"got {list(low.shape)} and {list(high.shape)}"
        )
    codes, weight_scale = quantize_weight(layer.weight, clip=scheme.weight_clip)
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach().float()
    scale, zero_point = range_parameters(low, high, scheme.symmetric)
    return LayerPlan(name, kind_of(layer), scheme, codes, weight_scale, bias, scale, zero_point)
