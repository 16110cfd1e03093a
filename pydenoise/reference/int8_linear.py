"""int8 matrix product with exact integer accumulation, in plain torch: the oracle of ``int8_linear``."""

import torch
from torch import Tensor

from pydenoise.reference import quantize as numbers
from pydenoise.reference.activations import activate


def int8_linear(
    input: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:
    """``input`` [..., K] and ``weight`` [O, K] give [..., O]; scales and zero points are 0-d or per token [..., 1]."""
    x = input.double() if input_zero_point is None else input.double() - input_zero_point
    acc = x @ weight.double().t()
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = acc * weight_scale.double() * input_scale.double()
    y = y if bias is None else y + bias.double()
    y = activate(y, activation)
    y = y if residual is None else y + residual.double()
    if out_dtype == torch.int8:
        return numbers.codes(y, out_scale.double(), out_zero_point)
    return y.to(out_dtype)
