"""What a planned layer computes, emulated in floating point: integer codes are exact there."""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydenoise.quantization import numbers
from pydenoise.quantization.observers import LayerStatistics

if TYPE_CHECKING:
    from pydenoise.quantization.plan import LayerPlan


def float_output(layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, *, padded: bool = False) -> Tensor:
    """``layer``'s own output on ``x``, [N, C, H, W] or [..., C], in ``dtype``.

    Padding only if ``padded``: samples are cut out of images, so their borders are no borders of the image. (Samples
    smaller than the kernel are padded, or they would give nothing.)
    """
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return _apply(layer, x.to(dtype), layer.weight.detach().to(dtype), bias, padded)


def simulate(
    plan: "LayerPlan",
    layer: nn.Module,
    x: Tensor,
    bucket: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    padded: bool = False,
) -> Tensor:
    """What ``plan`` computes on ``x`` [N, C, H, W] or [..., C] in timestep bucket ``bucket``.

    ``layer`` gives the geometry. In float64 the accumulators are exact integers; float32 adds errors of about 1e-6,
    far below those of int8.
    """
    codes, scale = quantized_input(plan, x, bucket)
    y = _apply(layer, codes.to(dtype), plan.weight.to(dtype), None, padded)
    channels = (-1, 1, 1) if plan.kind == "conv2d" else (-1,)
    factor = plan.weight_scale.to(dtype) if scale is None else plan.weight_scale.to(dtype) * scale.to(dtype)
    y = y * factor.reshape(channels)
    return y if plan.bias is None else y + plan.bias.to(dtype).reshape(channels)


def quantized_input(plan: "LayerPlan", x: Tensor, bucket: int = 0) -> tuple[Tensor, Tensor | None]:
    """The planned layer's input: (codes less their zero point, scale), float32; or (values, ``None``) where every
    position has a scale of its own."""
    x = x.float()
    if plan.channel_scale is not None:
        x = x * plan.channel_scale.reshape((-1, 1, 1) if plan.kind == "conv2d" else (-1,))
    if plan.scheme.is_dynamic:
        return numbers.fake_quantize_dynamic(x, 1 if plan.kind == "conv2d" else -1, plan.scheme.symmetric), None
    tabled = plan.input_scale.dim() == 1
    scale = plan.input_scale[bucket] if tabled else plan.input_scale
    zero_point = plan.input_zero_point
    zero_point = zero_point[bucket] if tabled and zero_point is not None else zero_point
    codes = numbers.encode(x, scale, zero_point).float()
    return (codes if zero_point is None else codes - zero_point), scale


def sample_batches(statistics: LayerStatistics, device: torch.device | str = "cpu") -> list[tuple[int, Tensor]]:
    """All samples as (bucket, [n, C, h, w] or [n, tokens, C]): those of one shape and bucket are together."""
    together: dict[tuple, list[Tensor]] = defaultdict(list)
    for bucket in range(len(statistics.counts)):
        for sample in statistics.samples(bucket):
            together[(bucket, *sample.shape)].append(sample)
    return [(key[0], torch.stack(samples).to(device)) for key, samples in together.items()]


Sample = tuple[int, Tensor, Tensor]


def sample_outputs(layer: nn.Module, statistics: LayerStatistics) -> list[Sample]:
    """(bucket, input, the layer's full-precision output) of all samples, on the layer's device."""
    batches = sample_batches(statistics, layer.weight.device)
    return [(bucket, x, float_output(layer, x)) for bucket, x in batches]


def _apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool) -> Tensor:
    if not isinstance(layer, nn.Conv2d):
        return F.linear(x, weight, bias)
    extent = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding = layer.padding if padded or any(n < e for n, e in zip(x.shape[2:], extent, strict=True)) else 0
    return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
