"""Int8Chain: convolutions one after the other that hand int8 codes on, as in DnCNN and FFDNet."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pydenoise.nn._blocks import Int8Block, activation_name
from pydenoise.nn._plans import Plans, Request, ask, keeps_float
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.nn.int8_conv2d import Int8Conv2d, plain_conv
from pydenoise.reference.activations import HOMOGENEOUS

_SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout2d)


class Int8Chain(Int8Block):
    """Int8 convolutions in a row; made by :meth:`from_float`.

    Where a layer's scale is known beforehand ("per_tensor", "per_timestep"), the layer before it writes the int8 codes
    that it reads; where it is computed ("per_pixel"), a float image passes between them. A smoothed layer's channel
    factors are folded into the layer before it, if a factor passes its activation (none, ReLU, leaky ReLU).
    """

    def __init__(self, layers: Iterable[Int8Conv2d]):
        super().__init__()
        self.layers = nn.ModuleList(layers).eval()
        for first, second in zip(self.layers, self.layers[1:], strict=False):
            if first.out_channels != second.in_channels:
                raise ValueError(
                    f"layers: {first.out_channels} output channels cannot feed a layer of {second.in_channels}"
                )

    @classmethod
    def from_float(
        cls,
        layers: nn.Sequential | Iterable[nn.Module],
        plans: Plans = "per_pixel",
        *,
        gain: float = 1.0,
    ) -> "Int8Chain":
        """The int8 chain of float layers, which stay as they are.

        Args:
            layers: convolutions, each perhaps followed by a BatchNorm2d (folded into it) and an activation (SiLU, ReLU,
                LeakyReLU, GELU); Identity and Dropout are left out.
            plans: how each convolution is quantized: one scheme for all, a mapping from names ("0", "2", ...: its name
                in the Sequential, or its place among ``layers``), or a function.
            gain: multiplies the last layer's output: -1 for ``residual - chain(x)``.

        Raises:
            TypeError, ValueError: another layer, a plan that keeps one in float, or numbers of channels that do not
            fit; the message names it.
        """
        parts = _parse(layers)
        if not parts:
            raise ValueError("layers: expected at least one convolution")
        if gain != 1.0 and parts[-1][2] != "none":
            raise ValueError(f"gain: expected no activation behind the last layer, got {parts[-1][2]!r}")
        made = []
        for index, (name, conv, activation) in enumerate(parts):
            choice = ask(plans, Request((name,), conv))
            if keeps_float(choice):
                raise ValueError(f"plans: layer {name!r} of a chain cannot stay in float; end the chain before it")
            factor = gain if index == len(parts) - 1 else 1.0
            made.append(Int8Conv2d.from_float(conv, choice, activation=activation, gain=factor, name=name))
        for first, second in zip(made, made[1:], strict=False):
            fold_smoothing(first, second)
        return cls(made)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the chain.

        Args:
            input: [N, C, H, W], float32, bfloat16 or float16. residual: of the result's shape, added to it.

        Returns:
            The last layer's output in the input's dtype and channels_last memory.
        """
        self.check(input, "input")
        dtype, value = input.dtype, input
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            scale, zero_point = following.input_parameters
            if scale is None or following.channel_scale is not None:
                value = layer(value, out_dtype=dtype)
                continue
            given = 0 if zero_point is None else zero_point
            codes = layer(value, out_dtype=torch.int8, out_scale=scale, out_zero_point=given)
            value = (codes, scale, zero_point)
        return self.layers[-1](value, residual=residual, out_dtype=dtype)


def _parse(layers: nn.Sequential | Iterable[nn.Module]) -> list[tuple[str, nn.Module, str]]:
    """(name, convolution with its BatchNorm folded in, activation) of each convolution."""
    if isinstance(layers, nn.Sequential):
        named = list(layers.named_children())
    else:
        named = [(str(index), layer) for index, layer in enumerate(layers)]
    parts: list[tuple[str, nn.Module, str]] = []
    for name, layer in named:
        if isinstance(layer, _SKIPPED):
            continue
        if isinstance(layer, FusedConv2d):
            parts.append((name, plain_conv(layer, name), layer.activation))
        elif isinstance(layer, nn.Conv2d):
            parts.append((name, plain_conv(layer, name), "none"))
        elif not parts or parts[-1][2] != "none":
            raise TypeError(f"layers: expected a convolution at {name!r}, got {type(layer).__name__}")
        elif isinstance(layer, nn.BatchNorm2d):
            folded = plain_conv(FusedConv2d.from_float(parts[-1][1], batch_norm=layer), name)
            parts[-1] = (parts[-1][0], folded, "none")
        else:
            parts[-1] = (*parts[-1][:2], activation_name(layer, name))
    return parts


def fold_smoothing(first: nn.Module, second: Int8Conv2d) -> None:
    """Let ``first`` (Int8Conv2d or FusedConv2d) write what ``second``, its only reader, would have to multiply.

    Nothing changes where ``second`` is not smoothed, or where a factor does not pass ``first``'s activation.
    """
    factors = second.channel_scale
    if factors is None or not isinstance(first, (Int8Conv2d, FusedConv2d)):
        return
    if first.activation not in HOMOGENEOUS or factors.numel() != first.out_channels:
        return
    with torch.no_grad():
        if isinstance(first, Int8Conv2d):
            first.weight_scale.mul_(factors)
        else:
            first.weight.mul_(factors.to(first.weight.dtype).reshape(-1, 1, 1, 1))
        if first.bias is not None:
            first.bias.mul_(factors.to(first.bias.dtype))
    second.channel_scale = None
