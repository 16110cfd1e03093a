"""Weighted convolution as implicit matrix products over channels_last tensors: forward and all three gradients.

One kernel, ``conv_kernel``, computes every problem of this form, with q an output position, t a tap, and per axis
integers step, offset and hop:

    y[q, o] = act(b[o] + sum over t, c of x[q * step + offset + t * hop, c] * (W * density)[o, c, tap(t)]) + r[q, o]

The forward pass is one such problem. The input gradient is one per residue of the input position modulo the stride,
each with the taps that reach that residue (none: zeros are written), so no work goes to zeros between strided outputs.
The weight gradient is a product of the output gradient with the unfolded input, split over the pixels; a second kernel
adds the parts in a fixed order, multiplies by the density, and reduces the density's own gradient in the same pass.
No float atomics: a call with the same tiles gives the same bits.

Accumulation is in float32. ``W * density`` is formed in registers, tile by tile, and never written to memory.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Arguments whose divisibility says nothing about alignment: specialising on it would only compile more often.
_SIZES = ("pixels", "tune", *(f"{name}_{d}" for name in ("in", "out", "offset", "hop") for d in "dhw"))


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)  # not maximum: a NaN must stay a NaN
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "leaky_relu_0.01":
        v = tl.where(v < 0, v * 0.01, v)
    elif ACTIVATION == "leaky_relu_0.1":
        v = tl.where(v < 0, v * 0.1, v)
    elif ACTIVATION == "leaky_relu_0.2":
        v = tl.where(v < 0, v * 0.2, v)
    elif ACTIVATION == "softplus":  # the rounding of 1 + e is divided out of its logarithm
        e = tl.exp(-tl.abs(v))
        above = 1.0 + e
        rest = tl.where(above == 1.0, e, tl.log(above) * (e / tl.where(above == 1.0, 1.0, above - 1.0)))
        v = tl.where(v < 0, 0.0, v) + rest
    return v


@triton.jit
def _coordinates(m, out_d, out_h, out_w, DIMS: tl.constexpr):
    """Split the linear pixel index ``m`` into (n, d, h, w)."""
    rest = m // out_w
    w = m - rest * out_w
    if DIMS == 1:
        return rest, rest * 0, rest * 0, w
    above = rest // out_h
    h = rest - above * out_h
    if DIMS == 2:
        return above, above * 0, h, w
    n = above // out_d
    return n, above - n * out_d, h, w


@triton.jit
def _inside(d, h, w, in_d, in_h, in_w, DIMS: tl.constexpr):
    ok = (w >= 0) & (w < in_w)
    if DIMS > 1:
        ok = ok & (h >= 0) & (h < in_h)
    if DIMS > 2:
        ok = ok & (d >= 0) & (d < in_d)
    return ok


@triton.jit
def _offset(n, d, h, w, s_n, s_d, s_h, s_w, DIMS: tl.constexpr):
    """Element offset, in 64 bits: the coordinates are small, the product with a stride may not be."""
    offset = n.to(tl.int64) * s_n + w.to(tl.int64) * s_w
    if DIMS > 1:
        offset += h.to(tl.int64) * s_h
    if DIMS > 2:
        offset += d.to(tl.int64) * s_d
    return offset


@triton.jit
def _sum_of(rows, depth, ROWS_FIRST: tl.constexpr):
    """rows[i] + depth[k] as [i, k], or as [k, i]: loading a tile as the product reads it needs no transposition."""
    return rows[:, None] + depth[None, :] if ROWS_FIRST else rows[None, :] + depth[:, None]


@triton.jit
def _both(rows, depth, ROWS_FIRST: tl.constexpr):
    return rows[:, None] & depth[None, :] if ROWS_FIRST else rows[None, :] & depth[:, None]


@triton.jit
def _epilogue(acc, bias, residual, y, channel, channel_ok, rows_ok, n, d, h, w,
              r_n, r_c, r_d, r_h, r_w, y_n, y_c, y_d, y_h, y_w,
              HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
              DIMS: tl.constexpr):  # fmt: skip
    """Bias, activation, residual and store of a [pixels, channels] tile; ``channel`` counts over all groups."""
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    acc = _activate(acc, ACTIVATION)
    mask = rows_ok[:, None] & channel_ok[None, :]
    column = channel.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        at = _offset(n, d, h, w, r_n, r_d, r_h, r_w, DIMS)[:, None] + column * r_c
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    at = _offset(n, d, h, w, y_n, y_d, y_h, y_w, DIMS)[:, None] + column * y_c
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*_SIZES, "tap"))
def conv_kernel(
    x, weight, density, bias, residual, y,
    pixels, groups, in_channels, out_channels,
    x_n, x_d, x_h, x_w, w_group, w_out, w_in, w_tap,
    r_n, r_c, r_d, r_h, r_w, y_n, y_c, y_d, y_h, y_w,
    in_d, in_h, in_w, out_d, out_h, out_w,
    step_d, step_h, step_w, offset_d, offset_h, offset_w, hop_d, hop_h, hop_w,
    taps_d, taps_h, taps_w, tap, tap_d, tap_h, tap_w,
    tune,
    DIMS: tl.constexpr, WIDE: tl.constexpr, GATHER: tl.constexpr, HAS_DENSITY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M pixels, BLOCK_O channels] tile of one group.

    x has channel stride 1; channel counts are per group; w_* are strides of the weight in the roles it plays here. WIDE
    computes coordinates in 64 bits. GATHER unfolds (tap, channel) into one axis, for few input channels; without it,
    the loop runs over taps and blocks of BLOCK_K channels. WEIGHT_LEFT computes the transposed product: the weight,
    which has just been multiplied by the density in registers, is then the operand that Hopper's wgmma can take from
    registers.
    ``tune`` is read by the autotuner only.
    """
    # Neighbouring programs share their input pixels: channel tiles are the fastest axis, then groups.
    tiles_o = tl.cdiv(out_channels, BLOCK_O)
    program = tl.program_id(0)
    tile_o = program % tiles_o
    group = (program // tiles_o) % groups
    tile_m = program // tiles_o // groups
    if WIDE:
        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = m < pixels
    n, d, h, w = _coordinates(m, out_d, out_h, out_w, DIMS)
    from_d = d * step_d + offset_d
    from_h = h * step_h + offset_h
    from_w = w * step_w + offset_w

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < out_channels
    k = tl.arange(0, BLOCK_K)
    x_rows = _offset(n, from_d, from_h, from_w, x_n, x_d, x_h, x_w, DIMS) + group.to(tl.int64) * in_channels
    w_rows = group.to(tl.int64) * w_group + o.to(tl.int64) * w_out

    if WEIGHT_LEFT:
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)

    if GATHER:
        depth = taps_d * taps_h * taps_w * in_channels
        for start in range(0, depth, BLOCK_K):
            kk = start + k
            t = kk // in_channels
            c = kk - t * in_channels
            above = t // taps_w
            j_w = t - above * taps_w
            j_d = above // taps_h
            j_h = above - j_d * taps_h
            k_ok = kk < depth
            inside = _inside(
                _sum_of(from_d, j_d * hop_d, not WEIGHT_LEFT), _sum_of(from_h, j_h * hop_h, not WEIGHT_LEFT),
                _sum_of(from_w, j_w * hop_w, not WEIGHT_LEFT), in_d, in_h, in_w, DIMS,
            )  # fmt: skip
            x_at = c + _offset(c * 0, j_d * hop_d, j_h * hop_h, j_w * hop_w, x_n, x_d, x_h, x_w, DIMS)
            mask = inside & _both(rows_ok, k_ok, not WEIGHT_LEFT)
            a = tl.load(x + _sum_of(x_rows, x_at, not WEIGHT_LEFT), mask=mask, other=0.0)
            which = tap + j_d * tap_d + j_h * tap_h + j_w * tap_w
            w_at = which.to(tl.int64) * w_tap + c.to(tl.int64) * w_in
            b = tl.load(weight + _sum_of(w_rows, w_at, WEIGHT_LEFT), mask=_both(o_ok, k_ok, WEIGHT_LEFT), other=0.0)
            if HAS_DENSITY:
                scales = tl.load(density + which, mask=k_ok, other=0.0)
                b *= scales[None, :] if WEIGHT_LEFT else scales[:, None]
            if WEIGHT_LEFT:
                acc = tl.dot(b, a, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        x_tile = x + _sum_of(x_rows, k, not WEIGHT_LEFT)
        w_tile = weight + _sum_of(w_rows, k.to(tl.int64) * w_in, WEIGHT_LEFT)
        steps = taps_d * taps_h * taps_w * tl.cdiv(in_channels, BLOCK_K)
        c = tl.zeros((), tl.int32)
        j_d = tl.zeros((), tl.int32)
        j_h = tl.zeros((), tl.int32)
        j_w = tl.zeros((), tl.int32)
        which = j_w + tap
        if HAS_DENSITY:  # read one step ahead, so that its latency is not on the critical path
            scale = tl.load(density + which)
        for step in range(0, steps):
            inside = _inside(from_d + j_d * hop_d, from_h + j_h * hop_h, from_w + j_w * hop_w, in_d, in_h, in_w, DIMS)
            x_at = c.to(tl.int64) + _offset(c * 0, j_d * hop_d, j_h * hop_h, j_w * hop_w, x_n, x_d, x_h, x_w, DIMS)
            k_ok = c + k < in_channels
            a = tl.load(x_tile + x_at, mask=_both(inside & rows_ok, k_ok, not WEIGHT_LEFT), other=0.0)
            w_at = which.to(tl.int64) * w_tap + c.to(tl.int64) * w_in
            b = tl.load(w_tile + w_at, mask=_both(o_ok, k_ok, WEIGHT_LEFT), other=0.0)
            if HAS_DENSITY:
                b *= scale
            if WEIGHT_LEFT:
                acc = tl.dot(b, a, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            # Counters instead of divisions: this runs once per step on every thread.
            c += BLOCK_K
            carry = c >= in_channels
            c = tl.where(carry, 0, c)
            j_w += carry.to(tl.int32)
            if DIMS > 1:
                carry = j_w >= taps_w
                j_w = tl.where(carry, 0, j_w)
                j_h += carry.to(tl.int32)
            if DIMS > 2:
                carry = j_h >= taps_h
                j_h = tl.where(carry, 0, j_h)
                j_d += carry.to(tl.int32)
            which = tap + j_d * tap_d + j_h * tap_h + j_w * tap_w
            if HAS_DENSITY:
                scale = tl.load(density + which, mask=step + 1 < steps, other=0.0)

    if WEIGHT_LEFT:
        acc = tl.trans(acc)
    _epilogue(acc, bias, residual, y, group * out_channels + o, o_ok, rows_ok, n, d, h, w,
              r_n, r_c, r_d, r_h, r_w, y_n, y_c, y_d, y_h, y_w, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, DIMS)  # fmt: skip


@triton.jit(do_not_specialize=(*_SIZES, "per_split"))
def weight_gradient_kernel(
    grad, x, partial,
    pixels, per_split, groups, in_channels, out_channels,
    g_pixel, x_n, x_d, x_h, x_w,
    in_d, in_h, in_w, out_d, out_h, out_w,
    step_d, step_h, step_w, offset_d, offset_h, offset_w, hop_d, hop_h, hop_w, taps_d, taps_h, taps_w,
    tune,
    DIMS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """partial[split, o, (tap, c)] = sum over the split's pixels of grad[p, o] * x[position(p, tap), c], in float32.

    The columns unfold (tap, channel), so small channel counts fill a tile with several taps.
    """
    columns = taps_d * taps_h * taps_w * in_channels
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles_o = tl.cdiv(out_channels, BLOCK_O)
    program = tl.program_id(0)
    split = tl.program_id(1)
    tile_n = program % tiles_n
    tile_o = (program // tiles_n) % tiles_o
    group = program // tiles_n // tiles_o

    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    t = column // in_channels
    c = column - t * in_channels
    above = t // taps_w
    shift_w = (t - above * taps_w) * hop_w
    shift_d = (above // taps_h) * hop_d
    shift_h = (above % taps_h) * hop_h
    column_ok = column < columns
    x_columns = c + group.to(tl.int64) * in_channels
    x_columns += _offset(c * 0, shift_d, shift_h, shift_w, x_n, x_d, x_h, x_w, DIMS)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < out_channels
    channel = group.to(tl.int64) * out_channels + o

    begin = split.to(tl.int64) * per_split
    end = tl.minimum(begin + per_split, pixels)
    p = begin + tl.arange(0, BLOCK_P)
    n, d, h, w = _coordinates(p if WIDE else p.to(tl.int32), out_d, out_h, out_w, DIMS)
    # The next block of pixels is found by adding BLOCK_P's own coordinates and carrying, not by dividing again.
    by_w = BLOCK_P % out_w
    by_h = (BLOCK_P // out_w) % out_h
    by_d = (BLOCK_P // (out_w * out_h)) % out_d
    if DIMS == 1:
        by_n = BLOCK_P // out_w
    elif DIMS == 2:
        by_n = BLOCK_P // out_w // out_h
    else:
        by_n = BLOCK_P // out_w // out_h // out_d

    acc = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for _ in range(0, tl.cdiv(end - begin, BLOCK_P)):
        p_ok = p < end
        from_d = d * step_d + offset_d
        from_h = h * step_h + offset_h
        from_w = w * step_w + offset_w
        inside = _inside(
            from_d[:, None] + shift_d[None, :], from_h[:, None] + shift_h[None, :], from_w[:, None] + shift_w[None, :],
            in_d, in_h, in_w, DIMS,
        )  # fmt: skip
        a = tl.load(grad + (p * g_pixel)[None, :] + channel[:, None], mask=p_ok[None, :] & o_ok[:, None], other=0.0)
        at = _offset(n, from_d, from_h, from_w, x_n, x_d, x_h, x_w, DIMS)
        b = tl.load(x + at[:, None] + x_columns[None, :], mask=inside & p_ok[:, None] & column_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        p += BLOCK_P
        w += by_w
        carry = w >= out_w
        w = tl.where(carry, w - out_w, w)
        if DIMS > 1:
            h += by_h + carry.to(tl.int32)
            carry = h >= out_h
            h = tl.where(carry, h - out_h, h)
        if DIMS > 2:
            d += by_d + carry.to(tl.int32)
            carry = d >= out_d
            d = tl.where(carry, d - out_d, d)
        n += by_n + carry.to(tl.int32)

    total = split.to(tl.int64) * groups * out_channels
    at = (total + channel)[:, None] * columns + column[None, :]
    tl.store(partial + at, acc, mask=o_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=("splits",))
def reduce_kernel(
    partial, weight, density, dweight, ddensity,
    splits, rows, channels, taps,
    HAS_DENSITY: tl.constexpr, WANT_WEIGHT: tl.constexpr, WANT_DENSITY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """G = sum of the splits, in order; dweight = density * G; ddensity[program, tap] = sum over its rows of weight * G.

    A row is a pair (output channel, input channel of the group). partial and weight are [o, tap, c], dweight is
    [o, c, tap].
    """
    program = tl.program_id(0)
    row = program.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = t < taps
    mask = (row < rows)[:, None] & t_ok[None, :]
    o = row // channels
    at = (o * taps * channels + row - o * channels)[:, None] + (t * channels)[None, :]
    plain = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    size = tl.zeros((), tl.int64) + rows
    size *= taps
    for split in tl.range(0, splits, num_stages=3):
        plain += tl.load(partial + split * size + at, mask=mask, other=0.0)
    if WANT_WEIGHT:
        value = plain
        if HAS_DENSITY:
            value = plain * tl.load(density + t, mask=t_ok, other=0.0).to(tl.float32)[None, :]
        tl.store(dweight + (row * taps)[:, None] + t[None, :], value.to(dweight.dtype.element_ty), mask=mask)
    if WANT_DENSITY:
        # In float64: the terms cancel, and there are so few of them that it costs nothing.
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float64)
        tl.store(ddensity + program.to(tl.int64) * taps + t, tl.sum(w * plain.to(tl.float64), 0), mask=t_ok)


@triton.jit
def _depthwise_tap(acc, x_rows, w_columns, density, j_d, j_h, j_w, rows_ok, c_ok, from_d, from_h, from_w,
                   x_d, x_h, x_w, w_tap, in_d, in_h, in_w, hop_d, hop_h, hop_w, tap, tap_d, tap_h, tap_w,
                   HAS_DENSITY: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    zero = tl.zeros((), tl.int32)
    s_d, s_h, s_w = (zero + j_d) * hop_d, (zero + j_h) * hop_h, (zero + j_w) * hop_w
    ok = rows_ok & _inside(from_d + s_d, from_h + s_h, from_w + s_w, in_d, in_h, in_w, DIMS)
    at = _offset(zero, s_d, s_h, s_w, 0, x_d, x_h, x_w, DIMS)
    which = zero + tap + j_d * tap_d + j_h * tap_h + j_w * tap_w
    value = tl.load(x_rows + at, mask=ok[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
    w = tl.load(w_columns + which.to(tl.int64) * w_tap, mask=c_ok, other=0.0).to(tl.float32)
    if HAS_DENSITY:
        w *= tl.load(density + which).to(tl.float32)
    return acc + value * w[None, :]


@triton.jit(do_not_specialize=(*_SIZES, "tap"))
def depthwise_kernel(
    x, weight, density, bias, residual, y,
    pixels, channels,
    x_n, x_d, x_h, x_w, w_tap,
    r_n, r_c, r_d, r_h, r_w, y_n, y_c, y_d, y_h, y_w,
    in_d, in_h, in_w, out_d, out_h, out_w,
    step_d, step_h, step_w, offset_d, offset_h, offset_w, hop_d, hop_h, hop_w,
    tap, tap_d, tap_h, tap_w,
    tune,
    TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, EXPAND: tl.constexpr, REDUCE: tl.constexpr,
    DIMS: tl.constexpr, WIDE: tl.constexpr, HAS_DENSITY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M pixels, BLOCK_C channels] tile of a depthwise convolution; the weight is [tap, channel].

    Output channel c reads input channel c // EXPAND (forward with a channel multiplier), or the sum runs over the input
    channels c * REDUCE + i (its input gradient).
    """
    tiles_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    tile_c = program % tiles_c
    tile_m = program // tiles_c
    if WIDE:
        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = m < pixels
    n, d, h, w = _coordinates(m, out_d, out_h, out_w, DIMS)
    from_d = d * step_d + offset_d
    from_h = h * step_h + offset_h
    from_w = w * step_w + offset_w
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    base = x + _offset(n, from_d, from_h, from_w, x_n, x_d, x_h, x_w, DIMS)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.static_range(REDUCE):
        x_rows = base + (c * REDUCE + i)[None, :] if EXPAND == 1 else base + (c // EXPAND)[None, :]
        w_columns = weight + c * REDUCE + i
        for j_d in range(TAPS_D):
            for j_h in range(TAPS_H):
                if TAPS_W <= 16:
                    for j_w in tl.static_range(TAPS_W):
                        acc = _depthwise_tap(acc, x_rows, w_columns, density, j_d, j_h, j_w, rows_ok, c_ok,
                                             from_d, from_h, from_w, x_d, x_h, x_w, w_tap, in_d, in_h, in_w,
                                             hop_d, hop_h, hop_w, tap, tap_d, tap_h, tap_w,
                                             HAS_DENSITY, DIMS)  # fmt: skip
                else:  # four at a time: their loads overlap, and a 31x31 kernel takes half the registers of eight
                    for first in range(0, TAPS_W - TAPS_W % 4, 4):
                        for i_w in tl.static_range(4):
                            acc = _depthwise_tap(acc, x_rows, w_columns, density, j_d, j_h, first + i_w, rows_ok, c_ok,
                                                 from_d, from_h, from_w, x_d, x_h, x_w, w_tap, in_d, in_h, in_w,
                                                 hop_d, hop_h, hop_w, tap, tap_d, tap_h, tap_w,
                                                 HAS_DENSITY, DIMS)  # fmt: skip
                    for j_w in tl.static_range(TAPS_W - TAPS_W % 4, TAPS_W):
                        acc = _depthwise_tap(acc, x_rows, w_columns, density, j_d, j_h, j_w, rows_ok, c_ok,
                                             from_d, from_h, from_w, x_d, x_h, x_w, w_tap, in_d, in_h, in_w,
                                             hop_d, hop_h, hop_w, tap, tap_d, tap_h, tap_w,
                                             HAS_DENSITY, DIMS)  # fmt: skip
    _epilogue(acc, bias, residual, y, c, c_ok, rows_ok, n, d, h, w,
              r_n, r_c, r_d, r_h, r_w, y_n, y_c, y_d, y_h, y_w, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, DIMS)  # fmt: skip


@triton.jit(do_not_specialize=(*_SIZES, "per_split"))
def depthwise_weight_gradient_kernel(
    grad, x, partial,
    pixels, per_split, channels, taps,
    g_pixel, x_n, x_d, x_h, x_w,
    in_d, in_h, in_w, out_d, out_h, out_w,
    step_d, step_h, step_w, offset_d, offset_h, offset_w, hop_d, hop_h, hop_w, taps_h, taps_w,
    tune,
    EXPAND: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[split, c, tap] = sum over the split's pixels of grad[p, c] * x[position(p, tap), c // EXPAND]."""
    tap = tl.program_id(0) % taps
    tile_c = tl.program_id(0) // taps
    split = tl.program_id(1)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    above = tap // taps_w
    shift_w = (tap - above * taps_w) * hop_w
    shift_d = (above // taps_h) * hop_d
    shift_h = (above % taps_h) * hop_h
    begin = split.to(tl.int64) * per_split
    end = tl.minimum(begin + per_split, pixels)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, tl.cdiv(end - begin, BLOCK_P)):
        p = begin + start * BLOCK_P + tl.arange(0, BLOCK_P)
        p_ok = p < end
        n, d, h, w = _coordinates(p if WIDE else p.to(tl.int32), out_d, out_h, out_w, DIMS)
        d = d * step_d + offset_d + shift_d
        h = h * step_h + offset_h + shift_h
        w = w * step_w + offset_w + shift_w
        ok = p_ok & _inside(d, h, w, in_d, in_h, in_w, DIMS)
        g = tl.load(grad + (p * g_pixel)[:, None] + c[None, :], mask=p_ok[:, None] & c_ok[None, :], other=0.0)
        at = _offset(n, d, h, w, x_n, x_d, x_h, x_w, DIMS)[:, None] + (c // EXPAND)[None, :]
        v = tl.load(x + at, mask=ok[:, None] & c_ok[None, :], other=0.0)
        acc += g.to(tl.float32) * v.to(tl.float32)
    at = (split.to(tl.int64) * channels + c) * taps + tap
    tl.store(partial + at, tl.sum(acc, 0), mask=c_ok)


# ----------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a problem; see the module's docstring for step, offset and hop.

    ``size`` positions are read, ``count`` written. Tap j of ``taps`` is kernel position ``tap + j * tap_step``.
    """

    size: int
    count: int
    step: int
    offset: int
    hop: int
    taps: int
    tap: int = 0
    tap_step: int = 1


def _phases(axis: Axis, kernel: int) -> list[tuple[slice, Axis]]:
    """The input-gradient problems of one forward ``axis``: for each, the input positions it writes, and its axis."""
    stride, dilation, padding = axis.step, axis.hop, -axis.offset
    input_size, output_size = axis.size, axis.count
    common = math.gcd(stride, dilation)
    phases = []
    for residue in range(stride):
        first = (residue - padding) % stride
        if first >= input_size:
            continue
        count = -(-(input_size - first) // stride)
        taps = [t for t in range(kernel) if t * dilation % stride == residue]
        where = slice(first, None, stride)
        if not taps:
            phases.append((where, Axis(output_size, count, 1, 0, 0, 0)))
            continue
        offset = (first + padding - taps[0] * dilation) // stride
        hop = -(dilation // common)
        phases.append((where, Axis(output_size, count, 1, offset, hop, len(taps), taps[0], stride // common)))
    return phases


def _pad3(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def _five(tensor: Tensor) -> Tensor:
    """[N, C, *spatial] as a view [N, C, D, H, W]; missing axes have size 1."""
    while tensor.dim() < 5:
        tensor = tensor.unsqueeze(2)
    return tensor


def _channels_inner(tensor: Tensor) -> Tensor:
    """``tensor`` [N, C, D, H, W] with channel stride 1, copied only if it has another."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised result in the layout that the op promises: adjacent channels, whatever the rank."""
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=like.dtype, device=like.device).movedim(-1, 1)


def _forward_axes(input: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[Axis, Axis, Axis]:
    dims = len(stride)
    axes = []
    for i in range(dims):
        size, kernel = input.shape[2 + i], weight.shape[2 + i]
        count = (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel - 1) - 1) // stride[i] + 1
        axes.append(Axis(size, count, stride[i], -padding[2 * i], dilation[i], kernel))
    return (Axis(1, 1, 1, 0, 1, 1),) * (3 - dims) + tuple(axes)


# ------------------------------------------------------------------------------------------------------ configurations


_MOST_CANDIDATES = 6
_MOST_WASTE = 1.4  # of the arithmetic spent on padding, relative to the tile that wastes least
_LEAST_CHANNELS = 16  # per group; with fewer, a block of one tap's channels would be mostly padding
_MOST_MULTIPLIER = 4  # output channels per group up to which a depthwise convolution is not worth a matrix product
_REDUCE_ROWS = 64  # rows of one partial density gradient; not tuned, since it sets the size of the buffer
_LEAST_SPLIT = 512  # pixels of one partial weight gradient
_WORKSPACE = 1 << 26  # floats in all partial weight gradients together


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of tile sizes, for one precision: "half" (fp16, bf16), "fp32" or "tf32"."""

    kernel: str
    precision: str
    meta: tuple[tuple[str, int | bool], ...]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        blocks = "_".join(f"{key.removeprefix('BLOCK_').lower()}{int(value)}" for key, value in self.meta)
        return f"{self.kernel}-{self.precision}-{blocks}-w{self.num_warps}-s{self.num_stages}"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return {"half": DTYPES[1:], "any": DTYPES}.get(self.precision, DTYPES[:1])

    def config(self) -> triton.Config:
        return triton.Config(dict(self.meta), num_warps=self.num_warps, num_stages=self.num_stages)


def _variants(kernel: str, precision: str, names: tuple[str, ...], rows: Sequence[tuple]) -> tuple[Variant, ...]:
    return tuple(
        Variant(kernel, precision, tuple(zip(names, blocks, strict=True)), warps, stages)
        for *blocks, warps, stages in rows
    )


_CONV_NAMES = ("BLOCK_M", "BLOCK_O", "BLOCK_K", "WEIGHT_LEFT")
_GRADIENT_NAMES = ("BLOCK_O", "BLOCK_N", "BLOCK_P")

# Every (kernel, tile) that can be launched; tests, benches and the ahead-of-time check loop over it. Among those that
# waste little on a problem, the first is the default.
VARIANTS: tuple[Variant, ...] = (
    *_variants("conv", "half", _CONV_NAMES, [
        (128, 128, 64, False, 8, 3),
        (128, 128, 64, True, 8, 3),
        (128, 64, 64, False, 8, 3),
        (128, 64, 32, True, 4, 4),
        (256, 64, 32, False, 8, 4),
        (128, 128, 32, False, 8, 4),
        (256, 64, 32, True, 8, 4),
        (64, 64, 64, True, 4, 3),
        (128, 32, 32, False, 4, 4),
        (128, 16, 64, False, 4, 4),
        (128, 32, 16, False, 4, 4),
    ]),
    *_variants("conv", "tf32", _CONV_NAMES, [
        (128, 128, 32, True, 8, 3),
        (128, 64, 32, True, 8, 3),
        (64, 128, 32, False, 8, 3),
        (64, 64, 32, True, 4, 3),
        (128, 32, 32, False, 4, 3),
        (128, 16, 16, False, 4, 3),
    ]),
    *_variants("conv", "fp32", _CONV_NAMES, [
        (64, 64, 16, False, 8, 3),
        (128, 64, 16, False, 8, 2),
        (64, 32, 16, False, 4, 3),
        (128, 16, 16, False, 4, 3),
    ]),
    *_variants("conv_unfold", "half", _CONV_NAMES, [
        (128, 64, 32, False, 8, 1),
        (64, 64, 32, True, 4, 1),
        (128, 32, 32, False, 4, 1),
        (64, 64, 16, False, 4, 1),
        (64, 16, 32, False, 4, 1),
    ]),
    *_variants("conv_unfold", "tf32", _CONV_NAMES, [
        (64, 64, 32, False, 4, 1),
        (64, 32, 32, False, 4, 1),
        (64, 16, 32, False, 4, 1),
    ]),
    *_variants("conv_unfold", "fp32", _CONV_NAMES, [
        (64, 64, 16, False, 8, 1),
        (64, 32, 16, False, 4, 1),
        (64, 16, 16, False, 4, 1),
    ]),
    *_variants("weight_gradient", "half", _GRADIENT_NAMES, [
        (128, 128, 64, 8, 3),
        (64, 128, 64, 4, 3),
        (64, 256, 64, 8, 3),
        (64, 64, 32, 4, 4),
        (32, 128, 64, 4, 3),
        (16, 128, 32, 4, 3),
        (64, 32, 64, 4, 3),
    ]),
    *_variants("weight_gradient", "tf32", _GRADIENT_NAMES, [
        (64, 128, 32, 8, 3),
        (128, 128, 32, 8, 3),
        (64, 64, 16, 4, 4),
        (16, 64, 16, 4, 3),
    ]),
    *_variants("weight_gradient", "fp32", _GRADIENT_NAMES, [
        (64, 64, 16, 4, 3),
        (128, 64, 16, 8, 3),
        (32, 64, 16, 4, 3),
        (16, 64, 16, 4, 3),
    ]),
    *_variants("depthwise", "any", ("BLOCK_M", "BLOCK_C"), [(32, 64, 4, 1), (64, 32, 4, 1), (128, 16, 4, 1)]),
    *_variants("depthwise_weight_gradient", "any", ("BLOCK_P", "BLOCK_C"), [(32, 64, 4, 1), (64, 32, 4, 1)]),
    *_variants("reduce", "any", ("BLOCK_R", "BLOCK_T"), [(_REDUCE_ROWS, 16, 4, 1)]),
)  # fmt: skip

KERNELS = {
    "conv": conv_kernel,
    "conv_unfold": conv_kernel,  # with GATHER
    "weight_gradient": weight_gradient_kernel,
    "depthwise": depthwise_kernel,
    "depthwise_weight_gradient": depthwise_weight_gradient_kernel,
    "reduce": reduce_kernel,
}

MATRIX_KERNELS = ("conv", "conv_unfold", "weight_gradient")  # those whose work is matrix products

# What a tuned choice depends on. Sizes enter through ``tune``, the number of bits of the pixel count.
_CONV_KEYS = ["tune", "groups", "in_channels", "out_channels", "w_in", "step_w", "DIMS", "HAS_DENSITY", "PRECISION"]
_TUNING_KEYS = {
    "conv": _CONV_KEYS,
    "conv_unfold": [*_CONV_KEYS, "taps_d", "taps_h", "taps_w"],
    "weight_gradient": [
        "tune", "groups", "in_channels", "out_channels", "taps_d", "taps_h", "taps_w", "step_w", "DIMS", "PRECISION",
    ],
    "depthwise": ["tune", "channels", "TAPS_D", "TAPS_H", "TAPS_W", "step_w", "DIMS"],
    "depthwise_weight_gradient": ["tune", "channels", "taps", "step_w", "DIMS"],
}  # fmt: skip


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when this module was imported)."""
    return not isinstance(conv_kernel, triton.JITFunction)


def _pow2(value: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(value)))


def _extents(kernel: str, args: dict) -> dict[str, int]:
    """Extent of the problem along each block axis of ``kernel``."""
    if kernel == "conv":
        return {"BLOCK_M": args["pixels"], "BLOCK_O": args["out_channels"], "BLOCK_K": args["in_channels"]}
    if kernel in ("conv_unfold", "weight_gradient"):
        columns = args["taps_d"] * args["taps_h"] * args["taps_w"] * args["in_channels"]
        if kernel == "conv_unfold":
            return {"BLOCK_M": args["pixels"], "BLOCK_O": args["out_channels"], "BLOCK_K": columns}
        return {"BLOCK_O": args["out_channels"], "BLOCK_N": columns, "BLOCK_P": args["per_split"]}
    if kernel == "reduce":
        return {}
    pixels = {"BLOCK_M": args["pixels"]} if kernel == "depthwise" else {"BLOCK_P": args["per_split"]}
    return {**pixels, "BLOCK_C": args["channels"]}


def candidates(kernel: str, args: dict) -> list[Variant]:
    """The tiles worth timing for a problem, the default first: those that spend little arithmetic on padding."""
    precision = _variant_precision(kernel, args)
    rows = [v for v in VARIANTS if v.kernel == kernel and v.precision == precision]
    extents = _extents(kernel, args)

    def padded(variant: Variant) -> float:
        blocks = dict(variant.meta)
        return math.prod(-(-extent // blocks[axis]) * blocks[axis] for axis, extent in extents.items())

    least = min(map(padded, rows))
    return [v for v in rows if padded(v) <= _MOST_WASTE * least][:_MOST_CANDIDATES]


def _variant_precision(kernel: str, args: dict) -> str:
    if kernel not in MATRIX_KERNELS:
        return "any"
    if args["x"].dtype != torch.float32:
        return "half"
    return "tf32" if args["PRECISION"] == "tf32" else "fp32"


def _interpreter_config(kernel: str, args: dict) -> triton.Config:
    """Few, large tiles: the interpreter's time goes by steps, hardly by their size."""
    limits = {"BLOCK_M": 1024, "BLOCK_O": 128, "BLOCK_K": 256, "BLOCK_P": 512, "BLOCK_N": 1024, "BLOCK_C": 128}
    extents = _extents(kernel, args)
    meta = {axis: _pow2(extent, 16, limits.get(axis, 4096)) for axis, extent in extents.items()}
    if kernel in ("conv", "conv_unfold"):
        meta["WEIGHT_LEFT"] = False
    return triton.Config(meta)


@cache
def _tuned(kernel: str) -> triton.runtime.Autotuner:
    def keep(configs, named, **kwargs):
        names = {v.name for v in candidates(kernel, {**named, **kwargs})}
        return [c for c, v in zip(configs, variants, strict=True) if v.name in names]

    variants = [v for v in VARIANTS if v.kernel == kernel]
    configs = [v.config() for v in variants]
    decorate = triton.autotune(
        configs, key=_TUNING_KEYS[kernel], prune_configs_by={"early_config_prune": keep}, cache_results=True
    )
    return decorate(KERNELS[kernel])


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Launch:
    """One kernel call without its tile sizes; ``grid`` maps the tile sizes to the number of programs."""

    kernel: str
    arguments: dict[str, object]
    grid: Callable[[dict], tuple[int, ...]]

    @property
    def device(self) -> torch.device:
        return self.arguments["x" if "x" in self.arguments else "partial"].device

    def run(self, config: triton.Config | None = None) -> None:
        """Launch with ``config``, or with the tuned one.

        Nothing is timed, and the first candidate is taken, under ``torch.use_deterministic_algorithms(True)`` (another
        tile may round another way), with ``PYDENOISE_AUTOTUNE=0``, and in the interpreter.
        """
        tunable = self.kernel in _TUNING_KEYS
        wanted = not torch.are_deterministic_algorithms_enabled() and os.environ.get("PYDENOISE_AUTOTUNE") != "0"
        on_gpu = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            if config is None and tunable and wanted and not interpreting():
                _tuned(self.kernel)[self.grid](**self.arguments)
                return
            config = config or self.default_config()
            KERNELS[self.kernel][self.grid](**self.arguments, **config.all_kwargs())

    def default_config(self) -> triton.Config:
        """The configuration that is used where nothing is timed."""
        if interpreting() and self.kernel != "reduce":
            return _interpreter_config(self.kernel, self.arguments)
        return candidates(self.kernel, self.arguments)[0].config()


def _precision() -> str:
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses the question once its newer per-backend settings were used: those decide
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def _wide(pixels: int, axes: Sequence[Axis]) -> bool:
    """Whether pixel indices or coordinates need 64 bits, with room for a tile and the padding."""
    return max(pixels, *(max(a.size, a.count * a.step) + abs(a.offset) + abs(a.hop) * a.taps for a in axes)) >= 2**30


def _per_axis(axes: Sequence[Axis], **names: str) -> dict[str, int]:
    return {f"{name}_{d}": getattr(a, field) for name, field in names.items() for d, a in zip("dhw", axes, strict=True)}


def _strides(prefix: str, tensor: Tensor | None, *, channel: bool = True) -> dict[str, int]:
    n, c, d, h, w = (0,) * 5 if tensor is None else tensor.stride()
    strides = {f"{prefix}_n": n, f"{prefix}_d": d, f"{prefix}_h": h, f"{prefix}_w": w}
    return {**strides, f"{prefix}_c": c} if channel else strides


@dataclass(frozen=True)
class _Weight:
    """The raw weight as [O, taps, C], and the number of taps per unit step along each of the three kernel axes."""

    rows: Tensor
    tap_strides: tuple[int, int, int]

    @classmethod
    def of(cls, weight: Tensor) -> "_Weight":
        _, kernel_h, kernel_w = _pad3(weight.shape[2:], 1)
        return cls(weight.flatten(2).transpose(1, 2).contiguous(), (kernel_h * kernel_w, kernel_w, 1))

    def taps_of(self, axes: Sequence[Axis]) -> dict[str, int]:
        """Kernel position of the first tap, and the steps to the next along each axis."""
        pairs = list(zip(axes, self.tap_strides, strict=True))
        steps = {f"tap_{d}": a.tap_step * s for d, (a, s) in zip("dhw", pairs, strict=True)}
        return {"tap": sum(a.tap * s for a, s in pairs), **steps}


def _geometry(x: Tensor, y: Tensor, residual: Tensor | None, axes: Sequence[Axis]) -> dict[str, int]:
    fields = {"in": "size", "out": "count", "step": "step", "offset": "offset", "hop": "hop"}
    strides = {**_strides("x", x, channel=False), **_strides("r", residual), **_strides("y", y)}
    return {**strides, **_per_axis(axes, **fields)}


def _conv_launch(
    x: Tensor, weight: _Weight, density, bias, residual, y: Tensor, axes: Sequence[Axis], groups: int, dims: int,
    activation: str = "none", *, transposed: bool = False,
) -> Launch:  # fmt: skip
    """y [N, O, D, H, W] from x [N, C, D, H, W], possibly views; ``transposed``: the weight maps y's channels to x's."""
    pixels = y.shape[0] * math.prod(a.count for a in axes)
    rows, taps, columns = weight.rows.shape
    flags = {
        "DIMS": dims, "WIDE": _wide(pixels, axes), "HAS_DENSITY": density is not None, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation,
    }  # fmt: skip
    shared = {
        "x": x, "density": density, "bias": bias, "residual": residual, "y": y, "pixels": pixels,
        **_geometry(x, y, residual, axes), **weight.taps_of(axes), "tune": pixels.bit_length(), **flags,
    }  # fmt: skip
    if _is_depthwise(groups, rows, columns):
        multiplier, channels = rows // groups, y.shape[1]
        arguments = {
            **shared, "weight": weight.rows.view(rows, taps).t().contiguous(), "channels": channels, "w_tap": rows,
            **{f"TAPS_{d}": a.taps for d, a in zip("DHW", axes, strict=True)},
            "EXPAND": 1 if transposed else multiplier, "REDUCE": multiplier if transposed else 1,
        }  # fmt: skip

        def grid(meta):
            return (triton.cdiv(pixels, meta["BLOCK_M"]) * triton.cdiv(channels, meta["BLOCK_C"]),)

        return Launch("depthwise", arguments, grid)
    in_channels, out_channels = x.shape[1] // groups, y.shape[1] // groups
    across, along = taps * columns, 1
    arguments = {
        **shared, "weight": weight.rows, "groups": groups, "in_channels": in_channels, "out_channels": out_channels,
        "w_group": rows // groups * across, "w_tap": columns,
        "w_out": along if transposed else across, "w_in": across if transposed else along,
        **_per_axis(axes, taps="taps"), "GATHER": in_channels < _LEAST_CHANNELS, "PRECISION": _precision(),
    }  # fmt: skip

    def grid(meta):
        return (triton.cdiv(pixels, meta["BLOCK_M"]) * triton.cdiv(out_channels, meta["BLOCK_O"]) * groups,)

    return Launch("conv_unfold" if arguments["GATHER"] else "conv", arguments, grid)


def _is_depthwise(groups: int, out_channels: int, group_channels: int) -> bool:
    return groups > 1 and group_channels == 1 and out_channels // groups <= _MOST_MULTIPLIER


def plan_forward(
    input: Tensor, weight: Tensor, density: Tensor | None, bias: Tensor | None, residual: Tensor | None, output: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str = "none",
) -> list[Launch]:  # fmt: skip
    """The launches that write ``output``; arguments as for :func:`forward`."""
    if output.numel() == 0:
        return []
    axes = _forward_axes(input, weight, stride, padding, dilation)
    x = _channels_inner(_five(input))
    residual = None if residual is None else _five(residual)
    density, bias = _dense(density), _dense(bias)
    return [
        _conv_launch(
            x, _Weight.of(weight), density, bias, residual, _five(output), axes, groups, len(stride), activation
        )
    ]


def plan_input_gradient(
    grad: Tensor, weight: Tensor, density: Tensor | None, dinput: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> list[Launch]:  # fmt: skip
    """The launches that write ``dinput``: one per residue of the input position modulo the stride, on every axis."""
    if dinput.numel() == 0:
        return []
    forward_axes = _forward_axes(dinput, weight, stride, padding, dilation)
    kernel = _pad3(weight.shape[2:], 1)
    phases = [_phases(a, k) for a, k in zip(forward_axes, kernel, strict=True)]
    x, rows, density, target = _channels_inner(_five(grad)), _Weight.of(weight), _dense(density), _five(dinput)
    launches = []
    for (where_d, d), (where_h, h), (where_w, w) in itertools.product(*phases):
        y = target[:, :, where_d, where_h, where_w]
        axes = (d, h, w)
        if min(a.taps for a in axes) == 0:  # nothing reaches these positions; the kernel writes the zeros
            axes = tuple(replace(a, taps=0, tap=0) for a in axes)
        launches.append(_conv_launch(x, rows, density, None, None, y, axes, groups, len(stride), transposed=True))
    return launches


def plan_weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, density: Tensor | None, dweight: Tensor | None,
    ddensity_parts: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    *, splits: int | None = None,
) -> list[Launch]:  # fmt: skip
    """The two launches that write ``dweight`` and ``ddensity_parts`` (either may be ``None``).

    ``ddensity_parts`` is float64 [``density_parts(weight)``, taps]; its sum over the first axis is the gradient.
    ``splits`` asks for a number of partial weight gradients instead of the one that fills the device.
    """
    axes = _forward_axes(input, weight, stride, padding, dilation)
    x = _channels_inner(_five(input))
    dy = _five(grad).contiguous(memory_format=torch.channels_last_3d)
    out_channels, group_channels = weight.shape[:2]
    taps = weight[0, 0].numel()
    pixels = grad.numel() // out_channels
    depthwise = _is_depthwise(groups, out_channels, group_channels)
    tiles = -(-out_channels // 64) * taps if depthwise else (
        groups * -(-out_channels // groups // 64) * -(-taps * group_channels // 128)
    )  # fmt: skip
    splits, per_split = _split(pixels, tiles, weight.numel(), grad.device, splits)
    partial = torch.empty((splits, out_channels, taps, group_channels), dtype=torch.float32, device=grad.device)
    arguments = {
        "grad": dy, "x": x, "partial": partial, "pixels": pixels, "per_split": per_split, "g_pixel": out_channels,
        **_strides("x", x, channel=False),
        **_per_axis(axes, **{"in": "size", "out": "count", "step": "step", "offset": "offset", "hop": "hop"}),
        "tune": pixels.bit_length(), "DIMS": len(stride), "WIDE": _wide(pixels, axes),
    }  # fmt: skip
    if depthwise:
        arguments |= {
            "channels": out_channels, "taps": taps, "taps_h": axes[1].taps, "taps_w": axes[2].taps,
            "EXPAND": out_channels // groups,
        }  # fmt: skip

        def grid(meta):
            return taps * triton.cdiv(out_channels, meta["BLOCK_C"]), splits

        product = Launch("depthwise_weight_gradient", arguments, grid)
    else:
        per_group = out_channels // groups
        arguments |= {
            "groups": groups, "in_channels": group_channels, "out_channels": per_group,
            **_per_axis(axes, taps="taps"), "PRECISION": _precision(),
        }  # fmt: skip

        def grid(meta):
            columns = taps * group_channels
            return groups * triton.cdiv(per_group, meta["BLOCK_O"]) * triton.cdiv(columns, meta["BLOCK_N"]), splits

        product = Launch("weight_gradient", arguments, grid)
    return [product, _reduce_launch(partial, weight, density, dweight, ddensity_parts)]


def _reduce_launch(partial: Tensor, weight: Tensor, density, dweight, ddensity_parts) -> Launch:
    splits, out_channels, taps, channels = partial.shape
    rows = out_channels * channels
    arguments = {
        "partial": partial, "weight": None if ddensity_parts is None else _Weight.of(weight).rows,
        "density": _dense(density), "dweight": dweight, "ddensity": ddensity_parts,
        "splits": splits, "rows": rows, "channels": channels, "taps": taps, "HAS_DENSITY": density is not None,
        "WANT_WEIGHT": dweight is not None, "WANT_DENSITY": ddensity_parts is not None,
    }  # fmt: skip

    def grid(meta):
        return triton.cdiv(rows, meta["BLOCK_R"]), triton.cdiv(taps, meta["BLOCK_T"])

    return Launch("reduce", arguments, grid)


def density_parts(weight: Tensor) -> int:
    """How many partial sums :func:`plan_weight_gradient` makes of the density's gradient."""
    return -(-weight.shape[0] * weight.shape[1] // _REDUCE_ROWS)


def _split(pixels: int, tiles: int, weights: int, device: torch.device, splits: int | None) -> tuple[int, int]:
    """(number of partial sums, pixels of each): enough programs to fill the device twice, none of them too short."""
    if splits is None:
        splits = min(-(-2 * _multiprocessors(device) // tiles), -(-pixels // _LEAST_SPLIT), _WORKSPACE // weights)
    per_split = -(-pixels // max(1, splits))
    per_split = -(-per_split // 128) * 128  # whole blocks, so that only the last split has a partly empty one
    return -(-pixels // per_split), per_split


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---------------------------------------------------------------------------------------------------------- public API


def forward(
    input: Tensor, weight: Tensor, density: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str = "none",
) -> Tensor:  # fmt: skip
    """``activation(conv(input, weight * density) + bias) + residual``; ``padding`` is (low, high) per axis.

    Shapes as in ``torch.nn.functional.conv{1,2,3}d``; all tensors have one dtype of ``DTYPES`` and one device.
    Arguments are not checked here. Returns channels_last memory (contiguous in 1-D).
    """
    axes = _forward_axes(input, weight, stride, padding, dilation)
    size = [a.count for a in axes[3 - len(stride) :]]
    output = _empty((input.shape[0], weight.shape[0], *size), input)
    plan = plan_forward(input, weight, density, bias, residual, output, stride, padding, dilation, groups, activation)
    for launch in plan:
        launch.run()
    return output


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, density: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    mask: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (input, weight, density) of :func:`forward` without its epilogue; ``mask`` says which are wanted."""
    dinput = dweight = ddensity = None
    if mask[0]:
        dinput = _empty(input.shape, input)
        for launch in plan_input_gradient(grad, weight, density, dinput, stride, padding, dilation, groups):
            launch.run()
    want_density = mask[2] and density is not None
    if grad.numel() == 0:
        dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if mask[1] else None
        return dinput, dweight, torch.zeros_like(density) if want_density else None
    if mask[1] or want_density:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if mask[1] else None
        parts = None
        if want_density:
            parts = torch.empty((density_parts(weight), density.numel()), dtype=torch.float64, device=weight.device)
        plan = plan_weight_gradient(grad, input, weight, density, dweight, parts, stride, padding, dilation, groups)
        for launch in plan:
            launch.run()
        if want_density:
            ddensity = parts.sum(0).to(density.dtype).view(density.shape)
    return dinput, dweight, ddensity
