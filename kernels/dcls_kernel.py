"""DCLS kernels and their gradients. Nothing but the kernel, or the parameters' gradients, is written to memory.

A pair of an output and an input channel has one kernel, seen as a matrix: columns are the last axis, rows all others.
Forward, a program makes a tile of one kernel, the product of two small matrices of factors that it holds in registers.
Backward, a program owns a block of components of one pair and goes over that pair's gradient.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

LEAST_MASS = tl.constexpr(1e-7)  # as in pydenoise/reference/dcls_kernel.py
_SCALARS = ("pairs", "components", *(f"{name}_{axis}" for name in ("size", "place", "centre") for axis in "zyx"))


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _read(P, SIG, place, n, c, ok, pairs, components, spread):
    """Positions and widths of components ``c`` of pair ``n``, from those of axis ``place``."""
    at = (place.to(tl.int64) * pairs + n) * components + c
    position = tl.load(P + at, mask=ok, other=0.0).to(tl.float32)
    if SIG is not None:
        width = tl.abs(tl.load(SIG + at, mask=ok, other=0.0).to(tl.float32)) + spread
    else:
        width = tl.zeros_like(position) + spread
    return position, width


@triton.jit
def _factor(d, width, GAUSS: tl.constexpr):
    if GAUSS:
        t = d / width
        return tl.exp(-0.5 * t * t)
    v = width - tl.abs(d)
    return tl.where(v < 0, 0.0, v)  # not maximum: a NaN must stay a NaN


@triton.jit
def _slopes(d, width, u, GAUSS: tl.constexpr):
    """Derivatives of the factor ``u`` by position and by width."""
    if GAUSS:
        by_position = u * d / (width * width)
        return by_position, by_position * d / width
    inside = tl.where(u > 0, 1.0, 0.0)
    return tl.where(d > 0, inside, tl.where(d < 0, -inside, 0.0)), inside


@triton.jit
def _mass(position, width, centre, size, GAUSS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of an axis' factors."""
    total = tl.zeros_like(position)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        u = _factor((i - centre).to(tl.float32)[None, :] - position[:, None], width[:, None], GAUSS)
        total += tl.sum(tl.where((i < size)[None, :], u, 0.0), 1)
    return total


@triton.jit
def _mass_slopes(position, width, centre, size, GAUSS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of an axis' factors, and its derivatives by position and by width."""
    total = tl.zeros_like(position)
    by_position = tl.zeros_like(position)
    by_width = tl.zeros_like(position)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = (i < size)[None, :]
        d = (i - centre).to(tl.float32)[None, :] - position[:, None]
        u = _factor(d, width[:, None], GAUSS)
        first, second = _slopes(d, width[:, None], u, GAUSS)
        total += tl.sum(tl.where(ok, u, 0.0), 1)
        by_position += tl.sum(tl.where(ok, first, 0.0), 1)
        by_width += tl.sum(tl.where(ok, second, 0.0), 1)
    return total, by_position, by_width


@triton.jit(do_not_specialize=_SCALARS)
def construct_kernel(
    weight, P, SIG, kernel,
    pairs, components, size_z, size_y, size_x, place_z, place_y, place_x, centre_z, centre_y, centre_x, spread,
    DIMS: tl.constexpr, GAUSS: tl.constexpr, NORMALIZED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_R, BLOCK_N] tile of one kernel; of a 1-D one, BLOCK_N taps."""
    rows = size_z * size_y
    tiles_x = tl.cdiv(size_x, BLOCK_N)
    tiles_r = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0)
    x = program % tiles_x * BLOCK_N + tl.arange(0, BLOCK_N)
    row = program // tiles_x % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    n = (program // tiles_x // tiles_r).to(tl.int64)
    distance_x = (x - centre_x).to(tl.float32)
    if DIMS > 1:
        tile = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        distance_y = (row % size_y - centre_y).to(tl.float32)
        distance_z = (row // size_y - centre_z).to(tl.float32)
    else:
        tile = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, components, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        ok = c < components
        w = tl.load(weight + n * components + c, mask=ok, other=0.0).to(tl.float32)
        position_x, width_x = _read(P, SIG, place_x, n, c, ok, pairs, components, spread)
        mass = _mass(position_x, width_x, centre_x, size_x, GAUSS, BLOCK_N)
        if DIMS > 1:
            position, width = _read(P, SIG, place_y, n, c, ok, pairs, components, spread)
            mass *= _mass(position, width, centre_y, size_y, GAUSS, BLOCK_N)
            left = _factor(distance_y[:, None] - position[None, :], width[None, :], GAUSS)
        if DIMS > 2:
            position, width = _read(P, SIG, place_z, n, c, ok, pairs, components, spread)
            mass *= _mass(position, width, centre_z, size_z, GAUSS, BLOCK_N)
            left *= _factor(distance_z[:, None] - position[None, :], width[None, :], GAUSS)
        if NORMALIZED:
            w /= mass + LEAST_MASS
        right = _factor(distance_x[None, :] - position_x[:, None], width_x[:, None], GAUSS) * w[:, None]
        if DIMS > 1:
            tile = tl.dot(left, right, tile, input_precision="ieee")
        else:
            tile += tl.sum(right, 0)
    if DIMS > 1:
        at = (n * rows + row)[:, None] * size_x + x[None, :]
        tl.store(kernel + at, tile.to(kernel.dtype.element_ty), mask=(row < rows)[:, None] & (x < size_x)[None, :])
    else:
        tl.store(kernel + n * size_x + x, tile.to(kernel.dtype.element_ty), mask=x < size_x)


@triton.jit
def _write(P_grad, SIG_grad, SIG, place, n, c, ok, pairs, components, by_position, by_width):
    at = (place.to(tl.int64) * pairs + n) * components + c
    tl.store(P_grad + at, by_position.to(P_grad.dtype.element_ty), mask=ok)
    if SIG is not None:
        value = tl.load(SIG + at, mask=ok, other=0.0).to(tl.float32)
        by_width = tl.where(value > 0, by_width, tl.where(value < 0, -by_width, 0.0))
        tl.store(SIG_grad + at, by_width.to(SIG_grad.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SCALARS)
def gradient_kernel(
    grad, weight, P, SIG, weight_grad, P_grad, SIG_grad,
    pairs, components, size_z, size_y, size_x, place_z, place_y, place_x, centre_z, centre_y, centre_x, spread,
    DIMS: tl.constexpr, GAUSS: tl.constexpr, NORMALIZED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_C components of one pair. Everything is linear in ``grad``, so tiles of it are added up."""
    blocks = tl.cdiv(components, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < components
    rows = size_z * size_y
    w = tl.load(weight + n * components + c, mask=ok, other=0.0).to(tl.float32)
    position_x, width_x = _read(P, SIG, place_x, n, c, ok, pairs, components, spread)
    product = tl.zeros((BLOCK_C,), tl.float32)  # of the gradient and the component's shape, over all taps
    p_x = tl.zeros((BLOCK_C,), tl.float32)  # the same with a factor's derivative in its place
    s_x = tl.zeros((BLOCK_C,), tl.float32)
    if DIMS > 1:
        position_y, width_y = _read(P, SIG, place_y, n, c, ok, pairs, components, spread)
        p_y = tl.zeros((BLOCK_C,), tl.float32)
        s_y = tl.zeros((BLOCK_C,), tl.float32)
    if DIMS > 2:
        position_z, width_z = _read(P, SIG, place_z, n, c, ok, pairs, components, spread)
        p_z = tl.zeros((BLOCK_C,), tl.float32)
        s_z = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, size_x, BLOCK_N):
        x = first + tl.arange(0, BLOCK_N)
        d = (x - centre_x).to(tl.float32)[None, :] - position_x[:, None]
        columns = _factor(d, width_x[:, None], GAUSS)
        by_position, by_width = _slopes(d, width_x[:, None], columns, GAUSS)
        if DIMS == 1:
            g = tl.load(grad + n * size_x + x, mask=x < size_x, other=0.0).to(tl.float32)[None, :]
            product += tl.sum(g * columns, 1)
            p_x += tl.sum(g * by_position, 1)
            s_x += tl.sum(g * by_width, 1)
        else:
            for start in range(0, rows, BLOCK_R):
                row = start + tl.arange(0, BLOCK_R)
                mask = (row < rows)[:, None] & (x < size_x)[None, :]
                at = (n * rows + row)[:, None] * size_x + x[None, :]
                g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
                d = (row % size_y - centre_y).to(tl.float32)[None, :] - position_y[:, None]
                u_y = _factor(d, width_y[:, None], GAUSS)
                by_y, width_by_y = _slopes(d, width_y[:, None], u_y, GAUSS)
                left = u_y
                if DIMS > 2:
                    d = (row // size_y - centre_z).to(tl.float32)[None, :] - position_z[:, None]
                    u_z = _factor(d, width_z[:, None], GAUSS)
                    by_z, width_by_z = _slopes(d, width_z[:, None], u_z, GAUSS)
                    left *= u_z
                    by_y *= u_z
                    width_by_y *= u_z
                    by_z *= u_y
                    width_by_z *= u_y
                of_columns = tl.dot(left, g, input_precision="ieee")
                p_x += tl.sum(of_columns * by_position, 1)
                s_x += tl.sum(of_columns * by_width, 1)
                of_rows = tl.dot(columns, tl.trans(g), input_precision="ieee")
                product += tl.sum(of_rows * left, 1)
                p_y += tl.sum(of_rows * by_y, 1)
                s_y += tl.sum(of_rows * width_by_y, 1)
                if DIMS > 2:
                    p_z += tl.sum(of_rows * by_z, 1)
                    s_z += tl.sum(of_rows * width_by_z, 1)
    if NORMALIZED:
        mass_x, mass_p_x, mass_s_x = _mass_slopes(position_x, width_x, centre_x, size_x, GAUSS, BLOCK_N)
        mass = mass_x
        if DIMS > 1:
            mass_y, mass_p_y, mass_s_y = _mass_slopes(position_y, width_y, centre_y, size_y, GAUSS, BLOCK_N)
            mass = mass_x * mass_y
        if DIMS > 2:
            mass_z, mass_p_z, mass_s_z = _mass_slopes(position_z, width_z, centre_z, size_z, GAUSS, BLOCK_N)
            mass *= mass_z
        inverse = 1.0 / (mass + LEAST_MASS)
        product *= inverse
        w *= inverse
        if DIMS == 1:
            p_x -= product * mass_p_x
            s_x -= product * mass_s_x
        elif DIMS == 2:
            p_x -= product * mass_y * mass_p_x
            s_x -= product * mass_y * mass_s_x
            p_y -= product * mass_x * mass_p_y
            s_y -= product * mass_x * mass_s_y
        else:
            p_x -= product * mass_y * mass_z * mass_p_x
            s_x -= product * mass_y * mass_z * mass_s_x
            p_y -= product * mass_x * mass_z * mass_p_y
            s_y -= product * mass_x * mass_z * mass_s_y
            p_z -= product * mass_x * mass_y * mass_p_z
            s_z -= product * mass_x * mass_y * mass_s_z
    tl.store(weight_grad + n * components + c, product.to(weight_grad.dtype.element_ty), mask=ok)
    _write(P_grad, SIG_grad, SIG, place_x, n, c, ok, pairs, components, w * p_x, w * s_x)
    if DIMS > 1:
        _write(P_grad, SIG_grad, SIG, place_y, n, c, ok, pairs, components, w * p_y, w * s_y)
    if DIMS > 2:
        _write(P_grad, SIG_grad, SIG, place_z, n, c, ok, pairs, components, w * p_z, w * s_z)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_C", "BLOCK_R", "BLOCK_N")
_TILES = [(16, 32, 32, 4, 1), (16, 16, 16, 2, 1)]
_GRADIENT_TILES = [(16, 16, 16, 4, 1)]


def _extents(args: dict) -> dict[str, int]:
    rows = args["size_z"] * args["size_y"]
    return {"BLOCK_C": args["components"], "BLOCK_R": rows, "BLOCK_N": args["size_x"]}


# Not timed: another tile would round sums another way, and a kernel is made in microseconds.
CONSTRUCT = Kernel("dcls_kernel", construct_kernel, variants("dcls_kernel", _NAMES, _TILES), _extents)
GRADIENT = Kernel(
    "dcls_kernel_gradient", gradient_kernel, variants("dcls_kernel_gradient", _NAMES, _GRADIENT_TILES), _extents
)  # fmt: skip
KERNELS = (CONSTRUCT, GRADIENT)


# ------------------------------------------------------------------------------------------------------------ launches


def _shared(weight, P, SIG, size, axes, centres, gauss, normalized, spread) -> dict:
    missing = 3 - len(size)
    arguments = {
        "weight": weight.contiguous(), "P": P.contiguous(), "SIG": None if SIG is None else SIG.contiguous(),
        "pairs": weight.shape[0] * weight.shape[1], "components": weight.shape[2], "spread": float(spread),
        "DIMS": len(size), "GAUSS": gauss, "NORMALIZED": normalized,
    }  # fmt: skip
    for name, values, filling in (("size", size, 1), ("place", axes, 0), ("centre", centres, 0)):
        arguments |= dict(zip((f"{name}_{a}" for a in "zyx"), (filling,) * missing + tuple(values), strict=True))
    return arguments


def plan_forward(
    weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int], centres: Sequence[int],
    gauss: bool, normalized: bool, spread: float, kernel: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes ``kernel``."""
    arguments = _shared(weight, P, SIG, size, axes, centres, gauss, normalized, spread) | {"kernel": kernel}
    rows = math.prod(size[:-1])

    def grid(meta):
        return (arguments["pairs"] * triton.cdiv(rows, meta["BLOCK_R"]) * triton.cdiv(size[-1], meta["BLOCK_N"]),)

    return Launch(CONSTRUCT, arguments, grid)


def plan_backward(
    grad: Tensor, weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int],
    centres: Sequence[int], gauss: bool, normalized: bool, spread: float, weight_grad: Tensor, P_grad: Tensor,
    SIG_grad: Tensor | None,
) -> Launch:  # fmt: skip
    """The launch that writes the gradients."""
    arguments = _shared(weight, P, SIG, size, axes, centres, gauss, normalized, spread)
    results = {"weight_grad": weight_grad, "P_grad": P_grad, "SIG_grad": SIG_grad}
    arguments |= {"grad": grad.contiguous(), **results}

    def grid(meta):
        return (arguments["pairs"] * triton.cdiv(arguments["components"], meta["BLOCK_C"]),)

    return Launch(GRADIENT, arguments, grid)


def forward(
    weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int], centres: Sequence[int],
    gauss: bool, normalized: bool, spread: float,
) -> Tensor:  # fmt: skip
    """The kernel [O, I, *size]; arguments as the op's ``prepare`` returns them, not checked here."""
    kernel = torch.empty((*weight.shape[:2], *size), dtype=weight.dtype, device=weight.device)
    plan_forward(weight, P, SIG, size, axes, centres, gauss, normalized, spread, kernel).run()
    return kernel


def backward(
    grad: Tensor, weight: Tensor, P: Tensor, SIG: Tensor | None, size: Sequence[int], axes: Sequence[int],
    centres: Sequence[int], gauss: bool, normalized: bool, spread: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of weight, P and SIG for the kernel's gradient ``grad``."""
    grads = [
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weight, P, SIG)
    ]  # fmt: skip
    plan_backward(grad, weight, P, SIG, size, axes, centres, gauss, normalized, spread, *grads).run()
    return tuple(grads)
