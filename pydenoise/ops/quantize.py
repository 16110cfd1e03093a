"""Quantization to int8 and back: argument checks, torch ops with fake kernels, and the backend rows.

``q = clamp(rint(x / scale) + zero_point)``, with true division in float32 and rounding half to even.
"""

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice
from pydenoise.ops._quantized import (
    FLOATS,
    call,
    check_codes,
    check_floats,
    never,
    optional_vector,
    scale_of,
    zero_point_of,
)
from pydenoise.ops.registry import Backend
from pydenoise.reference import quantize as reference
from pydenoise.reference.activations import INPUT_ACTIVATIONS

QUANTIZE, DYNAMIC, DEQUANTIZE = "quantize", "quantize_dynamic", "dequantize"
GRANULARITIES = ("pixel", "token")

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "quantize(Tensor input, Tensor scale, Tensor? zero_point, str activation, Tensor? channel_scale, str backend) "
    "-> Tensor"
)
_library.define(
    "quantize_dynamic(Tensor input, str granularity, str activation, Tensor? channel_scale, bool symmetric, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define("dequantize(Tensor input, Tensor scale, Tensor? zero_point, ScalarType dtype, str backend) -> Tensor")


# ---------------------------------------------------------------------------------------------- public functions


def quantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor = 0,
    *,
    activation: str = "none",
    channel_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """int8 codes of ``activation(input) * channel_scale`` under a known scale.

    Args:
        input: float32, bfloat16 or float16; images [N, C, H, W] have their channels in dim 1, all other shapes in the
            last dim. Any strides.
        scale: one positive number or 0-d tensor, or a tensor per pixel [N, 1, H, W] or per token [..., 1].
        zero_point: the int 0 means symmetric codes, -127..127; any other int or an integer tensor of ``scale``'s shape
            means affine codes, -128..127.
        activation: "none", "relu", "silu", "gelu", "gelu_tanh", "leaky_relu_0.01", "leaky_relu_0.1",
            "leaky_relu_0.2", or "geglu": the first half of the channels times the GELU of the second half.
        channel_scale: [C_out], multiplied in after the activation (SmoothQuant's 1 / s per channel).
        backend: "auto" or one of "cpu", "triton", "cuda", "reference"; see :func:`pydenoise.explain`.

    Returns:
        torch.int8 of the input's shape ("geglu": half of the channels); images in channels_last memory. NaN becomes the
        code of 0, infinities saturate. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it. Values of scales are checked for CPU tensors.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.
    """
    return call(
        QUANTIZE,
        torch.ops.pydenoise.quantize,
        prepare(input, scale, zero_point, activation=activation, channel_scale=channel_scale),
        backend,
    )


def quantize_dynamic(
    input: Tensor,
    *,
    granularity: str = "token",
    activation: str = "none",
    channel_scale: Tensor | None = None,
    symmetric: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point with a scale per position, from the values themselves: no calibration.

    Args:
        input, activation, channel_scale, backend: as in :func:`quantize`.
        granularity: "pixel", a scale per position of images [N, C, H, W] over their channels; or "token", a scale over
            the last dim.
        symmetric: scale = amax / 127 and zero point 0; otherwise affine over a range that includes 0.

    Returns:
        (torch.int8 codes, float32 scale, int32 zero_point); the last two [N, 1, H, W] or [..., 1]. A position with NaN
        gets a NaN scale, so that what is computed from it is NaN.
    """
    args = prepare_dynamic(
        input, granularity=granularity, activation=activation, channel_scale=channel_scale, symmetric=symmetric
    )
    return call(DYNAMIC, torch.ops.pydenoise.quantize_dynamic, args, backend)


def dequantize(
    input: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor = 0,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """``(input - zero_point) * scale`` in ``dtype`` (float32, bfloat16 or float16); shapes as in :func:`quantize`."""
    return call(
        DEQUANTIZE, torch.ops.pydenoise.dequantize, prepare_dequantize(input, scale, zero_point, dtype=dtype), backend
    )


# ------------------------------------------------------------------------------------------------ argument checks


def position_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of scales finer than the tensor, for an input of ``shape``."""
    shapes = {"per token": (*shape[:-1], 1)} if shape else {}
    return {"per pixel": (shape[0], 1, *shape[2:]), **shapes} if len(shape) == 4 else shapes


def _quantized_shape(input: Tensor, activation: str) -> tuple[int, ...]:
    """The codes' shape: "geglu" halves the channels."""
    shape = list(input.shape)
    if activation == "geglu":
        shape[reference.channel_dim(input)] //= 2
    return tuple(shape)


def _check_input(input: Tensor, activation: str, channel_scale: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
    check_floats("input", input)
    check_choice("activation", activation, INPUT_ACTIVATIONS)
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, got a 0-d tensor")
    channels = input.shape[reference.channel_dim(input)]
    if activation == "geglu" and channels % 2:
        raise ValueError(f"input: 'geglu' needs an even number of channels, got {channels}")
    shape = _quantized_shape(input, activation)
    length = shape[reference.channel_dim(input)]
    return shape, optional_vector("channel_scale", channel_scale, (length,), input)


def prepare(input, scale, zero_point=0, *, activation="none", channel_scale=None) -> tuple:
    """Check everything and return the positional arguments of the ``quantize`` rows."""
    shape, channel_scale = _check_input(input, activation, channel_scale)
    scale = scale_of("scale", scale, input, position_shapes(shape))
    return input.detach(), scale, zero_point_of("zero_point", zero_point, scale), activation, channel_scale


def prepare_dynamic(input, *, granularity="token", activation="none", channel_scale=None, symmetric=False) -> tuple:
    """Check everything and return the positional arguments of the ``quantize_dynamic`` rows."""
    shape, channel_scale = _check_input(input, activation, channel_scale)
    check_choice("granularity", granularity, GRANULARITIES)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric: expected a bool, got {type(symmetric).__name__}")
    if granularity == "pixel" and input.dim() != 4:
        raise ValueError(f"input: granularity 'pixel' needs images [N, C, H, W], got shape {tuple(input.shape)}")
    if granularity == "token" and input.dim() == 4 and (activation == "geglu" or channel_scale is not None):
        raise ValueError("input: 4-D inputs have channels in dim 1; reshape tokens [..., C] to at most 3 dims")
    if shape[1 if granularity == "pixel" else -1] == 0:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(input.shape)}")
    return input.detach(), granularity, activation, channel_scale, symmetric


def prepare_dequantize(input, scale, zero_point=0, *, dtype=torch.float32) -> tuple:
    """Check everything and return the positional arguments of the ``dequantize`` rows."""
    check_codes("input", input)
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    scale = scale_of("scale", scale, input, position_shapes(tuple(input.shape)))
    return input, scale, zero_point_of("zero_point", zero_point, scale), dtype


# --------------------------------------------------------------------------------------- torch ops and fake kernels


def like_input(input: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised result: images in channels_last memory, all else row-major."""
    if len(shape) != 4:
        return input.new_empty(shape, dtype=dtype)
    n, c, h, w = shape
    return input.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


def in_memory_order(tensor: Tensor) -> Tensor:
    """``tensor`` in the layout that every row returns (see :func:`like_input`)."""
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def position_scale(input: Tensor, shape: tuple[int, ...], granularity: str) -> tuple[Tensor, Tensor]:
    """Uninitialised (scale, zero_point) of a dynamic quantization, row-major."""
    shape = (shape[0], 1, *shape[2:]) if granularity == "pixel" else (*shape[:-1], 1)
    return input.new_empty(shape, dtype=torch.float32), input.new_empty(shape, dtype=torch.int32)


@torch.library.impl(_library, "quantize", "CompositeExplicitAutograd")
def _run_quantize(*args):
    *args, backend = args
    return registry.select(QUANTIZE, backend, tuple(args)).run(*args)


@torch.library.impl(_library, "quantize_dynamic", "CompositeExplicitAutograd")
def _run_dynamic(*args):
    *args, backend = args
    return registry.select(DYNAMIC, backend, tuple(args)).run(*args)


@torch.library.impl(_library, "dequantize", "CompositeExplicitAutograd")
def _run_dequantize(*args):
    *args, backend = args
    return registry.select(DEQUANTIZE, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::quantize", lib=_library)
def _fake_quantize(input, scale, zero_point, activation, channel_scale, backend):
    return like_input(input, _quantized_shape(input, activation), torch.int8)


@torch.library.register_fake("pydenoise::quantize_dynamic", lib=_library)
def _fake_dynamic(input, granularity, activation, channel_scale, symmetric, backend):
    shape = _quantized_shape(input, activation)
    return like_input(input, shape, torch.int8), *position_scale(input, shape, granularity)


@torch.library.register_fake("pydenoise::dequantize", lib=_library)
def _fake_dequantize(input, scale, zero_point, dtype, backend):
    return like_input(input, tuple(input.shape), dtype)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_quantize(*args):
    return in_memory_order(reference.quantize(*args))


def _reference_dynamic(*args):
    codes, scale, zero_point = reference.quantize_dynamic(*args)
    return in_memory_order(codes), scale.contiguous(), zero_point.contiguous()


def _reference_dequantize(*args):
    return in_memory_order(reference.dequantize(*args))


for _op, _run in ((QUANTIZE, _reference_quantize), (DYNAMIC, _reference_dynamic), (DEQUANTIZE, _reference_dequantize)):
    registry.register(Backend(_op, "reference", 0, never, _run, "the fallback: always last"))

from pydenoise.ops._rows import quantize_cpu, quantize_cuda, quantize_triton  # noqa: E402

for _module in (quantize_cpu, quantize_triton, quantize_cuda):
    for _row in _module.ROWS:
        registry.register(_row)
