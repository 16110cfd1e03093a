"""CPU rows of ``int8_conv2d``: the C++ kernels of ``pydenoise._C``, and their packed-weight form."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import _native
from pydenoise.ops._rows import _cpu
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS


def unsupported(input: Tensor, *args: object) -> str | None:
    """Why the kernels cannot read ``input``, or ``None``."""
    return _cpu.unsupported(input)


def _run(input, weight, input_scale, weight_scale, input_zero_point, bias, stride, padding, dilation, groups,
         channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point, upsample):  # fmt: skip
    return torch.ops.pydenoise.int8_conv2d_cpu.default(
        input, weight, input_scale, weight_scale, input_zero_point, bias,
        [*stride, *padding, *dilation, *weight.shape[2:]], groups, channel_bias, film, residual,
        NUMBERS[activation], out_dtype, out_scale, out_zero_point, upsample,
    )  # fmt: skip


ROWS = (
    Backend("int8_conv2d", "cpu", 100, unsupported, _run, "bench/notes-int8-conv.md, the only compiled CPU backend"),
)


# ------------------------------------------------------------------------------------------------- packed weights


@dataclass(frozen=True, eq=False)
class PackedInt8:
    """An int8 weight in the layout of one kernel: made once, used for every call of an inference.

    ``isa`` is the level it was packed for; ``data`` is opaque.
    """

    data: Tensor
    kind: list[int]
    isa: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    groups: int

    def __deepcopy__(self, memo) -> "PackedInt8":
        return self  # immutable


def pack(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> PackedInt8 | None:
    """Pack ``weight`` [C_out, C_in / groups, K_h, K_w] for the active ISA level; ``None`` where nothing is packed.

    Arguments are those that ``int8_conv2d.prepare`` returns.
    """
    if unsupported(weight) is not None:
        return None
    kernel = tuple(weight.shape[2:])
    data, kind = torch.ops.pydenoise.int8_conv2d_cpu_pack.default(
        weight.detach(), [*stride, 0, 0, 0, 0, *dilation, *kernel], groups
    )
    return PackedInt8(
        data,
        list(kind),
        _native.extension().module.active_isa(),
        tuple(stride),
        tuple(dilation),
        kernel,
        weight.shape[1] * groups,
        weight.shape[0],
        groups,
    )


def run_packed(
    input: Tensor,
    packed: PackedInt8,
    input_scale: Tensor,
    weight_scale: Tensor,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    padding: Sequence[int],
    channel_bias: Tensor | None,
    film: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    upsample: int,
) -> Tensor:
    """The row's result with a weight that was packed once; the other arguments are those of the row."""
    return torch.ops.pydenoise.int8_conv2d_cpu_packed.default(
        input, packed.data, packed.kind, input_scale, weight_scale, input_zero_point, bias,
        [*packed.stride, *padding, *packed.dilation, *packed.kernel_size], packed.out_channels, packed.groups,
        channel_bias, film, residual, NUMBERS[activation], out_dtype, out_scale, out_zero_point, upsample,
    )  # fmt: skip
