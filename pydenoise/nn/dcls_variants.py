"""Convolutions with learnable spacings along one axis only: the published Dcls2_1d, Dcls3_1d and Dcls2dK1d.

Source: Khalfaoui-Hassani et al., https://arxiv.org/abs/2306.00817 and the delays of https://arxiv.org/abs/2306.17670.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pydenoise.nn.dcls_conv import DclsConvNd
from pydenoise.ops._arguments import int_tuple

_REFERENCE_SPREAD = 1.0  # least standard deviation of Gaussians in the published Dcls2_1d, where all others have 0.27

_DOC = """{dims}-D convolution whose last axis has learnable spacings; the others are dense, ``dense_kernel_size`` taps.

    Args:
        dense_kernel_size: taps of the leading ax{e}s.
        dilated_kernel_size: taps of the last axis, where each of the ``kernel_count`` components has a position.
        The others as in :class:`DclsConv{dims}d`.

    The state_dict has weight [O, I, *dense_kernel_size, C], P and SIG [1, O, I, *dense_kernel_size, C], and bias [O].
    {more}"""


class _DclsConvLast(DclsConvNd):
    learned = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_count: int,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dense_kernel_size: int | Sequence[int] = 1,
        dilated_kernel_size: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        version: str = "gauss",
        *,
        compat: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_count, stride, padding, dilated_kernel_size, groups, bias, padding_mode,
            version, compat, device, dtype, int_tuple("dense_kernel_size", dense_kernel_size, self.dims - 1, minimum=1),
        )  # fmt: skip

    def _reset_positions(self) -> None:
        half = self.dilated_kernel_size[0] // 2
        nn.init.uniform_(self.P, -half, half)
        self.clamp_parameters()


class DclsConv2_1d(_DclsConvLast):
    dims = 2
    __doc__ = _DOC.format(dims=2, e="i", more='With "gauss", ``compat="reference"`` has s = |SIG| + 1, as published.')

    @staticmethod
    def gauss_spread(compat: str | None) -> float:
        """The least standard deviation of Gaussians, to which |SIG| is added."""
        return DclsConvNd.gauss_spread(compat) if compat is None else _REFERENCE_SPREAD


class DclsConv3_1d(_DclsConvLast):
    dims = 3
    __doc__ = _DOC.format(dims=3, e="e", more="")


class DclsConv2dK1d(DclsConvNd):
    """2-D convolution whose kernel has one axis with learnable spacings, and one tap along the other.

    Args:
        flat_dim: 0: the spacings run along the height; 1: along the width.
        The others as in :class:`DclsConv2d`; ``dilated_kernel_size`` is one size.

    The state_dict has weight [O, I, C], P and SIG [1, O, I, C], and bias [O].
    """

    dims, learned = 2, 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_count: int,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilated_kernel_size: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        version: str = "v1",
        flat_dim: int = 0,
        *,
        compat: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if flat_dim not in (0, 1) or isinstance(flat_dim, bool):
            raise ValueError(f"flat_dim: expected 0 or 1, got {flat_dim!r}")
        self.flat_dim = flat_dim  # which kernel_size reads
        super().__init__(
            in_channels, out_channels, kernel_count, stride, padding, dilated_kernel_size, groups, bias, padding_mode,
            version, compat, device, dtype,
        )  # fmt: skip

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Size of the constructed kernel."""
        size = self.dilated_kernel_size[0]
        return (size, 1) if self.flat_dim == 0 else (1, size)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", flat_dim={self.flat_dim}"
