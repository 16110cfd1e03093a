"""What the int8 kernels share: activations, codes, the epilogue of matrix products, sums of weights."""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------ numbers


@triton.jit
def gelu(v):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)  # not maximum: a NaN must stay a NaN
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        v = gelu(v)
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "leaky_relu_0.01":
        v = tl.where(v < 0, v * 0.01, v)
    elif ACTIVATION == "leaky_relu_0.1":
        v = tl.where(v < 0, v * 0.1, v)
    elif ACTIVATION == "leaky_relu_0.2":
        v = tl.where(v < 0, v * 0.2, v)
    return v


@triton.jit
def rounded(v):
    """rint(v) to even, of values that any code's range clamps to the same; NaN becomes 0.

    Adding 1.5 * 2^23 leaves no bit for a fraction; the compiler may not reassociate it.
    """
    v = tl.where(v == v, v, 0.0)
    v = tl.minimum(tl.maximum(v, -512.0), 512.0)
    return (v + 12582912.0) - 12582912.0


@triton.jit
def codes(v, scale, zero_point, AFFINE: tl.constexpr):
    """Codes of float32 ``v`` as int8; true division, as the rules ask. ``zero_point`` is read where AFFINE."""
    steps = rounded(tl.div_rn(v, scale))
    if AFFINE:
        steps = tl.minimum(tl.maximum(steps + zero_point.to(tl.float32), -128.0), 127.0)
    else:
        steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    return steps.to(tl.int32).to(tl.int8)


@triton.jit
def dynamic_parameters(low, high, nan, SYMMETRIC: tl.constexpr):
    """(scale, zero point as float32) of values in low..high; a scale that is no normal number becomes 1.

    ``low`` <= 0 <= ``high``; ``nan`` > 0 where a value was NaN.
    """
    if SYMMETRIC:
        reach = tl.maximum(-low, high)
        scale = tl.div_rn(reach, tl.zeros_like(reach) + 127.0)
    else:
        reach = high - low
        scale = tl.div_rn(reach, tl.zeros_like(reach) + 255.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    scale = tl.where(nan > 0, float("nan"), scale)
    if SYMMETRIC:
        zero_point = tl.zeros_like(scale)
    else:
        zero_point = tl.minimum(tl.maximum(rounded(-128.0 - tl.div_rn(low, scale)), -128.0), 127.0)
    return scale, zero_point


# ----------------------------------------------------------------------------------------------------------- epilogue


_WIDEST = tl.constexpr(64)  # columns that the epilogue holds at a time, beside the accumulators: more would spill


@triton.jit
def finish(acc, row_scale, weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y, n, row,
           rows_ok, first, past, channels, RAW: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """The epilogue of a tile of y, dense [rows, channels]: from accumulators [rows, columns], int32 or float32.

    Scales, bias, FiLM, activation, residual, then cast or requantization; a tensor that is None is left out. RAW stores
    the accumulators. The columns are the channels from ``first`` on, below ``past``; ``n`` is each row's image, and
    ``row_scale`` is one number or [rows] of them. Wide tiles are done in halves.
    """
    rows: tl.constexpr = acc.shape[0]
    width: tl.constexpr = acc.shape[1]
    if width > _WIDEST:
        half: tl.constexpr = width // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (rows, 2, half)), (0, 2, 1)))
        finish(left, row_scale, weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y, n, row,
               rows_ok, first, past, channels, RAW, ACTIVATION)  # fmt: skip
        finish(right, row_scale, weight_scale, bias, channel_bias, film, residual, out_scale, out_zero_point, y, n,
               row, rows_ok, first + half, past, channels, RAW, ACTIVATION)  # fmt: skip
    else:
        channel = first + tl.arange(0, width)
        channel_ok = channel < past
        mask = rows_ok[:, None] & channel_ok[None, :]
        at = (row.to(tl.int64) * channels)[:, None] + channel[None, :]
        if RAW:
            tl.store(y + at, acc, mask=mask)
        else:
            scale = tl.load(weight_scale + channel, mask=channel_ok, other=0.0)[None, :]
            if len(row_scale.shape) == 1:
                v = acc.to(tl.float32) * (scale * row_scale[:, None])
            else:
                v = acc.to(tl.float32) * (scale * row_scale)
            if bias is not None:
                v += tl.load(bias + channel, mask=channel_ok, other=0.0)[None, :]
            if channel_bias is not None:
                shift_at = (n.to(tl.int64) * channels)[:, None] + channel[None, :]
                v += tl.load(channel_bias + shift_at, mask=mask, other=0.0)
            if film is not None:
                gain_at = (n.to(tl.int64) * channels * 2)[:, None] + channel[None, :]
                gain = tl.load(film + gain_at, mask=mask, other=0.0)
                v = v * (1.0 + gain) + tl.load(film + gain_at + channels, mask=mask, other=0.0)
            v = activate(v, ACTIVATION)
            if residual is not None:
                v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            if out_scale is not None:
                by = tl.zeros_like(v) + tl.load(out_scale)
                if out_zero_point is not None:
                    v = codes(v, by, tl.load(out_zero_point), True)
                else:
                    v = codes(v, by, 0, False)
            tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------- sums of weights


DIGITS = tl.constexpr(4)  # base 256, of the share of the zero point
_TAPS = 32  # a row of digits is padded to a multiple of these: the depth of one int8 product


@triton.jit(do_not_specialize=("rows", "taps", "padded", "tune"))
def weight_sums_kernel(
    weight, zero_point, sums, rows, columns, taps, padded, tune,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[row] = sum of weight[row, :], exact; the weight is dense.

    With a zero point: the base-256 digits of -zero_point * sum instead, balanced and as int8, [digit, channel, tap
    padded with zeros]; the rows are then pairs (channel, padded tap).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    tap = row % padded
    at = (row // padded * taps + tap) * columns
    row_ok = (row < rows) & (tap < taps)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, columns, BLOCK_C):
        mask = row_ok[:, None] & (start + c < columns)[None, :]
        w = tl.load(weight + at[:, None] + (start + c)[None, :], mask=mask, other=0)
        total += tl.sum(w.to(tl.int32), 1)
    if zero_point is None:
        tl.store(sums + row, total, mask=row_ok)
    else:
        total *= -tl.load(zero_point)
        for digit in tl.static_range(DIGITS):
            value = total.to(tl.int8)  # the lowest byte, as a signed one
            tl.store(sums + digit * rows.to(tl.int64) + row, value, mask=row < rows)
            total = (total - value.to(tl.int32)) >> 8


WEIGHT_SUMS = Kernel(
    "weight_sums",
    weight_sums_kernel,
    variants("weight_sums", ("BLOCK_R", "BLOCK_C"), [(16, 256, 4, 2), (32, 64, 4, 2), (4, 1024, 4, 2)]),
    lambda args: {"BLOCK_R": args["rows"], "BLOCK_C": args["columns"]},
    keys=("tune", "columns"),
)


def plan_weight_sums(weight: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, list[Launch]]:
    """What :func:`weight_sums_kernel` makes of dense ``weight`` [channels, taps, columns], and the one launch."""
    channels, taps, columns = weight.shape
    padded = taps if zero_point is None else -(-taps // _TAPS) * _TAPS
    if zero_point is None:
        sums = torch.empty((channels, taps), dtype=torch.int32, device=weight.device)
    else:
        sums = torch.empty((DIGITS.value, channels, padded), dtype=torch.int8, device=weight.device)
    rows = channels * padded
    arguments = {
        "weight": weight, "zero_point": zero_point, "sums": sums, "rows": rows, "columns": columns, "taps": taps,
        "padded": padded, "tune": rows.bit_length(),
    }  # fmt: skip
    return sums, [Launch(WEIGHT_SUMS, arguments, lambda meta: (triton.cdiv(rows, meta["BLOCK_R"]),))]
