"""Normalisation + activation + quantization in one step: argument checks, torch ops, and the backend rows.

The producer of every int8 convolution of a U-Net: one statistics pass, one write of int8.
"""

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice, check_tensor
from pydenoise.ops._quantized import call, check_floats, never, optional_vector, scale_of, zero_point_of
from pydenoise.ops.quantize import in_memory_order, like_input, position_scale
from pydenoise.ops.registry import Backend
from pydenoise.reference import norm_quantize as reference
from pydenoise.reference.activations import ACTIVATIONS

GROUP_NORM, LAYER_NORM = "group_norm_quantize", "layer_norm_quantize"

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "group_norm_quantize(Tensor input, Tensor? skip, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? film, str activation, Tensor? channel_scale, Tensor? scale, Tensor? zero_point, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "layer_norm_quantize(Tensor input, Tensor? weight, Tensor? bias, float eps, Tensor? film, Tensor? channel_scale, "
    "Tensor? scale, Tensor? zero_point, str backend) -> (Tensor, Tensor, Tensor)"
)


# ---------------------------------------------------------------------------------------------- public functions


def group_norm_silu_quantize(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    skip: Tensor | None = None,
    film: Tensor | None = None,
    activation: str = "silu",
    channel_scale: Tensor | None = None,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor = 0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """int8 codes of ``activation(film(group_norm(input))) * channel_scale``.

    Args:
        input: [N, C, H, W], float32, bfloat16 or float16, any strides.
        num_groups: divides the channels. weight, bias: [C] or ``None``. eps: added to the variance, >= 0.
        skip: [N, C2, H, W], read as if concatenated after ``input``'s channels (C below is then the sum): the skip
            connection of a U-Net, never written to memory. Same dtype and device.
        film: [N, 2 C]: ``x * (1 + film[:, :C]) + film[:, C:]`` after the normalisation.
        activation: "none", "relu", "silu", "gelu", "gelu_tanh", "leaky_relu_0.01", "leaky_relu_0.1" or
            "leaky_relu_0.2".
        channel_scale: [C], multiplied in after the activation (SmoothQuant's 1 / s per channel).
        scale, zero_point: as in :func:`pydenoise.functional.quantize`, one for the tensor; ``scale=None``: a scale per
            pixel from the values themselves.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference".

    Returns:
        torch.int8 [N, C, H, W] in channels_last memory; where ``scale`` is ``None``, (codes, scale [N, 1, H, W]
        float32, zero_point int32). Statistics are float32; codes are within 1 of exact arithmetic. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.
    """
    args = prepare_group_norm(
        input, num_groups, weight, bias, eps, skip=skip, film=film, activation=activation,
        channel_scale=channel_scale, scale=scale, zero_point=zero_point,
    )  # fmt: skip
    result = call(GROUP_NORM, torch.ops.pydenoise.group_norm_quantize, args, backend)
    return result if scale is None else result[0]


def layer_norm_quantize(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    film: Tensor | None = None,
    channel_scale: Tensor | None = None,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor = 0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """int8 codes of ``film(layer_norm(input)) * channel_scale`` over the last dim.

    Args:
        input: [..., C], float32, bfloat16 or float16. weight, bias, channel_scale: [C] or ``None``. eps: >= 0.
        film: [N, 2 C] with N = ``input.shape[0]``: ``x * (1 + film[:, :C]) + film[:, C:]`` (adaptive LayerNorm).
        scale, zero_point: one for the tensor; ``scale=None``: a scale per token from the values themselves.

    Returns:
        torch.int8 of ``input``'s shape; where ``scale`` is ``None``, (codes, scale [..., 1] float32, zero_point int32).

    Raises:
        As :func:`group_norm_silu_quantize`.
    """
    args = prepare_layer_norm(
        input, weight, bias, eps, film=film, channel_scale=channel_scale, scale=scale, zero_point=zero_point
    )
    result = call(LAYER_NORM, torch.ops.pydenoise.layer_norm_quantize, args, backend)
    return result if scale is None else result[0]


# ------------------------------------------------------------------------------------------------ argument checks


def _check_eps(eps: float) -> float:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    return float(eps)


def _parameters(scale, zero_point, input) -> tuple[Tensor | None, Tensor | None]:
    if scale is None:
        if not (isinstance(zero_point, int) and zero_point == 0):
            raise ValueError("zero_point: without a scale both are computed; give a scale as well, or neither")
        return None, None
    scale = scale_of("scale", scale, input, {})
    return scale, zero_point_of("zero_point", zero_point, scale)


def prepare_group_norm(
    input, num_groups, weight=None, bias=None, eps=1e-5, *, skip=None, film=None, activation="silu",
    channel_scale=None, scale=None, zero_point=0,
) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the ``group_norm_quantize`` rows."""
    check_floats("input", input)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input: expected non-empty images [N, C, H, W], got shape {tuple(input.shape)}")
    channels = input.shape[1]
    if skip is not None:
        check_tensor("skip", skip, like=input)
        if skip.dim() != 4 or skip.shape[0] != input.shape[0] or skip.shape[2:] != input.shape[2:]:
            raise ValueError(
                f"skip: expected [N, C2, H, W] with N, H, W of input {tuple(input.shape)}, got {tuple(skip.shape)}"
            )
        channels += skip.shape[1]
        skip = skip.detach()
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a positive divisor of the {channels} channels, got {num_groups}")
    check_choice("activation", activation, ACTIVATIONS)
    weight = optional_vector("weight", weight, (channels,), input)
    bias = optional_vector("bias", bias, (channels,), input)
    film = optional_vector("film", film, (input.shape[0], 2 * channels), input)
    channel_scale = optional_vector("channel_scale", channel_scale, (channels,), input)
    scale, zero_point = _parameters(scale, zero_point, input)
    eps = _check_eps(eps)
    return (
        input.detach(), skip, num_groups, weight, bias, eps, film, activation, channel_scale, scale, zero_point,
    )  # fmt: skip


def prepare_layer_norm(
    input, weight=None, bias=None, eps=1e-5, *, film=None, channel_scale=None, scale=None, zero_point=0
) -> tuple:
    """Check everything and return the positional arguments of the ``layer_norm_quantize`` rows."""
    check_floats("input", input)
    if input.dim() < 2 or input.shape[-1] == 0:
        raise ValueError(f"input: expected [..., C] with at least 2 dims and C > 0, got shape {tuple(input.shape)}")
    channels = input.shape[-1]
    weight = optional_vector("weight", weight, (channels,), input)
    bias = optional_vector("bias", bias, (channels,), input)
    film = optional_vector("film", film, (input.shape[0], 2 * channels), input)
    channel_scale = optional_vector("channel_scale", channel_scale, (channels,), input)
    scale, zero_point = _parameters(scale, zero_point, input)
    return input.detach(), weight, bias, _check_eps(eps), film, channel_scale, scale, zero_point


# --------------------------------------------------------------------------------------- torch ops and fake kernels


def _without_none(results: tuple, input: Tensor) -> tuple:
    """Torch ops return tensors only: an empty one for a scale that the caller gave."""
    return tuple(input.new_empty(0) if t is None else t for t in results)


@torch.library.impl(_library, "group_norm_quantize", "CompositeExplicitAutograd")
def _run_group_norm(*args):
    *args, backend = args
    return _without_none(registry.select(GROUP_NORM, backend, tuple(args)).run(*args), args[0])


@torch.library.impl(_library, "layer_norm_quantize", "CompositeExplicitAutograd")
def _run_layer_norm(*args):
    *args, backend = args
    return _without_none(registry.select(LAYER_NORM, backend, tuple(args)).run(*args), args[0])


def _fake(input: Tensor, shape: tuple[int, ...], scale: Tensor | None, granularity: str) -> tuple:
    codes = like_input(input, shape, torch.int8) if granularity == "pixel" else input.new_empty(shape, dtype=torch.int8)
    return codes, *(
        _without_none((None, None), input) if scale is not None else position_scale(input, shape, granularity)
    )


@torch.library.register_fake("pydenoise::group_norm_quantize", lib=_library)
def _fake_group_norm(input, skip, num_groups, weight, bias, eps, film, activation, channel_scale, scale, zero_point, backend):  # fmt: skip  # noqa: E501
    n, c, h, w = input.shape
    return _fake(input, (n, c + (0 if skip is None else skip.shape[1]), h, w), scale, "pixel")


@torch.library.register_fake("pydenoise::layer_norm_quantize", lib=_library)
def _fake_layer_norm(input, weight, bias, eps, film, channel_scale, scale, zero_point, backend):
    return _fake(input, tuple(input.shape), scale, "token")


# --------------------------------------------------------------------------------------------------- backend rows
# Rows return (codes, scale, zero_point), the last two None where the caller gave the scale.


def _dense(results: tuple) -> tuple:
    return tuple(None if t is None else t.contiguous() for t in results)


def _reference_group_norm(*args):
    codes, *rest = reference.group_norm_quantize(*args)
    return in_memory_order(codes), *_dense(rest)


def _reference_layer_norm(*args):
    return _dense(reference.layer_norm_quantize(*args))


registry.register(Backend(GROUP_NORM, "reference", 0, never, _reference_group_norm, "the fallback: always last"))
registry.register(Backend(LAYER_NORM, "reference", 0, never, _reference_layer_norm, "the fallback: always last"))

from pydenoise.ops._rows import norm_quantize_cpu, norm_quantize_cuda, norm_quantize_triton  # noqa: E402

for _module in (norm_quantize_cpu, norm_quantize_triton, norm_quantize_cuda):
    for _row in _module.ROWS:
        registry.register(_row)
