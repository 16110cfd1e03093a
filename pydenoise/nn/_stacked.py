"""N modules of one shape as one: their weights stacked, their feature maps the groups of one wide map.

A map is *shared*, [B, C, h, w], where all N networks read the same, else *apart*, [B, N * C, h, w] with the channels of
network n behind those of n - 1. Every stacked module takes either and returns maps apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.nn._unet_units import Part
from pydenoise.nn.int8_attention import AttentionSpec, attention_spec
from pydenoise.nn.resnet_spec import ResnetSpec, resnet_spec
from pydenoise.reference.activations import activate


@dataclass(frozen=True)
class Told:
    """What the blocks are told besides feature maps: ``embeddings`` [B, N, E], ``texts`` [B, N, L, D] or ``None``."""

    embeddings: Tensor
    texts: Tensor | None = None


def network(told: Told, number: int) -> tuple[Tensor, Tensor | None]:
    """(embedding, text) of one network."""
    return told.embeddings[:, number], None if told.texts is None else told.texts[:, number]


class Stacked(nn.Module):
    """Base: buffers, no parameters, evaluation mode only; ``count`` is N."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else tensor.detach().contiguous(), persistent=False)

    def forward(self, x: Tensor, told: Told, shared: bool) -> Tensor:
        raise NotImplementedError


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat([t.detach() for t in tensors])


class StackedConv(Stacked):
    """Convolutions: one with N times the outputs of a shared map, a grouped one of maps apart."""

    def __init__(self, convs: Sequence[nn.Conv2d], padding: tuple[int, int, int, int] | None = None, scale: int = 1):
        """``padding``: left, right, above, below instead of the convolution's own. ``scale``: nearest upsampling."""
        super().__init__(len(convs))
        first = convs[0]
        if first.padding_mode != "zeros" or first.groups != 1:
            raise ValueError("conv: expected zero padding and groups of 1")
        self.stride, self.padding, self.dilation = first.stride, first.padding, first.dilation
        self.before, self.scale = padding, scale
        self.keep("weight", _joined([conv.weight for conv in convs]))
        self.keep("bias", _joined([conv.bias for conv in convs]))

    def forward(self, x: Tensor, told: Told | None, shared: bool) -> Tensor:
        if self.scale != 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode="nearest")
        if self.before is not None:
            x = F.pad(x, self.before)
        groups = 1 if shared else self.count
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, groups)


class StackedGroupNorm(Stacked):
    """Group norms; the statistics of a shared map are taken once."""

    def __init__(self, norms: Sequence[nn.GroupNorm]):
        super().__init__(len(norms))
        self.groups, self.eps = norms[0].num_groups, norms[0].eps
        self.keep("weight", _joined([norm.weight for norm in norms]))
        self.keep("bias", _joined([norm.bias for norm in norms]))

    def forward(self, x: Tensor, told: Told | None, shared: bool) -> Tensor:
        if not shared:
            return F.group_norm(x, self.count * self.groups, self.weight, self.bias, self.eps)
        normed = F.group_norm(x, self.groups, None, None, self.eps)
        if self.weight is None:
            return normed.repeat(1, self.count, 1, 1)
        weight, bias = (v.view(self.count, -1, 1, 1) for v in (self.weight, self.bias))
        return torch.addcmul(bias, normed[:, None], weight).flatten(1, 2)


class StackedLinear(Stacked):
    """Linear layers of vectors [B, N, E], in one batched product."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__(len(layers))
        self.keep("weight", torch.stack([layer.weight.detach().t() for layer in layers]))
        bias = None if layers[0].bias is None else torch.stack([layer.bias.detach() for layer in layers])[:, None]
        self.keep("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1)
        y = torch.bmm(rows, self.weight) if self.bias is None else torch.baddbmm(self.bias, rows, self.weight)
        return y.transpose(0, 1)


def resampled(x: Tensor, kind: str) -> Tensor:
    """``x`` enlarged by two ("up"), halved ("down") or as it is ("none")."""
    if kind == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x, 2) if kind == "down" else x


def apart(x: Tensor, count: int, shared: bool) -> Tensor:
    """A map that all networks read, as maps apart."""
    return x.repeat(1, count, 1, 1) if shared else x


class StackedResnet(Stacked):
    """Residual blocks of one shape; see :class:`ResnetSpec` for what they compute."""

    def __init__(self, specs: Sequence[ResnetSpec]):
        super().__init__(len(specs))
        first = specs[0]
        self.activation, self.resample, self.gain, self.film = (
            first.activation, first.resample, first.gain, first.film
        )  # fmt: skip
        self.embedding_activation = first.embedding_activation
        self.norm1, self.norm2 = (
            StackedGroupNorm([getattr(spec, name) for spec in specs]) for name in ("norm1", "norm2")
        )
        self.conv1, self.conv2 = (StackedConv([getattr(spec, name) for spec in specs]) for name in ("conv1", "conv2"))
        self.embedding = self.shortcut = None
        if first.embedding is not None:
            self.embedding = StackedLinear([spec.embedding for spec in specs])
        if first.shortcut is not None:
            self.shortcut = StackedConv([spec.shortcut for spec in specs])

    def forward(self, x: Tensor, told: Told, shared: bool) -> Tensor:
        h = activate(self.norm1(x, told, shared), self.activation)
        h = self.conv1(resampled(h, self.resample), told, False)
        film = None
        if self.embedding is not None:
            film = self.embedding(activate(told.embeddings, self.embedding_activation))
            if not self.film:
                h = h + film.flatten(1)[:, :, None, None]
        h = self.norm2(h, told, False)
        if self.film:
            gain, shift = (part.flatten(1)[:, :, None, None] for part in film.chunk(2, dim=-1))
            h = h * (1 + gain) + shift
        h = self.conv2(activate(h, self.activation), told, False)
        x = resampled(x, self.resample)
        x = apart(x, self.count, shared) if self.shortcut is None else self.shortcut(x, told, shared)
        return x + h if self.gain == 1.0 else (x + h) * self.gain


class StackedAttention(Stacked):
    """Self-attention blocks between the pixels of a map; see :class:`AttentionSpec`."""

    def __init__(self, specs: Sequence[AttentionSpec]):
        super().__init__(len(specs))
        first = specs[0]
        self.heads, self.scale, self.residual, self.gain = first.heads, first.scale, first.residual, first.gain
        self.norm = StackedGroupNorm([spec.norm for spec in specs])
        self.qkv = StackedConv([_pointwise(spec.qkv) for spec in specs])
        self.proj = StackedConv([_pointwise((spec.proj,)) for spec in specs])

    def forward(self, x: Tensor, told: Told, shared: bool) -> Tensor:
        size = x.shape[2:]
        qkv = self.qkv(self.norm(x, told, shared), told, False)
        qkv = qkv.flatten(2).unflatten(1, (self.count, 3, self.heads, -1)).transpose(-1, -2)  # [B, N, 3, H, P, d]
        q, k, v = (part.flatten(1, 2) for part in qkv.unbind(2))
        h = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        h = self.proj(h.transpose(-1, -2).flatten(1, 2).unflatten(-1, size), told, False)
        if self.residual:
            h = h + apart(x, self.count, shared)
        return h if self.gain == 1.0 else h * self.gain


def _pointwise(layers: Sequence[nn.Module]) -> nn.Conv2d:
    """Linear layers or 1x1 convolutions, one after the other, as one 1x1 convolution."""
    weight = torch.cat([layer.weight.detach().flatten(1) for layer in layers])
    biases = [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("qkv: expected biases in all layers or in none")
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=biases[0] is not None, device="meta")
    conv.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
    if biases[0] is not None:
        conv.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return conv


class Chain(Stacked):
    """Stacked modules, one after the other; only the first can read a shared map."""

    def __init__(self, parts: Sequence[Stacked]):
        super().__init__(parts[0].count)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, told: Told, shared: bool) -> Tensor:
        for part in self.parts:
            x, shared = part(x, told, shared), False
        return x


class _Activation(Stacked):
    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__(len(modules))
        self.function = modules[0]

    def forward(self, x: Tensor, told: Told, shared: bool) -> Tensor:
        return apart(self.function(x), self.count, shared)


class Separate(Stacked):
    """The N modules themselves, one call after the other: what is used for kinds that are not stacked."""

    def __init__(self, parts: Sequence[Part]):
        super().__init__(len(parts))
        self.calls = [part.call for part in parts]
        self.networks = nn.ModuleList(part.module for part in parts)

    def forward(self, x: Tensor, told: Told, shared: bool) -> Tensor:
        inputs = [x] * self.count if shared else x.chunk(self.count, dim=1)
        results = [
            Part(module, call)(own, *network(told, number))
            for number, (module, call, own) in enumerate(zip(self.networks, self.calls, inputs, strict=True))
        ]
        return torch.cat(results, dim=1)


# ------------------------------------------------------------------------------------------------------------- kinds


def _is_resnet(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("norm1", "conv1", "norm2", "conv2"))


def _is_attention(module: nn.Module) -> bool:
    ours = all(hasattr(module, name) for name in ("norm", "qkv", "proj", "heads"))
    return ours or (hasattr(module, "to_q") and getattr(module, "group_norm", None) is not None)


def _resampling_conv(modules: Sequence[nn.Module]) -> Stacked | None:
    """Of diffusers' Downsample2D and Upsample2D with a convolution and no norm."""
    first = modules[0]
    if not getattr(first, "use_conv", False) or getattr(first, "norm", None) is not None:
        return None
    name = next((name for name in ("conv", "Conv2d_0") if isinstance(getattr(first, name, None), nn.Conv2d)), None)
    if name is None:
        return None
    convs = [getattr(module, name) for module in modules]
    if not hasattr(first, "use_conv_transpose"):
        return StackedConv(convs, padding=(0, 1, 0, 1) if first.padding == 0 else None)
    if first.use_conv_transpose or not getattr(first, "interpolate", True):
        return None
    return StackedConv(convs, scale=2)


def _stack_modules(modules: Sequence[nn.Module]) -> Stacked | None:
    """The stacked form of modules of a known kind, or ``None``."""
    first = modules[0]
    if isinstance(first, nn.Sequential):
        parts = [_stack_modules(children) for children in zip(*modules, strict=True)]
        return None if None in parts else Chain(parts)
    if isinstance(first, nn.Conv2d):
        return StackedConv(modules)
    if isinstance(first, nn.GroupNorm):
        return StackedGroupNorm(modules)
    if isinstance(first, nn.SiLU | nn.ReLU | nn.GELU | nn.Identity):
        return _Activation(modules)
    if _is_resnet(first):
        return StackedResnet([resnet_spec(module) for module in modules])
    if _is_attention(first):
        return StackedAttention([attention_spec(module) for module in modules])
    return _resampling_conv(modules)


def stacked(parts: Sequence[Part], separate: bool = False) -> Stacked:
    """The N forms of one part as one module: stacked where its kind is known, and not ``separate``, else in turns."""
    if not separate:
        try:
            found = _stack_modules([part.module for part in parts])
        except (TypeError, ValueError):  # an option that the spec of the kind does not have
            found = None
        if found is not None:
            return found
    return Separate(parts)
