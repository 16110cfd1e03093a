"""How much attention each block of keys gets from each block of queries, without an L x L matrix.

Two passes over the scores. The first finds, for each query, the log-sum-exp over all keys and that over the generated
ones (in base 2); a log-sum-exp that the caller has leaves it only the generated keys. The second makes the scores again
and adds up exp2(score - log-sum-exp) over blocks. In the generated part one exp2 serves both results: the other is
its product with a factor of the row, at most 1.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._attention import (
    BLOCKS,
    LOG2E,
    heads_of,
    plain,
    precision,
    products,
    rows_of,
    scaling,
    strides,
)
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

_SIZES = ("queries", "keys", "heads", "group", "generated", "tune")

# ---------------------------------------------------------------------------------------------------------- first pass


@triton.jit
def _scan(total, top, q, rows_ok, k_base, first, past, k_l, factor,
          HEAD_DIM: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The running (sum of weights, largest score) after the keys from ``first`` to ``past``."""
    column = tl.arange(0, BLOCK_N)
    tiles = (past - first) // BLOCK_N
    for tile in range(tiles):
        s, _ = products(
            q, rows_ok, k_base, first + tile * BLOCK_N, k_l, None,
            HEAD_DIM, False, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s * factor - higher[:, None]), 1)
        top = higher
    whole = first + tiles * BLOCK_N
    if whole < past:
        ok = whole + column < past
        s, _ = products(
            q, rows_ok, k_base, whole, k_l, ok, HEAD_DIM, True, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(tl.where(ok[None, :], s, float("-inf")), 1) * factor)
        p = tl.where(ok[None, :], tl.exp2(s * factor - higher[:, None]), 0.0)
        total = total * tl.exp2(top - higher) + tl.sum(p, 1)
        top = higher
    return total, top


@triton.jit(do_not_specialize=_SIZES)
def importance_sums_kernel(
    query, key, lengths, lse, total_all, total_generated,
    q_b, q_h, q_l, k_b, k_h, k_l, queries, keys, heads, group, generated, factor, tune,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The log-sum-exps of BLOCK_M queries, in base 2; inf where there is no key, which makes every weight 0.

    ``generated``: the first block of the generated part. ``lse``: the log-sum-exp over all keys, if it is known.
    """
    tiles_m = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    batch, head, key_head = heads_of(program // tiles_m, heads, group)
    first = program % tiles_m * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    rows_ok = rows < queries
    limit = keys
    if lengths is not None:
        limit = tl.load(lengths + batch)
    split = tl.minimum(generated * BLOCK_SIZE, limit)
    q_base = query + batch * q_b + head * q_h
    q = rows_of(q_base, first, q_l, rows_ok, HEAD_DIM, NEGATE, BLOCK_K, BLOCK_M, BLOCK_D)
    k_base = key + batch * k_b + key_head * k_h
    at = (batch * heads + head) * queries + rows
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if lse is None:
        # The generated keys first: their sums are then the beginning of those over all keys.
        total, top = _scan(total, top, q, rows_ok, k_base, split, limit, k_l, factor,
                           HEAD_DIM, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D)  # fmt: skip
        tl.store(total_generated + at, _log_sum(total, top), mask=rows_ok)
        total, top = _scan(total, top, q, rows_ok, k_base, split * 0, split, k_l, factor,
                           HEAD_DIM, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D)  # fmt: skip
        tl.store(total_all + at, _log_sum(total, top), mask=rows_ok)
    else:
        known = tl.load(lse + at, mask=rows_ok, other=0.0)
        known = tl.where(known == float("-inf"), float("inf"), known * LOG2E)
        tl.store(total_all + at, known, mask=rows_ok)
        if generated > 0:
            total, top = _scan(total, top, q, rows_ok, k_base, split, limit, k_l, factor,
                               HEAD_DIM, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D)  # fmt: skip
            known = _log_sum(total, top)
        tl.store(total_generated + at, known, mask=rows_ok)


@triton.jit
def _log_sum(total, top):
    return tl.where(total == 0, float("inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))


# --------------------------------------------------------------------------------------------------------- second pass


@triton.jit
def _pool(p, weights, BLOCK_SIZE: tl.constexpr):
    """Means [blocks of rows, blocks of columns] of p [rows, columns], whose rows are weighted unless it is None."""
    rows: tl.constexpr = p.shape[0]
    columns: tl.constexpr = p.shape[1] // BLOCK_SIZE
    sums = tl.sum(tl.reshape(p, (rows, columns, BLOCK_SIZE)), 2)
    if weights is not None:
        sums = sums * weights[:, None]
    return tl.sum(tl.reshape(sums, (rows // BLOCK_SIZE, BLOCK_SIZE, columns)), 1) * (1.0 / (BLOCK_SIZE * BLOCK_SIZE))


@triton.jit
def _store_pooled(base, pooled, row, rows, width, column, past, BLOCK_SIZE: tl.constexpr):
    """Blocks ``pooled`` into rows ``row``.. of base [rows, width], columns ``column``.. below ``past``."""
    r = row + tl.arange(0, pooled.shape[0])
    c = column + tl.arange(0, pooled.shape[1])
    at = r.to(tl.int64)[:, None] * width + c[None, :]
    tl.store(base + at, pooled, mask=(r < rows)[:, None] & (c < past)[None, :])


@triton.jit
def _tile(q, rows_ok, k_base, start, limit, k_l, factor, total, decay, all_base, generated_base, row, rows, blocks,
          generated, past, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, GENERATED: tl.constexpr,
          NEGATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The blocks of one tile of keys, below block ``past``."""
    ok = start + tl.arange(0, BLOCK_N) < limit
    s, _ = products(
        q, rows_ok, k_base, start, k_l, ok, HEAD_DIM, MASKED, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D
    )  # fmt: skip
    p = tl.exp2(s * factor - total[:, None])
    if MASKED:
        p = tl.where(ok[None, :], p, 0.0)
    column = start // BLOCK_SIZE
    if GENERATED:
        pooled = _pool(p, None, BLOCK_SIZE)
        width = blocks - generated
        _store_pooled(generated_base, pooled, row, rows, width, column - generated, past - generated, BLOCK_SIZE)
        _store_pooled(all_base, _pool(p, decay, BLOCK_SIZE), row, rows, blocks, column, past, BLOCK_SIZE)
    else:
        _store_pooled(all_base, _pool(p, None, BLOCK_SIZE), row, rows, blocks, column, past, BLOCK_SIZE)


@triton.jit
def _region(q, rows_ok, k_base, first, limit, k_l, factor, total, decay, all_base, generated_base, row, rows, blocks,
            generated, past, HEAD_DIM: tl.constexpr, GENERATED: tl.constexpr, NEGATE: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """The blocks of the keys from ``first`` up to ``limit``."""
    tiles = (limit - first) // BLOCK_N
    for tile in range(tiles):
        _tile(q, rows_ok, k_base, first + tile * BLOCK_N, limit, k_l, factor, total, decay, all_base, generated_base,
              row, rows, blocks, generated, past, HEAD_DIM, False, GENERATED, NEGATE, PRECISION, BLOCK_SIZE, BLOCK_K,
              BLOCK_N, BLOCK_D)  # fmt: skip
    if first + tiles * BLOCK_N < limit:
        _tile(q, rows_ok, k_base, first + tiles * BLOCK_N, limit, k_l, factor, total, decay, all_base, generated_base,
              row, rows, blocks, generated, past, HEAD_DIM, True, GENERATED, NEGATE, PRECISION, BLOCK_SIZE, BLOCK_K,
              BLOCK_N, BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def importance_kernel(
    query, key, lengths, total_all, total_generated, over_all, over_generated,
    q_b, q_h, q_l, k_b, k_h, k_l, queries, keys, heads, group, generated, factor, tune,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The importances of BLOCK_M queries, a multiple of BLOCK_SIZE; blocks at or beyond a length are left as they are.

    ``total_all`` and ``total_generated`` are what the first pass found.
    """
    tiles_m = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    batch, head, key_head = heads_of(program // tiles_m, heads, group)
    first = program % tiles_m * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    rows_ok = rows < queries
    limit = keys
    if lengths is not None:
        limit = tl.load(lengths + batch)
    split = tl.minimum(generated * BLOCK_SIZE, limit)
    q_base = query + batch * q_b + head * q_h
    q = rows_of(q_base, first, q_l, rows_ok, HEAD_DIM, NEGATE, BLOCK_K, BLOCK_M, BLOCK_D)
    k_base = key + batch * k_b + key_head * k_h
    at = (batch * heads + head) * queries + rows
    total = tl.load(total_all + at, mask=rows_ok, other=float("inf"))
    own = tl.load(total_generated + at, mask=rows_ok, other=float("inf"))
    decay = tl.where(own == float("inf"), 0.0, tl.exp2(own - total))
    row, row_blocks = first // BLOCK_SIZE, tl.cdiv(queries, BLOCK_SIZE)
    blocks = tl.cdiv(keys, BLOCK_SIZE)
    all_base = over_all + (batch * heads + head) * row_blocks * blocks
    generated_base = over_generated + (batch * heads + head) * row_blocks * (blocks - generated)
    _region(q, rows_ok, k_base, split * 0, split, k_l, factor, total, decay, all_base, generated_base, row, row_blocks,
            blocks, generated, generated, HEAD_DIM, False, NEGATE, PRECISION, BLOCK_SIZE, BLOCK_K, BLOCK_N,
            BLOCK_D)  # fmt: skip
    _region(q, rows_ok, k_base, split, limit, k_l, factor, own, decay, all_base, generated_base, row, row_blocks,
            blocks, generated, blocks, HEAD_DIM, True, NEGATE, PRECISION, BLOCK_SIZE, BLOCK_K, BLOCK_N,
            BLOCK_D)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ configurations

_KEYS = ("tune", "HEAD_DIM", "BLOCK_SIZE", "PRECISION")


def _kernel(name: str, function, rows: list[tuple]) -> Kernel:
    def extents(arguments: dict) -> dict[str, int]:
        return {"BLOCK_D": arguments["HEAD_DIM"]}

    return Kernel(name, function, variants(name, BLOCKS, rows), extents, _KEYS, matrix=True, whole="BLOCK_D")


# Of the second pass: BLOCK_N is a multiple of every block size. Two programs on a multiprocessor let the products of
# one hide the exponentials of the other, so few stages may be better than many.
IMPORTANCE = _kernel("block_importance", importance_kernel, [
    (128, 128, 128, 128, 8, 2, 90),
    (128, 128, 128, 128, 8, 3, 90),
    (128, 128, 128, 64, 8, 3),
    (128, 128, 64, 64, 8, 3),
    (128, 128, 32, 32, 8, 3),
    (128, 128, 256, 256, 8, 2, 90),
    (128, 128, 256, 64, 8, 3),
])  # fmt: skip

IMPORTANCE_FP32 = _kernel("block_importance_fp32", importance_kernel, [
    (128, 128, 128, 16, 8, 2),
    (128, 128, 64, 16, 8, 2),
    (128, 128, 32, 16, 8, 2),
    (128, 128, 256, 16, 8, 2),
])  # fmt: skip

SUMS = _kernel("importance_sums", importance_sums_kernel, [
    (128, 64, 128, 128, 8, 3),
    (128, 128, 128, 128, 8, 3, 90),
    (128, 128, 64, 64, 8, 3),
    (128, 64, 64, 64, 4, 3),
    (128, 128, 32, 32, 8, 3),
    (128, 64, 32, 32, 4, 3),
    (128, 128, 256, 256, 8, 2, 90),
    (128, 64, 256, 64, 8, 3),
])  # fmt: skip

SUMS_FP32 = _kernel("importance_sums_fp32", importance_sums_kernel, [
    (64, 64, 128, 32, 8, 3),
    (64, 64, 64, 32, 8, 3),
    (64, 64, 32, 32, 8, 3),
    (64, 64, 256, 32, 8, 3),
])  # fmt: skip

KERNELS = (SUMS, SUMS_FP32, IMPORTANCE, IMPORTANCE_FP32)


# ------------------------------------------------------------------------------------------------------------ launches


def plan(
    query: Tensor, key: Tensor, block_size: int, first_generated: int, scale: float, lse: Tensor | None,
    lengths: Tensor | None, over_all: Tensor, over_generated: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches that write the results, row-major; blocks at or beyond a length are not written."""
    batch, heads, queries, _ = query.shape
    if over_all.numel() == 0:
        return []
    q, k = plain(query), plain(key)
    totals = torch.empty((2, batch, heads, queries), dtype=torch.float32, device=query.device)
    common = {
        "query": q, "key": k, "lengths": lengths, "total_all": totals[0], "total_generated": totals[1],
        **strides(q=q, k=k), "queries": queries, "keys": key.shape[2], "heads": heads,
        "group": heads // key.shape[1], "generated": first_generated,
        "tune": max(queries, key.shape[2]).bit_length(), "HEAD_DIM": query.shape[3], "BLOCK_SIZE": block_size,
        "PRECISION": precision(query), **scaling(scale),
    }  # fmt: skip
    sums, pooled = (SUMS_FP32, IMPORTANCE_FP32) if query.dtype == torch.float32 else (SUMS, IMPORTANCE)

    def grid(meta):
        return (batch * heads * triton.cdiv(queries, meta["BLOCK_M"]),)

    return [
        Launch(sums, {**common, "lse": lse}, grid),
        Launch(pooled, {**common, "over_all": over_all, "over_generated": over_generated}, grid),
    ]


# ---------------------------------------------------------------------------------------------------------- public API


def forward(
    query: Tensor, key: Tensor, block_size: int, first_generated: int, scale: float, lse: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(over all keys, over generated ones); arguments as ``pydenoise.ops.block_importance.prepare`` returns them."""
    rows, columns = (triton.cdiv(t.shape[2], block_size) for t in (query, key))
    make = torch.empty if key_lengths is None else torch.zeros
    over_all, over_generated = (
        make((*query.shape[:2], rows, n), dtype=torch.float32, device=query.device)
        for n in (columns, columns - first_generated)
    )
    for launch in plan(query, key, block_size, first_generated, scale, lse, key_lengths, over_all, over_generated):
        launch.run()
    return over_all, over_generated
