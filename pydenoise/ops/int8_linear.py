"""int8 matrix product: argument checks, the torch op with its fake kernel, and the backend rows."""

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice
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
from pydenoise.ops.int8_conv2d import weight_scale_of
from pydenoise.ops.registry import Backend
from pydenoise.reference import int8_linear as reference
from pydenoise.reference.activations import ACTIVATIONS

OP = "int8_linear"

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "int8_linear(Tensor input, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? input_zero_point, "
    "Tensor? bias, Tensor? residual, str activation, ScalarType out_dtype, Tensor? out_scale, Tensor? out_zero_point, "
    "str backend) -> Tensor"
)


def int8_linear(
    input: Tensor,
    weight: Tensor,
    input_scale: float | Tensor,
    weight_scale: float | Tensor,
    *,
    input_zero_point: int | Tensor = 0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | Tensor | None = None,
    out_zero_point: int | Tensor = 0,
    backend: str = "auto",
) -> Tensor:
    """``activation(input_scale * weight_scale * acc + bias) + residual`` with ``acc = weight @ (input - zero_point)``.

    Args:
        input: torch.int8 [..., K], at least 1-D. weight: torch.int8 [O, K], K at most 131071 (65793 with a zero
            point).
        input_scale: one positive number or 0-d tensor, or per token [..., 1].
        weight_scale: one, or [O]. bias: [O]. residual: [..., O]; float32, bfloat16 or float16.
        input_zero_point, activation, out_dtype, out_scale, out_zero_point, backend: as in
            :func:`pydenoise.functional.int8_conv2d`.

    Returns:
        [..., O] of ``out_dtype``, row-major. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it. Values of scales are checked for CPU tensors.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.
    """
    args = prepare(
        input, weight, input_scale, weight_scale, input_zero_point=input_zero_point, bias=bias, residual=residual,
        activation=activation, out_dtype=out_dtype, out_scale=out_scale, out_zero_point=out_zero_point,
    )  # fmt: skip
    return call(OP, torch.ops.pydenoise.int8_linear, args, backend)


def prepare(
    input, weight, input_scale, weight_scale, *, input_zero_point=0, bias=None, residual=None, activation="none",
    out_dtype=torch.float32, out_scale=None, out_zero_point=0,
) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows."""
    check_codes("input", input)
    check_codes("weight", weight, input)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty [O, K], got shape {tuple(weight.shape)}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: expected [..., {weight.shape[1]}] (weight's K), got shape {tuple(input.shape)}")
    check_choice("activation", activation, ACTIVATIONS)
    channels = weight.shape[0]
    input_scale = scale_of("input_scale", input_scale, input, {"per token": (*input.shape[:-1], 1)})
    input_zero_point = zero_point_of("input_zero_point", input_zero_point, input_scale)
    check_accumulation(weight.shape[1], affine=input_zero_point is not None)
    weight_scale = weight_scale_of(weight_scale, channels, input)
    bias = optional_vector("bias", bias, (channels,), input)
    residual = residual_of(residual, (*input.shape[:-1], channels), input)
    out_scale, out_zero_point = output_scale_of(out_dtype, out_scale, out_zero_point, input)
    check_plain(out_dtype, input_scale, bias=bias, residual=residual, activation=activation)
    return (
        input, weight, input_scale, weight_scale, input_zero_point, bias, residual, activation, out_dtype, out_scale,
        out_zero_point,
    )  # fmt: skip


@torch.library.impl(_library, OP, "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::int8_linear", lib=_library)
def _fake(input, weight, input_scale, weight_scale, input_zero_point, bias, residual, activation, out_dtype, out_scale,
          out_zero_point, backend):  # fmt: skip
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _reference_run(*args):
    return reference.int8_linear(*args).contiguous()


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))

from pydenoise.ops._rows import int8_linear_cpu, int8_linear_cuda, int8_linear_triton  # noqa: E402

for _module in (int8_linear_cpu, int8_linear_triton, int8_linear_cuda):
    for _row in _module.ROWS:
        registry.register(_row)


# -------------------------------------------------------------------------------------------------- packed weights

pack = int8_linear_cpu.pack


def int8_linear_packed(
    input: Tensor, packed: int8_linear_cpu.PackedInt8, input_scale, weight_scale, input_zero_point, bias, residual,
    activation, out_dtype, out_scale, out_zero_point,
) -> Tensor:  # fmt: skip
    """Run a product whose weight was packed once: the inference path of the modules.

    ``packed`` comes from :func:`pack`; the other arguments are as :func:`prepare` returns them.

    Raises:
        ValueError: ``input`` does not have the channels of the packed weight.
    """
    if input.dim() < 1 or input.shape[-1] != packed.in_channels:
        raise ValueError(f"input: expected [..., {packed.in_channels}], got shape {tuple(input.shape)}")
    return int8_linear_cpu.run_packed(
        input, packed, input_scale, weight_scale, input_zero_point, bias, residual, activation, out_dtype, out_scale,
        out_zero_point,
    )  # fmt: skip
