"""CUDA C++ rows of ``quantize``, ``quantize_dynamic`` and ``dequantize``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS

_CHANNELS_LAST = torch.channels_last


def _by_pixel(shape: tuple[int, ...], scale: Tensor) -> bool:
    """Whether rows of channels are pixels of an image; else they run along the last dim."""
    return len(shape) == 4 and (scale.dim() == 0 or tuple(scale.shape) == (shape[0], 1, *shape[2:]))


def _halved(shape: tuple[int, ...], activation: str) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if activation == "geglu" else tuple(shape)


def _codes_shape(input: Tensor, activation: str) -> tuple[int, ...]:
    if input.dim() != 4 or activation != "geglu":
        return tuple(input.shape)
    return (input.shape[0], input.shape[1] // 2, *input.shape[2:])


def _unsupported_quantize(input, scale, zero_point, activation, channel_scale) -> str | None:
    reason = _cuda.unsupported(input, _cuda.FLOATS)
    if reason is not None:
        return reason
    across = channel_scale is not None or activation == "geglu"
    if input.dim() == 4 and across and not _by_pixel(_codes_shape(input, activation), scale):
        return "channels of images are in dim 1, which scales along the last dim do not follow"
    return None


def _unsupported_dynamic(input: Tensor, *args) -> str | None:
    return _cuda.unsupported(input, _cuda.FLOATS)


def _unsupported_dequantize(input, scale, zero_point, dtype) -> str | None:
    return _cuda.unsupported(input, (torch.int8,))


def _rows_of(input: Tensor, pixels: bool) -> Tensor:
    """Row-major, the channels inside."""
    return (_cuda.channels_inside(input) if pixels else input).contiguous()


def _as_returned(rows: Tensor, pixels: bool) -> Tensor:
    """Images in channels_last memory, all else row-major."""
    if pixels:
        return _cuda.as_image(rows)
    return rows.contiguous(memory_format=_CHANNELS_LAST) if rows.dim() == 4 else rows


def _quantize(input, scale, zero_point, activation, channel_scale) -> Tensor:
    pixels = _by_pixel(_codes_shape(input, activation), scale)
    rows = _rows_of(input, pixels)
    output = rows.new_empty(_halved(rows.shape, activation), dtype=torch.int8)
    torch.ops.pydenoise.quantize_cuda.default(
        rows, _cuda.dense(scale), _cuda.dense(zero_point), channel_scale, output, NUMBERS[activation]
    )
    return _as_returned(output, pixels)


def _quantize_dynamic(input, granularity, activation, channel_scale, symmetric) -> tuple[Tensor, Tensor, Tensor]:
    pixels = granularity == "pixel"
    rows = _rows_of(input, pixels)
    output = rows.new_empty(_halved(rows.shape, activation), dtype=torch.int8)
    shape = (input.shape[0], 1, *input.shape[2:]) if pixels else (*rows.shape[:-1], 1)
    scale, zero_point = rows.new_empty(shape, dtype=torch.float32), rows.new_empty(shape, dtype=torch.int32)
    torch.ops.pydenoise.quantize_dynamic_cuda.default(
        rows, channel_scale, output, scale, zero_point, NUMBERS[activation], symmetric
    )
    return _as_returned(output, pixels), scale, zero_point


def _dequantize(input, scale, zero_point, dtype) -> Tensor:
    pixels = _by_pixel(tuple(input.shape), scale)
    rows = _rows_of(input, pixels)
    if rows.dim() == 0:
        return _dequantize(input.reshape(1), scale, zero_point, dtype).reshape(())
    output = torch.empty_like(rows, dtype=dtype)
    torch.ops.pydenoise.dequantize_cuda.default(rows, _cuda.dense(scale), _cuda.dense(zero_point), output)
    return _as_returned(output, pixels)


_MEASURED = "not measured yet: above Triton; both are bound by memory (bench/gpu.py)"

ROWS = (
    Backend("quantize", "cuda", 300, _unsupported_quantize, _quantize, _MEASURED),
    Backend("quantize_dynamic", "cuda", 300, _unsupported_dynamic, _quantize_dynamic, _MEASURED),
    Backend("dequantize", "cuda", 300, _unsupported_dequantize, _dequantize, _MEASURED),
)
