"""CUDA C++ rows of ``group_norm_quantize`` and ``layer_norm_quantize``."""

from math import prod

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS

_MAX_CHANNELS = 6144  # csrc/norm_quantize/cuda.h: kMaxChannels


def _channels(input: Tensor, skip: Tensor | None) -> int:
    return input.shape[1] + (0 if skip is None else skip.shape[1])


def _unsupported_group_norm(input, skip, *args) -> str | None:
    reason = _cuda.unsupported(input, _cuda.FLOATS)
    if reason is not None:
        return reason
    if _channels(input, skip) > _MAX_CHANNELS:
        return f"{_channels(input, skip)} channels are more than fit in shared memory: at most {_MAX_CHANNELS}"
    return _cuda.too_many(prod(input.shape[2:]), "pixels of an image")


def _unsupported_layer_norm(input, *args) -> str | None:
    return _cuda.unsupported(input, _cuda.FLOATS) or _cuda.too_many(prod(input.shape[1:-1]), "tokens of an image")


def _pixels(image: Tensor | None) -> Tensor | None:
    """[N, C, H, W] as dense [N, H W, C]."""
    if image is None:
        return None
    n, c, h, w = image.shape
    return _cuda.channels_inside(image).contiguous().view(n, h * w, c)


def _row_results(like: Tensor, shape: tuple[int, ...], scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if scale is not None:
        return None, None
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.int32)


def _group_norm(input, skip, num_groups, weight, bias, eps, film, activation, channel_scale, scale, zero_point):
    (n, _, h, w), channels = input.shape, _channels(input, skip)
    output = input.new_empty((n, h, w, channels), dtype=torch.int8)
    row_scale, row_zero_point = _row_results(input, (n, 1, h, w), scale)
    torch.ops.pydenoise.group_norm_quantize_cuda.default(
        _pixels(input), _pixels(skip), num_groups, weight, bias, eps, film, NUMBERS[activation],
        channel_scale, scale, zero_point, output.view(n, h * w, channels), row_scale, row_zero_point,
    )  # fmt: skip
    return _cuda.as_image(output), row_scale, row_zero_point


def _layer_norm(input, weight, bias, eps, film, channel_scale, scale, zero_point):
    rows = input.contiguous()
    shape = (rows.shape[0], prod(rows.shape[1:-1]), rows.shape[-1])
    output = torch.empty_like(rows, dtype=torch.int8)
    row_scale, row_zero_point = _row_results(input, (*input.shape[:-1], 1), scale)
    torch.ops.pydenoise.layer_norm_quantize_cuda.default(
        rows.view(shape), weight, bias, eps, film, channel_scale, scale, zero_point, output.view(shape), row_scale,
        row_zero_point,
    )  # fmt: skip
    return output, row_scale, row_zero_point


_MEASURED = "not measured yet: above Triton; both are bound by memory (bench/gpu.py)"

ROWS = (
    Backend("group_norm_quantize", "cuda", 300, _unsupported_group_norm, _group_norm, _MEASURED),
    Backend("layer_norm_quantize", "cuda", 300, _unsupported_layer_norm, _layer_norm, _MEASURED),
)
