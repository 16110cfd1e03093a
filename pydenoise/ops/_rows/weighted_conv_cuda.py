"""CUDA C++ rows of weighted convolution: skinny first and last layers, and depthwise ones with their gradients."""

from math import prod

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend
from pydenoise.reference.activations import NUMBERS

_SKINNY_IN, _SKINNY_OUT, _DEPTHWISE = 0, 1, 2
# csrc/weighted_conv/cuda.h: kMaxSkinny, and kMaxSharedBytes / 4 / kChannelBlock, the weights per channel that fit.
_MAX_SKINNY = 4
_MAX_STAGED = 768


def _kind(in_channels: int, out_channels: int, groups: int) -> int | None:
    """Which kernel takes a layer of these channels; ``None`` if no CUDA kernel does."""
    if groups == in_channels and groups > 1:
        return _DEPTHWISE
    if groups == 1 and in_channels <= _MAX_SKINNY:
        return _SKINNY_IN
    return _SKINNY_OUT if groups == 1 and out_channels <= _MAX_SKINNY else None


def _unsupported_tensors(tensor: Tensor) -> str | None:
    return _cuda.unsupported(tensor, _cuda.FLOATS)


def _unsupported(
    input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm
) -> str | None:
    reason = _unsupported_tensors(input)
    if reason is not None:
        return reason
    if activation == "softplus":
        return "activation 'softplus' is not among those of the CUDA kernels"
    channels, out_channels = input.shape[1], weight.shape[0]
    kind = _kind(channels, out_channels, groups)
    if kind is None:
        return (
            f"{channels} channels in, {out_channels} out, {groups} groups is neither skinny (at most {_MAX_SKINNY} "
            "channels on one side, 1 group) nor depthwise (as many groups as input channels)"
        )
    # A last layer holds up to four weights per channel (skinny_out_columns in cuda.cu), a depthwise one a single one.
    narrow = {_SKINNY_IN: channels, _SKINNY_OUT: _MAX_SKINNY, _DEPTHWISE: 1}[kind]
    taps = prod(weight.shape[2:])
    if taps * narrow > _MAX_STAGED:
        return f"a kernel of {taps} taps is too large for shared memory: at most {_MAX_STAGED // narrow} here"
    return None


def _unsupported_backward(
    grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask
) -> str | None:
    reason = _unsupported_tensors(input)
    if reason is not None:
        return reason
    channels, out_channels = input.shape[1], weight.shape[0]
    if _kind(channels, out_channels, groups) != _DEPTHWISE or channels != out_channels:
        return f"gradients are for depthwise layers, got {channels} channels in, {out_channels} out, {groups} groups"
    taps = prod(weight.shape[2:])
    if taps > _MAX_STAGED:
        return f"a kernel of {taps} taps is too large for shared memory: at most {_MAX_STAGED} here"
    return None


def _adjacent_channels(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its channels are adjacent in memory, else a copy in which they are."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _empty(like: Tensor, batch: int, channels: int, size: list[int]) -> Tensor:
    return like.new_empty((batch, *size, channels)).movedim(-1, 1)


def _as_declared(tensor: Tensor) -> Tensor:
    """The memory layout that the op's fake kernel promises: row-major for [N, C, L], channels_last otherwise."""
    return tensor.contiguous() if tensor.dim() == 3 else tensor


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _run(input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm):
    kernel = weight.shape[2:]
    size = [
        (n + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, n in enumerate(input.shape[2:])
    ]
    output = _empty(input, input.shape[0], weight.shape[0], size)
    torch.ops.pydenoise.weighted_conv_cuda.default(
        _adjacent_channels(input),
        weight.contiguous(),
        _dense(density),
        _dense(bias),
        None if residual is None else _adjacent_channels(residual),
        output,
        [*stride, *padding, *dilation, *kernel],
        _kind(input.shape[1], weight.shape[0], groups),
        NUMBERS[activation],
    )
    return _as_declared(output)


def _run_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask):
    geometry = [*stride, *padding, *dilation, *weight.shape[2:]]
    grad, weight, density = _adjacent_channels(grad), weight.contiguous(), _dense(density)
    want_density = mask[2] and density is not None
    dx = dweight = ddensity = None
    if mask[0]:
        dx = _empty(input, input.shape[0], input.shape[1], list(input.shape[2:]))
        torch.ops.pydenoise.weighted_conv_cuda_depthwise_grad_input.default(grad, weight, density, dx, geometry)
        dx = _as_declared(dx)
    if mask[1] or want_density:
        dweight = torch.empty_like(weight) if mask[1] else None
        ddensity = torch.empty_like(density) if want_density else None
        torch.ops.pydenoise.weighted_conv_cuda_depthwise_grad_weight.default(
            grad, _adjacent_channels(input), weight, density, dweight, ddensity, geometry
        )
    return dx, dweight, ddensity


_MEASURED = "not measured yet: above Triton, whose matrix products waste most of a tile on such layers (bench/gpu.py)"

ROWS = (
    Backend("weighted_conv", "cuda", 300, _unsupported, _run, _MEASURED),
    Backend("weighted_conv_backward", "cuda", 300, _unsupported_backward, _run_backward, _MEASURED),
)
