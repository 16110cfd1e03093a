"""What the attention kernels share: tiles of listed blocks, scores in base 2, and how tensors reach a kernel.

A list names blocks of BLOCK_SIZE tokens. It is walked in tiles of BLOCK tokens: a tile is a part of one block, or joins
several blocks where these are too small for the tensor cores. Lists ascend, so only the last tiles can hold a token at
or beyond the limit; those take a masked path of their own, and all others load without a mask.

Scores are dot products times ``factor``, which is |scale| * log2(e): exp2 then needs no further product. The sign of a
negative scale goes into the query (NEGATE), so that the largest product is the largest score.
"""

import math

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import exact_float32
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))

# ------------------------------------------------------------------------------------------------------ tiles of tokens


@triton.jit
def load_part(pointers, rows_ok, columns, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """A tile; 0 where PADDED from column ``columns`` on, and where CHECKED in rows that are not ``rows_ok``."""
    columns_ok = tl.arange(0, pointers.shape[1]) < columns
    if CHECKED and PADDED:
        return tl.load(pointers, mask=rows_ok[:, None] & columns_ok[None, :], other=0.0)
    elif CHECKED:
        return tl.load(pointers, mask=rows_ok[:, None], other=0.0)
    elif PADDED:
        return tl.load(pointers, mask=columns_ok[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(pointers, rows_ok, HEAD_DIM: tl.constexpr, CHECKED: tl.constexpr):
    """A tile [rows, BLOCK_D]; 0 in columns from HEAD_DIM on and, where CHECKED, in rows that are not ``rows_ok``."""
    return load_part(pointers, rows_ok, HEAD_DIM, pointers.shape[1] > HEAD_DIM, CHECKED)


@triton.jit
def store_rows(pointers, values, rows_ok, HEAD_DIM: tl.constexpr):
    width: tl.constexpr = values.shape[1]
    mask = rows_ok[:, None]
    if width > HEAD_DIM:
        mask = mask & (tl.arange(0, width) < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def rows_of(base, start, stride, rows_ok, HEAD_DIM: tl.constexpr, NEGATE: tl.constexpr, BLOCK_K: tl.constexpr,
            BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """A program's own rows for :func:`products`: a tile, or pointers where that reads BLOCK_K columns at a time."""
    if BLOCK_K < BLOCK_D:
        return rows_at(base, start, stride, BLOCK, BLOCK_K)
    else:
        tile = load_rows(rows_at(base, start, stride, BLOCK, BLOCK_D), rows_ok, HEAD_DIM, True)
        return -tile if NEGATE else tile


@triton.jit
def products(own, own_ok, base, start, stride, ok, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
             NEGATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """(own @ tile^T in float32, or int32 of codes; the tile of BLOCK listed rows, or None)."""
    if BLOCK_K < BLOCK_D:
        acc = tl.zeros((own.shape[0], BLOCK), tl.float32)
        padded: tl.constexpr = HEAD_DIM % BLOCK_K != 0
        for d in range(0, HEAD_DIM, BLOCK_K):
            a = load_part(own + d, own_ok, HEAD_DIM - d, padded, True)
            b = load_part(rows_at(base + d, start, stride, BLOCK, BLOCK_K), ok, HEAD_DIM - d, padded, MASKED)
            acc = tl.dot(-a if NEGATE else a, tl.trans(b), acc, input_precision=PRECISION)
        return acc, None
    else:
        tile = load_rows(rows_at(base, start, stride, BLOCK, BLOCK_D), ok, HEAD_DIM, MASKED)
        if tile.dtype == tl.int8:
            return tl.dot(own, tl.trans(tile), out_dtype=tl.int32), tile
        else:
            return tl.dot(own, tl.trans(tile), input_precision=PRECISION), tile


@triton.jit
def listed(indices, tile, last, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where ``tile`` of a list begins: its first token, or where blocks are joined the tokens [BLOCK].

    ``last`` is the place in the list that is read in place of any beyond it, which lets a caller look one tile ahead.
    """
    if BLOCK <= BLOCK_SIZE:
        parts: tl.constexpr = BLOCK_SIZE // BLOCK
        return tl.load(indices + tl.minimum(tile // parts, last)).to(tl.int32) * BLOCK_SIZE + tile % parts * BLOCK
    else:
        lane = tl.arange(0, BLOCK)
        place = tl.minimum(tile * (BLOCK // BLOCK_SIZE) + lane // BLOCK_SIZE, last)
        return tl.load(indices + place).to(tl.int32) * BLOCK_SIZE + lane % BLOCK_SIZE


@triton.jit
def tokens_of(start, BLOCK: tl.constexpr):
    """The tokens [BLOCK] of a tile, from what :func:`listed` returned."""
    if len(start.shape) == 0:
        return start + tl.arange(0, BLOCK)
    else:
        return start


@triton.jit
def rows_at(base, start, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to the rows of a tile; without joined blocks only a scalar changes between tiles."""
    d = tl.arange(0, BLOCK_D)
    if len(start.shape) == 0:
        return base + start.to(tl.int64) * stride + ((tl.arange(0, BLOCK) * stride)[:, None] + d[None, :])
    else:
        return base + ((start.to(tl.int64) * stride)[:, None] + d[None, :])


@triton.jit
def extent(indices, count, limit, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    """(tiles without a token at or beyond ``limit``, all tiles with a token before it, blocks with one).

    SHORT: any number of the list's blocks may lie beyond the limit; otherwise only its last block may reach over it.
    """
    whole = 0
    some = count
    if SHORT:
        some = 0
        lane = tl.arange(0, 128)
        for first in range(0, count, 128):
            used = first + lane < count
            block = tl.load(indices + first + lane, mask=used, other=0).to(tl.int32)
            whole += tl.sum((used & (block < limit // BLOCK_SIZE)).to(tl.int32), 0)
            some += tl.sum((used & (block * BLOCK_SIZE < limit)).to(tl.int32), 0)
    elif count > 0:
        whole = count - (tl.load(indices + count - 1).to(tl.int32) >= limit // BLOCK_SIZE).to(tl.int32)
    if BLOCK <= BLOCK_SIZE:
        parts: tl.constexpr = BLOCK_SIZE // BLOCK
        tiles = whole * parts
        if some > whole:
            tiles += tl.cdiv(limit - tl.load(indices + whole).to(tl.int32) * BLOCK_SIZE, BLOCK)
        return whole * parts, tiles, some
    else:
        joined: tl.constexpr = BLOCK // BLOCK_SIZE
        return whole // joined, tl.cdiv(some, joined), some


@triton.jit
def counted(start, tile, blocks, limit, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens [BLOCK] of a masked tile count: those below ``limit`` of the first ``blocks`` listed blocks."""
    ok = tokens_of(start, BLOCK) < limit
    if BLOCK > BLOCK_SIZE:
        ok = ok & (tile * (BLOCK // BLOCK_SIZE) + tl.arange(0, BLOCK) // BLOCK_SIZE < blocks)
    return ok


@triton.jit
def heads_of(program, heads, group):
    """(batch, query head, key head), in 64 bits, of the ``program``-th (batch, query head)."""
    batch = (program // heads).to(tl.int64)
    head = (program % heads).to(tl.int64)
    return batch, head, head // group


# ---------------------------------------------------------------------------------------------------------------- host


def width_of(head_dim: int) -> int:
    """The BLOCK_D that holds ``head_dim`` values."""
    return max(32, triton.next_power_of_2(head_dim))


def precision(tensor: Tensor) -> str:
    """How float32 products are made: in one TF32 product if torch's own may be, else in three, which keep all bits."""
    return "tf32x3" if tensor.dtype == torch.float32 and exact_float32() else "tf32"


_LARGEST_STRIDE = 1 << 23  # offsets within a tile are formed in 32 bits


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` [B, H, L, D] itself, or a copy if its rows do not lie as the kernels read them."""
    adjacent = tensor.stride(3) == 1 or tensor.shape[3] == 1
    return tensor if adjacent and tensor.stride(2) < _LARGEST_STRIDE else tensor.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of [B, H, L, D] tensors under the kernels' names: ``q_b``, ``q_h``, ``q_l`` for ``q=query``."""
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("bhl")}


def list_strides(counts: Tensor) -> dict[str, int]:
    """Rows between the lists of two batches, and of two heads; 0 where one stands for all."""
    batches, heads, rows = counts.shape
    return {"list_b": heads * rows if batches > 1 else 0, "list_h": rows if heads > 1 else 0}


def scaling(scale: float) -> dict[str, object]:
    return {"factor": abs(scale) * LOG2E.value, "NEGATE": scale < 0}


def tiles(rows: list[tuple], depth: int | None = None) -> list[tuple]:
    """Rows (BLOCK_M, BLOCK_N, BLOCK_D, ...) with BLOCK_K after them: ``depth``, or all of BLOCK_D."""
    return [(*row[:3], min(row[2], depth or row[2]), *row[3:]) for row in rows]


BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_K")
SPLIT_DEPTH = 32  # of float32: whole rows, each number split in two for its products, would not fit in the registers
