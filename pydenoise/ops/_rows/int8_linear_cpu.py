"""CPU rows of ``int8_linear``: on the engine of ``int8_conv2d``, with tokens as the pixels of an image of one row."""

import torch
from torch import Tensor

from pydenoise.ops._rows import int8_conv2d_cpu
from pydenoise.ops._rows.int8_conv2d_cpu import PackedInt8
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS


def _run(input, weight, input_scale, weight_scale, input_zero_point, bias, residual, activation, out_dtype, out_scale,
         out_zero_point):  # fmt: skip
    return torch.ops.pydenoise.int8_linear_cpu.default(
        input, weight, input_scale, weight_scale, input_zero_point, bias, residual, NUMBERS[activation], out_dtype,
        out_scale, out_zero_point,
    )  # fmt: skip


ROWS = (
    Backend(
        "int8_linear",
        "cpu",
        100,
        int8_conv2d_cpu.unsupported,
        _run,
        "bench/notes-int8-conv.md, the only compiled CPU backend",
    ),
)


# ------------------------------------------------------------------------------------------------- packed weights


def pack(weight: Tensor) -> PackedInt8 | None:
    """Pack ``weight`` [O, K] for the active ISA level; ``None`` where nothing is packed."""
    return int8_conv2d_cpu.pack(weight[:, :, None, None], (1, 1), (1, 1), 1)


def run_packed(
    input: Tensor,
    packed: PackedInt8,
    input_scale: Tensor,
    weight_scale: Tensor,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """The row's result with a weight that was packed once; the other arguments are those of the row."""
    return torch.ops.pydenoise.int8_linear_cpu_packed.default(
        input, packed.data, packed.kind, input_scale, weight_scale, input_zero_point, bias, packed.out_channels,
        residual, NUMBERS[activation], out_dtype, out_scale, out_zero_point,
    )  # fmt: skip
