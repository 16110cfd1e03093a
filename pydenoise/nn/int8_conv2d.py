"""Int8Conv2d: a convolution that really runs on int8 codes, with everything around it in one epilogue."""

import torch
from torch import Tensor, nn

from pydenoise.nn import _int8
from pydenoise.nn._frozen import refuse_training
from pydenoise.nn._int8 import Codes, Int8Layer
from pydenoise.nn._plans import Choice, plan_of
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.ops import int8_conv2d as op
from pydenoise.ops._arguments import int_tuple
from pydenoise.ops._quantized import call, optional_vector, output_scale_of, residual_of
from pydenoise.ops.weighted_conv import explicit_padding, output_size
from pydenoise.quantization import LayerStatistics, Scheme


class Int8Conv2d(Int8Layer):
    """``act(conv2d(x) + b) + residual`` over [N, C_in, H, W] with int8 weights and inputs, for inference.

    Made by :meth:`from_float`, or empty, to be filled by ``load_state_dict``, which takes over the checkpoint's scheme.
    Buffers: ``weight`` int8 and ``weight_scale`` float32 [C_out]; ``bias``; ``input_scale`` and ``input_zero_point``
    (0-d for "per_tensor", [buckets] for "per_timestep", absent for "per_pixel"); ``channel_scale`` [C_in] where the
    input is smoothed. They keep their dtypes when a model is cast to half precision.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in ``torch.nn.Conv2d``.
        padding: as there, or ((top, bottom), (left, right)). Zeros.
        activation: as in :func:`pydenoise.functional.int8_conv2d`, after the bias.
        scheme: how the input is quantized; "per_timestep" needs a :class:`TimestepScales`.
    """

    kind, granularity = "conv2d", "pixel"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: op.Padding = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "none",
        scheme: Scheme | str = "per_pixel",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels}, got {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = int_tuple("kernel_size", kernel_size, 2, minimum=1)
        self.stride = int_tuple("stride", stride, 2, minimum=1)
        self.dilation = int_tuple("dilation", dilation, 2, minimum=1)
        self.padding, self._pads = padding, _explicit(padding, self.kernel_size, self.stride, self.dilation)
        self.activation = _int8.check_activation(activation)
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._create(shape, in_channels, bias, scheme, device)

    # ------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input: Tensor | Codes,
        *,
        channel_bias: Tensor | None = None,
        film: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
        upsample: int = 1,
        out_dtype: torch.dtype | None = None,
        out_scale: Tensor | float | None = None,
        out_zero_point: Tensor | int = 0,
    ) -> Tensor:
        """The convolution, its epilogue fused.

        Args:
            input: [N, C_in, H, W], float32, bfloat16 or float16, quantized here; or (codes, scale, zero point) from a
                producer such as :meth:`quantize`.
            channel_bias, film, residual, upsample, out_scale, out_zero_point: as in
                :func:`pydenoise.functional.int8_conv2d`.
            activation: ``None``: the layer's own.
            out_dtype: ``None``: the input's dtype, float32 for codes.

        Returns:
            [N, C_out, H_out, W_out] in channels_last memory. No gradients.
        """
        refuse_training(self)
        codes, scale, zero_point = self._input_codes(input)
        if out_dtype is None:
            out_dtype = torch.float32 if isinstance(input, tuple) else input.dtype
        if upsample not in (1, 2):
            raise ValueError(f"upsample: expected 1 or 2, got {upsample!r}")
        batch, channels = codes.shape[0], self.out_channels
        size = output_size(
            [n * upsample for n in codes.shape[2:]], self.kernel_size, self.stride, self._pads, self.dilation
        )
        fused = (
            optional_vector("channel_bias", channel_bias, (batch, channels), codes),
            optional_vector("film", film, (batch, 2 * channels), codes),
            residual_of(residual, (batch, channels, *size), codes),
            self.activation if activation is None else _int8.check_activation(activation),
            out_dtype,
            *output_scale_of(out_dtype, out_scale, out_zero_point, codes),
        )
        return self._run(codes, scale, zero_point, fused, upsample)

    def _run(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, fused: tuple, upsample: int) -> Tensor:
        scales = (scale, self.weight_scale, zero_point, self.bias)
        if _int8.is_plain(codes):
            packed = self._packed_weight(self._pack)
            if packed is not None:
                return op.int8_conv2d_packed(codes, packed, *scales, self._pads, *fused, upsample)
        args = (codes, self.weight, *scales, self.stride, self._pads, self.dilation, self.groups, *fused, upsample)
        return call(op.OP, torch.ops.pydenoise.int8_conv2d, args, "auto")

    def _pack(self, weight: Tensor) -> object | None:
        return op.pack(weight, self.stride, self.dilation, self.groups)

    # ------------------------------------------------------------------------------------------ hooks of Int8Layer

    def _channel_scale_by_weight(self) -> Tensor:
        by_group = self.channel_scale.reshape(self.groups, 1, -1, 1, 1)
        rows = by_group.expand(-1, self.out_channels // self.groups, -1, -1, -1)
        return rows.reshape(self.out_channels, -1, 1, 1)

    def _check_shape(self, input: Tensor, channels: int) -> None:
        if input.dim() != 4 or input.shape[1] != channels:
            raise ValueError(f"input: expected [N, {channels}, H, W], got {tuple(input.shape)}")

    def _position_shape(self, codes: Tensor) -> tuple[int, ...]:
        return (codes.shape[0], 1, *codes.shape[2:])

    def _description(self) -> dict:
        return {
            "weight_shape": tuple(self.weight.shape), "stride": self.stride, "padding": self._pads,
            "dilation": self.dilation, "groups": self.groups, "activation": self.activation,
        }  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding!r}"
        text += f", dilation={self.dilation}" if any(d != 1 for d in self.dilation) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += "" if self.bias is not None else ", bias=False"
        text += f", activation={self.activation}" if self.activation != "none" else ""
        return f"{text}, scheme={self.scheme}"

    # ------------------------------------------------------------------------------------------------- from_float

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        scheme: Choice = "per_pixel",
        *,
        statistics: LayerStatistics | None = None,
        input_range: tuple | None = None,
        activation: str | None = None,
        padding: op.Padding | None = None,
        gain: float = 1.0,
        name: str = "conv",
    ) -> "Int8Conv2d":
        """The int8 layer of a float convolution, which stays as it is.

        Args:
            conv: ``torch.nn.Conv2d``, or one of pydenoise (:class:`WeightedConv2d`, folded; :class:`FusedConv2d`).
                Weights on the meta device give a layer on the meta device, for ``load_state_dict(..., assign=True)``.
            scheme: a :class:`pydenoise.quantization.Scheme`, the name of a preset, or a finished
                :class:`pydenoise.quantization.LayerPlan`.
            statistics: of the layer's input, from a calibration; for static, smoothed or bias-corrected schemes.
            input_range: (low, high) of the input instead: numbers for "per_tensor", [buckets] for "per_timestep".
            activation: ``None``: "none", or that of a FusedConv2d.
            padding: ``None``: that of ``conv``.
            gain: multiplies the convolution's output: -1 for ``residual - conv(x)``, 1 / factor for a rescaled one.
            name: of the layer in error messages.

        Raises:
            TypeError, ValueError: the layer or an argument does not fit; the message names it.
        """
        own = getattr(conv, "activation", "none")
        conv = plain_conv(conv, name)
        plan = plan_of(conv, scheme, name, statistics, input_range)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            conv.padding if padding is None else padding, conv.dilation, conv.groups, conv.bias is not None,
            activation=own if activation is None else activation, scheme=plan.scheme if plan is not None else scheme,
            device=conv.weight.device,
        )  # fmt: skip
        if plan is not None:
            layer._fill(plan, gain)
        return layer


def plain_conv(conv: nn.Module, name: str) -> nn.Conv2d:
    """``conv`` as a torch.nn.Conv2d that pads with zeros.

    Raises:
        TypeError, ValueError: it is something else; ``name`` is the layer's in the message.
    """
    if isinstance(conv, FusedConv2d):
        plain = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, device="meta",
        )  # fmt: skip
        plain.weight, plain.bias = conv.weight, conv.bias
        conv = plain
    conv = conv.fold() if hasattr(conv, "fold") else conv
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"{name}: expected a torch.nn.Conv2d, got {type(conv).__name__}")
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        raise TypeError(f"{name}: expected a torch.nn.Conv2d, got {type(conv).__name__} with a forward of its own")
    if conv.padding_mode != "zeros":
        raise ValueError(f"{name}: padding_mode: expected 'zeros', got {conv.padding_mode!r}")
    return conv


def _explicit(padding: op.Padding, kernel: tuple, stride: tuple, dilation: tuple) -> tuple[int, ...]:
    """``padding`` as (top, bottom, left, right)."""
    if isinstance(padding, (tuple, list)) and len(padding) == 2 and not any(isinstance(p, int) for p in padding):
        rows, columns = (int_tuple("padding", pair, 2, minimum=0) for pair in padding)
        return (*rows, *columns)
    return explicit_padding(padding, kernel, stride, dilation)
