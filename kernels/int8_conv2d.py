"""int8 convolution as implicit matrix products over channels_last images, with int32 accumulators and one epilogue.

    acc[q, o] = sum over t, c of (x[q * stride - padding + t * dilation, c] - zero_point) * w[o, t, c]

Positions outside the image add nothing. The products run on the codes themselves, with 0 loaded outside the image; the
zero point's share, ``zero_point * (sum of the weights of the taps inside)``, is subtracted. SHARE says how: "total"
where every tap is inside, one sum per channel; "digits" where some are not: a matrix product of its own, of the 0/1
matrix [pixel, tap inside] with the base-256 digits of ``-zero_point * sum``, whose result the accumulators begin with;
"taps" adds the same up tap by tap, for sums so long that a saturating product (sm_80's) could differ. All are exact.

Scales per pixel give every tap an accumulator of its own, rescaled in float32 as it is added.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from pydenoise.kernels._int8 import DIGITS, WEIGHT_SUMS, finish, plan_weight_sums
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

# Arguments whose divisibility says nothing about alignment: specialising on it would only compile more often.
_SIZES = (
    "pixels", "tune", "in_h", "in_w", "out_h", "out_w", "stride_h", "stride_w", "top", "left", "dilation_h",
    "dilation_w", "taps_h", "taps_w", "groups",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _pixel(tile, out_h, out_w, WIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(linear index, n, h, w) of a tile's output pixels."""
    if WIDE:
        m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    above = m // out_w
    n = above // out_h
    return m, n, above - n * out_h, m - above * out_w


@triton.jit
def _source(h, w, in_h, in_w, UPSAMPLE: tl.constexpr):
    """(inside, h, w) of the pixel that is read for a position of the image as enlarged, whose size is in_h, in_w."""
    inside = (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
    if UPSAMPLE == 2:
        h = h >> 1
        w = w >> 1
    return inside, h, w


@triton.jit
def _minus_share(acc, digits, channel, channel_ok, channels, from_h, from_w, in_h, in_w, dilation_h, dilation_w,
                 taps_h, taps_w):  # fmt: skip
    """``acc`` (zeros) minus zero_point times the sums of the weights of the taps inside the image."""
    taps = taps_h * taps_w
    padded = tl.cdiv(taps, 32) * 32
    t = tl.arange(0, 32)
    for digit in tl.static_range(DIGITS):  # from the highest
        acc = acc * 256
        row = (DIGITS - 1 - digit) * channels + channel
        tile = (digits + row.to(tl.int64) * padded)[None, :] + t[:, None]
        for start in tl.range(0, taps, 32, num_stages=1):
            j_h = (start + t) // taps_w
            j_w = (start + t) - j_h * taps_w
            h = from_h[:, None] + (j_h * dilation_h)[None, :]
            w = from_w[:, None] + (j_w * dilation_w)[None, :]
            inside = (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
            value = tl.load(tile + start, mask=channel_ok[None, :], other=0)
            acc = tl.dot(inside.to(tl.int8), value, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _add_share(acc, sums, zero_point, channel, channel_ok, from_h, from_w, in_h, in_w, dilation_h, dilation_w, taps_h,
               taps_w, SHARE: tl.constexpr):  # fmt: skip
    """``acc`` minus the same share, added up without matrix products, which may saturate: this wraps."""
    taps = taps_h * taps_w
    minus = -tl.load(zero_point)
    total = tl.zeros_like(channel).to(tl.int32)
    for tap in tl.range(0, taps, num_stages=1):
        part = minus * tl.load(sums + channel.to(tl.int64) * taps + tap, mask=channel_ok, other=0)
        if SHARE == "taps":
            j_h = tap // taps_w
            h = from_h + j_h * dilation_h
            w = from_w + (tap - j_h * taps_w) * dilation_w
            inside = (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
            acc += tl.where(inside[:, None], part[None, :], 0)
        else:
            total += part
    return acc + total[None, :]


@triton.jit(do_not_specialize=_SIZES)
def conv_kernel(
    x, weight, sums, input_scale, zero_point, weight_scale, bias, channel_bias, film, residual, out_scale,
    out_zero_point, y,
    pixels, groups, in_channels, out_channels, x_n, x_h, x_w, w_tap, w_out,
    in_h, in_w, out_h, out_w, stride_h, stride_w, top, left, dilation_h, dilation_w, taps_h, taps_w,
    tune,
    GATHER: tl.constexpr, SHARE: tl.constexpr, UPSAMPLE: tl.constexpr, WIDE: tl.constexpr,
    RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M pixels, BLOCK_O channels] tile of one group.

    x has channel stride 1, weight is [out channel, tap, channel], sums as weight_sums_kernel makes them for SHARE;
    channel counts are per group; in_h, in_w are the sizes after upsampling. GATHER unfolds (tap, channel) into one
    axis, for few channels; without it, the loop runs over taps and blocks of BLOCK_K channels. RAW stores the
    accumulators. ``tune`` is read by the autotuner only.
    """
    # Neighbouring programs share their input pixels: channel tiles are the fastest axis, then groups.
    tiles_o = tl.cdiv(out_channels, BLOCK_O)
    program = tl.program_id(0)
    tile_o = program % tiles_o
    group = (program // tiles_o) % groups
    m, n, h, w = _pixel(program // tiles_o // groups, out_h, out_w, WIDE, BLOCK_M)
    rows_ok = m < pixels
    from_h = h * stride_h - top
    from_w = w * stride_w - left
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < out_channels
    channel = group * out_channels + o
    taps = taps_h * taps_w
    k = tl.arange(0, BLOCK_K)
    x_rows = x + n.to(tl.int64) * x_n + group.to(tl.int64) * in_channels
    w_columns = weight + channel.to(tl.int64) * w_out
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)

    if SHARE == "digits":
        acc = _minus_share(acc, sums, channel, o_ok, groups * out_channels, from_h, from_w, in_h, in_w, dilation_h,
                           dilation_w, taps_h, taps_w)  # fmt: skip
    if GATHER:
        depth = taps * in_channels
        for start in range(0, depth, BLOCK_K):
            kk = start + k
            tap = kk // in_channels
            c = kk - tap * in_channels
            j_h = tap // taps_w
            j_w = tap - j_h * taps_w
            k_ok = kk < depth
            inside, row_h, row_w = _source(
                from_h[:, None] + (j_h * dilation_h)[None, :], from_w[:, None] + (j_w * dilation_w)[None, :],
                in_h, in_w, UPSAMPLE,
            )  # fmt: skip
            at = row_h.to(tl.int64) * x_h + row_w.to(tl.int64) * x_w + c[None, :]
            a = tl.load(x_rows[:, None] + at, mask=inside & rows_ok[:, None] & k_ok[None, :], other=0)
            b = tl.load(w_columns[None, :] + kk[:, None], mask=k_ok[:, None] & o_ok[None, :], other=0)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        x_tile = x_rows[:, None] + k[None, :]
        if UPSAMPLE == 1:
            x_tile += (from_h.to(tl.int64) * x_h + from_w.to(tl.int64) * x_w)[:, None]
        w_tile = w_columns[None, :] + k[:, None]
        c = tl.zeros((), tl.int32)
        j_h = tl.zeros((), tl.int32)
        j_w = tl.zeros((), tl.int32)
        for _ in range(0, taps * tl.cdiv(in_channels, BLOCK_K)):
            inside, row_h, row_w = _source(
                from_h + j_h * dilation_h, from_w + j_w * dilation_w, in_h, in_w, UPSAMPLE
            )  # fmt: skip
            mask = (inside & rows_ok)[:, None] & (c + k < in_channels)[None, :]
            if UPSAMPLE == 1:
                a = tl.load(
                    x_tile + (c + (j_h * dilation_h).to(tl.int64) * x_h + (j_w * dilation_w).to(tl.int64) * x_w),
                    mask=mask, other=0,
                )  # fmt: skip
            else:
                at = row_h.to(tl.int64) * x_h + row_w.to(tl.int64) * x_w + c
                a = tl.load(x_tile + at[:, None], mask=mask, other=0)
            b = tl.load(
                w_tile + (c + (j_h * taps_w + j_w) * w_tap), mask=(c + k < in_channels)[:, None] & o_ok[None, :],
                other=0,
            )  # fmt: skip
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            # Counters instead of divisions: this runs once per step on every thread.
            c += BLOCK_K
            carry = c >= in_channels
            c = tl.where(carry, 0, c)
            j_w += carry.to(tl.int32)
            carry = j_w >= taps_w
            j_w = tl.where(carry, 0, j_w)
            j_h += carry.to(tl.int32)

    if SHARE == "total" or SHARE == "taps":
        acc = _add_share(acc, sums, zero_point, channel, o_ok, from_h, from_w, in_h, in_w, dilation_h, dilation_w,
                         taps_h, taps_w, SHARE)  # fmt: skip
    finish(acc, tl.load(input_scale), weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y,
           n, m, rows_ok, group * out_channels + tile_o * BLOCK_O, (group + 1) * out_channels, groups * out_channels,
           RAW, ACTIVATION)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def pixel_conv_kernel(
    x, weight, sums, input_scale, zero_point, weight_scale, bias, channel_bias, film, residual, out_scale,
    out_zero_point, y,
    pixels, groups, in_channels, out_channels, x_n, x_h, x_w, w_tap, w_out,
    in_h, in_w, out_h, out_w, stride_h, stride_w, top, left, dilation_h, dilation_w, taps_h, taps_w,
    tune,
    UPSAMPLE: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As ``conv_kernel``, with scales and zero points per pixel, dense [N, H, W]."""
    tiles_o = tl.cdiv(out_channels, BLOCK_O)
    program = tl.program_id(0)
    tile_o = program % tiles_o
    group = (program // tiles_o) % groups
    m, n, h, w = _pixel(program // tiles_o // groups, out_h, out_w, WIDE, BLOCK_M)
    rows_ok = m < pixels
    from_h = h * stride_h - top
    from_w = w * stride_w - left
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_ok = o < out_channels
    channel = group * out_channels + o
    taps = taps_h * taps_w
    k = tl.arange(0, BLOCK_K)
    x_rows = x + n.to(tl.int64) * x_n + group.to(tl.int64) * in_channels
    w_columns = weight + channel.to(tl.int64) * w_out
    one = tl.zeros((), tl.float32) + 1.0
    y_tile = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    source_h = in_h // UPSAMPLE
    source_w = in_w // UPSAMPLE
    for tap in range(0, taps):
        j_h = tap // taps_w
        j_w = tap - j_h * taps_w
        inside, row_h, row_w = _source(
            from_h + j_h * dilation_h, from_w + j_w * dilation_w, in_h, in_w, UPSAMPLE
        )  # fmt: skip
        inside = inside & rows_ok
        x_tile = (x_rows + row_h.to(tl.int64) * x_h + row_w.to(tl.int64) * x_w)[:, None] + k[None, :]
        w_tile = (w_columns + tap * w_tap)[None, :] + k[:, None]
        part = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)
        for c in range(0, in_channels, BLOCK_K):
            k_ok = c + k < in_channels
            a = tl.load(x_tile + c, mask=inside[:, None] & k_ok[None, :], other=0)
            b = tl.load(w_tile + c, mask=k_ok[:, None] & o_ok[None, :], other=0)
            part = tl.dot(a, b, part, out_dtype=tl.int32)
        at = (n.to(tl.int64) * source_h + row_h) * source_w + row_w
        if zero_point is not None:
            total = tl.load(sums + channel.to(tl.int64) * taps + tap, mask=o_ok, other=0)
            part -= tl.load(zero_point + at, mask=inside, other=0)[:, None] * total[None, :]
        y_tile += part.to(tl.float32) * tl.load(input_scale + at, mask=inside, other=0.0)[:, None]
    finish(y_tile, one, weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y, n, m, rows_ok,
           group * out_channels + tile_o * BLOCK_O, (group + 1) * out_channels, groups * out_channels,
           False, ACTIVATION)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES[:-1])
def depthwise_kernel(
    x, weight, input_scale, zero_point, weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y,
    pixels, channels, x_n, x_h, x_w,
    in_h, in_w, out_h, out_w, stride_h, stride_w, top, left, dilation_h, dilation_w, taps_h, taps_w,
    tune,
    EXPAND: tl.constexpr, PER_PIXEL: tl.constexpr, UPSAMPLE: tl.constexpr, WIDE: tl.constexpr, RAW: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M pixels, BLOCK_C channels] tile; output channel c reads c // EXPAND. weight is [channel, tap]."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    m, n, h, w = _pixel(program // tiles_c, out_h, out_w, WIDE, BLOCK_M)
    rows_ok = m < pixels
    from_h = h * stride_h - top
    from_w = w * stride_w - left
    first = (program % tiles_c) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    c_ok = channel < channels
    taps = taps_h * taps_w
    x_rows = x + n.to(tl.int64) * x_n
    w_columns = weight + channel.to(tl.int64) * taps
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    y_tile = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if zero_point is not None and not PER_PIXEL:
        offset = tl.load(zero_point)
    for tap in range(0, taps):
        j_h = tap // taps_w
        j_w = tap - j_h * taps_w
        inside, row_h, row_w = _source(from_h + j_h * dilation_h, from_w + j_w * dilation_w, in_h, in_w, UPSAMPLE)
        inside = inside & rows_ok
        at = (x_rows + row_h.to(tl.int64) * x_h + row_w.to(tl.int64) * x_w)[:, None] + (channel // EXPAND)[None, :]
        mask = inside[:, None] & c_ok[None, :]
        value = tl.load(at, mask=mask, other=0).to(tl.int32)
        coefficient = tl.load(w_columns + tap, mask=c_ok, other=0).to(tl.int32)
        pixel = (n.to(tl.int64) * (in_h // UPSAMPLE) + row_h) * (in_w // UPSAMPLE) + row_w
        if zero_point is not None:
            if PER_PIXEL:
                value -= tl.load(zero_point + pixel, mask=inside, other=0)[:, None]
            else:
                value = tl.where(mask, value - offset, 0)
        if PER_PIXEL:
            scale = tl.load(input_scale + pixel, mask=inside, other=0.0)
            y_tile += (value * coefficient[None, :]).to(tl.float32) * scale[:, None]
        else:
            acc += value * coefficient[None, :]
    if PER_PIXEL:
        one = tl.zeros((), tl.float32) + 1.0
        finish(y_tile, one, weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y, n, m,
               rows_ok, first, channels, channels, RAW, ACTIVATION)  # fmt: skip
    else:
        finish(acc, tl.load(input_scale), weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point,
               y, n, m, rows_ok, first, channels, channels, RAW, ACTIVATION)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ configurations

_LEAST_CHANNELS = 32  # per group; with fewer, a block of one tap's channels would be mostly padding
_SATURATING = 65536  # products from which on a sum that began with the zero point's share may leave int32
_MOST_MULTIPLIER = 4  # output channels per group up to which a depthwise convolution is not worth a matrix product

_NAMES = ("BLOCK_M", "BLOCK_O", "BLOCK_K")
_KEYS = ("tune", "groups", "in_channels", "out_channels", "taps_h", "taps_w", "stride_w", "UPSAMPLE")


def _extents(args: dict) -> dict[str, int]:
    return {"BLOCK_M": args["pixels"], "BLOCK_O": args["out_channels"], "BLOCK_K": args["in_channels"]}


def _gather_extents(args: dict) -> dict[str, int]:
    return {**_extents(args), "BLOCK_K": args["taps_h"] * args["taps_w"] * args["in_channels"]}


CONV = Kernel(
    "int8_conv",
    conv_kernel,
    variants("int8_conv", _NAMES, [
        (128, 128, 128, 8, 3),
        (128, 256, 128, 8, 3, 90),
        (128, 128, 64, 8, 4),
        (64, 256, 128, 8, 3),
        (128, 64, 128, 8, 3),
        (64, 128, 128, 8, 3),
        (64, 64, 128, 4, 4),
        (64, 32, 128, 4, 4),
        (128, 32, 64, 4, 4),
        (128, 16, 64, 4, 4),
        (128, 32, 32, 4, 4),
    ]),
    _extents,
    (*_KEYS, "SHARE"),
    matrix=True,
)  # fmt: skip

CONV_GATHER = Kernel(  # with GATHER
    "int8_conv_gather",
    conv_kernel,
    variants("int8_conv_gather", _NAMES, [
        (128, 64, 32, 8, 1),
        (64, 64, 32, 4, 1),
        (128, 32, 32, 8, 1),
        (64, 16, 32, 4, 1),
    ]),
    _gather_extents,
    _KEYS,
    matrix=True,
)  # fmt: skip

CONV_PIXEL = Kernel(  # two accumulators, so smaller tiles
    "int8_conv_pixel",
    pixel_conv_kernel,
    variants("int8_conv_pixel", _NAMES, [
        (64, 128, 128, 8, 3),
        (128, 64, 128, 8, 3, 90),
        (128, 64, 64, 8, 3),
        (64, 128, 64, 8, 3),
        (64, 64, 64, 4, 4),
        (64, 32, 64, 4, 3),
        (64, 16, 32, 4, 3),
    ]),
    _extents,
    _KEYS,
    matrix=True,
)  # fmt: skip

DEPTHWISE = Kernel(
    "int8_depthwise",
    depthwise_kernel,
    variants("int8_depthwise", ("BLOCK_M", "BLOCK_C"), [
        (32, 64, 4, 2),
        (64, 32, 4, 2),
        (16, 128, 4, 2),
        (128, 16, 4, 2),
    ]),
    lambda args: {"BLOCK_M": args["pixels"], "BLOCK_C": args["channels"]},
    ("tune", "channels", "taps_h", "taps_w", "stride_w", "UPSAMPLE", "PER_PIXEL"),
)  # fmt: skip

KERNELS = (CONV, CONV_GATHER, CONV_PIXEL, DEPTHWISE, WEIGHT_SUMS)


# ------------------------------------------------------------------------------------------------------------ launches


def output_size(input: Tensor, weight: Tensor, stride, padding, dilation, upsample: int) -> list[int]:
    """[H_out, W_out]; ``padding`` is (top, bottom, left, right)."""
    return [
        (n * upsample + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i, n in enumerate(input.shape[2:])
    ]


def _geometry(x: Tensor, weight: Tensor, size, stride, padding, dilation, upsample: int) -> dict[str, int]:
    x_n, _, x_h, x_w = x.stride()
    return {
        "pixels": x.shape[0] * size[0] * size[1], "x_n": x_n, "x_h": x_h, "x_w": x_w,
        "in_h": x.shape[2] * upsample, "in_w": x.shape[3] * upsample, "out_h": size[0], "out_w": size[1],
        "stride_h": stride[0], "stride_w": stride[1], "top": padding[0], "left": padding[2],
        "dilation_h": dilation[0], "dilation_w": dilation[1], "taps_h": weight.shape[2], "taps_w": weight.shape[3],
        "UPSAMPLE": upsample,
    }  # fmt: skip


def _has_border(geometry: dict[str, int]) -> bool:
    """Whether some tap of some output pixel falls outside the image."""

    def leaves(axis: str, before: str) -> bool:
        last = (geometry[f"out_{axis}"] - 1) * geometry[f"stride_{axis}"] - geometry[before]
        last += (geometry[f"taps_{axis}"] - 1) * geometry[f"dilation_{axis}"]
        return geometry[before] > 0 or last >= geometry[f"in_{axis}"]

    return leaves("h", "top") or leaves("w", "left")


def _share(geometry: dict[str, int], products: int) -> str:
    """How the zero point's share is subtracted (see the module's docstring)."""
    if not _has_border(geometry):
        return "total"
    return "digits" if products < _SATURATING else "taps"


def _is_wide(geometry: dict[str, int]) -> bool:
    """Whether pixel indices or coordinates need 64 bits, with room for a tile and the padding."""
    reach = [
        max(geometry[f"in_{a}"], geometry[f"out_{a}"] * geometry[f"stride_{a}"]) + abs(geometry[before])
        + geometry[f"taps_{a}"] * geometry[f"dilation_{a}"]
        for a, before in (("h", "top"), ("w", "left"))
    ]  # fmt: skip
    return max(geometry["pixels"], *reach) >= 2**30


def _channels_inner(tensor: Tensor) -> Tensor:
    """``tensor`` with channel stride 1, copied only if it has another."""
    if tensor.stride(1) == 1 or tensor.shape[1] == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def plan(
    input: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, input_zero_point: Tensor | None,
    bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    channel_bias: Tensor | None, film: Tensor | None, residual: Tensor | None, activation: str,
    out_scale: Tensor | None, out_zero_point: Tensor | None, upsample: int, output: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches that write ``output`` [N, O, H, W], dense in channels_last memory."""
    if output.numel() == 0:
        return []
    x = _channels_inner(input)
    geometry = _geometry(x, weight, output.shape[2:], stride, padding, dilation, upsample)
    channels, group_channels = weight.shape[:2]
    per_pixel = input_scale.dim() > 0
    arguments = {
        "x": x, "input_scale": input_scale.contiguous(), "weight_scale": weight_scale, "bias": bias,
        "zero_point": None if input_zero_point is None else input_zero_point.contiguous(),
        "channel_bias": channel_bias, "film": film,
        "residual": None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        "out_scale": out_scale, "out_zero_point": out_zero_point, "y": output, **geometry,
        "tune": geometry["pixels"].bit_length(), "WIDE": _is_wide(geometry), "ACTIVATION": activation,
    }  # fmt: skip
    raw = output.dtype == torch.int32
    if groups > 1 and group_channels == 1 and channels // groups <= _MOST_MULTIPLIER:
        multiplier = channels // groups
        return [_depthwise_launch({**arguments, "PER_PIXEL": per_pixel, "RAW": raw}, weight, multiplier)]
    # As [out channel, tap, channel]: a view of a weight in channels_last memory or with one tap, else a copy per call.
    rows = weight.permute(0, 2, 3, 1).contiguous().view(channels, -1, group_channels)
    gather = group_channels < _LEAST_CHANNELS and not per_pixel
    share = "" if input_zero_point is None or per_pixel else _share(geometry, rows[0].numel())
    sums, before = None, []
    if input_zero_point is not None:
        sums, before = plan_weight_sums(rows, input_zero_point if share == "digits" else None)
    out_channels = channels // groups
    arguments |= {
        "weight": rows, "sums": sums, "groups": groups, "in_channels": group_channels, "out_channels": out_channels,
        "w_tap": group_channels, "w_out": rows[0].numel(),
    }  # fmt: skip
    if not per_pixel:
        arguments |= {"GATHER": gather, "SHARE": share, "RAW": raw}
    kernel = CONV_PIXEL if per_pixel else CONV_GATHER if gather else CONV

    def grid(meta):
        tiles = triton.cdiv(geometry["pixels"], meta["BLOCK_M"]) * triton.cdiv(out_channels, meta["BLOCK_O"])
        return (tiles * groups,)

    return [*before, Launch(kernel, arguments, grid)]


def _depthwise_launch(arguments: dict, weight: Tensor, multiplier: int) -> Launch:
    pixels, channels = arguments["pixels"], weight.shape[0]

    def grid(meta):
        return (triton.cdiv(pixels, meta["BLOCK_M"]) * triton.cdiv(channels, meta["BLOCK_C"]),)

    return Launch(
        DEPTHWISE, {**arguments, "weight": weight.contiguous(), "channels": channels, "EXPAND": multiplier}, grid
    )


# ---------------------------------------------------------------------------------------------------------- public API


def forward(
    input: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, input_zero_point: Tensor | None,
    bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    channel_bias: Tensor | None, film: Tensor | None, residual: Tensor | None, activation: str,
    out_dtype: torch.dtype, out_scale: Tensor | None, out_zero_point: Tensor | None, upsample: int,
) -> Tensor:  # fmt: skip
    """The op; arguments as ``pydenoise.ops.int8_conv2d.prepare`` returns them, not checked here.

    Returns [N, O, H, W] of ``out_dtype`` in channels_last memory. A ``weight`` in channels_last memory is read where it
    lies; any other is rearranged on every call.
    """
    size = output_size(input, weight, stride, padding, dilation, upsample)
    shape = (input.shape[0], *size, weight.shape[0])
    output = torch.empty(shape, dtype=out_dtype, device=input.device).permute(0, 3, 1, 2)
    launches = plan(
        input, weight, input_scale, weight_scale, input_zero_point, bias, stride, padding, dilation, groups,
        channel_bias, film, residual, activation, out_scale, out_zero_point, upsample, output,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return output
