"""Quantization to int8 and back in plain torch, exact: the oracle of the ops of the same names.

Rules (specification of the int8 blocks): true division, round half to even, clamp to -127..127 where symmetric and to
-128..127 where affine. Computed in float64 for float64 inputs, else in float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pydenoise.reference.activations import activate

LOW, HIGH = -128, 127
LEVELS = HIGH - LOW
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a range too narrow for a normal float32 scale gets scale 1


def channel_dim(input: Tensor) -> int:
    """Where the channels are: dim 1 of images [N, C, H, W], else the last."""
    return 1 if input.dim() == 4 else -1


def widen(input: Tensor) -> Tensor:
    """``input`` in the dtype of the computation: float64 stays, all else becomes float32."""
    return input if input.dtype == torch.float64 else input.float()


def along_channels(values: Tensor, input: Tensor) -> Tensor:
    """[C] or [N, C] ``values`` in a shape that broadcasts over ``input``."""
    if values.dim() == 1:
        values = values.unsqueeze(0)
    trailing = (1,) * (input.dim() - 2)
    shape = (*values.shape, *trailing) if channel_dim(input) == 1 else (values.shape[0], *trailing, values.shape[1])
    return values.to(input.dtype).reshape(shape if input.dim() > 1 else (-1,))


def transform(input: Tensor, activation: str, channel_scale: Tensor | None) -> Tensor:
    """What is quantized: ``activation(input) * channel_scale``; "geglu" halves the channels."""
    x = widen(input)
    if activation == "geglu":
        value, gate = x.chunk(2, dim=channel_dim(x))
        x = value * F.gelu(gate)
    else:
        x = activate(x, activation)
    return x if channel_scale is None else x * along_channels(channel_scale, x)


def codes(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """int8 codes of ``x``, symmetric without ``zero_point``. NaN becomes the code of 0, infinities saturate."""
    low = LOW + 1 if zero_point is None else LOW
    offset = 0 if zero_point is None else zero_point
    steps = torch.nan_to_num(torch.round(x / scale), nan=0.0, posinf=1e9, neginf=-1e9).clamp(-1e9, 1e9)
    return (steps + offset).clamp(low, HIGH).to(torch.int8)


def dynamic_parameters(x: Tensor, dim: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) from the values along ``dim``, which is kept: float32 and int32.

    Affine: the range includes 0, scale = (high - low) / 255, zero_point = clamp(rint(-128 - low / scale)). Symmetric:
    scale = amax / 127, zero_point 0. NaN among the values gives a NaN scale.
    """
    if symmetric:
        scale = x.abs().amax(dim, keepdim=True) / HIGH
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
        return scale.float(), torch.zeros_like(scale, dtype=torch.int32)
    low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    zero_point = torch.nan_to_num(torch.round(LOW - low / scale), nan=0.0).clamp(LOW, HIGH)
    return scale.float(), zero_point.to(torch.int32)


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    activation: str = "none",
    channel_scale: Tensor | None = None,
) -> Tensor:
    """int8 codes of ``activation(input) * channel_scale``."""
    return codes(transform(input, activation, channel_scale), scale, zero_point)


def quantize_dynamic(
    input: Tensor, granularity: str, activation: str, channel_scale: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero_point) with a scale per pixel (over dim 1) or per token (over the last dim)."""
    return dynamic(transform(input, activation, channel_scale), 1 if granularity == "pixel" else -1, symmetric)


def dynamic(x: Tensor, dim: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero_point) of ``x`` itself, with a scale per position over ``dim``."""
    scale, zero_point = dynamic_parameters(x, dim, symmetric)
    return codes(x, scale, None if symmetric else zero_point), scale, zero_point


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(input - zero_point) * scale`` in ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = input.to(torch.int32) if zero_point is None else input.to(torch.int32) - zero_point
    return (steps.to(wide) * scale.to(wide)).to(dtype)
