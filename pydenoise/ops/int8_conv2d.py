"""int8 convolution: argument checks, the torch op with its fake kernel, and the backend rows.

``acc = sum w * (x - zero_point)`` in int32, then scale, bias, FiLM, activation, residual and the cast or
requantization in one epilogue.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice, int_tuple
from pydenoise.ops._quantized import (
    call,
    check_accumulation,
    check_codes,
    check_plain,
    never,
    optional_vector,
    output_scale_of,
    residual_of,
    scale_of,
    zero_point_of,
)
from pydenoise.ops.quantize import in_memory_order, like_input
from pydenoise.ops.registry import Backend
from pydenoise.ops.weighted_conv import explicit_padding, output_size
from pydenoise.reference import int8_conv2d as reference
from pydenoise.reference.activations import ACTIVATIONS

OP = "int8_conv2d"

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "int8_conv2d(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? input_zero_point, "
    "Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, Tensor? channel_bias, "
    "Tensor? film, Tensor? residual, str activation, ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point, "
    "SymInt upsample, str backend) -> Tensor"
)


def int8_conv2d(
    input: Tensor,
    weight: Tensor,
    input_scale: float | Tensor,
    weight_scale: float | Tensor,
    *,
    input_zero_point: int | Tensor = 0,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    channel_bias: Tensor | None = None,
    film: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | Tensor | None = None,
    out_zero_point: int | Tensor = 0,
    upsample: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolution of int8 codes with int32 accumulators and a fused epilogue.

    With ``acc = sum weight * (input - input_zero_point)``::

        y = input_scale * weight_scale[o] * acc + bias[o] + channel_bias[n, o]
        y = y * (1 + film[n, o]) + film[n, C_out + o]
        y = activation(y) + residual, then cast to out_dtype or requantized

    Args:
        input: torch.int8 [N, C_in, H, W], any strides. Padding holds the zero point: it adds nothing to ``acc``.
        weight: torch.int8 [C_out, C_in / groups, K_h, K_w], symmetric. At most 131071 products per output
            (65793 with a zero point), so that no accumulator can overflow.
        input_scale: one positive number or 0-d tensor, or per pixel [N, 1, H, W] (each tap is rescaled as it is added).
        weight_scale: one, or [C_out]. bias: [C_out].
        input_zero_point: int or integer tensor of ``input_scale``'s shape, -128..127.
        stride, dilation: positive ints. groups: divides C_in and C_out.
        padding: ints, "same", "valid", or ((top, bottom), (left, right)).
        channel_bias: [N, C_out], such as a projected time embedding. film: [N, 2 C_out], gain then shift.
        residual: of the output's shape; float32, bfloat16 or float16.
        activation: "none", "relu", "silu", "gelu", "gelu_tanh", "leaky_relu_0.01", "leaky_relu_0.1" or
            "leaky_relu_0.2".
        out_dtype: torch.float32, bfloat16 or float16; torch.int8, requantized by ``out_scale`` and ``out_zero_point``
            (rules of :func:`pydenoise.functional.quantize`; a code beside a tie may differ by one); or torch.int32,
            ``acc`` itself.
        upsample: 2 reads the input as if enlarged twice by nearest neighbours.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference".

    Returns:
        [N, C_out, H_out, W_out] of ``out_dtype`` in channels_last memory. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it. Values of scales are checked for CPU tensors.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.
    """
    args = prepare(
        input, weight, input_scale, weight_scale, input_zero_point=input_zero_point, bias=bias, stride=stride,
        padding=padding, dilation=dilation, groups=groups, channel_bias=channel_bias, film=film, residual=residual,
        activation=activation, out_dtype=out_dtype, out_scale=out_scale, out_zero_point=out_zero_point,
        upsample=upsample,
    )  # fmt: skip
    return call(OP, torch.ops.pydenoise.int8_conv2d, args, backend)


# ------------------------------------------------------------------------------------------------ argument checks


def prepare(
    input, weight, input_scale, weight_scale, *, input_zero_point=0, bias=None, stride=1, padding=0, dilation=1,
    groups=1, channel_bias=None, film=None, residual=None, activation="none", out_dtype=torch.float32, out_scale=None,
    out_zero_point=0, upsample=1,
) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows (padding as top, bottom, left, right)."""
    _check_shapes(input, weight, groups, upsample)
    geometry = _geometry if torch.compiler.is_compiling() else _cached_geometry
    stride, padding, dilation = geometry(*map(_hashable, (stride, padding, dilation)), tuple(weight.shape[2:]))
    check_choice("activation", activation, ACTIVATIONS)
    size = output_size([n * upsample for n in input.shape[2:]], weight.shape[2:], stride, padding, dilation)
    batch, channels = input.shape[0], weight.shape[0]
    input_scale = scale_of("input_scale", input_scale, input, {"per pixel": (batch, 1, *input.shape[2:])})
    input_zero_point = zero_point_of("input_zero_point", input_zero_point, input_scale)
    check_accumulation(weight[0].numel(), affine=input_zero_point is not None)
    weight_scale = weight_scale_of(weight_scale, channels, input)
    bias = optional_vector("bias", bias, (channels,), input)
    channel_bias = optional_vector("channel_bias", channel_bias, (batch, channels), input)
    film = optional_vector("film", film, (batch, 2 * channels), input)
    residual = residual_of(residual, (batch, channels, *size), input)
    out_scale, out_zero_point = output_scale_of(out_dtype, out_scale, out_zero_point, input)
    check_plain(
        out_dtype, input_scale, bias=bias, channel_bias=channel_bias, film=film, residual=residual,
        activation=activation,
    )  # fmt: skip
    return (
        input, weight, input_scale, weight_scale, input_zero_point, bias, stride, padding, dilation, groups,
        channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point, upsample,
    )  # fmt: skip


def _check_shapes(input: Tensor, weight: Tensor, groups: int, upsample: int) -> None:
    check_codes("input", input)
    if input.dim() != 4:
        raise ValueError(f"input: expected [N, C, H, W], got shape {tuple(input.shape)}")
    check_codes("weight", weight, input)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty [C_out, C_in / groups, K_h, K_w], got {tuple(weight.shape)}")
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a positive divisor of C_out = {weight.shape[0]}, got {groups}")
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels (weight {tuple(weight.shape)} with groups={groups}), "
            f"got {input.shape[1]} in shape {tuple(input.shape)}"
        )
    if upsample not in (1, 2) or isinstance(upsample, bool):
        raise ValueError(f"upsample: expected 1 or 2, got {upsample!r}")


def weight_scale_of(value: object, channels: int, like: Tensor) -> Tensor:
    """``value`` as float32 [C_out] on ``like``'s device."""
    scale = scale_of("weight_scale", value, like, {"per output channel": (channels,)})
    return scale.expand(channels).contiguous() if scale.dim() == 0 else scale.contiguous()


def _hashable(option):
    if isinstance(option, Sequence) and not isinstance(option, str):
        return tuple(_hashable(item) for item in option)
    return option


def _geometry(stride, padding, dilation, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    stride = int_tuple("stride", stride, 2, minimum=1)
    dilation = int_tuple("dilation", dilation, 2, minimum=1)
    if isinstance(padding, tuple) and len(padding) == 2 and all(isinstance(pair, tuple) for pair in padding):
        rows, columns = (int_tuple("padding", pair, 2, minimum=0) for pair in padding)
        return stride, (*rows, *columns), dilation
    return stride, explicit_padding(padding, kernel, stride, dilation), dilation


_cached_geometry = lru_cache(maxsize=1024, typed=True)(_geometry)


# ---------------------------------------------------------------------------------------- torch op and fake kernel


@torch.library.impl(_library, OP, "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::int8_conv2d", lib=_library)
def _fake(input, weight, input_scale, weight_scale, input_zero_point, bias, stride, padding, dilation, groups,
          channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point, upsample,
          backend):  # fmt: skip
    size = [
        (n * upsample + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i, n in enumerate(input.shape[2:])
    ]
    return like_input(input, (input.shape[0], weight.shape[0], *size), out_dtype)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_run(*args):
    return in_memory_order(reference.int8_conv2d(*args))


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))

from pydenoise.ops._rows import int8_conv2d_cpu, int8_conv2d_cuda, int8_conv2d_triton  # noqa: E402

for _module in (int8_conv2d_cpu, int8_conv2d_triton, int8_conv2d_cuda):
    for _row in _module.ROWS:
        registry.register(_row)


# -------------------------------------------------------------------------------------------------- packed weights

pack = int8_conv2d_cpu.pack


def int8_conv2d_packed(
    input: Tensor, packed: int8_conv2d_cpu.PackedInt8, input_scale, weight_scale, input_zero_point, bias, padding,
    channel_bias, film, residual, activation, out_dtype, out_scale, out_zero_point, upsample,
) -> Tensor:  # fmt: skip
    """Run a convolution whose weight was packed once: the inference path of the modules.

    ``packed`` comes from :func:`pack`; the other arguments are as :func:`prepare` returns them.

    Raises:
        ValueError: ``input`` does not have the channels of the packed weight.
    """
    if input.dim() != 4 or input.shape[1] != packed.in_channels:
        raise ValueError(f"input: expected [N, {packed.in_channels}, H, W], got shape {tuple(input.shape)}")
    return int8_conv2d_cpu.run_packed(
        input, packed, input_scale, weight_scale, input_zero_point, bias, padding, channel_bias, film, residual,
        activation, out_dtype, out_scale, out_zero_point, upsample,
    )  # fmt: skip
