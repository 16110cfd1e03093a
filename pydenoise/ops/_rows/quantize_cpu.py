"""CPU rows of quantize, quantize_dynamic and dequantize: the C++ kernels of ``pydenoise._C``."""

import torch
from torch import Tensor

from pydenoise.ops._rows._cpu import unsupported, unsupported_floats
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS

_MEASURED = "bench/notes-int8-norm.md, the only compiled CPU backend"


def _image_tokens(input: Tensor) -> Tensor:
    """[N, C, H, W] with a scale per token (the last dim) as a matrix of tokens."""
    return input.contiguous().view(-1, input.shape[-1])


def _image(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tokens.view(shape).contiguous(memory_format=torch.channels_last)


def _is_per_token(input: Tensor, scale: Tensor) -> bool:
    """Whether the channels in dim 1 of ``input`` are not what its scales run over."""
    return input.dim() == 4 and scale.dim() == 4 and (scale.shape[1] != 1 or scale.shape[3] != input.shape[3])


def _quantize(input, scale, zero_point, activation, channel_scale):
    run = torch.ops.pydenoise.quantize_cpu.default
    if not _is_per_token(input, scale):
        return run(input, scale, zero_point, NUMBERS[activation], channel_scale)
    zero_point = None if zero_point is None else zero_point.reshape(-1, 1)
    codes = run(_image_tokens(input), scale.reshape(-1, 1), zero_point, NUMBERS[activation], None)
    return _image(codes, input.shape)


def _unsupported_quantize(input, scale, zero_point, activation, channel_scale):
    if _is_per_token(input, scale) and (activation == "geglu" or channel_scale is not None):
        return "per-token scales of 4-D inputs together with 'geglu' or channel_scale"
    return unsupported_floats(input)


def _dynamic(input, granularity, activation, channel_scale, symmetric):
    run = torch.ops.pydenoise.quantize_dynamic_cpu.default
    if input.dim() != 4 or granularity == "pixel":
        return run(input, NUMBERS[activation], channel_scale, symmetric)
    codes, scale, zero_point = run(_image_tokens(input), NUMBERS[activation], None, symmetric)
    shape = (*input.shape[:-1], 1)
    return _image(codes, input.shape), scale.view(shape), zero_point.view(shape)


def _dequantize(input, scale, zero_point, dtype):
    run = torch.ops.pydenoise.dequantize_cpu.default
    if not _is_per_token(input, scale):
        return run(input, scale, zero_point, dtype)
    zero_point = None if zero_point is None else zero_point.reshape(-1, 1)
    return _image(run(_image_tokens(input), scale.reshape(-1, 1), zero_point, dtype), input.shape)


def _unsupported_dequantize(input, *args):
    return unsupported(input)


ROWS = (
    Backend("quantize", "cpu", 100, _unsupported_quantize, _quantize, _MEASURED),
    Backend("quantize_dynamic", "cpu", 100, unsupported_floats, _dynamic, _MEASURED),
    Backend("dequantize", "cpu", 100, _unsupported_dequantize, _dequantize, _MEASURED),
)
