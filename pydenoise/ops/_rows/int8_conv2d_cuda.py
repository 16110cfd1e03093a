"""CUDA C++ rows of ``int8_conv2d``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend
from pydenoise.ops.weighted_conv import output_size
from pydenoise.reference.activations import NUMBERS


def _size(input: Tensor, weight: Tensor, stride, padding, dilation, upsample: int) -> list[int]:
    return output_size([n * upsample for n in input.shape[2:]], weight.shape[2:], stride, padding, dilation)


def _unsupported(
    input, weight, input_scale, weight_scale, input_zero_point, bias, stride, padding, dilation, groups, channel_bias,
    film, residual, activation, out_dtype, out_scale, out_zero_point, upsample,
) -> str | None:  # fmt: skip
    reason = _cuda.unsupported(input, (torch.int8,))
    if reason is not None:
        return reason
    height, width = _size(input, weight, stride, padding, dilation, upsample)
    return _cuda.too_many(input.shape[0] * height * width, "output pixels")


def _run(
    input, weight, input_scale, weight_scale, input_zero_point, bias, stride, padding, dilation, groups, channel_bias,
    film, residual, activation, out_dtype, out_scale, out_zero_point, upsample,
) -> Tensor:  # fmt: skip
    height, width = _size(input, weight, stride, padding, dilation, upsample)
    output = input.new_empty((input.shape[0], height, width, weight.shape[0]), dtype=out_dtype)
    torch.ops.pydenoise.int8_conv2d_cuda.default(
        _cuda.codes_for_copies(_cuda.channels_inside(input), weight.shape[1]),
        _cuda.channels_inside(weight).contiguous(),  # no copy if the weight is kept in channels_last memory
        _cuda.dense(input_scale),
        weight_scale,
        _cuda.dense(input_zero_point),
        bias,
        channel_bias,
        film,
        None if residual is None else _cuda.channels_inside(residual).contiguous(),
        out_scale,
        out_zero_point,
        output,
        [*stride, *padding, *dilation, groups, upsample],
        NUMBERS[activation],
    )
    return _cuda.as_image(output)


_MEASURED = "not measured yet: above Triton, which cannot choose instructions and split depths (bench/gpu.py)"

ROWS = (Backend("int8_conv2d", "cuda", 300, _unsupported, _run, _MEASURED),)
