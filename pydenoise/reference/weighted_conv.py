"""Weighted convolution in plain torch: ``y = act(conv(x, W * density) + b) + residual``.

Source: Cammarasana and Patane, "Optimal Weighted Convolution for Classification and Denoising" (2025), eq. 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise.reference.activations import activate

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def effective_weight(weight: Tensor, density: Tensor | None) -> Tensor:
    """``W * density``, the weight of the plain convolution that computes the same values."""
    return weight if density is None else weight * density


def pad_explicitly(input: Tensor, padding: Sequence[int]) -> Tensor:
    """Zero-pad the spatial axes by ``padding`` = (low, high) per axis, outermost axis first."""
    pairs = [tuple(padding[i : i + 2]) for i in range(0, len(padding), 2)]
    return F.pad(input, [extent for pair in reversed(pairs) for extent in pair])


def weighted_conv(
    input: Tensor,
    weight: Tensor,
    density: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
) -> Tensor:
    """Forward pass; shapes as in :func:`pydenoise.ops.weighted_conv.weighted_conv`."""
    low, high = padding[0::2], padding[1::2]
    symmetric = list(low) == list(high)
    x = input if symmetric else pad_explicitly(input, padding)
    convolve = _CONVOLUTIONS[len(stride)]
    pad = list(low) if symmetric else 0
    y = convolve(x, effective_weight(weight, density), bias, list(stride), pad, list(dilation), groups)
    y = activate(y, activation)
    return y if residual is None else y + residual


def weighted_conv_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    density: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (input, weight, density) of ``weighted_conv`` without its epilogue; differentiable once more.

    ``dW = density * G``, ``d density = sum over channels of W * G``, ``dx = conv_input_grad(dy, W * density)``, with
    ``G`` the weight gradient of the plain convolution.
    """
    x = pad_explicitly(input, padding)
    want_plain = mask[1] or (mask[2] and density is not None)
    dims = len(stride)
    dx, plain, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        effective_weight(weight, density),
        None,
        list(stride),
        [0] * dims,
        list(dilation),
        False,
        [0] * dims,
        groups,
        [mask[0], want_plain, False],
    )
    if mask[0]:
        for axis in range(dims):
            dx = dx.narrow(2 + axis, padding[2 * axis], input.shape[2 + axis])
    dweight = effective_weight(plain, density) if mask[1] else None
    ddensity = (weight * plain).sum((0, 1)) if mask[2] and density is not None else None
    return (dx if mask[0] else None), dweight, ddensity
