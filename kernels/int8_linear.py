"""int8 matrix product, ``y[m, o] = epilogue(scale * sum over k of (x[m, k] - zero_point) * w[o, k])``.

The products run on the codes; ``zero_point[m] * (sum of w[o, :])`` is subtracted afterwards, exact in int32.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._int8 import WEIGHT_SUMS, finish, plan_weight_sums
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=("rows", "tune"))
def linear_kernel(
    x, weight, sums, input_scale, zero_point, weight_scale, bias, residual, out_scale, out_zero_point, y,
    rows, channels, depth, tune,
    PER_TOKEN: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_O] tile; x [rows, depth] and weight [channels, depth] are dense.

    ``sums`` None: the weights' sums are added up beside the products.
    """
    # Eight row tiles at a time walk over the channels, so that both operands come from the cache.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_o = tl.cdiv(channels, BLOCK_O)
    program = tl.program_id(0)
    first = program // (8 * tiles_o) * 8
    height = tl.minimum(tiles_m - first, 8)
    rest = program % (8 * tiles_o)
    m = (first + rest % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = rest // height * BLOCK_O + tl.arange(0, BLOCK_O)
    m_ok = m < rows
    o_ok = o < channels
    k = tl.arange(0, BLOCK_K)
    x_tile = x + (m * depth)[:, None] + k[None, :]
    w_tile = weight + (o.to(tl.int64) * depth)[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)
    total = tl.zeros((BLOCK_O,), tl.int32)
    for start in range(0, depth, BLOCK_K):
        k_ok = start + k < depth
        a = tl.load(x_tile + start, mask=m_ok[:, None] & k_ok[None, :], other=0)
        b = tl.load(w_tile + start, mask=k_ok[:, None] & o_ok[None, :], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        if zero_point is not None and sums is None:
            total += tl.sum(b.to(tl.int32), 0)
    if zero_point is not None:
        if sums is not None:
            total = tl.load(sums + o, mask=o_ok, other=0)
        if PER_TOKEN:
            acc -= tl.load(zero_point + m, mask=m_ok, other=0)[:, None] * total[None, :]
        else:
            acc -= (tl.load(zero_point) * total)[None, :]
    if PER_TOKEN:
        row_scale = tl.load(input_scale + m, mask=m_ok, other=0.0)
    else:
        row_scale = tl.load(input_scale)
    finish(acc, row_scale, weight_scale, bias, None, None, residual, out_scale, out_zero_point, y, m, m, m_ok,
           rest // height * BLOCK_O, channels, channels, RAW, ACTIVATION)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ configurations

_FEW_ROWS = 64  # up to here reading the weight is the cost, and its sums are added up beside the products

LINEAR = Kernel(
    "int8_linear",
    linear_kernel,
    variants("int8_linear", ("BLOCK_M", "BLOCK_O", "BLOCK_K"), [
        (128, 128, 128, 8, 3),
        (128, 256, 128, 8, 3, 90),
        (128, 128, 64, 8, 4),
        (64, 128, 128, 4, 4),
        (64, 64, 128, 4, 4),
        (128, 32, 64, 4, 4),
        (32, 64, 128, 4, 4),
        (16, 64, 128, 4, 4),
        (16, 32, 256, 4, 4),
    ]),
    lambda args: {"BLOCK_M": args["rows"], "BLOCK_O": args["channels"], "BLOCK_K": args["depth"]},
    ("tune", "channels", "depth", "PER_TOKEN"),
    matrix=True,
)  # fmt: skip

KERNELS = (LINEAR, WEIGHT_SUMS)


# ------------------------------------------------------------------------------------------------------------ launches


def plan(
    input: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, input_zero_point: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, activation: str, out_scale: Tensor | None,
    out_zero_point: Tensor | None, output: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches that write ``output`` [..., O], row-major."""
    if output.numel() == 0:
        return []
    channels, depth = weight.shape
    rows = output.numel() // channels
    weight = weight.contiguous()
    sums, before = None, []
    if input_zero_point is not None and rows > _FEW_ROWS:
        sums, before = plan_weight_sums(weight.view(channels, 1, depth))
    arguments = {
        "x": input.contiguous(), "weight": weight, "sums": sums, "input_scale": input_scale.contiguous(),
        "zero_point": None if input_zero_point is None else input_zero_point.contiguous(),
        "weight_scale": weight_scale, "bias": bias, "residual": None if residual is None else residual.contiguous(),
        "out_scale": out_scale, "out_zero_point": out_zero_point, "y": output, "rows": rows, "channels": channels,
        "depth": depth, "tune": rows.bit_length(), "PER_TOKEN": input_scale.dim() > 0,
        "RAW": output.dtype == torch.int32, "ACTIVATION": activation,
    }  # fmt: skip

    def grid(meta):
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(channels, meta["BLOCK_O"]),)

    return [*before, Launch(LINEAR, arguments, grid)]


# ---------------------------------------------------------------------------------------------------------- public API


def forward(
    input: Tensor, weight: Tensor, input_scale: Tensor, weight_scale: Tensor, input_zero_point: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, activation: str, out_dtype: torch.dtype, out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    """The op; arguments as ``pydenoise.ops.int8_linear.prepare`` returns them, not checked here; [..., O]."""
    shape = (*input.shape[:-1], weight.shape[0])
    output = torch.empty(shape, dtype=out_dtype, device=input.device)
    launches = plan(
        input, weight, input_scale, weight_scale, input_zero_point, bias, residual, activation, out_scale,
        out_zero_point, output,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return output
