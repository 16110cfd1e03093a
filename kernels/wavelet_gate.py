"""Gated Haar wavelets: a program takes some channels of some blocks of 2 x 2 pixels, and loads each pixel once.

Gradients of gates are sums over pixels: a program adds up its part of them, and a second, small kernel joins the parts
in order. Where columns are adjacent, the two of a block are loaded and stored together.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, multiprocessors, variants
from torch import Tensor

_SIZES = ("blocks", "pixels", "height", "per_part", "parts", "tune")
_LEAST_PART = 256  # blocks, or pixels, that a program adds up


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _place(program, blocks, columns, channels, first, end, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """(channels [C], rows [P], columns [P], mask [C, P]) of the blocks from ``first`` on, below ``end``."""
    c = program % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = first + tl.arange(0, BLOCK_P)
    i = p // columns
    mask = (c < channels)[:, None] & (p < end)[None, :]
    return c.to(tl.int64), i.to(tl.int64), (p - i * columns).to(tl.int64), mask


@triton.jit
def _gates(gate, n, c, channels, gate_n, gate_k, gate_c):
    """Half the four gates, each [C]."""
    at = gate + n * gate_n + c * gate_c
    ok = c < channels
    g0 = tl.load(at, mask=ok, other=0.0).to(tl.float32) * 0.5
    g1 = tl.load(at + gate_k, mask=ok, other=0.0).to(tl.float32) * 0.5
    g2 = tl.load(at + 2 * gate_k, mask=ok, other=0.0).to(tl.float32) * 0.5
    g3 = tl.load(at + 3 * gate_k, mask=ok, other=0.0).to(tl.float32) * 0.5
    return g0, g1, g2, g3


@triton.jit
def _butterfly(a, b, c, d):
    """Signs times (a, b, c, d): pixels to bands, bands to pixels, gates to factors of pixels."""
    above, below, left, right = a + b, c + d, a - b, c - d
    return above + below, left + right, above - below, left - right


@triton.jit
def _load_row(at, step, mask, right, PAIRED: tl.constexpr):
    """The left and the right pixels [C, P] of a row of blocks, zero where there is none."""
    if PAIRED:
        pair = at[:, :, None] + tl.arange(0, 2)[None, None, :]
        return tl.split(tl.load(pair, mask=mask[:, :, None], other=0.0).to(tl.float32))
    else:
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        return a, tl.load(at + step, mask=mask & right[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_blocks(x, c, i, j, mask, height, width, x_c, x_h, x_w, PAIRED: tl.constexpr, REPEAT: tl.constexpr):
    """The pixels a, b, c, d [C, P] of blocks; beyond the image zero, or with REPEAT the last ones again."""
    at = x + (c * x_c)[:, None] + (2 * i * x_h + 2 * j * x_w)[None, :]
    right, below = 2 * j + 1 < width, 2 * i + 1 < height
    p0, p1 = _load_row(at, x_w, mask, right, PAIRED)
    p2, p3 = _load_row(at + x_h, x_w, mask & below[None, :], right, PAIRED)
    if REPEAT:
        if not PAIRED:
            p1, p3 = tl.where(right[None, :], p1, p0), tl.where(right[None, :], p3, p2)
        p2, p3 = tl.where(below[None, :], p2, p0), tl.where(below[None, :], p3, p1)
    return p0, p1, p2, p3


@triton.jit
def _store_row(at, a, b, step, mask, right, PAIRED: tl.constexpr):
    if PAIRED:
        pair = at[:, :, None] + tl.arange(0, 2)[None, None, :]
        tl.store(pair, tl.join(a, b).to(at.dtype.element_ty), mask=mask[:, :, None])
    else:
        tl.store(at, a.to(at.dtype.element_ty), mask=mask)
        tl.store(at + step, b.to(at.dtype.element_ty), mask=mask & right[None, :])


@triton.jit
def _store_blocks(y, p0, p1, p2, p3, c, i, j, mask, height, width, y_c, y_h, y_w, PAIRED: tl.constexpr):
    """Those of the pixels of blocks that are in the image."""
    at = y + (c * y_c)[:, None] + (2 * i * y_h + 2 * j * y_w)[None, :]
    right, below = 2 * j + 1 < width, 2 * i + 1 < height
    _store_row(at, p0, p1, y_w, mask, right, PAIRED)
    _store_row(at + y_h, p2, p3, y_w, mask & below[None, :], right, PAIRED)


@triton.jit(do_not_specialize=_SIZES)
def down_kernel(
    x, gate, y,
    blocks, columns, channels, height, width, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, gate_n, gate_k, gate_c, tune,
    PAIRED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y[n, c, i, j] = the sum of the gated bands of a block."""
    tiles = tl.cdiv(blocks, BLOCK_P)
    program = tl.program_id(0) // tiles
    n = (program // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_P
    c, i, j, mask = _place(program, blocks, columns, channels, first, blocks, BLOCK_C, BLOCK_P)
    p0, p1, p2, p3 = _load_blocks(x + n * x_n, c, i, j, mask, height, width, x_c, x_h, x_w, PAIRED, True)
    g0, g1, g2, g3 = _gates(gate, n, c, channels, gate_n, gate_k, gate_c)
    f0, f1, f2, f3 = _butterfly(g0, g1, g2, g3)
    value = (p0 * f0[:, None] + p1 * f1[:, None]) + (p2 * f2[:, None] + p3 * f3[:, None])
    at = y + n * y_n + (c * y_c)[:, None] + (i * y_h + j * y_w)[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def up_kernel(
    x, gate, y,
    blocks, columns, channels, height, width, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, gate_n, gate_k, gate_c, tune,
    PAIRED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The pixels of y from the four gated bands in x."""
    tiles = tl.cdiv(blocks, BLOCK_P)
    program = tl.program_id(0) // tiles
    n = (program // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_P
    c, i, j, mask = _place(program, blocks, columns, channels, first, blocks, BLOCK_C, BLOCK_P)
    g0, g1, g2, g3 = _gates(gate, n, c, channels, gate_n, gate_k, gate_c)
    at = x + n * x_n + (c * x_c)[:, None] + (i * x_h + j * x_w)[None, :]
    band = x_c * channels
    b0 = tl.load(at, mask=mask, other=0.0).to(tl.float32) * g0[:, None]
    b1 = tl.load(at + band, mask=mask, other=0.0).to(tl.float32) * g1[:, None]
    b2 = tl.load(at + 2 * band, mask=mask, other=0.0).to(tl.float32) * g2[:, None]
    b3 = tl.load(at + 3 * band, mask=mask, other=0.0).to(tl.float32) * g3[:, None]
    p0, p1, p2, p3 = _butterfly(b0, b1, b2, b3)
    _store_blocks(y + n * y_n, p0, p1, p2, p3, c, i, j, mask, height, width, y_c, y_h, y_w, PAIRED)


@triton.jit
def _store_sums(sums, n, part, parts, c, channels, s0, s1, s2, s3):
    """Four sums [C] to sums [n, part, 4, channels]."""
    at = sums + (n * parts + part) * 4 * channels + c
    tl.store(at, s0, mask=c < channels)
    tl.store(at + channels, s1, mask=c < channels)
    tl.store(at + 2 * channels, s2, mask=c < channels)
    tl.store(at + 3 * channels, s3, mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def down_backward_kernel(
    grad, x, gate, offset, y, sums,
    blocks, columns, channels, height, width, per_part, parts, g_n, g_c, g_h, g_w, x_n, x_c, x_h, x_w, y_n, y_c, y_h,
    y_w, gate_n, gate_k, gate_c, tune, PAIRED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y: the gradient of the image, plus ``offset`` [n, channels]; sums: of grad times pixels. Either may be None."""
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    n = (program // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, blocks)
    none = tl.zeros((BLOCK_C,), tl.float32)
    s0, s1, s2, s3 = none, none, none, none
    for first in range(part * per_part, end, BLOCK_P):
        c, i, j, mask = _place(program, blocks, columns, channels, first, end, BLOCK_C, BLOCK_P)
        at = grad + n * g_n + (c * g_c)[:, None] + (i * g_h + j * g_w)[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if sums is not None:
            p0, p1, p2, p3 = _load_blocks(x + n * x_n, c, i, j, mask, height, width, x_c, x_h, x_w, PAIRED, True)
            s0 += tl.sum(g * p0, 1)
            s1 += tl.sum(g * p1, 1)
            s2 += tl.sum(g * p2, 1)
            s3 += tl.sum(g * p3, 1)
        if y is not None:
            g0, g1, g2, g3 = _gates(gate, n, c, channels, gate_n, gate_k, gate_c)
            f0, f1, f2, f3 = _butterfly(g0, g1, g2, g3)
            zero = tl.zeros_like(g)
            q0, q1, q2, q3 = f0[:, None] + zero, f1[:, None] + zero, f2[:, None] + zero, f3[:, None] + zero
            right, below = (2 * j + 1 < width)[None, :], (2 * i + 1 < height)[None, :]
            q0, q2 = tl.where(right, q0, q0 + q1), tl.where(right, q2, q2 + q3)
            q0, q1 = tl.where(below, q0, q0 + q2), tl.where(below, q1, q1 + q3)
            add = zero
            if offset is not None:
                add += tl.load(offset + n * channels + c, mask=c < channels, other=0.0)[:, None]
            _store_blocks(y + n * y_n, g * q0 + add, g * q1 + add, g * q2 + add, g * q3 + add, c, i, j, mask, height,
                          width, y_c, y_h, y_w, PAIRED)  # fmt: skip
    if sums is not None:
        c = program % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
        _store_sums(sums, n, part, parts, c, channels, s0, s1, s2, s3)


@triton.jit
def _band_gradient(v, k, g, y, offset, n, c, i, j, mask, channels, y_n, y_c, y_h, y_w):
    """The gradient of band ``k`` of the input: half the gate is ``g``, the gradient of the gated band ``v``."""
    value = v * g[:, None]
    if offset is not None:
        value += tl.load(offset + (n * 4 + k) * channels + c, mask=c < channels, other=0.0)[:, None]
    at = y + n * y_n + ((c + k * channels) * y_c)[:, None] + (i * y_h + j * y_w)[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def up_backward_kernel(
    grad, x, gate, offset, y, sums,
    blocks, columns, channels, height, width, per_part, parts, g_n, g_c, g_h, g_w, x_n, x_c, x_h, x_w, y_n, y_c, y_h,
    y_w, gate_n, gate_k, gate_c, tune, PAIRED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y: the gradient of the bands, plus ``offset`` [n, 4 channels]; sums: of both gradients. Either may be None."""
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    n = (program // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, blocks)
    none = tl.zeros((BLOCK_C,), tl.float32)
    s0, s1, s2, s3 = none, none, none, none
    for first in range(part * per_part, end, BLOCK_P):
        c, i, j, mask = _place(program, blocks, columns, channels, first, end, BLOCK_C, BLOCK_P)
        p0, p1, p2, p3 = _load_blocks(grad + n * g_n, c, i, j, mask, height, width, g_c, g_h, g_w, PAIRED, False)
        v0, v1, v2, v3 = _butterfly(p0, p1, p2, p3)
        if sums is not None:
            at = x + n * x_n + (c * x_c)[:, None] + (i * x_h + j * x_w)[None, :]
            band = x_c * channels
            s0 += tl.sum(v0 * tl.load(at, mask=mask, other=0.0).to(tl.float32), 1)
            s1 += tl.sum(v1 * tl.load(at + band, mask=mask, other=0.0).to(tl.float32), 1)
            s2 += tl.sum(v2 * tl.load(at + 2 * band, mask=mask, other=0.0).to(tl.float32), 1)
            s3 += tl.sum(v3 * tl.load(at + 3 * band, mask=mask, other=0.0).to(tl.float32), 1)
        if y is not None:
            g0, g1, g2, g3 = _gates(gate, n, c, channels, gate_n, gate_k, gate_c)
            _band_gradient(v0, 0, g0, y, offset, n, c, i, j, mask, channels, y_n, y_c, y_h, y_w)
            _band_gradient(v1, 1, g1, y, offset, n, c, i, j, mask, channels, y_n, y_c, y_h, y_w)
            _band_gradient(v2, 2, g2, y, offset, n, c, i, j, mask, channels, y_n, y_c, y_h, y_w)
            _band_gradient(v3, 3, g3, y, offset, n, c, i, j, mask, channels, y_n, y_c, y_h, y_w)
    if sums is not None:
        c = program % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
        _store_sums(sums, n, part, parts, c, channels, s0, s1, s2, s3)


@triton.jit(do_not_specialize=_SIZES)
def gate_gradient_kernel(
    sums, y, channels, parts, UP: tl.constexpr, SHARED: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """y: gradients of the gates, [n, 4], or [n, 4, channels] without SHARED, from the sums of the parts."""
    tiles = tl.cdiv(channels, BLOCK_C)
    if SHARED:
        tiles = 1
    n = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * BLOCK_C
    end = begin + BLOCK_C
    if SHARED:
        end = channels
    none = tl.zeros((BLOCK_C,), tl.float32)
    s0, s1, s2, s3 = none, none, none, none
    for first in range(begin, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        ok = c < channels
        for part in range(0, parts):
            at = sums + (n * parts + part) * 4 * channels + c
            s0 += tl.load(at, mask=ok, other=0.0)
            s1 += tl.load(at + channels, mask=ok, other=0.0)
            s2 += tl.load(at + 2 * channels, mask=ok, other=0.0)
            s3 += tl.load(at + 3 * channels, mask=ok, other=0.0)
    if not UP:
        s0, s1, s2, s3 = _butterfly(s0, s1, s2, s3)
    if SHARED:
        at = y + n * 4
        tl.store(at, (tl.sum(s0, 0) * 0.5).to(y.dtype.element_ty))
        tl.store(at + 1, (tl.sum(s1, 0) * 0.5).to(y.dtype.element_ty))
        tl.store(at + 2, (tl.sum(s2, 0) * 0.5).to(y.dtype.element_ty))
        tl.store(at + 3, (tl.sum(s3, 0) * 0.5).to(y.dtype.element_ty))
    else:
        c = begin + tl.arange(0, BLOCK_C)
        at = y + n * 4 * channels + c
        tl.store(at, (s0 * 0.5).to(y.dtype.element_ty), mask=c < channels)
        tl.store(at + channels, (s1 * 0.5).to(y.dtype.element_ty), mask=c < channels)
        tl.store(at + 2 * channels, (s2 * 0.5).to(y.dtype.element_ty), mask=c < channels)
        tl.store(at + 3 * channels, (s3 * 0.5).to(y.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def pool_kernel(
    x, sums, pixels, columns, channels, per_part, parts, x_n, x_c, x_h, x_w, tune, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the pixels: [n, part, channels]."""
    part, program = tl.program_id(0) % parts, tl.program_id(0) // parts
    n = (program // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, pixels)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(part * per_part, end, BLOCK_P):
        c, i, j, mask = _place(program, pixels, columns, channels, first, end, BLOCK_C, BLOCK_P)
        at = x + n * x_n + (c * x_c)[:, None] + (i * x_h + j * x_w)[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 1)
    c = program % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(sums + (n * parts + part) * channels + c, total, mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def mean_kernel(sums, y, channels, parts, pixels, BLOCK_C: tl.constexpr):
    """y [n, channels] from the sums of the parts."""
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + (n * parts + part) * channels + c, mask=c < channels, other=0.0)
    tl.store(y + n * channels + c, (total / pixels).to(y.dtype.element_ty), mask=c < channels)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_C", "BLOCK_P")
_TILES = {  # by what is adjacent
    "columns": [(1, 1024, 4, 1), (4, 256, 4, 1), (16, 64, 4, 1)],
    "channels": [(64, 16, 4, 1), (32, 32, 4, 1), (256, 4, 4, 1)],
}
_BACKWARD_TILES = {  # larger ones spill
    "columns": [(1, 512, 4, 1), (4, 128, 4, 1), (8, 64, 4, 1)],
    "channels": [(64, 8, 4, 1), (32, 8, 4, 1), (128, 4, 4, 1)],
}
_KEYS = ("tune", "channels", "PAIRED")
_FUNCTIONS = {
    "wavelet_down": down_kernel,
    "wavelet_up": up_kernel,
    "wavelet_down_backward": down_backward_kernel,
    "wavelet_up_backward": up_backward_kernel,
    "wavelet_pool": pool_kernel,
}


def _extents(args: dict) -> dict[str, int]:
    return {"BLOCK_C": args["channels"], "BLOCK_P": args["pixels"] if "pixels" in args else args["blocks"]}


def _kernels() -> dict[tuple[str, str], Kernel]:
    found = {}
    for (name, function), adjacent in [(item, adjacent) for item in _FUNCTIONS.items() for adjacent in _TILES]:
        full = name if adjacent == "columns" else f"{name}_last"
        tiles = (_BACKWARD_TILES if name.endswith("backward") else _TILES)[adjacent]
        keys = _KEYS if function is not pool_kernel else _KEYS[:2]
        found[name, adjacent] = Kernel(full, function, variants(full, _NAMES, tiles), _extents, keys)
    return found


_BY_LAYOUT = _kernels()
# One tile each: another one would round sums another way, and their time is that of a launch.
GATE_GRADIENT = Kernel(
    "wavelet_gate_gradient",
    gate_gradient_kernel,
    variants("wavelet_gate_gradient", ("BLOCK_C",), [(64, 1, 1)]),
    lambda args: {"BLOCK_C": args["channels"]},
)
MEAN = Kernel(
    "wavelet_mean",
    mean_kernel,
    variants("wavelet_mean", ("BLOCK_C",), [(64, 1, 1)]),
    lambda args: {"BLOCK_C": args["channels"]},
)
KERNELS = (*_BY_LAYOUT.values(), GATE_GRADIENT, MEAN)


# ------------------------------------------------------------------------------------------------------------ launches


def _strides(prefix: str, tensor: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0, 0) if tensor is None else tensor.stride()
    return dict(zip((f"{prefix}_n", f"{prefix}_c", f"{prefix}_h", f"{prefix}_w"), strides, strict=True))


def _gate_strides(gate: Tensor) -> dict[str, int]:
    return {"gate_n": gate.stride(0), "gate_k": gate.stride(1), "gate_c": gate.stride(2) if gate.dim() == 3 else 0}


def _last(input: Tensor) -> bool:
    """Whether channels are adjacent in ``input``, and so in results: as ``pydenoise.ops.wavelet_gate`` decides."""
    return input.shape[1] > 1 and input.stride(1) == 1 and input.stride(3) != 1


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not _last(like):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    n, c, h, w = shape
    return torch.empty((n, h, w, c), dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


def _paired(width: int, *images: Tensor | None) -> bool:
    return width % 2 == 0 and all(image is None or image.stride(3) == 1 for image in images)


def _geometry(channels: int, size: tuple[int, int]) -> dict[str, int]:
    """Blocks of 2 x 2 of an image of ``size``."""
    height, width = size
    columns = (width + 1) // 2
    blocks = (height + 1) // 2 * columns
    return {
        "blocks": blocks, "columns": columns, "channels": channels, "height": height, "width": width,
        "tune": blocks.bit_length(),
    }  # fmt: skip


def _parts(input: Tensor, channels: int, pixels: int) -> dict[str, int]:
    """How many programs share the pixels of a sample and some of its channels."""
    groups = input.shape[0] * triton.cdiv(channels, 16)
    parts = max(1, min(4 * multiprocessors(input.device) // groups, triton.cdiv(pixels, _LEAST_PART)))
    per_part = triton.cdiv(triton.cdiv(pixels, parts), _LEAST_PART) * _LEAST_PART
    return {"per_part": per_part, "parts": triton.cdiv(pixels, per_part)}


def plan_forward(input: Tensor, gate: Tensor, up: bool, size: tuple[int, int], output: Tensor) -> Launch:
    """The launch that writes ``output``, non-empty."""
    channels, batch = output.shape[1], output.shape[0]
    arguments = {
        "x": input, "gate": gate, "y": output, **_geometry(channels, size), **_strides("x", input),
        **_strides("y", output), **_gate_strides(gate), "PAIRED": _paired(size[1], output if up else input),
    }  # fmt: skip
    kernel = _BY_LAYOUT["wavelet_up" if up else "wavelet_down", "channels" if _last(input) else "columns"]

    def grid(meta):
        return (batch * triton.cdiv(channels, meta["BLOCK_C"]) * triton.cdiv(arguments["blocks"], meta["BLOCK_P"]),)

    return Launch(kernel, arguments, grid)


def plan_backward(
    grad: Tensor, input: Tensor, gate: Tensor, offset: Tensor | None, up: bool, size: tuple[int, int],
    output: Tensor | None, of_gate: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """The launches that write the gradients of input and gate, non-empty, or ``None`` where one is not wanted.

    ``offset``: float32 [n, channels of the input], added to the input's gradient.
    """
    batch, channels = grad.shape[:2]
    geometry = _geometry(channels, size)
    parts = _parts(input, channels, geometry["blocks"])
    sums = None
    if of_gate is not None:
        sums = torch.empty((batch, parts["parts"], 4, channels), dtype=torch.float32, device=input.device)
    images = (grad,) if up else (output, input if of_gate is not None else None)
    arguments = {
        "grad": grad, "x": input, "gate": gate, "offset": offset, "y": output, "sums": sums, **geometry, **parts,
        **_strides("g", grad), **_strides("x", input), **_strides("y", output), **_gate_strides(gate),
        "PAIRED": _paired(size[1], *images),
    }  # fmt: skip
    name = "wavelet_up_backward" if up else "wavelet_down_backward"
    kernel = _BY_LAYOUT[name, "channels" if _last(input) else "columns"]
    count = parts["parts"]
    found = [Launch(kernel, arguments, lambda meta: (batch * triton.cdiv(channels, meta["BLOCK_C"]) * count,))]
    if of_gate is not None:
        found.append(_plan_gates(sums, of_gate, up))
    return found


def _plan_gates(sums: Tensor, of_gate: Tensor, up: bool) -> Launch:
    batch, parts, _, channels = sums.shape
    shared = of_gate.dim() == 2
    arguments = {"sums": sums, "y": of_gate, "channels": channels, "parts": parts, "UP": up, "SHARED": shared}

    return Launch(
        GATE_GRADIENT, arguments, lambda meta: (batch if shared else batch * triton.cdiv(channels, meta["BLOCK_C"]),)
    )


def plan_pool(input: Tensor, output: Tensor) -> list[Launch]:
    """The launches that write the means ``output`` [n, channels], non-empty."""
    batch, channels, height, width = input.shape
    pixels = height * width
    parts = _parts(input, channels, pixels)
    count = parts["parts"]
    sums = torch.empty((batch, count, channels), dtype=torch.float32, device=input.device)
    arguments = {
        "x": input, "sums": sums, "pixels": pixels, "columns": width, "channels": channels, **parts,
        **_strides("x", input), "tune": pixels.bit_length(),
    }  # fmt: skip
    kernel = _BY_LAYOUT["wavelet_pool", "channels" if _last(input) else "columns"]
    joined = {"sums": sums, "y": output, "channels": channels, "parts": count, "pixels": pixels}
    return [
        Launch(kernel, arguments, lambda meta: (batch * triton.cdiv(channels, meta["BLOCK_C"]) * count,)),
        Launch(MEAN, joined, lambda meta: (batch * triton.cdiv(channels, meta["BLOCK_C"]),)),
    ]


# ---------------------------------------------------------------------------------------------------------- public API
# Arguments as the ``prepare`` functions of ``pydenoise.ops.wavelet_gate`` return them, not checked here.


def wavelet_gate(input: Tensor, gate: Tensor, up: bool, size: tuple[int, int]) -> Tensor:
    """The sum of gated bands, or the image of them: see the reference."""
    batch, channels = input.shape[0], input.shape[1] // (4 if up else 1)
    coarse = tuple((extent + 1) // 2 for extent in size)
    output = _empty(input, (batch, channels, *(size if up else coarse)))
    if output.numel():
        plan_forward(input, gate, up, size, output).run()
    return output


def wavelet_gate_backward(
    grad: Tensor, input: Tensor, gate: Tensor, pool_grad: Tensor | None, up: bool, size: tuple[int, int],
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input and gate, ``None`` where ``mask`` does not want them."""
    output = _empty(input, tuple(input.shape)) if mask[0] else None
    of_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if mask[1] else None
    offset = None
    if pool_grad is not None:
        offset = (pool_grad.float() / (input.shape[2] * input.shape[3])).contiguous()
    if input.numel() and any(mask):
        for launch in plan_backward(grad, input, gate, offset, up, size, output, of_gate):
            launch.run()
    return output, of_gate


def wavelet_gate_pool(input: Tensor) -> Tensor:
    """Means over the pixels, [n, channels]."""
    output = torch.empty(input.shape[:2], dtype=input.dtype, device=input.device)
    if output.numel():
        for launch in plan_pool(input, output):
            launch.run()
    return output
