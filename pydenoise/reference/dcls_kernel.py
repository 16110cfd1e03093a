"""Kernels of dilated convolutions with learnable spacings (DCLS) in plain torch: construction and gradients.

Every component c of a pair (output channel, input channel) has a weight, a position P and perhaps a width SIG along
each axis. Tap i of an axis lies at distance d = i - centre - P from the component and gets the factor u(i): a Gaussian
exp(-(d / s)^2 / 2) or a hat max(0, s - |d|). The kernel is the sum over c of W / n times the product of the factors,
with n the sum of that product over all taps, plus 1e-7, or 1 where the kernel is not normalised.

Source: Khalfaoui-Hassani, Pellegrini and Masquelier, "Dilated convolution with learnable spacings" (2023),
https://arxiv.org/abs/2112.03740, and "Dilated convolution with learnable spacings: beyond bilinear interpolation"
(2023), https://arxiv.org/abs/2306.00817. The gradients are derived by hand; in float64 they are autograd's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_MASS = 1e-7  # added to a component's mass, which is 0 where all of it lies outside the kernel
_LETTERS = "xyz"


def _single(*tensors: Tensor | None) -> list[Tensor | None]:
    """16-bit tensors in float32: 1e-7 is nothing in half precision."""
    return [t if t is None or t.element_size() > 2 else t.float() for t in tensors]


def _distances(P: Tensor, size: int, centre: int) -> Tensor:
    """[O, I, C, size]. Whole numbers are subtracted from each other first: that is exact."""
    return torch.arange(size, dtype=P.dtype, device=P.device) - centre - P.unsqueeze(-1)


def _widths(SIG: Tensor | None, axis: int, like: Tensor, spread: float) -> Tensor:
    """[O, I, C, 1]: standard deviations of Gaussians, half the bases of hats."""
    if SIG is None:
        return torch.full_like(like, spread).unsqueeze(-1)
    return (SIG[axis].abs() + spread).unsqueeze(-1)


def _factors(distances: Tensor, widths: Tensor, gauss: bool) -> Tensor:
    if gauss:
        return torch.exp(-0.5 * (distances / widths).square())
    return torch.relu(widths - distances.abs())


def _all_factors(
    weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int], centres: Sequence[int],
    gauss: bool, spread: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Distances, widths and factors of every axis of the kernel."""
    distances = [_distances(P[m], n, c) for m, n, c in zip(axes, size, centres, strict=True)]
    widths = [_widths(SIG, m, weight, spread) for m in axes]
    return distances, widths, [_factors(d, w, gauss) for d, w in zip(distances, widths, strict=True)]


def dcls_kernel(
    weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int], centres: Sequence[int],
    gauss: bool, normalized: bool, spread: float,
) -> Tensor:  # fmt: skip
    """The kernel [O, I, *size] of ``weight`` [O, I, C], ``P`` and ``SIG`` [D, O, I, C].

    Axis a of the kernel is moved by P[axes[a]], which counts from tap centres[a]. Hats have half a base of |SIG| +
    ``spread``, Gaussians that standard deviation; SIG ``None`` stands for zeros. 16-bit tensors are
    computed in float32.
    """
    dtype = weight.dtype
    weight, P, SIG = _single(weight, P, SIG)
    _, _, factors = _all_factors(weight, P, SIG, size, axes, centres, gauss, spread)
    scaled = weight
    if normalized:
        scaled = weight / (math.prod(u.sum(-1) for u in factors) + LEAST_MASS)
    letters = _LETTERS[: len(size)]
    terms = ",".join(f"oic{letter}" for letter in letters)
    return torch.einsum(f"oic,{terms}->oi{letters}", scaled, *factors).to(dtype)


def dcls_kernel_backward(
    grad: Tensor, weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int],
    centres: Sequence[int], gauss: bool, normalized: bool, spread: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of ``weight``, ``P`` and ``SIG`` for the kernel's gradient ``grad`` [O, I, *size].

    At the kinks of the hats the derivatives are those of torch's ``abs`` and ``relu``: 0.
    """
    dtype = weight.dtype
    grad, weight, P, SIG = _single(grad, weight, P, SIG)
    distances, widths, factors = _all_factors(weight, P, SIG, size, axes, centres, gauss, spread)
    contracted = [_contracted(grad, factors, axis) for axis in range(len(size))]
    product = (contracted[0] * factors[0]).sum(-1)  # of the gradient and the component, over all taps
    masses = [u.sum(-1) for u in factors]
    mass = math.prod(masses) + LEAST_MASS if normalized else torch.ones_like(product)
    positions, spreads = [], []
    for axis, (d, w, u) in enumerate(zip(distances, widths, factors, strict=True)):
        du = (weight / mass).unsqueeze(-1) * contracted[axis]
        if normalized:
            others = math.prod((m for i, m in enumerate(masses) if i != axis), start=torch.ones_like(mass))
            du = du - (weight * product / mass.square() * others).unsqueeze(-1)
        if gauss:
            positions.append((du * u * d / w.square()).sum(-1))
            spreads.append((du * u * d.square() / w**3).sum(-1))
        else:
            du = torch.where(u > 0, du, torch.zeros((), dtype=du.dtype, device=du.device))
            positions.append((du * d.sign()).sum(-1))
            spreads.append(du.sum(-1))
    order = [list(axes).index(m) for m in range(len(size))]
    dweight, dP = (product / mass).to(dtype), torch.stack([positions[axis] for axis in order]).to(dtype)
    if SIG is None:
        return dweight, dP, None
    return dweight, dP, (torch.stack([spreads[axis] for axis in order]) * SIG.sign()).to(dtype)


def _contracted(grad: Tensor, factors: list[Tensor], axis: int) -> Tensor:
    """[O, I, C, size of ``axis``]: the sum over the other axes of the gradient times their factors."""
    letters = _LETTERS[: len(factors)]
    others = [i for i in range(len(factors)) if i != axis]
    if not others:
        return grad.unsqueeze(2).expand_as(factors[0])
    terms = ",".join(f"oic{letters[i]}" for i in others)
    return torch.einsum(f"oi{letters},{terms}->oic{letters[axis]}", grad, *(factors[i] for i in others))
