"""CUDA C++ rows of ``int8_linear``."""

from math import prod

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS


def _unsupported(input: Tensor, *args) -> str | None:
    return _cuda.unsupported(input, (torch.int8,)) or _cuda.too_many(prod(input.shape[:-1]), "tokens")


def _run(
    input, weight, input_scale, weight_scale, input_zero_point, bias, residual, activation, out_dtype, out_scale,
    out_zero_point,
) -> Tensor:  # fmt: skip
    tokens = _cuda.codes_for_copies(input.reshape(prod(input.shape[:-1]), input.shape[-1]), weight.shape[1])
    output = input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=out_dtype)
    torch.ops.pydenoise.int8_linear_cuda.default(
        tokens,
        weight.contiguous(),
        _cuda.dense(input_scale),
        weight_scale,
        _cuda.dense(input_zero_point),
        bias,
        _cuda.dense(residual),
        out_scale,
        out_zero_point,
        output.view(tokens.shape[0], weight.shape[0]),
        NUMBERS[activation],
    )
    return output


_MEASURED = "not measured yet: above Triton, which cannot choose instructions and split depths (bench/gpu.py)"

ROWS = (Backend("int8_linear", "cuda", 300, _unsupported, _run, _MEASURED),)
