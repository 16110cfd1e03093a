"""CPU rows of group_norm_quantize and layer_norm_quantize: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS

_MEASURED = "bench/notes-int8-norm.md, the only compiled CPU backend"


def _unsupported_group_norm(input, skip, *args):
    reason = unsupported_floats(input)
    return unsupported_floats(skip) if reason is None and skip is not None else reason


def _group_norm(
    input, skip, num_groups, weight, bias, eps, film, activation, channel_scale, scale, zero_point
):  # fmt: skip
    codes, out_scale, out_zero_point = torch.ops.pydenoise.group_norm_quantize_cpu.default(
        input, skip, num_groups, weight, bias, eps, film, NUMBERS[activation], channel_scale, scale, zero_point
    )
    return (codes, out_scale, out_zero_point) if scale is None else (codes, None, None)


def _layer_norm(input, weight, bias, eps, film, channel_scale, scale, zero_point):
    shape = input.shape
    if len(shape) > 3:  # the kernels know images [N, C, H, W] and tokens [N, T, C]
        input = input.reshape(shape[0], shape[1:-1].numel(), shape[-1])
    codes, out_scale, out_zero_point = torch.ops.pydenoise.layer_norm_quantize_cpu.default(
        input, weight, bias, eps, film, channel_scale, scale, zero_point
    )
    codes = codes.view(shape)
    if scale is not None:
        return codes, None, None
    position = (*shape[:-1], 1)
    return codes, out_scale.view(position), out_zero_point.view(position)


ROWS = (
    Backend("group_norm_quantize", "cpu", 100, _unsupported_group_norm, _group_norm, _MEASURED),
    Backend("layer_norm_quantize", "cpu", 100, unsupported_floats, _layer_norm, _MEASURED),
)
