"""Int8Linear: a matrix product that really runs on int8 codes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pydenoise.nn import _int8
from pydenoise.nn._frozen import refuse_training
from pydenoise.nn._int8 import Codes, Int8Layer
from pydenoise.nn._plans import Choice, plan_of
from pydenoise.ops import int8_linear as op
from pydenoise.ops._quantized import call, output_scale_of, residual_of
from pydenoise.quantization import LayerStatistics, Scheme


class Int8Linear(Int8Layer):
    """``act(x @ weight.T + b) + residual`` over [..., C_in] with int8 weights and inputs, for inference.

    Made by :meth:`from_float`, or empty, to be filled by ``load_state_dict``. Buffers as in :class:`Int8Conv2d`, with
    a scale per token where those have one per pixel.

    Args:
        in_features, out_features, bias: as in ``torch.nn.Linear``.
        activation: as in :func:`pydenoise.functional.int8_linear`, after the bias.
        scheme: how the input is quantized; "per_timestep" needs a :class:`TimestepScales`.
    """

    kind, granularity = "linear", "token"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        scheme: Scheme | str = "per_token",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value}")
        self.in_features, self.out_features = in_features, out_features
        self.activation = _int8.check_activation(activation)
        self._create((out_features, in_features), in_features, bias, scheme, device)

    # ------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        input: Tensor | Codes,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
        out_scale: Tensor | float | None = None,
        out_zero_point: Tensor | int = 0,
    ) -> Tensor:
        """The product, its epilogue fused.

        Args:
            input: [..., C_in], float32, bfloat16 or float16, quantized here; or (codes, scale, zero point) from a
                producer, with one scale or one per token [..., 1].
            residual, out_scale, out_zero_point: as in :func:`pydenoise.functional.int8_linear`.
            activation: ``None``: the layer's own.
            out_dtype: ``None``: the input's dtype, float32 for codes.

        Returns:
            [..., C_out], row-major. No gradients.
        """
        refuse_training(self)
        codes, scale, zero_point = self._input_codes(input)
        if out_dtype is None:
            out_dtype = torch.float32 if isinstance(input, tuple) else input.dtype
        fused = (
            residual_of(residual, (*codes.shape[:-1], self.out_features), codes),
            self.activation if activation is None else _int8.check_activation(activation),
            out_dtype,
            *output_scale_of(out_dtype, out_scale, out_zero_point, codes),
        )
        scales = (scale, self.weight_scale, zero_point, self.bias)
        if _int8.is_plain(codes):
            packed = self._packed_weight(op.pack)
            if packed is not None:
                return op.int8_linear_packed(codes, packed, *scales, *fused)
        return call(op.OP, torch.ops.pydenoise.int8_linear, (codes, self.weight, *scales, *fused), "auto")

    def quantize(self, input: Tensor, activation: str = "none") -> Codes:
        """As of :class:`Int8Conv2d`, over the last dim of [..., C_in]; more than three dims are taken together."""
        if not isinstance(input, Tensor) or input.dim() <= 3:
            return super().quantize(input, activation)
        codes, scale, zero_point = super().quantize(input.flatten(0, -2), activation)
        leading = input.shape[:-1]
        if scale.dim():
            scale = scale.reshape(*leading, 1)
            zero_point = None if zero_point is None else zero_point.reshape(*leading, 1)
        return codes.reshape(*leading, codes.shape[-1]), scale, zero_point

    # ------------------------------------------------------------------------------------------ hooks of Int8Layer

    def _channel_scale_by_weight(self) -> Tensor:
        return self.channel_scale

    def _check_shape(self, input: Tensor, channels: int) -> None:
        if input.dim() < 1 or input.shape[-1] != channels:
            raise ValueError(f"input: expected [..., {channels}], got {tuple(input.shape)}")

    def _position_shape(self, codes: Tensor) -> tuple[int, ...]:
        return (*codes.shape[:-1], 1)

    def _description(self) -> dict:
        return {"weight_shape": tuple(self.weight.shape), "activation": self.activation}

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}" + ("" if self.bias is not None else ", bias=False")
        text += f", activation={self.activation}" if self.activation != "none" else ""
        return f"{text}, scheme={self.scheme}"

    # ------------------------------------------------------------------------------------------------- from_float

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        scheme: Choice = "per_token",
        *,
        statistics: LayerStatistics | None = None,
        input_range: tuple | None = None,
        activation: str = "none",
        gain: float = 1.0,
        name: str = "linear",
    ) -> "Int8Linear":
        """The int8 layer of a float one, which stays as it is.

        Args:
            linear: ``torch.nn.Linear``, or a 1x1 ``torch.nn.Conv2d``, whose pixels are then tokens.
            scheme, statistics, input_range, gain, name: as in :meth:`Int8Conv2d.from_float`.
            activation: fused after the bias.

        Raises:
            TypeError, ValueError: the layer or an argument does not fit; the message names it.
        """
        _check_linear(linear, name)
        plan = plan_of(linear, scheme, name, statistics, input_range)
        out_features, in_features = linear.weight.shape[:2]
        layer = cls(
            in_features, out_features, linear.bias is not None, activation=activation,
            scheme=plan.scheme if plan is not None else scheme, device=linear.weight.device,
        )  # fmt: skip
        if plan is not None:
            layer._fill(plan, gain)
        return layer


def joined(layers: Sequence[nn.Module], name: str) -> nn.Linear:
    """One ``torch.nn.Linear`` that computes several with the same input, outputs one after the other."""
    for layer in layers:
        _check_linear(layer, name)
    if len({layer.weight.shape[1] for layer in layers}) != 1:
        raise ValueError(f"{name}: expected layers with the same number of inputs")
    if len(layers) == 1 and isinstance(layers[0], nn.Linear):
        return layers[0]
    weight = torch.cat([layer.weight.detach().flatten(1) for layer in layers])
    result = nn.Linear(weight.shape[1], weight.shape[0], any(layer.bias is not None for layer in layers), device="meta")
    result.weight = nn.Parameter(weight, requires_grad=False)
    if result.bias is not None:
        parts = [w.new_zeros(w.shape[0]) if b is None else b for w, b in ((lay.weight, lay.bias) for lay in layers)]
        result.bias = nn.Parameter(torch.cat(parts).detach(), requires_grad=False)
    return result.eval()


def _check_linear(layer: nn.Module, name: str) -> None:
    """A linear layer or a 1x1 convolution."""
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return
    if not isinstance(layer, nn.Conv2d) or type(layer).forward is not nn.Conv2d.forward:
        raise TypeError(f"{name}: expected a torch.nn.Linear or a 1x1 torch.nn.Conv2d, got {type(layer).__name__}")
    padded = not isinstance(layer.padding, str) and any(layer.padding)
    if layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.groups != 1 or padded:
        raise ValueError(f"{name}: expected a 1x1 convolution with stride 1 and no padding or groups, got {layer}")
