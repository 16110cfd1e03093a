"""int8 convolution with exact integer accumulation, in plain torch: the oracle of ``int8_conv2d`` and ``int8_linear``.

Products and sums of int8 codes are exact in float64 (|sum| < 2**53), and an epilogue in float64 follows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pydenoise.reference import quantize as numbers
from pydenoise.reference.activations import activate


def accumulate(
    input: Tensor,
    weight: Tensor,
    zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: int,
    pixel_scale: Tensor | None = None,
) -> Tensor:
    """Sum of ``weight * (input - zero_point)``, times the pixel's scale if given, as float64; padding adds nothing."""
    x = input.double()
    x = x if zero_point is None else x - zero_point
    x = x if pixel_scale is None else x * pixel_scale
    if upsample > 1:
        x = x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight.double(), None, tuple(stride), 0, tuple(dilation), groups)


def epilogue(
    y: Tensor,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    film: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """Bias, FiLM, activation, residual, and the cast or requantization; ``y`` is float64 with channels in dim 1."""
    if bias is not None:
        y = y + numbers.along_channels(bias, y)
    if channel_bias is not None:
        y = y + numbers.along_channels(channel_bias, y)
    if film is not None:
        gain, shift = film.chunk(2, dim=1)
        y = y * (1 + numbers.along_channels(gain, y)) + numbers.along_channels(shift, y)
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.double()
    if out_dtype == torch.int8:
        return numbers.codes(y, out_scale.double(), out_zero_point)
    return y.to(out_dtype)


def int8_conv2d(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channel_bias: Tensor | None,
    film: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    upsample: int,
) -> Tensor:
    """The op; ``padding`` is (top, bottom, left, right), scales are tensors, and a zero point ``None`` is 0."""
    per_pixel = input_scale.dim() > 0
    geometry = (stride, padding, dilation, groups, upsample)
    acc = accumulate(input, weight, input_zero_point, *geometry, input_scale.double() if per_pixel else None)
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = acc * weight_scale.double().reshape(1, -1, 1, 1)
    y = y if per_pixel else y * input_scale.double()
    return epilogue(y, bias, channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point)
