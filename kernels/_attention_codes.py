"""int8 codes of queries and keys for attention: one scale for each block of tokens, keys less their mean."""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._attention import heads_of, load_rows, rows_at, strides, width_of
from pydenoise.kernels._int8 import codes
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

_CHUNK = 1024  # tokens of one partial sum of keys


@triton.jit(do_not_specialize=("tokens", "heads", "chunk", "chunks"))
def key_sums_kernel(
    x, lengths, sums, x_b, x_h, x_l, tokens, heads, chunk, chunks,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums [B * heads, chunks, BLOCK_D], float32, over each chunk's tokens that count."""
    part = tl.program_id(0) % chunks
    program = tl.program_id(0) // chunks
    batch, head, _ = heads_of(program, heads, 1)
    limit = tokens
    if lengths is not None:
        limit = tl.load(lengths + batch)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    base = x + batch * x_b + head * x_h
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, limit), BLOCK_T):
        pointers = base + (((first + t).to(tl.int64) * x_l)[:, None] + d[None, :])
        total += tl.sum(load_rows(pointers, first + t < limit, HEAD_DIM, True).to(tl.float32), 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * BLOCK_D + d, total)


@triton.jit(do_not_specialize=("tokens", "heads", "chunks"))
def key_mean_kernel(sums, lengths, mean, tokens, heads, chunks, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """mean [B * heads, BLOCK_D] from the sums of chunks; 0 where no token counts."""
    program = tl.program_id(0)
    limit = tokens
    if lengths is not None:
        limit = tl.load(lengths + program // heads)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, chunks, BLOCK_T):
        at = (program.to(tl.int64) * chunks + first + t) * BLOCK_D
        total += tl.sum(tl.load(sums + at[:, None] + d[None, :], mask=(first + t < chunks)[:, None], other=0.0), 0)
    tl.store(mean + program.to(tl.int64) * BLOCK_D + d, tl.div_rn(total, tl.zeros_like(total) + tl.maximum(limit, 1)))


@triton.jit(do_not_specialize=("tokens", "heads", "blocks", "programs"))
def codes_kernel(
    x, mean, lengths, y, scales, x_b, x_h, x_l, tokens, heads, blocks, programs,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Codes y [B * heads, tokens, BLOCK_D] of x less its mean, and the scale of each block of BLOCK_SIZE tokens.

    What does not count, or is no finite number, has code 0 and no say in the scale; columns from HEAD_DIM on are 0.
    """
    groups: tl.constexpr = BLOCK_T // BLOCK_SIZE
    program = tl.program_id(0) // programs
    batch, head, _ = heads_of(program, heads, 1)
    first = tl.program_id(0) % programs * BLOCK_T
    limit = tokens
    if lengths is not None:
        limit = tl.load(lengths + batch)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    ok = first + t < limit
    pointers = rows_at(x + batch * x_b + head * x_h, first, x_l, BLOCK_T, BLOCK_D)
    v = load_rows(pointers, ok, HEAD_DIM, True).to(tl.float32)
    if mean is not None:
        v = tl.where(ok[:, None], v - tl.load(mean + program.to(tl.int64) * BLOCK_D + d)[None, :], 0.0)
    v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
    reach = tl.max(tl.reshape(tl.max(tl.abs(v), 1), (groups, BLOCK_SIZE)), 1)
    scale = tl.div_rn(reach, tl.zeros_like(reach) + 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    number = first // BLOCK_SIZE + tl.arange(0, groups)
    tl.store(scales + program.to(tl.int64) * blocks + number, scale, mask=number < blocks)
    by = tl.broadcast_to(scale[:, None, None], (groups, BLOCK_SIZE, BLOCK_D))
    rows = tl.reshape(codes(tl.reshape(v, (groups, BLOCK_SIZE, BLOCK_D)), by, 0, False), (BLOCK_T, BLOCK_D))
    at = (program.to(tl.int64) * tokens + first) * BLOCK_D
    tl.store(y + at + (t * BLOCK_D)[:, None] + d[None, :], rows, mask=(first + t < tokens)[:, None])


# ------------------------------------------------------------------------------------------------------ configurations


def _kernel(name: str, function, rows: list[tuple]) -> Kernel:
    return Kernel(name, function, variants(name, ("BLOCK_T",), rows), lambda arguments: {})


KEY_SUMS = _kernel("attention_key_sums", key_sums_kernel, [(32, 4, 1)])
KEY_MEAN = _kernel("attention_key_mean", key_mean_kernel, [(16, 4, 1)])
CODES = _kernel("attention_codes", codes_kernel, [(128, 8, 1)])  # a multiple of every block size

KERNELS = (KEY_SUMS, KEY_MEAN, CODES)


# ------------------------------------------------------------------------------------------------------------ launches


def plan_mean(key: Tensor, lengths: Tensor | None) -> tuple[Tensor, list[Launch]]:
    """(mean of the keys that count, float32 [B, Hkv, width], its launches); the order of the sums is fixed."""
    batch, heads, tokens, size = key.shape
    width, chunks = width_of(size), triton.cdiv(tokens, _CHUNK)
    sums = torch.empty((batch * heads, chunks, width), dtype=torch.float32, device=key.device)
    mean = torch.empty((batch, heads, width), dtype=torch.float32, device=key.device)
    common = {"lengths": lengths, "tokens": tokens, "heads": heads, "chunks": chunks, "BLOCK_D": width}
    parts = {"x": key, "sums": sums, "chunk": _CHUNK, "HEAD_DIM": size, **strides(x=key), **common}
    return mean, [
        Launch(KEY_SUMS, parts, lambda meta: (batch * heads * chunks,)),
        Launch(KEY_MEAN, {"sums": sums, "mean": mean, **common}, lambda meta: (batch * heads,)),
    ]


def plan_codes(
    x: Tensor, mean: Tensor | None, lengths: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor, Launch]:  # fmt: skip
    """(codes int8 [B, H, L, width], scales float32 [B, H, blocks], the launch that computes them)."""
    batch, heads, tokens, size = x.shape
    width, blocks = width_of(size), triton.cdiv(tokens, block_size)
    y = torch.empty((batch, heads, tokens, width), dtype=torch.int8, device=x.device)
    scales = torch.empty((batch, heads, blocks), dtype=torch.float32, device=x.device)
    programs = triton.cdiv(tokens, dict(CODES.variants[0].meta)["BLOCK_T"])
    arguments = {
        "x": x, "mean": mean, "lengths": lengths, "y": y, "scales": scales, "tokens": tokens, "heads": heads,
        "blocks": blocks, "programs": programs, "HEAD_DIM": size, "BLOCK_SIZE": block_size, "BLOCK_D": width,
        **strides(x=x),
    }  # fmt: skip
    return y, scales, Launch(CODES, arguments, lambda meta: (batch * heads * programs,))
