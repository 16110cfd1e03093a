"""What the int8 blocks share: layers that a plan may leave in float, and norms in front of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.nn._frozen import Norm, refuse_training
from pydenoise.nn._int8 import Codes, Int8Layer
from pydenoise.nn._plans import Plans, Request, ask, keeps_float, label
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.nn.int8_conv2d import Int8Conv2d, plain_conv
from pydenoise.nn.int8_linear import Int8Linear
from pydenoise.ops._quantized import FLOATS
from pydenoise.reference.activations import LEAKY_SLOPES, activate, leaky_relu_name

_ACTIVATIONS = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Identity: "none"}


class Int8Block(nn.Module):
    """Base of the blocks: evaluation mode only."""

    def __init__(self):
        super().__init__()
        self.training = False

    def check(self, input: object, name: str = "hidden_states", dims: int = 4) -> None:
        """Training mode, and what no layer inside would report by this name."""
        refuse_training(self)
        if not isinstance(input, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(input).__name__}")
        if input.dim() != dims:
            shape = "[N, C, H, W]" if dims == 4 else "[N, tokens, C]"
            raise ValueError(f"{name}: expected {shape}, got {tuple(input.shape)}")
        if input.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {input.dtype}")


def activation_name(module: object, name: str) -> str:
    """What the ops call a torch.nn activation. Raises ``ValueError`` naming the layer for one they do not have."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if isinstance(module, nn.LeakyReLU):
        word = leaky_relu_name(module.negative_slope)
        if word is None:
            slopes = ", ".join(map(str, LEAKY_SLOPES.values()))
            raise ValueError(f"{name}: expected a LeakyReLU of slope {slopes}, got {module.negative_slope}")
        return word
    for kind, word in _ACTIVATIONS.items():
        if isinstance(module, kind):
            return word
    raise ValueError(f"{name}: expected SiLU, ReLU, LeakyReLU, GELU or Identity, got {type(module).__name__}")


def check_attributes(block: nn.Module, names: tuple[str, ...], expected: str) -> None:
    """``block`` has the attributes of the float block it should be."""
    missing = [name for name in names if not hasattr(block, name)]
    if missing:
        raise TypeError(f"block: expected {expected}, got {type(block).__name__} without {missing[0]!r}")


# ----------------------------------------------------------------------------------------------------------- layers


def conv_layer(
    conv: nn.Module,
    plans: Plans,
    name: str,
    *,
    gain: float = 1.0,
    channels: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    normed: bool = False,
    padding: tuple | None = None,
) -> nn.Module:
    """An :class:`Int8Conv2d`, or a :class:`FusedConv2d` where the plan says "float".

    Args:
        name: of the layer inside the block. gain: of its output.
        channels: the part of its input channels that is read; only the first part keeps the bias.
        dtype: of the weight of a float layer; ``None``: its own.
        normed: a fused norm writes its input.
        padding: instead of the convolution's own.
    """
    conv = sliced(plain_conv(conv, name), channels)
    request = Request((name,), conv, channels)
    choice, name = ask(plans, request), label(plans, request)
    if not keeps_float(choice):
        layer = Int8Conv2d.from_float(conv, choice, gain=gain, name=name, padding=padding)
        return _checked_producer(layer, name) if normed else layer
    if padding is not None:
        raise ValueError(f"scheme: {name}: padding at one side only needs an int8 layer, got 'float'")
    return FusedConv2d.from_float(_amplified(conv, gain), dtype=dtype).eval()


def linear_layer(
    layer: nn.Module, plans: Plans, names: tuple[str, ...], *, gain: float = 1.0, normed: bool = False
) -> nn.Module:
    """An :class:`Int8Linear`, or a ``torch.nn.Linear`` where the plan says "float"; 1x1 convolutions become linear."""
    request = Request(names, layer)
    choice, name = ask(plans, request), label(plans, request)
    if not keeps_float(choice):
        result = Int8Linear.from_float(layer, choice, gain=gain, name=name)
        return _checked_producer(result, name) if normed else result
    weight, bias = layer.weight.detach().flatten(1), layer.bias
    result = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    result.weight = nn.Parameter(weight * gain, requires_grad=False)
    if bias is not None:
        result.bias = nn.Parameter(bias.detach() * gain, requires_grad=False)
    return result.eval()


def _checked_producer(layer: Int8Layer, name: str) -> Int8Layer:
    if layer.scheme.is_dynamic and layer.scheme.symmetric:
        raise ValueError(f"scheme: {name}: norms compute affine codes per position, expected symmetric=False")
    return layer


def sliced(conv: nn.Conv2d, channels: tuple[int, int] | None) -> nn.Conv2d:
    """``conv`` on a part of its input channels; the bias goes with the first part."""
    if channels is None:
        return conv
    start, stop = channels
    part = nn.Conv2d(
        stop - start, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1,
        conv.bias is not None and start == 0, device="meta",
    )  # fmt: skip
    part.weight = nn.Parameter(conv.weight.detach()[:, start:stop].clone(), requires_grad=False)
    if part.bias is not None:
        part.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return part.eval()


def _amplified(conv: nn.Conv2d, gain: float) -> nn.Conv2d:
    if gain == 1.0:
        return conv
    result = sliced(conv, (0, conv.in_channels)) if conv.groups == 1 else None
    if result is None:
        raise ValueError(f"groups: expected 1 in a rescaled float convolution, got {conv.groups}")
    with torch.no_grad():
        result.weight = nn.Parameter(conv.weight.detach() * gain, requires_grad=False)
        if result.bias is not None:
            result.bias = nn.Parameter(conv.bias.detach() * gain, requires_grad=False)
    return result


def run_conv(
    layer: nn.Module,
    input: Tensor | Codes,
    out_dtype: torch.dtype,
    *,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: int = 1,
) -> Tensor:
    """``layer(input) + channel_bias + residual``, of an int8 or a float convolution."""
    if isinstance(layer, Int8Conv2d):
        return layer(input, channel_bias=channel_bias, residual=residual, upsample=upsample, out_dtype=out_dtype)
    x = input.to(layer.weight.dtype)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample == 2 else x
    if channel_bias is None:
        return layer(x, residual).to(out_dtype)
    y = layer(x) + channel_bias[:, :, None, None]
    return (y if residual is None else y + residual).to(out_dtype)


def run_linear(
    layer: nn.Module, input: Tensor | Codes, out_dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    """``layer(input) + residual``, of an int8 or a float linear layer."""
    if isinstance(layer, Int8Linear):
        return layer(input, residual=residual, out_dtype=out_dtype)
    y = layer(input.to(layer.weight.dtype))
    return (y if residual is None else y + residual).to(out_dtype)


# ------------------------------------------------------------------------------------------------------------ norms


def group_normed(
    layer: nn.Module,
    norm: Norm,
    input: Tensor,
    *,
    skip: Tensor | None = None,
    film: Tensor | None = None,
    activation: str = "silu",
) -> Tensor | Codes:
    """What ``layer`` reads: codes from the fused norm, or floats for a float layer."""
    if isinstance(layer, Int8Layer):
        return layer.group_norm(norm, input, skip=skip, film=film, activation=activation)
    return float_group_norm(norm, input, skip=skip, film=film, activation=activation)


def float_group_norm(
    norm: Norm, input: Tensor, *, skip: Tensor | None = None, film: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """``activation(film(group_norm(input)))`` in float32, returned in the input's dtype."""
    x = input if skip is None else torch.cat([input, skip], dim=1)
    if x.numel() == 0:
        return x
    y = F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    if film is not None:
        gain, shift = film.float()[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + gain) + shift
    return activate(y, activation).to(input.dtype)


def layer_normed(layer: nn.Module, norm: Norm, input: Tensor) -> Tensor | Codes:
    """What ``layer`` reads: codes from the fused LayerNorm, or floats for a float layer."""
    if isinstance(layer, Int8Layer):
        return layer.layer_norm(norm, input)
    return F.layer_norm(input.float(), input.shape[-1:], norm.weight, norm.bias, norm.eps).to(input.dtype)


# ---------------------------------------------------------------------------------------------- images and tokens


def as_tokens(value: Tensor | Codes) -> Tensor | Codes:
    """[N, C, H, W] as tokens [N, H * W, C]; free for channels_last memory. Codes keep their scales per position."""
    if isinstance(value, Tensor):
        return value.permute(0, 2, 3, 1).flatten(1, 2)
    codes, scale, zero_point = value
    if isinstance(scale, Tensor) and scale.dim():
        scale = as_tokens(scale)
        zero_point = as_tokens(zero_point) if isinstance(zero_point, Tensor) else zero_point
    return as_tokens(codes), scale, zero_point


def as_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [N, H * W, C] as an image [N, C, H, W] in channels_last memory."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
