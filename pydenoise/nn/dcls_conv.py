"""Dilated convolutions with learnable spacings: few weights at positions that are trained, in a large kernel.

Source: Khalfaoui-Hassani, Pellegrini and Masquelier, https://arxiv.org/abs/2112.03740 and
https://arxiv.org/abs/2306.00817. Constructor and state_dict are those of the published package's ``Dcls1d/2d/3d``.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.nn._fingerprint import Fingerprint, have_versions, untracked
from pydenoise.nn._kept_in_eval import KeptInEval
from pydenoise.ops import dcls_kernel as op
from pydenoise.ops import weighted_conv
from pydenoise.ops._arguments import check_choice, int_tuple

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
SIG_START = {"gauss": 0.23, "max": 0.0}
POSITION_DEVIATION = 0.5  # in taps, of the positions drawn at the start
METADATA = "compat"  # key of a state dict's metadata: how the module that wrote it reads P
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: weighted_conv.weighted_conv1d,
    2: weighted_conv.weighted_conv2d,
    3: weighted_conv.weighted_conv3d,
}
_TWINS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _Cache(NamedTuple):
    """A kernel that was constructed once, and what it was made from."""

    key: tuple
    sources: tuple[Fingerprint | None, ...]
    kernel: Tensor
    packed: weighted_conv.PackedWeight | None  # the same for the CPU's kernels, where they take one

    def holds_for(self, key: tuple, sources: tuple[Tensor | None, ...]) -> bool:
        return self.key == key and all(
            (known is None) == (tensor is None) and (known is None or known.holds_for(tensor))
            for known, tensor in zip(self.sources, sources, strict=True)
        )


class DclsConvNd(KeptInEval):
    """What the modules share. ``dims`` is the number of spatial axes, ``learned`` how many of them have positions."""

    dims: int
    learned: int
    _version = 2  # state dicts of the published package have 1, that of every module which names none
    weight: nn.Parameter
    P: nn.Parameter
    SIG: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: int | Sequence[int],
        padding: int | str | Sequence[int], dilated_kernel_size: int | Sequence[int], groups: int, bias: bool,
        padding_mode: str, version: str, compat: str | None, device: torch.device | str | None,
        dtype: torch.dtype | None, dense: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """``dense`` are the sizes of axes without positions, in front of the others."""
        super().__init__()
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        check_choice("version", version, op.VERSIONS)
        op.check_compat(compat)
        self.in_channels = int_tuple("in_channels", in_channels, 1, minimum=1)[0]
        self.out_channels = int_tuple("out_channels", out_channels, 1, minimum=1)[0]
        self.kernel_count = int_tuple("kernel_count", kernel_count, 1, minimum=1)[0]
        self.groups = int_tuple("groups", groups, 1, minimum=1)[0]
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name}: {getattr(self, name)} is not divisible by groups = {self.groups}")
        self.dilated_kernel_size = int_tuple("dilated_kernel_size", dilated_kernel_size, self.learned, minimum=1)
        self.dense = dense
        self.stride = int_tuple("stride", stride, self.dims, minimum=1)
        self.padding = padding if isinstance(padding, str) else int_tuple("padding", padding, self.dims, minimum=0)
        self.padding_mode, self.version, self.compat = padding_mode, version, compat
        weighted_conv.explicit_padding(self.padding, self.kernel_size, self.stride, (1,) * self.dims)
        self._make_parameters(bias, device, dtype)
        self._cache: _Cache | None = None
        self.reset_parameters()

    def _make_parameters(self, bias: bool, device, dtype) -> None:
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        shape = (self.out_channels, self.in_channels // self.groups, *self.dense, self.kernel_count)
        self.weight = parameter(*shape)
        self.P = parameter(self.learned, *shape)
        self.register_parameter("SIG", parameter(self.learned, *shape) if op.has_widths(self.version) else None)
        self.register_parameter("bias", parameter(self.out_channels) if bias else None)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Size of the constructed kernel, that of the plain convolution with the same values."""
        return (*self.dense, *self.dilated_kernel_size)

    # ------------------------------------------------------------------------------------------------ parameters

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch's convolutions do, for ``kernel_count`` taps; positions near the centre."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_positions()
        if self.SIG is not None:
            nn.init.constant_(self.SIG, SIG_START[self.version])

    def _reset_positions(self) -> None:
        nn.init.normal_(self.P, 0.0, POSITION_DEVIATION)
        self.clamp_parameters()

    @torch.no_grad()
    def clamp_parameters(self) -> None:
        """Move positions that lie outside of the kernel to its border; call it after every step of an optimizer.

        The forward pass never clamps. With ``compat="reference"`` the limits are those of the published package:
        ``size // 2`` on both sides, which is one tap too many where the size is even.
        """
        for i, size in enumerate(self.dilated_kernel_size):
            above = size // 2 if self.compat == "reference" else (size - 1) // 2
            self.P[i].clamp_(-(size // 2), above)

    def construct_kernel(self) -> Tensor:
        """The dense kernel [out_channels, in_channels / groups, *kernel_size]; differentiable in weight, P and SIG."""
        return self.construct(self.weight, self.P, self.SIG)

    def construct(self, weight: Tensor, P: Tensor, SIG: Tensor | None, *, backend: str = "auto") -> Tensor:
        """The kernel of other parameters than the layer's own."""
        shape = (*weight.shape[:2], *self.kernel_size)
        if self.dense:  # the dense axes are more pairs of channels
            weight, P = weight.flatten(1, -2), P.flatten(2, -2)
            SIG = None if SIG is None else SIG.flatten(2, -2)
        spread = self.gauss_spread(self.compat) if self.version == "gauss" else None
        options = {"version": self.version, "compat": self.compat, "spread": spread}
        return op.call(op.prepare(weight, P, SIG, self.dilated_kernel_size, **options), backend).reshape(shape)

    @staticmethod
    def gauss_spread(compat: str | None) -> float:
        """The least standard deviation of Gaussians, to which |SIG| is added."""
        return op.GAUSS_SPREAD

    # --------------------------------------------------------------------------------------------------- forward

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` [N, C_in, *size] (or without N) with the constructed kernel."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input), 0
        if not self.training:
            y = self._forward_cached(input, padding)
            if y is not None:
                return y
        return self._convolve(input, self.construct_kernel(), padding)

    def _convolve(self, input: Tensor, kernel: Tensor, padding: int | str | tuple[int, ...]) -> Tensor:
        """The convolution itself, with whichever kernel the package has for it."""
        convolution = _CONVOLUTIONS[self.dims]
        return convolution(input, kernel, None, self.bias, self.stride, padding, 1, self.groups)

    def _padded(self, input: Tensor) -> Tensor:
        ends = weighted_conv.explicit_padding(self.padding, self.kernel_size, self.stride, (1,) * self.dims)
        spatial = input.shape[-self.dims :]
        most = {"reflect": -1, "circular": 0}.get(self.padding_mode)
        for axis, extent in enumerate(spatial if input.dim() > self.dims and most is not None else ()):
            if max(ends[2 * axis], ends[2 * axis + 1]) > extent + most:
                raise ValueError(
                    f"input: {self.padding_mode!r} padding by {ends[2 * axis : 2 * axis + 2]} needs more than "
                    f"{extent} along spatial axis {axis}"
                )
        innermost_first = [ends[2 * axis + end] for axis in reversed(range(self.dims)) for end in (0, 1)]
        return F.pad(input, innermost_first, mode=self.padding_mode)

    def _forward_cached(self, input: Tensor, padding: int | str | tuple[int, ...]) -> Tensor | None:
        """The result with a kernel made once, or ``None`` where parameters are trained or the call is traced."""
        sources = (self.weight, self.P, self.SIG)
        if not (untracked(*sources) and have_versions(*sources)):
            return None
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(input.device.type) and torch.float64 not in (dtype, input.dtype):
            dtype = torch.get_autocast_dtype(input.device.type)
        algorithm = weighted_conv.algorithm_by_precision()
        key = (dtype, algorithm, self.version, self.compat, self.kernel_size, self.stride, self.groups)
        cache = self._cache
        if cache is None or not cache.holds_for(key, sources):
            cache = self._cache = self._make_cache(key, sources)
        if not self._may_use_packed(cache, input):
            return self._convolve(input, cache.kernel, padding)
        ends = weighted_conv.explicit_padding(padding, self.kernel_size, self.stride, (1,) * self.dims)
        bias = None if self.bias is None else self.bias.to(dtype)
        batched = input.to(dtype) if input.dim() == self.dims + 2 else input.to(dtype)[None]
        y = weighted_conv.weighted_conv_packed(batched, cache.packed, bias, None, ends, "none")
        return y if input.dim() == self.dims + 2 else y[0]

    def _may_use_packed(self, cache: _Cache, input: Tensor) -> bool:
        if cache.packed is None or not untracked(input, self.bias):
            return False
        if input.dim() not in (self.dims + 1, self.dims + 2) or input.layout is not torch.strided:
            return False
        given = (input,) if self.bias is None else (input, self.bias)
        castable = (cache.packed.dtype, torch.float32) if torch.is_autocast_enabled("cpu") else (cache.packed.dtype,)
        return all(tensor.is_cpu and tensor.dtype in castable for tensor in given)

    def _make_cache(self, key: tuple, sources: tuple[Tensor | None, ...]) -> _Cache:
        dtype, algorithm, *_ = key
        fingerprints = tuple(None if tensor is None else Fingerprint(tensor) for tensor in sources)
        with torch.no_grad():
            kernel = self.construct_kernel().to(dtype)
            packed = weighted_conv.pack(kernel, None, self.stride, (1,) * self.dims, self.groups, algorithm)
        return _Cache(key, fingerprints, kernel, packed)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][METADATA] = self.compat

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        self._warn_of_other_axes(prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _warn_of_other_axes(self, prefix: str, metadata: Mapping) -> None:
        """Say so where a state dict's metadata tell that its P is read another way here. Files without metadata, such
        as safetensors, cannot tell."""
        version = metadata.get("version")
        if version is None:
            return
        written = metadata.get(METADATA, "reference" if version < 2 else None)
        if self.reads_alike(written, self.compat):
            return
        origin = "the published package" if version < 2 else f"a layer with compat={written!r}"
        warnings.warn(
            f"state_dict: {prefix}P comes from {origin} and is read another way with compat={self.compat!r}; "
            "pydenoise.nn.load_dcls_state_dict converts it exactly",
            UserWarning,
            stacklevel=2,
        )

    def reads_alike(self, one: str | None, other: str | None) -> bool:
        """Whether a layer of this kind and size constructs the same kernels with ``compat=one`` as with ``other``."""
        geometry = (self.dilated_kernel_size, self.version)
        if op.axes_and_centres(*geometry, one) != op.axes_and_centres(*geometry, other):
            return False
        return self.version != "gauss" or self.gauss_spread(one) == self.gauss_spread(other)

    def fold(self) -> nn.Module:
        """The plain torch.nn convolution with the constructed kernel as its weight, for export and other runtimes."""
        conv = _TWINS[self.dims](
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, 1, self.groups,
            self.bias is not None, self.padding_mode, device="meta", dtype=self.weight.dtype,
        )  # fmt: skip
        conv.weight = nn.Parameter(self.construct_kernel().detach().clone(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_count={self.kernel_count}, stride={self.stride}"
        text += f", dilated_kernel_size={self.dilated_kernel_size}, version={self.version!r}"
        if self.dense:
            text += f", dense_kernel_size={self.dense}"
        if self.padding not in ("valid", (0,) * self.dims):
            text += f", padding={self.padding!r}"
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += ", bias=False" if self.bias is None else ""
        text += f", padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else ""
        return text + (f", compat={self.compat!r}" if self.compat is not None else "")


_DOC = """{dims}-D dilated convolution with learnable spacings: ``kernel_count`` weights for each pair of channels, at
    positions that are trained, in a kernel of ``dilated_kernel_size`` taps.

    Args:
        in_channels, out_channels, stride, groups, bias: as in ``torch.nn.Conv{dims}d``; there is no dilation.
        kernel_count: components of each kernel.
        padding: ints, "same" or "valid". Usually ``dilated_kernel_size // 2``.
        dilated_kernel_size: an int or one for each axis.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        version: the interpolation, "gauss", "max", "v1" or "v0"; see :func:`pydenoise.functional.dcls_kernel`.
        compat: ``None``: P[a] and SIG[a] belong to axis a. "reference": to the axes that the published package moves
            with them; checkpoints made there are then read as they are. :func:`pydenoise.nn.load_dcls_state_dict`
            converts them exactly for ``compat=None``.

    The state_dict has weight [O, I, C], P [{dims}, O, I, C], SIG (likewise; "gauss" and "max" only) and bias [O], with
    I = in_channels / groups. Call :meth:`clamp_parameters` after each step of an optimizer. In evaluation, and without
    gradients, the kernel is constructed once and kept until a parameter, its dtype or its device changes.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: https://arxiv.org/abs/2112.03740 and https://arxiv.org/abs/2306.00817.
    """


class _DclsConv(DclsConvNd):
    """Every axis has positions."""

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
        version: str = "gauss",
        *,
        compat: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_count, stride, padding, dilated_kernel_size, groups, bias, padding_mode,
            version, compat, device, dtype,
        )  # fmt: skip


class DclsConv1d(_DclsConv):
    dims = learned = 1
    __doc__ = _DOC.format(dims=1)


class DclsConv2d(_DclsConv):
    dims = learned = 2
    __doc__ = _DOC.format(dims=2)


class DclsConv3d(_DclsConv):
    dims = learned = 3
    __doc__ = _DOC.format(dims=3)
