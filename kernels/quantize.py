"""Quantization to int8 and back: a pointwise kernel, a kernel with a scale per row of values, and the way back.

A row is what shares a scale or a position: the channels of a pixel, the values of a token. Tensors are addressed as
[rows 0, rows 1, rows 2, values] with four strides, so any strides are read where they lie.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._int8 import activate, codes, dynamic_parameters, gelu
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

_SIZES = ("rows", "size_1", "size_2", "tune")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _row(block, rows, size_1, size_2, BLOCK_R: tl.constexpr):
    """(in range, linear index, and its three coordinates in 64 bits) of a block of rows."""
    row = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    above = row // size_2
    i = above // size_1
    return row < rows, row, i, above - i * size_1, row - above * size_2


@triton.jit
def _values(x, channel_scale, at, c, x_c, columns, mask, ACTIVATION: tl.constexpr):
    """activation(x) * channel_scale as float32, of the columns ``c`` [C] of rows at ``at`` [R]."""
    pointers = x + at[:, None] + (c.to(tl.int64) * x_c)[None, :]
    v = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "geglu":
        gate = tl.load(pointers + (tl.zeros((), tl.int64) + columns) * x_c, mask=mask, other=0.0).to(tl.float32)
        v = v * gelu(gate)
    else:
        v = activate(v, ACTIVATION)
    if channel_scale is not None:
        v = v * tl.load(channel_scale + c, mask=c < columns, other=0.0)[None, :]
    return v


@triton.jit
def _parameter(values, at, c, s_c, ok, mask, PER: tl.constexpr):
    """A scale or zero point, one for the tensor, per row or per value, as [R, C]; 1 where masked."""
    if PER == "value":
        v = tl.load(values + at[:, None] + (c.to(tl.int64) * s_c)[None, :], mask=mask, other=1)
    elif PER == "row":
        v = tl.zeros_like(mask.to(values.dtype.element_ty)) + tl.load(values + at, mask=ok, other=1)[:, None]
    else:
        v = tl.zeros_like(mask.to(values.dtype.element_ty)) + tl.load(values)
    return v


@triton.jit(do_not_specialize=_SIZES)
def quantize_kernel(
    x, scale, zero_point, channel_scale, y,
    rows, columns, size_1, size_2, x_0, x_1, x_2, x_c, y_0, y_1, y_2, y_c, s_0, s_1, s_2, s_c, tune,
    PER: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes under known scales; scale and zero point have the strides s_*, 0 where they are shared."""
    tiles = tl.cdiv(columns, BLOCK_C)
    ok, _, i, j, k = _row(tl.program_id(0) // tiles, rows, size_1, size_2, BLOCK_R)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = ok[:, None] & (c < columns)[None, :]
    v = _values(x, channel_scale, i * x_0 + j * x_1 + k * x_2, c, x_c, columns, mask, ACTIVATION)
    at = i * s_0 + j * s_1 + k * s_2
    by = _parameter(scale, at, c, s_c, ok, mask, PER)
    if zero_point is not None:
        q = codes(v, by, _parameter(zero_point, at, c, s_c, ok, mask, PER), True)
    else:
        q = codes(v, by, 0, False)
    tl.store(y + (i * y_0 + j * y_1 + k * y_2)[:, None] + (c.to(tl.int64) * y_c)[None, :], q, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def dynamic_kernel(
    x, channel_scale, y, scale, zero_point,
    rows, columns, size_1, size_2, x_0, x_1, x_2, x_c, y_0, y_1, y_2, y_c, tune,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A scale per row: its range, then its codes. WHOLE: one block holds a row, so it is read once."""
    ok, row, i, j, k = _row(tl.program_id(0), rows, size_1, size_2, BLOCK_R)
    x_at = i * x_0 + j * x_1 + k * x_2
    y_at = i * y_0 + j * y_1 + k * y_2
    c = tl.arange(0, BLOCK_C)
    low = tl.zeros((BLOCK_R,), tl.float32)
    high = tl.zeros((BLOCK_R,), tl.float32)
    nan = tl.zeros((BLOCK_R,), tl.int32)
    v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, columns, BLOCK_C):
        mask = ok[:, None] & (start + c < columns)[None, :]
        v = _values(x, channel_scale, x_at, start + c, x_c, columns, mask, ACTIVATION)
        is_number = v == v
        plain = tl.where(mask & is_number, v, 0.0)
        low = tl.minimum(low, tl.min(plain, 1))
        high = tl.maximum(high, tl.max(plain, 1))
        nan = tl.maximum(nan, tl.max((mask & (v != v)).to(tl.int32), 1))
    by, offset = dynamic_parameters(low, high, nan, SYMMETRIC)
    for start in range(0, columns, BLOCK_C):
        mask = ok[:, None] & (start + c < columns)[None, :]
        if not WHOLE:
            v = _values(x, channel_scale, x_at, start + c, x_c, columns, mask, ACTIVATION)
        q = codes(v, tl.zeros_like(v) + by[:, None], offset[:, None], not SYMMETRIC)
        tl.store(y + y_at[:, None] + ((start + c).to(tl.int64) * y_c)[None, :], q, mask=mask)
    tl.store(scale + row, by, mask=ok)
    tl.store(zero_point + row, offset.to(tl.int32), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def dequantize_kernel(
    x, scale, zero_point, y,
    rows, columns, size_1, size_2, x_0, x_1, x_2, x_c, y_0, y_1, y_2, y_c, s_0, s_1, s_2, s_c, tune,
    PER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(codes - zero point) * scale."""
    tiles = tl.cdiv(columns, BLOCK_C)
    ok, _, i, j, k = _row(tl.program_id(0) // tiles, rows, size_1, size_2, BLOCK_R)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = ok[:, None] & (c < columns)[None, :]
    column = c.to(tl.int64)[None, :]
    steps = tl.load(x + (i * x_0 + j * x_1 + k * x_2)[:, None] + column * x_c, mask=mask, other=0).to(tl.int32)
    at = i * s_0 + j * s_1 + k * s_2
    if zero_point is not None:
        steps -= _parameter(zero_point, at, c, s_c, ok, mask, PER)
    v = steps.to(tl.float32) * _parameter(scale, at, c, s_c, ok, mask, PER)
    tl.store(y + (i * y_0 + j * y_1 + k * y_2)[:, None] + column * y_c, v.to(y.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_R", "BLOCK_C")
_TILES = [(32, 64, 4, 1), (16, 128, 4, 1), (8, 256, 4, 1), (4, 1024, 4, 1), (64, 16, 4, 1), (128, 64, 8, 1)]
_ROW_TILES = [
    (32, 64, 4, 1), (16, 128, 4, 1), (8, 256, 4, 1), (8, 512, 4, 1), (4, 1024, 4, 1), (2, 2048, 4, 1),
    (1, 4096, 4, 1), (16, 512, 8, 1),
]  # fmt: skip
_LONGEST_ROW = 4096  # values that one block holds
_KEYS = ("tune", "columns", "x_c", "ACTIVATION")


def _extents(args: dict) -> dict[str, int]:
    return {"BLOCK_R": args["rows"], "BLOCK_C": args["columns"]}


QUANTIZE = Kernel("quantize", quantize_kernel, variants("quantize", _NAMES, _TILES), _extents, _KEYS)
DYNAMIC = Kernel(
    "quantize_dynamic",
    dynamic_kernel,
    variants("quantize_dynamic", _NAMES, _ROW_TILES),
    _extents,
    _KEYS,
    whole="BLOCK_C",
)
DEQUANTIZE = Kernel(
    "dequantize",
    dequantize_kernel,
    variants("dequantize", _NAMES, _TILES),
    _extents,
    ("tune", "columns", "x_c"),
)

KERNELS = (QUANTIZE, DYNAMIC, DEQUANTIZE)


# ------------------------------------------------------------------------------------------------------------ launches


def _four(tensor: Tensor, last: int) -> Tensor:
    """``tensor`` as [rows 0, rows 1, rows 2, values]: images with axis ``last`` moved to the end, all else as rows."""
    if tensor.dim() == 4:
        return tensor.movedim(last, -1)
    return tensor.reshape(-1, 1, 1, tensor.shape[-1])


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip((f"{prefix}_0", f"{prefix}_1", f"{prefix}_2", f"{prefix}_c"), tensor.stride(), strict=True))


def _sizes(y: Tensor) -> dict[str, int]:
    rows = y.shape[0] * y.shape[1] * y.shape[2]
    return {
        "rows": rows, "columns": y.shape[3], "size_1": y.shape[1], "size_2": y.shape[2], "tune": rows.bit_length(),
    }  # fmt: skip


def _grid(rows: int, columns: int | None):
    """Programs for ``rows`` rows, and for blocks of ``columns`` columns if given."""

    def grid(meta):
        across = 1 if columns is None else triton.cdiv(columns, meta["BLOCK_C"])
        return (triton.cdiv(rows, meta["BLOCK_R"]) * across,)

    return grid


def _spread(values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Scales or zero points read at every element of a tensor of ``shape``, with strides 0 where they are shared."""
    return None if values is None else _four(values.contiguous().expand(shape), 1)


def _per(scales: Tensor) -> str:
    """What a spread scale is shared by."""
    if scales.stride(3):
        return "value"
    return "row" if any(scales.stride()) else "tensor"


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised result in the layout that the ops promise: images in channels_last memory."""
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype, device=device)
    n, c, h, w = shape
    return torch.empty((n, h, w, c), dtype=dtype, device=device).permute(0, 3, 1, 2)


def _quantized_shape(input: Tensor, activation: str) -> tuple[int, ...]:
    shape = list(input.shape)
    if activation == "geglu":
        shape[1 if input.dim() == 4 else -1] //= 2
    return tuple(shape)


def plan_quantize(input: Tensor, scale: Tensor, zero_point, activation: str, channel_scale, output: Tensor) -> Launch:
    """The launch that writes ``output``, non-empty."""
    x, y, scales = _four(input, 1), _four(output, 1), _spread(scale, output.shape)
    arguments = {
        "x": x, "scale": scales, "zero_point": _spread(zero_point, output.shape), "channel_scale": channel_scale,
        "y": y, **_sizes(y), **_strides("x", x), **_strides("y", y), **_strides("s", scales), "PER": _per(scales),
        "ACTIVATION": activation,
    }  # fmt: skip
    return Launch(QUANTIZE, arguments, _grid(arguments["rows"], arguments["columns"]))


def plan_dynamic(
    input: Tensor, granularity: str, activation: str, channel_scale, symmetric: bool, output: Tensor, scale: Tensor,
    zero_point: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes ``output``, ``scale`` and ``zero_point``, non-empty and the last two row-major."""
    axis = 1 if granularity == "pixel" else -1
    x, y = _four(input, axis), _four(output, axis)
    arguments = {
        "x": x, "channel_scale": channel_scale, "y": y, "scale": scale, "zero_point": zero_point, **_sizes(y),
        **_strides("x", x), **_strides("y", y), "SYMMETRIC": symmetric, "WHOLE": y.shape[3] <= _LONGEST_ROW,
        "ACTIVATION": activation,
    }  # fmt: skip
    return Launch(DYNAMIC, arguments, _grid(arguments["rows"], None))


def plan_dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None, output: Tensor) -> Launch:
    """The launch that writes ``output``, non-empty."""
    x, y, scales = _four(input, 1), _four(output, 1), _spread(scale, output.shape)
    arguments = {
        "x": x, "scale": scales, "zero_point": _spread(zero_point, output.shape), "y": y, **_sizes(y),
        **_strides("x", x), **_strides("y", y), **_strides("s", scales), "PER": _per(scales),
    }  # fmt: skip
    return Launch(DEQUANTIZE, arguments, _grid(arguments["rows"], arguments["columns"]))


# ---------------------------------------------------------------------------------------------------------- public API
# Arguments as the ``prepare`` functions of ``pydenoise.ops.quantize`` return them, not checked here.


def quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, activation: str, channel_scale: Tensor | None
) -> Tensor:
    """int8 codes of ``activation(input) * channel_scale``."""
    output = empty(_quantized_shape(input, activation), torch.int8, input.device)
    if output.numel():
        plan_quantize(input, scale, zero_point, activation, channel_scale, output).run()
    return output


def quantize_dynamic(
    input: Tensor, granularity: str, activation: str, channel_scale: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero_point) with a scale per pixel or token."""
    shape = _quantized_shape(input, activation)
    output = empty(shape, torch.int8, input.device)
    positions = (shape[0], 1, *shape[2:]) if granularity == "pixel" else (*shape[:-1], 1)
    scale = torch.empty(positions, dtype=torch.float32, device=input.device)
    zero_point = torch.empty(positions, dtype=torch.int32, device=input.device)
    if output.numel():
        plan_dynamic(input, granularity, activation, channel_scale, symmetric, output, scale, zero_point).run()
    return output, scale, zero_point


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(input - zero_point) * scale`` in ``dtype``."""
    output = empty(tuple(input.shape), dtype, input.device)
    if output.numel():
        plan_dequantize(input, scale, zero_point, output).run()
    return output
