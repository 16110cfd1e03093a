"""Normalisation, activation and quantization as one step, in plain torch: the oracle of the fused producers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pydenoise.reference import quantize as numbers
from pydenoise.reference.activations import activate


def _finish(
    x: Tensor, channel_scale: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, dim: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if channel_scale is not None:
        x = x * numbers.along_channels(channel_scale, x)
    if scale is None:
        return numbers.dynamic(x, dim, symmetric=False)
    return numbers.codes(x, scale, zero_point), None, None


def _film(x: Tensor, film: Tensor | None) -> Tensor:
    if film is None:
        return x
    gain, shift = film.chunk(2, dim=1)
    return x * (1 + numbers.along_channels(gain, x)) + numbers.along_channels(shift, x)


def group_norm_quantize(
    input: Tensor,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    film: Tensor | None,
    activation: str,
    channel_scale: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(codes, scale, zero_point); the last two are ``None`` where ``scale`` is given."""
    x = numbers.widen(input)
    if skip is not None:
        x = torch.cat([x, skip.to(x.dtype)], dim=1)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if x.numel():
        x = torch.group_norm(x, num_groups, weight, bias, eps)  # F.group_norm refuses a group of one value
    x = activate(_film(x, film), activation)
    return _finish(x, channel_scale, scale, zero_point, dim=1)


def layer_norm_quantize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    film: Tensor | None,
    channel_scale: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`group_norm_quantize`, normalised over the last dim, with a scale per token."""
    x = numbers.widen(input)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if film is not None:
        gain, shift = (part.to(x.dtype) for part in film.chunk(2, dim=1))
        shape = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
        x = x * (1 + gain.reshape(shape)) + shift.reshape(shape)
    if channel_scale is not None:
        x = x * channel_scale.to(x.dtype)
    if scale is None:
        return numbers.dynamic(x, -1, symmetric=False)
    return numbers.codes(x, scale, zero_point), None, None
