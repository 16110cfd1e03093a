"""FusedConv1d, FusedConv2d, FusedConv3d: ``y = act(conv(x) + b) + residual`` in one pass, for inference.

One layer stands for a convolution, the batch normalisation folded into it, its activation and the addition of a
residual. Its weight is packed for the kernel once, and its output is in channels_last memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.ops._arguments import check_choice, int_tuple
from pydenoise.ops.weighted_conv import ALGORITHMS, explicit_padding, pack, weighted_conv_packed
from pydenoise.reference.activations import CONV_ACTIVATIONS

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_FUNCTIONALS = {1: PF.weighted_conv1d, 2: PF.weighted_conv2d, 3: PF.weighted_conv3d}
_PLAIN_TENSORS = (Tensor, nn.Parameter)


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: nn.modules.batchnorm._BatchNorm
) -> tuple[Tensor, Tensor]:
    """Weight [C_out, ...] and bias [C_out], in float64, of the convolution followed by ``norm`` in eval mode."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if bias is not None:
        shift = shift + bias.double() * scale
    return weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift


def _needs_dispatch(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Gradients, compilation, autocast and tensor subclasses go through the differentiable op."""
    if torch.compiler.is_compiling() or type(input) not in _PLAIN_TENSORS or torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or (residual is not None and residual.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


class _FusedConv(nn.Module):
    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: str = "none",
        algorithm: str = "auto",
        output_dtype: torch.dtype | None = None,
        keep_layout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """A convolution as ``torch.nn.ConvNd`` takes it, with zero weights to be loaded, and its epilogue.

        Args:
            activation: as in :func:`pydenoise.functional.weighted_conv2d`.
            algorithm: "auto" allows Winograd (3x3, stride 1, float32: relative error up to 2e-5); "direct" does not.
            output_dtype: ``None``: the layer takes and returns the dtype of its weight. Otherwise inputs of any
                floating dtype are cast to the weight's, and the output to ``output_dtype``.
            keep_layout: return an output in contiguous memory for an input in contiguous memory.
        """
        super().__init__()
        check_choice("activation", activation, CONV_ACTIVATIONS)
        check_choice("algorithm", algorithm, ALGORITHMS)
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels}, got {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = int_tuple("kernel_size", kernel_size, self.dims, minimum=1)
        self.stride = int_tuple("stride", stride, self.dims, minimum=1)
        self.dilation = int_tuple("dilation", dilation, self.dims, minimum=1)
        self.padding = padding if isinstance(padding, str) else int_tuple("padding", padding, self.dims, minimum=0)
        self.padding_mode, self.activation, self.algorithm = padding_mode, activation, algorithm
        self.output_dtype, self.keep_layout = output_dtype, keep_layout
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False)
        values = torch.zeros(out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))
        self._plan()
        self._packed = None

    def _plan(self) -> None:
        """What every call needs and no call changes."""
        pads = explicit_padding(self.padding, self.kernel_size, self.stride, self.dilation)
        self._mode_pads = None
        if self.padding_mode != "zeros":
            # F.pad wants the innermost axis first
            self._mode_pads = [p for axis in range(self.dims - 1, -1, -1) for p in pads[2 * axis : 2 * axis + 2]]
            pads = (0,) * (2 * self.dims)
        self._pads = pads
        self._adapts = self.output_dtype is not None or self.keep_layout or self._mode_pads is not None
        spans = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        self._grows = [pads[2 * i] + pads[2 * i + 1] - spans[i] for i in range(self.dims)]
        self._same_size = all(s == 1 for s in self.stride) and not any(self._grows)

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``input`` [N, C_in, *spatial] (or without N), any strides; ``residual`` broadcasts to the output.

        A residual of the output's shape and dtype is added by the kernel; any other by torch, under its broadcasting
        and promotion rules. Differentiable in ``input`` and ``residual``.
        """
        if self._adapts:
            return self._forward_adapted(input, residual)
        return self._convolve(input, residual)

    def _convolve(self, input: Tensor, residual: Tensor | None) -> Tensor:
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if _needs_dispatch(input, weight, bias, residual):
            return self._call_op(input, weight, bias, residual)
        packed = self._packed
        if packed is None or packed[0] is not weight or (packed[1] is not None and packed[1] != weight._version):
            packed = self._pack(weight)
        if packed[2] is None or input.dim() != self.dims + 2:
            return self._call_op(input, weight, bias, residual)
        try:
            return weighted_conv_packed(input, packed[2], bias, residual, self._pads, self.activation)
        except (TypeError, ValueError):  # cheaper than asking first: nearly every residual fits
            if residual is None or self._fusable(input, residual):
                raise
            return self._convolve(input, None) + residual

    def _forward_adapted(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """The forward of layers that cast, pad by a rule other than zeros, or give the layout back."""
        x = input
        if self.output_dtype is not None:
            x = x.to(self.weight.dtype)
        if self._mode_pads is not None:
            x = F.pad(x, self._mode_pads, mode=self.padding_mode)
        late = residual is not None and residual.dtype != x.dtype  # added in the wider dtype
        y = self._convolve(x, None if late else residual)
        y = y if self.output_dtype is None else y.to(self.output_dtype)
        y = y + residual if late else y
        return y.contiguous() if self.keep_layout and input.is_contiguous() else y

    def _fusable(self, input: Tensor, residual: Tensor) -> bool:
        """Whether ``residual`` has the output's shape and dtype."""
        size, expected = residual.shape, input.shape
        if residual.dtype is not input.dtype or len(size) != len(expected) or len(size) < self.dims + 1:
            return False
        if size[: -self.dims] != (*expected[: -self.dims - 1], self.out_channels):
            return False
        if self._same_size:
            return size[-self.dims :] == expected[-self.dims :]
        spatial = zip(expected[-self.dims :], self._grows, self.stride, strict=True)
        return size[-self.dims :] == tuple((n + grow - 1) // s + 1 for n, grow, s in spatial)

    def _call_op(self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if residual is not None and not self._fusable(input, residual):
            return self._call_op(input, weight, bias, None) + residual
        padding = self.padding if self._mode_pads is None else 0
        return _FUNCTIONALS[self.dims](
            input, weight, None, bias, self.stride, padding, self.dilation, self.groups,
            activation=self.activation, residual=residual,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- packing

    def _pack(self, weight: Tensor) -> tuple:
        """(weight, its version, packed form or ``None``): valid as long as the first two are the parameter's.

        Tensors made under ``inference_mode`` count no version.
        """
        packed = pack(weight.detach(), None, self.stride, self.dilation, self.groups, self.algorithm)
        self._packed = (weight, None if weight.is_inference() else weight._version, packed)
        return self._packed

    @property
    def kernel(self) -> str:
        """Which kernel runs a call without gradients: "direct", "winograd", ..., or "chosen per call" by the op."""
        packed = self._pack(self.weight)
        return "chosen per call" if packed[2] is None else packed[2].algorithm

    def _apply(self, fn, recurse=True):
        self._packed = None  # .to() replaces the parameter's data without counting a version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding!r}"
        text += f", dilation={self.dilation}" if any(d != 1 for d in self.dilation) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += "" if self.bias is not None else ", bias=False"
        text += f", padding_mode={self.padding_mode}" if self.padding_mode != "zeros" else ""
        return f"{text}, activation={self.activation}, dtype={str(self.weight.dtype).removeprefix('torch.')}"

    # ------------------------------------------------------------------------------------------------- from_float

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        *,
        batch_norm: nn.modules.batchnorm._BatchNorm | None = None,
        activation: str = "none",
        negate: bool = False,
        dtype: torch.dtype | None = None,
        output_dtype: torch.dtype | None = None,
        algorithm: str = "auto",
        keep_layout: bool = False,
    ) -> "_FusedConv":
        """The fused layer of ``conv`` (``torch.nn.ConvNd``, or ``pydenoise.nn.WeightedConvNd``, folded).

        Args:
            batch_norm: what follows the convolution; its running statistics are folded in float64.
            negate: ``residual - conv(x)`` instead of a sum: the folded weight and bias change sign. ``activation``
                must be "none".
            dtype: of the new weight; ``None`` keeps ``conv``'s.

        Raises:
            TypeError, ValueError: ``conv`` or ``batch_norm`` is of another kind or of another width.
        """
        conv = conv.fold() if hasattr(conv, "fold") else conv
        expected = _CONVOLUTIONS[cls.dims]
        if not isinstance(conv, expected):
            raise TypeError(f"conv: expected a torch.nn.{expected.__name__}, got {type(conv).__name__}")
        if negate and activation != "none":
            raise ValueError(f"negate: expected activation 'none' with it, got {activation!r}")
        weight, bias = conv.weight.detach(), conv.bias.detach() if conv.bias is not None else None
        if batch_norm is not None:
            _check_batch_norm(batch_norm, conv.out_channels)
            weight, bias = (t.detach() for t in fold_batch_norm(weight, bias, batch_norm))
        if negate:
            weight, bias = -weight, None if bias is None else -bias
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, bias is not None, conv.padding_mode, activation=activation, algorithm=algorithm,
            output_dtype=output_dtype, keep_layout=keep_layout, device=weight.device, dtype=dtype or conv.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer.train(conv.training)


def _check_batch_norm(norm: nn.Module, channels: int) -> None:
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"batch_norm: expected a torch.nn.BatchNorm module, got {type(norm).__name__}")
    if norm.num_features != channels:
        raise ValueError(f"batch_norm: expected {channels} features (conv's out_channels), got {norm.num_features}")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("batch_norm: expected running statistics, got track_running_stats=False")


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class FusedConv1d(_FusedConv):
    """``act(conv1d(x) + b) + residual`` over [N, C_in, L]; see :class:`FusedConv2d`."""

    dims = 1


class FusedConv2d(_FusedConv):
    """``act(conv2d(x) + b) + residual`` over [N, C_in, H, W] in one pass, for inference; made by :meth:`from_float`.

    Parameters ``weight`` [C_out, C_in / groups, K_h, K_w] and ``bias`` [C_out] do not require gradients. The packed
    form follows them: loading a state dict, ``.to()`` and in-place changes are noticed, writing to ``.data`` is not.
    """

    dims = 2


class FusedConv3d(_FusedConv):
    """``act(conv3d(x) + b) + residual`` over [N, C_in, D, H, W]; see :class:`FusedConv2d`."""

    dims = 3


FUSED = {1: FusedConv1d, 2: FusedConv2d, 3: FusedConv3d}
