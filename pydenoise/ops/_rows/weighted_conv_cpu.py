"""CPU rows of weighted convolution: the C++ kernels of ``pydenoise._C``, and their packed-weight form."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pydenoise import _native
from pydenoise.ops._rows import _cpu
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS

_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _register_fakes() -> None:
    """Shapes of the C++ ops under fake tensors, once, when the library is first used."""
    library = torch.library.Library("pydenoise", "FRAGMENT")
    _register_fakes.library = library  # kept alive as long as the process

    def output(input, out_channels, geometry):
        dims = len(geometry) // 5
        stride, padding = geometry[:dims], geometry[dims : 3 * dims]
        dilation, kernel = geometry[3 * dims : 4 * dims], geometry[4 * dims :]
        size = [
            (n + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i, n in enumerate(input.shape[2:])
        ]
        y = input.new_empty((input.shape[0], *size, out_channels))
        return y.movedim(-1, 1)

    @torch.library.register_fake("pydenoise::weighted_conv_cpu", lib=library)
    def forward(input, weight, density, bias, residual, geometry, groups, activation, approximate):
        return output(input, weight.shape[0], geometry)

    @torch.library.register_fake("pydenoise::weighted_conv_cpu_packed", lib=library)
    def packed(input, packed, kind, bias, residual, geometry, out_channels, groups, activation):
        return output(input, out_channels, geometry)


def _unsupported(input: Tensor, *args: object) -> str | None:
    reason = _cpu.unsupported(input, _DTYPES)
    if reason is None:
        _register_fakes()
    return reason


def _geometry(stride, padding, dilation, kernel) -> list[int]:
    return [*stride, *padding, *dilation, *kernel]


def _run(input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm):
    return torch.ops.pydenoise.weighted_conv_cpu.default(
        input,
        weight,
        density,
        bias,
        residual,
        [*stride, *padding, *dilation, *weight.shape[2:]],
        groups,
        NUMBERS[activation],
        algorithm == "auto",
    )


def _run_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask):
    geometry = _geometry(stride, padding, dilation, weight.shape[2:])
    dx = dweight = ddensity = None
    if mask[0]:
        dx = torch.ops.pydenoise.weighted_conv_cpu_grad_input.default(
            grad, weight, density, list(input.shape), geometry, groups, algorithm == "auto"
        )
    if mask[1] or mask[2]:
        dweight, ddensity = torch.ops.pydenoise.weighted_conv_cpu_grad_weight.default(
            grad, input, weight, density, geometry, groups, mask[1], mask[2]
        )
    return dx, (dweight if mask[1] else None), (ddensity if mask[2] and density is not None else None)


ROWS = (
    Backend(
        "weighted_conv", "cpu", 100, _unsupported, _run, "bench suite weighted_conv, the only compiled CPU backend"
    ),
    Backend(
        "weighted_conv_backward",
        "cpu",
        100,
        _unsupported,
        _run_backward,
        "bench suite weighted_conv, the only compiled CPU backend",
    ),
)


# ------------------------------------------------------------------------------------------------- packed weights


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """``weight * density`` in the layout of one kernel: made once, used for every call of an inference.

    ``algorithm`` is the kernel's name ("direct", "winograd", ...), ``isa`` the level it was packed for; ``data`` is
    opaque.
    """

    data: Tensor
    kind: list[int]
    isa: str
    algorithm: str
    dtype: torch.dtype
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    groups: int

    def __deepcopy__(self, memo) -> "PackedWeight":
        return self  # immutable


def pack(
    weight: Tensor,
    density: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    algorithm: str = "auto",
) -> PackedWeight | None:
    """Pack ``weight * density`` for the fastest kernel of the active ISA level; ``None`` where there is no packed form.

    ``algorithm`` is "auto" (Winograd allowed) or "direct". Arguments are those that ``weighted_conv.prepare`` returns.
    """
    if _unsupported(weight) is not None:
        return None
    kernel = tuple(weight.shape[2:])
    geometry = _geometry(stride, [0] * (2 * len(kernel)), dilation, kernel)
    data, kind = torch.ops.pydenoise.weighted_conv_cpu_pack.default(
        weight.detach(), None if density is None else density.detach(), geometry, groups, algorithm == "auto"
    )
    if kind[1] < 0:
        return None
    module = _native.extension().module
    isa = module.isa_name(kind[0])
    return PackedWeight(
        data,
        list(kind),
        isa,
        module.algorithm_name(isa, kind[1]),
        weight.dtype,
        tuple(stride),
        tuple(dilation),
        kernel,
        weight.shape[1] * groups,
        weight.shape[0],
        groups,
    )


def run_packed(
    input: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
    activation: str,
) -> Tensor:
    """``activation(conv(input, packed) + bias) + residual``, without gradients. ``padding`` is (low, high) per axis."""
    return torch.ops.pydenoise.weighted_conv_cpu_packed.default(
        input,
        packed.data,
        packed.kind,
        bias,
        residual,
        [*packed.stride, *padding, *packed.dilation, *packed.kernel_size],
        packed.out_channels,
        packed.groups,
        NUMBERS[activation],
    )
