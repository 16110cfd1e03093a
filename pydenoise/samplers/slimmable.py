"""Networks whose width can be changed between calls: the first channels of every layer are a network of their own.

Source: Yu et al., "Slimmable Neural Networks", ICLR 2019; as DDSM uses it (``pydenoise/samplers/ddsm.py``), group norms
keep their number of groups.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make_divisible(channels: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, at least ``divisor``, and not below 90 % of ``channels``."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


class _Width:
    """The width that all layers of one network share, and whether they keep contiguous slices."""

    def __init__(self, presliced: bool):
        self.value, self.presliced = 1.0, presliced


class _Slim:
    """What slimmable layers share: parameters cut to the first channels, kept contiguous if asked for."""

    def _prepare(self, width: _Width, divisor: int | None) -> None:
        self._width, self._divisor = width, divisor  # no divisor: all outputs at every width
        self._slices: dict[tuple, tuple[tuple, Tensor, Tensor | None]] = {}

    def _outputs(self, full: int) -> int:
        if self._divisor is None:
            return full
        return min(full, make_divisible(full * self._width.value, self._divisor))

    def _sliced(self, outputs: int, inputs: int | None) -> tuple[Tensor, Tensor | None]:
        """weight[:outputs, :inputs] and bias[:outputs]."""
        weight, bias = self.weight, getattr(self, "bias", None)
        training = torch.is_grad_enabled() and weight.requires_grad
        if not self._width.presliced or training:
            return _cut(weight, outputs, inputs), None if bias is None else bias[:outputs]
        # Weights that were changed or moved since are cut again.
        state = tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in (weight, bias)
                      if p is not None)  # fmt: skip
        kept = self._slices.get((outputs, inputs))
        if kept is None or kept[0] != state:
            with torch.no_grad():
                own = _cut(weight, outputs, inputs).detach()
                own = own if own.is_contiguous() else own.clone()  # keeps channels last
                kept = (state, own, None if bias is None else bias[:outputs].detach())
            self._slices[outputs, inputs] = kept
        return kept[1], kept[2]


def _cut(weight: Tensor, outputs: int, inputs: int | None) -> Tensor:
    return weight[:outputs] if inputs is None else weight[:outputs, :inputs]


class _SlimConv2d(_Slim, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[-3]
        if self._width.value == 1 and channels == self.in_channels:
            return super().forward(input)
        weight, bias = self._sliced(self._outputs(self.out_channels), channels)
        return self._conv_forward(input, weight, bias)


class _SlimLinear(_Slim, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        features = input.shape[-1]
        if self._width.value == 1 and features == self.in_features:
            return super().forward(input)
        return F.linear(input, *self._sliced(self._outputs(self.out_features), features))


class _SlimEmbedding(_Slim, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : self._outputs(self.embedding_dim)]


class _SlimGroupNorm(_Slim, nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[1]
        weight, bias = self._sliced(channels, None) if self.affine else (None, None)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class _SlimLayerNorm(_Slim, nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        features = input.shape[-1]
        weight = None if self.weight is None else self.weight[:features]
        return F.layer_norm(input, (features,), weight, None if self.bias is None else self.bias[:features], self.eps)


_FORMS: dict[type, type] = {
    nn.Conv2d: _SlimConv2d,
    nn.Linear: _SlimLinear,
    nn.Embedding: _SlimEmbedding,
    nn.GroupNorm: _SlimGroupNorm,
    nn.LayerNorm: _SlimLayerNorm,
}


class Slimmable(nn.Module):
    """A copy of ``model`` that runs at several widths with one set of weights.

    At width w a convolution or linear layer computes the first ``make_divisible(w * outputs, divisor)`` of its outputs
    from as many inputs as arrive; group norms keep their number of groups. ``model`` must therefore take its channel
    counts from its tensors, not from its constructor (the U-Nets of diffusers check them, and fail). A model that was
    not trained at a width gives nonsense there: ``pydenoise.samplers.sandwich_backward`` is the rule to train all.

    Args:
        model: of Conv2d, Linear, Embedding, GroupNorm and LayerNorm layers, and of modules without parameters.
        widths: the widths that may be set, in (0, 1], with 1.
        keep: names of modules whose outputs are not cut; ``None``: the last Conv2d or Linear, which gives the result.
            Any other module named here stays as it is.
        divisor: cut layers have a multiple of it as outputs. (The public code's: 8 for convolutions and 16 for linear
            layers, which is the same where w * outputs is a multiple of 16.)
        presliced: keep contiguous copies of the cut weights of every width that was used, for calls without gradients:
            more memory, no strided weights. Weights that change are cut again.

    ``state_dict`` has the model's names behind "model.".

    Raises:
        TypeError, ValueError: a layer that cannot be cut, or channels that a group norm could not group; named.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
        *,
        keep: Sequence[str] | None = None,
        divisor: int = 8,
        presliced: bool = False,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(divisor, bool) or not hasattr(divisor, "__index__"):
            raise TypeError(f"divisor: expected an int, got {type(divisor).__name__}")
        if divisor < 1:
            raise ValueError(f"divisor: expected at least 1, got {divisor}")
        self.widths, self._divisor = check_widths(widths), int(divisor)
        self.model = copy.deepcopy(model)
        self._state = _Width(bool(presliced))
        self._convert(_kept(model, keep))

    def _convert(self, keep: frozenset[str]) -> None:
        for name, layer in self.model.named_modules():
            form = _FORMS.get(type(layer))
            if form is None:
                if next(layer.parameters(recurse=False), None) is not None and name not in keep:
                    raise TypeError(
                        f"model: {name or 'the model'} ({type(layer).__name__}) has parameters and no rule for "
                        "cutting them; name it in keep= to leave it as it is"
                    )
                continue
            if name in keep and form not in (_SlimConv2d, _SlimLinear, _SlimEmbedding):
                continue
            _check_layer(name, layer, self.widths, self._divisor)
            # The layer becomes one of a subclass that only differs in its forward: parameters, hooks and names stay.
            layer.__class__ = form
            layer._prepare(self._state, None if name in keep else self._divisor)

    @property
    def width(self) -> float:
        """The width of the next call."""
        return self._state.value

    @width.setter
    def width(self, value: float) -> None:
        if value not in self.widths:
            raise ValueError(f"width: expected one of {self.widths}, got {value}")
        self._state.value = float(value)

    @contextmanager
    def at(self, width: float) -> Iterator["Slimmable"]:
        """``width`` within a with-block."""
        before = self.width
        self.width = width
        try:
            yield self
        finally:
            self.width = before

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def macs(self, *args, **kwargs) -> dict[float, int]:
        """Multiplications of one call with these arguments, at every width (matrix products and convolutions)."""
        from torch.utils.flop_counter import FlopCounterMode

        counts = {}
        for width in self.widths:
            with self.at(width), torch.no_grad(), FlopCounterMode(display=False) as counter:
                self(*args, **kwargs)
            counts[width] = counter.get_total_flops() // 2
        return counts

    def extra_repr(self) -> str:
        return f"widths={self.widths}, width={self.width}"


def check_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """Different numbers in (0, 1] with 1 among them, descending."""
    values = tuple(float(w) for w in widths)
    if not all(0 < w <= 1 for w in values) or len(set(values)) != len(values):
        raise ValueError(f"widths: expected different numbers in (0, 1], got {values}")
    if 1.0 not in values:
        raise ValueError(f"widths: expected the full width 1 among them, got {values}")
    return tuple(sorted(values, reverse=True))


def _kept(model: nn.Module, keep: Sequence[str] | None) -> frozenset[str]:
    names = dict(model.named_modules())
    if keep is None:
        last = [name for name, layer in names.items() if type(layer) in (nn.Conv2d, nn.Linear)]
        if not last:
            raise ValueError("model: expected at least one Conv2d or Linear layer")
        return frozenset(last[-1:])
    if isinstance(keep, str):
        raise TypeError("keep: expected a list of module names, got a string")
    unknown = [name for name in keep if name not in names]
    if unknown:
        raise ValueError(f"keep: no module is named {unknown[0]!r}")
    return frozenset(keep)


def _check_layer(name: str, layer: nn.Module, widths: Sequence[float], divisor: int) -> None:
    if type(layer) is nn.Conv2d and layer.groups != 1:
        raise TypeError(f"model: {name} is a convolution with {layer.groups} groups, which cannot be cut")
    if type(layer) is nn.LayerNorm and len(layer.normalized_shape) != 1:
        raise TypeError(f"model: {name} normalizes over {tuple(layer.normalized_shape)}; only its last axis can be cut")
    if type(layer) is nn.GroupNorm:
        for width in widths:
            channels = min(layer.num_channels, make_divisible(layer.num_channels * width, divisor))
            if channels % layer.num_groups:
                raise ValueError(
                    f"widths: at {width} {name} has {channels} channels, no multiple of its {layer.num_groups} groups"
                )
