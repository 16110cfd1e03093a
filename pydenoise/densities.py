"""Density functions of weighted convolution: outer products of symmetric per-axis lists with 1 in the centre.

Source: Cammarasana and Patane, "Optimal Weighted Convolution for Classification and Denoising" (2025).
"""

from collections.abc import Sequence
from functools import reduce
from numbers import Number, Real

import torch
from torch import Tensor

Coefficients = Tensor | Sequence[float] | Sequence[Sequence[float]]


def density(
    coefficients: Coefficients,
    kernel_size: int | Sequence[int],
    *,
    dims: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The density function ``alpha_1 x ... x alpha_d`` (outer product over the spatial axes) of a weighted convolution.

    Coefficients come outermost first and the centre's 1 is implied: ``density((0.25, 0.15, 0.55), 7)`` is the outer
    product of ``(0.25, 0.15, 0.55, 1, 0.55, 0.15, 0.25)`` with itself.

    Args:
        coefficients: K // 2 numbers (or a tensor [K // 2]) for all axes alike, or one such list per axis (or a tensor
            [d, K // 2]), which kernels with different extents need: ``density(((0.7,), (0.2, 0.8)), (3, 5))``. An axis
            of extent 1 takes an empty list. The result is differentiable in coefficients that are tensors.
        kernel_size: odd ints, one per axis; a single int K stands for ``dims`` axes of extent K.
        dims: number of axes where ``kernel_size`` is one int; 2 unless given.
        dtype, device: of the result. By default those of coefficients that are tensors; numbers are multiplied in
            float64 and rounded once, to torch's default dtype.

    Returns:
        Tensor of shape ``kernel_size``.

    Raises:
        ValueError: an even extent (it has no centre; the op and the modules take a dense density there), a wrong number
            of lists or coefficients, NaN or infinity. TypeError: coefficients that are no real numbers.
    """
    lists = axis_coefficients(coefficients, kernel_tuple(kernel_size, dims))
    if dtype is None:
        dtype = lists[0].dtype if holds_tensors(coefficients) else torch.get_default_dtype()
    return outer_product(lists).to(dtype=dtype, device=device)


def outer_product(lists: Sequence[Tensor]) -> Tensor:
    """The density function of one coefficient tensor [K // 2] per axis, unchecked; differentiable."""
    alphas = [torch.cat((half, half.new_ones(1), half.flip(0))) for half in lists]
    return reduce(lambda left, right: left.unsqueeze(-1) * right, alphas)


def kernel_tuple(kernel_size: int | Sequence[int], dims: int | None = None) -> tuple[int, ...]:
    """``kernel_size`` as one positive int per axis."""
    if isinstance(kernel_size, Sequence) and not isinstance(kernel_size, str):
        kernel = tuple(kernel_size)
        if not 1 <= len(kernel) <= 3 or dims not in (None, len(kernel)):
            allowed = "1 to 3 ints" if dims is None else f"{dims} ints (dims={dims})"
            raise ValueError(f"kernel_size: expected {allowed}, got {kernel_size}")
    else:
        if dims not in (None, 1, 2, 3):
            raise ValueError(f"dims: expected 1, 2 or 3, got {dims!r}")
        kernel = (kernel_size,) * (dims or 2)
    for extent in kernel:
        if isinstance(extent, bool) or not isinstance(extent, int):
            raise TypeError(f"kernel_size: expected an int or a tuple of ints, got {kernel_size!r}")
        if extent < 1:
            raise ValueError(f"kernel_size: expected ints >= 1, got {kernel_size}")
    return kernel


def axis_coefficients(coefficients: Coefficients, kernel: tuple[int, ...]) -> list[Tensor]:
    """Checked coefficients, one tensor [K // 2] per axis; numbers become float64 tensors.

    The same tensor stands for every axis where one flat list was given.
    """
    refuse_even(kernel)
    per_axis = is_per_axis(coefficients)
    if per_axis and len(coefficients) != len(kernel):
        raise ValueError(
            f"density: expected one list of coefficients per axis, {len(kernel)} for kernel {kernel}, "
            f"got {len(coefficients)} (a dense density is a tensor of shape {kernel})"
        )
    if not per_axis and len(set(kernel)) > 1:
        raise ValueError(
            f"density: a flat list of coefficients needs the same extent on every axis, got kernel {kernel}; "
            "give one list per axis"
        )
    lists = [_vector(item) for item in coefficients] if per_axis else [_vector(coefficients)] * len(kernel)
    for axis, (half, extent) in enumerate(zip(lists, kernel, strict=True)):
        if half.numel() != extent // 2:
            raise ValueError(
                f"density: axis {axis} of extent {extent} takes {extent // 2} coefficients (outermost first, without "
                f"the centre's 1), got {half.numel()}"
            )
    return lists


def refuse_even(kernel: Sequence[int]) -> None:
    """Raise ``ValueError`` if some extent is even: coefficients describe kernels with a centre."""
    if any(extent % 2 == 0 for extent in kernel):
        raise ValueError(
            f"density: coefficients need odd kernel sizes (an even one has no centre), got {tuple(kernel)}; "
            f"give a dense density, a tensor of shape {tuple(kernel)}"
        )


def is_per_axis(coefficients: Coefficients) -> bool:
    """Whether ``coefficients`` holds one list per axis rather than one flat list."""
    if isinstance(coefficients, Tensor):
        return coefficients.dim() == 2
    if isinstance(coefficients, str) or not hasattr(coefficients, "__len__") or not hasattr(coefficients, "__iter__"):
        raise TypeError(f"density: expected coefficients or a tensor, got {type(coefficients).__name__}")
    nested = [not isinstance(c, Number) and getattr(c, "ndim", 1) > 0 for c in coefficients]
    if any(nested) and not all(nested):
        raise TypeError("density: expected numbers or one list of numbers per axis, got a mixture of both")
    return bool(nested) and all(nested)


def holds_tensors(coefficients: Coefficients) -> bool:
    """Whether any coefficient comes from a tensor, whose dtype and device the result then has."""
    if isinstance(coefficients, Tensor):
        return True
    return isinstance(coefficients, Sequence) and any(map(holds_tensors, coefficients))


def _vector(values: Tensor | Sequence[float]) -> Tensor:
    """One list of coefficients as a floating 1-D tensor, checked to be finite."""
    if not isinstance(values, Tensor):
        values = _from_numbers(values)
    if values.dim() != 1:
        raise ValueError(f"density: expected coefficients of one dimension per axis, got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"density: expected floating-point coefficients, got {values.dtype}")
    finite_here = values.device.type == "cpu" and not torch.compiler.is_compiling()
    if finite_here and not torch.isfinite(values.detach()).all():
        raise ValueError(f"density: every coefficient must be finite, got {values.detach().tolist()}")
    return values


def _from_numbers(values: Sequence[float]) -> Tensor:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"density: expected a list of numbers, got {values!r}")
    items = list(values)
    if items and all(isinstance(item, Tensor) for item in items):
        return torch.stack(items)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, Real):
            raise TypeError(f"density: expected real numbers, got {type(item).__name__} in {items}")
    return torch.tensor(items, dtype=torch.float64)
