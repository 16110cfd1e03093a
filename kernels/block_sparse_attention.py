"""Attention over listed blocks of keys: forward, and the gradients of query, key and value.

A program of the forward, or of the query's gradient, has some rows of one block of queries and walks over the keys
that the block's list names; scores stay in registers. A program of the keys' gradients has some rows of one block of
keys and walks over the queries that read it, for every query head of its group, so that the group's sum is made in
float32 and in a fixed order. No float atomics: a call with the same tiles gives the same bits.

Programs of one head follow each other, so that its keys and values come from the cache. The rows of one pattern keep
much the same number of blocks, and sorting them would cost about what it gains. How many rows read a block of keys
differs much more: where there are few programs, the keys' gradients start with the longest lists.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels import _attention_codes
from pydenoise.kernels._attention import (
    BLOCKS,
    LN2,
    LOG2E,
    SPLIT_DEPTH,
    counted,
    extent,
    heads_of,
    list_strides,
    listed,
    load_rows,
    plain,
    precision,
    products,
    rows_at,
    rows_of,
    scaling,
    store_rows,
    strides,
    tiles,
    tokens_of,
)
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

_SIZES = ("queries", "keys", "heads", "group", "list_b", "list_h", "longest", "tune")

# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _key_scale(s, key_scales, start, ok, MASKED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(products of codes [rows, keys] in float32, what they still lack of the keys' scale: 1, or a block's)."""
    if len(start.shape) == 0:
        return s.to(tl.float32), tl.load(key_scales + start // BLOCK_SIZE)
    elif MASKED:
        return s.to(tl.float32) * tl.load(key_scales + start // BLOCK_SIZE, mask=ok, other=0.0)[None, :], 1.0
    else:
        return s.to(tl.float32) * tl.load(key_scales + start // BLOCK_SIZE)[None, :], 1.0


@triton.jit
def _attend(acc, total, top, q, rows_ok, k_base, v_base, start, ok, k_l, v_l, key_scales, factor,
            SCORE_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, NEGATE: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """One tile of keys into the running (sum of weights * values, sum of weights, largest score)."""
    s, _ = products(
        q, rows_ok, k_base, start, k_l, ok, SCORE_DIM, MASKED, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D
    )  # fmt: skip
    if key_scales is not None:
        s, by = _key_scale(s, key_scales, start, ok, MASKED, BLOCK_SIZE)
        factor = factor * by
    if MASKED:
        s = tl.where(ok[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - higher[:, None])
    if MASKED:
        p = tl.where(ok[None, :], p, 0.0)  # a factor of 0 makes NaN of -inf
    decay = tl.exp2(top - higher)
    total = total * decay + tl.sum(p, 1)  # before the product: p then lives on in the values' dtype only
    v = load_rows(rows_at(v_base, start, v_l, BLOCK_N, BLOCK_D), ok, HEAD_DIM, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, total, higher


@triton.jit(do_not_specialize=_SIZES)
def attention_kernel(
    query, key, value, counts, indices, lengths, output, lse, query_scales, key_scales, mean, floats,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, f_b, f_h, f_l,
    queries, keys, heads, group, list_b, list_h, longest, factor, scale, tune,
    SCORE_DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of output and lse.

    With ``key_scales`` query and key are int8 codes of width SCORE_DIM; ``floats`` is then the query itself, whose
    products with the keys' ``mean`` the lse lacks.
    """
    tiles_m = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    batch, head, key_head = heads_of(program // tiles_m, heads, group)
    first = program % tiles_m * BLOCK_M
    row = batch * list_b + head * list_h + first // BLOCK_SIZE
    indices += row * longest
    count = tl.load(counts + row)
    limit = keys
    if lengths is not None:
        limit = tl.load(lengths + batch)
    whole, tiles, blocks = extent(indices, count, limit, BLOCK_SIZE, BLOCK_N, lengths is not None)

    rows = first + tl.arange(0, BLOCK_M)
    rows_ok = rows < queries
    q_base = query + batch * q_b + head * q_h
    q = rows_of(q_base, first, q_l, rows_ok, SCORE_DIM, NEGATE, BLOCK_K, BLOCK_M, BLOCK_D)
    if query_scales is not None:
        number = (batch * heads + head) * tl.cdiv(queries, BLOCK_SIZE) + first // BLOCK_SIZE
        factor *= tl.load(query_scales + number)
    if key_scales is not None:
        key_scales += (batch * (heads // group) + key_head) * tl.cdiv(keys, BLOCK_SIZE)
    k_base = key + batch * k_b + key_head * k_h
    v_base = value + batch * v_b + key_head * v_h
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if count > 0:
        start = listed(indices, 0, count - 1, BLOCK_SIZE, BLOCK_N)
        for tile in range(whole):
            following = listed(indices, tile + 1, count - 1, BLOCK_SIZE, BLOCK_N)  # one tile ahead of its use
            acc, total, top = _attend(
                acc, total, top, q, rows_ok, k_base, v_base, start, None, k_l, v_l, key_scales, factor,
                SCORE_DIM, HEAD_DIM, False, NEGATE, PRECISION, BLOCK_SIZE, BLOCK_K, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            start = following
        for tile in tl.range(whole, tiles, num_stages=1):
            start = listed(indices, tile, count - 1, BLOCK_SIZE, BLOCK_N)
            ok = counted(start, tile, blocks, limit, BLOCK_SIZE, BLOCK_N)
            acc, total, top = _attend(
                acc, total, top, q, rows_ok, k_base, v_base, start, ok, k_l, v_l, key_scales, factor,
                SCORE_DIM, HEAD_DIM, True, NEGATE, PRECISION, BLOCK_SIZE, BLOCK_K, BLOCK_N, BLOCK_D,
            )  # fmt: skip

    total = tl.where(total == 0, 1.0, total)  # nothing to attend to: 0, and -inf
    result = acc / total[:, None]
    log_sum = (top + tl.log2(total)) * LN2
    if mean is not None:
        pointers = rows_at(floats + batch * f_b + head * f_h, first, f_l, BLOCK_M, BLOCK_D)
        wide = load_rows(pointers, rows_ok, HEAD_DIM, True).to(tl.float32)
        means = tl.load(mean + (batch * (heads // group) + key_head) * BLOCK_D + tl.arange(0, BLOCK_D))
        shared = tl.sum(wide * means[None, :], 1)
        log_sum += scale * shared
        # A NaN or infinity has no code: it reaches its row this way.
        result += tl.where(tl.abs(shared) < float("inf"), 0.0, float("nan"))[:, None]
    store_rows(rows_at(output + batch * o_b + head * o_h, first, o_l, BLOCK_M, BLOCK_D), result, rows_ok, HEAD_DIM)
    tl.store(lse + (batch * heads + head) * queries + rows, log_sum, mask=rows_ok)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def _row_numbers(lse, delta, at, ok, CHECKED: tl.constexpr):
    """(lse in base 2, delta); rows with nothing to attend to have lse -inf, which becomes inf: all weights are 0."""
    if CHECKED:
        total = tl.load(lse + at, mask=ok, other=float("inf"))
        inner = tl.load(delta + at, mask=ok, other=0.0)
    else:
        total = tl.load(lse + at)
        inner = tl.load(delta + at)
    return tl.where(total == float("-inf"), float("inf"), total * LOG2E), inner


@triton.jit
def _query_gradient(acc, q, g, rows_ok, total, inner, k_base, v_base, start, ok, k_l, v_l, factor,
                    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    s, k = products(q, rows_ok, k_base, start, k_l, ok, HEAD_DIM, MASKED, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D)
    p = tl.exp2(s * factor - total[:, None])
    if MASKED:
        p = tl.where(ok[None, :], p, 0.0)
    dp, _ = products(g, rows_ok, v_base, start, v_l, ok, HEAD_DIM, MASKED, False, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D)
    ds = p * (dp - inner[:, None])
    if k is None:
        k = load_rows(rows_at(k_base, start, k_l, BLOCK_N, BLOCK_D), ok, HEAD_DIM, MASKED)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def query_gradient_kernel(
    grad, query, key, value, lse, delta, counts, indices, lengths, output,
    g_b, g_h, g_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    queries, keys, heads, group, list_b, list_h, longest, factor, scale, tune,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the query's gradient, row-major."""
    tiles_m = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    batch, head, key_head = heads_of(program // tiles_m, heads, group)
    first = program % tiles_m * BLOCK_M
    row = batch * list_b + head * list_h + first // BLOCK_SIZE
    indices += row * longest
    count = tl.load(counts + row)
    limit = keys
    if lengths is not None:
        limit = tl.load(lengths + batch)
    whole, tiles, blocks = extent(indices, count, limit, BLOCK_SIZE, BLOCK_N, lengths is not None)

    rows = first + tl.arange(0, BLOCK_M)
    rows_ok = rows < queries
    q_base = query + batch * q_b + head * q_h
    g_base = grad + batch * g_b + head * g_h
    q = rows_of(q_base, first, q_l, rows_ok, HEAD_DIM, NEGATE, BLOCK_K, BLOCK_M, BLOCK_D)
    g = rows_of(g_base, first, g_l, rows_ok, HEAD_DIM, False, BLOCK_K, BLOCK_M, BLOCK_D)
    total, inner = _row_numbers(lse, delta, (batch * heads + head) * queries + rows, rows_ok, True)
    k_base = key + batch * k_b + key_head * k_h
    v_base = value + batch * v_b + key_head * v_h
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if count > 0:
        start = listed(indices, 0, count - 1, BLOCK_SIZE, BLOCK_N)
        for tile in range(whole):
            following = listed(indices, tile + 1, count - 1, BLOCK_SIZE, BLOCK_N)
            acc = _query_gradient(
                acc, q, g, rows_ok, total, inner, k_base, v_base, start, None, k_l, v_l, factor,
                HEAD_DIM, False, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            start = following
        for tile in tl.range(whole, tiles, num_stages=1):
            start = listed(indices, tile, count - 1, BLOCK_SIZE, BLOCK_N)
            ok = counted(start, tile, blocks, limit, BLOCK_SIZE, BLOCK_N)
            acc = _query_gradient(
                acc, q, g, rows_ok, total, inner, k_base, v_base, start, ok, k_l, v_l, factor,
                HEAD_DIM, True, NEGATE, PRECISION, BLOCK_K, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    base = output + (batch * heads + head) * queries * HEAD_DIM
    store_rows(rows_at(base, first, HEAD_DIM, BLOCK_M, BLOCK_D), acc * scale, rows_ok, HEAD_DIM)


@triton.jit
def _key_gradients(acc_k, acc_v, k, v, rows_ok, q_base, g_base, lse, delta, start, ok, q_l, g_l, factor,
                   HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    total, inner = _row_numbers(lse, delta, tokens_of(start, BLOCK_M), ok, MASKED)
    s, q = products(k, rows_ok, q_base, start, q_l, ok, HEAD_DIM, MASKED, NEGATE, PRECISION, BLOCK_K, BLOCK_M, BLOCK_D)
    p = tl.exp2(s * factor - total[None, :])
    dp, g = products(v, rows_ok, g_base, start, g_l, ok, HEAD_DIM, MASKED, False, PRECISION, BLOCK_K, BLOCK_M, BLOCK_D)
    ds = p * (dp - inner[None, :])
    if g is None:
        g = load_rows(rows_at(g_base, start, g_l, BLOCK_M, BLOCK_D), ok, HEAD_DIM, MASKED)
    acc_v = tl.dot(p.to(g.dtype), g, acc_v, input_precision=PRECISION)
    if q is None:
        q = load_rows(rows_at(q_base, start, q_l, BLOCK_M, BLOCK_D), ok, HEAD_DIM, MASKED)
    return tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION), acc_v


@triton.jit(do_not_specialize=_SIZES)
def key_gradient_kernel(
    grad, query, key, value, lse, delta, counts, indices, lengths, order, grad_key, grad_value,
    g_b, g_h, g_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    queries, keys, heads, group, list_b, list_h, longest, factor, scale, tune,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the gradients of key and value, row-major; the lists are of the queries that read a block.

    ``order``: the blocks of keys, counted over all heads, in the order in which programs take them.
    """
    parts: tl.constexpr = BLOCK_SIZE // BLOCK_N
    blocks = tl.cdiv(keys, BLOCK_SIZE)
    program = tl.program_id(0)
    item = program // parts
    if order is not None:
        item = tl.load(order + item).to(tl.int32)
    batch, key_head, _ = heads_of(item // blocks, heads // group, 1)
    first = item % blocks * BLOCK_SIZE + program % parts * BLOCK_N
    limit = keys
    if lengths is not None:
        limit = tl.load(lengths + batch)
    rows = first + tl.arange(0, BLOCK_N)
    rows_ok = rows < limit
    k_base = key + batch * k_b + key_head * k_h
    v_base = value + batch * v_b + key_head * v_h
    k = rows_of(k_base, first, k_l, rows_ok, HEAD_DIM, NEGATE, BLOCK_K, BLOCK_N, BLOCK_D)
    v = rows_of(v_base, first, v_l, rows_ok, HEAD_DIM, False, BLOCK_K, BLOCK_N, BLOCK_D)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(group):
        head = key_head * group + member
        row = batch * list_b + head * list_h + first // BLOCK_SIZE
        count = tl.load(counts + row)
        if first >= limit:  # nothing to add
            count = 0
        q_list = indices + row * longest
        whole, tiles, listed_blocks = extent(q_list, count, queries, BLOCK_SIZE, BLOCK_M, False)
        at = (batch * heads + head) * queries
        q_base = query + batch * q_b + head * q_h
        g_base = grad + batch * g_b + head * g_h
        if count > 0:
            start = listed(q_list, 0, count - 1, BLOCK_SIZE, BLOCK_M)
            for tile in range(whole):
                following = listed(q_list, tile + 1, count - 1, BLOCK_SIZE, BLOCK_M)
                acc_k, acc_v = _key_gradients(
                    acc_k, acc_v, k, v, rows_ok, q_base, g_base, lse + at, delta + at, start, None, q_l, g_l, factor,
                    HEAD_DIM, False, NEGATE, PRECISION, BLOCK_K, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                start = following
            for tile in tl.range(whole, tiles, num_stages=1):
                start = listed(q_list, tile, count - 1, BLOCK_SIZE, BLOCK_M)
                ok = counted(start, tile, listed_blocks, queries, BLOCK_SIZE, BLOCK_M)
                acc_k, acc_v = _key_gradients(
                    acc_k, acc_v, k, v, rows_ok, q_base, g_base, lse + at, delta + at, start, ok, q_l, g_l, factor,
                    HEAD_DIM, True, NEGATE, PRECISION, BLOCK_K, BLOCK_M, BLOCK_D,
                )  # fmt: skip
    # Rows beyond the limit were zeros, but their scores are 0 rather than absent.
    acc_k = tl.where(rows_ok[:, None], acc_k * scale, 0.0)
    acc_v = tl.where(rows_ok[:, None], acc_v, 0.0)
    base = (batch * (heads // group) + key_head) * keys * HEAD_DIM
    stored = rows < keys
    store_rows(rows_at(grad_key + base, first, HEAD_DIM, BLOCK_N, BLOCK_D), acc_k, stored, HEAD_DIM)
    store_rows(rows_at(grad_value + base, first, HEAD_DIM, BLOCK_N, BLOCK_D), acc_v, stored, HEAD_DIM)


# ------------------------------------------------------------------------------------------------------ configurations

_KEYS = ("tune", "HEAD_DIM", "BLOCK_SIZE", "PRECISION")


def _kernel(name: str, function, own: str, rows: list[tuple], depth: int | None = None) -> Kernel:
    """``own``: the block axis along the program's own rows, which may not be longer than a block of the mask."""

    def extents(arguments: dict) -> dict[str, int]:
        # A tile longer than a block wastes half or more, so no such tile is a candidate.
        return {own: arguments["BLOCK_SIZE"], "BLOCK_D": arguments["HEAD_DIM"]}

    return Kernel(
        name, function, variants(name, BLOCKS, tiles(rows, depth)), extents, _KEYS, matrix=True, whole="BLOCK_D"
    )


FORWARD = _kernel("block_sparse_attention", attention_kernel, "BLOCK_M", [
    (128, 64, 128, 8, 3, 90),
    (128, 64, 128, 8, 4, 90),
    (64, 64, 128, 4, 3),
    (128, 32, 128, 8, 3),
    (64, 32, 128, 4, 3),
    (128, 128, 64, 8, 3, 90),
    (128, 64, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (128, 64, 32, 4, 3),
    (64, 64, 32, 4, 3),
    (128, 32, 256, 8, 3, 90),
    (64, 32, 256, 4, 3, 90),
    (64, 32, 256, 8, 2),
    (32, 64, 32, 2, 3),
    (32, 64, 64, 2, 3),
    (32, 64, 128, 4, 3),
    (32, 32, 256, 4, 3),
    (16, 64, 32, 1, 3),
    (16, 64, 64, 2, 3),
    (16, 64, 128, 4, 3, 90),
    (16, 32, 128, 2, 3),
    (16, 32, 256, 4, 3),
])  # fmt: skip

FORWARD_FP32 = _kernel("block_sparse_attention_fp32", attention_kernel, "BLOCK_M", [
    (64, 32, 128, 8, 3),
    (64, 32, 64, 4, 3),
    (64, 32, 32, 4, 2),
    (32, 32, 256, 8, 2),
    (32, 32, 128, 4, 2),
    (32, 32, 64, 4, 3),
    (32, 32, 32, 4, 3),
    (16, 16, 256, 4, 2),
    (16, 16, 128, 4, 3),
    (16, 32, 64, 2, 3),
    (16, 32, 32, 2, 3),
], SPLIT_DEPTH)  # fmt: skip

FORWARD_INT8 = _kernel("block_sparse_attention_int8", attention_kernel, "BLOCK_M", [
    (128, 64, 128, 8, 3),
    (128, 64, 128, 8, 4, 90),
    (64, 64, 128, 4, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 64, 4, 3),
    (128, 64, 32, 4, 3),
    (64, 64, 32, 4, 3),
    (64, 32, 256, 4, 3),
    (32, 64, 32, 2, 3),
    (32, 64, 64, 2, 3),
    (32, 64, 128, 4, 3),
    (32, 32, 256, 4, 3),
    (16, 64, 32, 1, 3),
    (16, 64, 64, 2, 3),
    (16, 32, 128, 2, 3),
    (16, 32, 256, 4, 3),
])  # fmt: skip

QUERY_GRADIENT = _kernel("attention_query_gradient", query_gradient_kernel, "BLOCK_M", [
    (128, 64, 128, 8, 3, 90, 90),
    (128, 32, 128, 8, 3, 90),
    (64, 64, 128, 4, 3, 90),
    (64, 32, 128, 4, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 64, 4, 3, 90),
    (64, 32, 64, 4, 3),
    (64, 64, 32, 4, 3),
    (64, 16, 256, 4, 3, 90),
    (64, 16, 256, 8, 2),
    (32, 32, 32, 2, 3),
    (32, 32, 64, 2, 3),
    (32, 32, 128, 4, 3),
    (32, 32, 256, 4, 2),
    (16, 32, 32, 1, 3),
    (16, 32, 64, 2, 3),
    (16, 32, 128, 4, 3),
    (16, 32, 256, 4, 2),
])  # fmt: skip

QUERY_GRADIENT_FP32 = _kernel("attention_query_gradient_fp32", query_gradient_kernel, "BLOCK_M", [
    (64, 32, 64, 8, 2),
    (32, 32, 128, 8, 2),
    (32, 32, 64, 4, 2),
    (32, 32, 32, 4, 2),
    (32, 16, 256, 8, 2),
    (16, 16, 256, 4, 2),
    (16, 32, 128, 4, 3),
    (16, 32, 64, 2, 3),
    (16, 32, 32, 2, 2),
], SPLIT_DEPTH)  # fmt: skip

KEY_GRADIENT = _kernel("attention_key_gradient", key_gradient_kernel, "BLOCK_N", [
    (32, 128, 128, 8, 3, 90, 90),
    (64, 64, 128, 8, 3, 100),
    (32, 64, 128, 8, 3),
    (64, 128, 64, 8, 3, 90),
    (64, 64, 64, 8, 3, 90),
    (32, 64, 64, 4, 3),
    (64, 64, 32, 4, 3),
    (32, 32, 256, 8, 2),
    (32, 32, 32, 2, 2),
    (32, 32, 64, 2, 3),
    (32, 32, 128, 8, 3),
    (32, 16, 32, 1, 2),
    (32, 16, 64, 2, 3),
    (32, 16, 128, 2, 3),
    (32, 16, 256, 4, 2),
])  # fmt: skip

KEY_GRADIENT_FP32 = _kernel("attention_key_gradient_fp32", key_gradient_kernel, "BLOCK_N", [
    (32, 32, 128, 8, 3),
    (32, 32, 64, 4, 3),
    (16, 32, 32, 4, 3),
    (16, 32, 256, 8, 3),
    (16, 16, 256, 8, 3),
    (16, 16, 128, 4, 3),
    (16, 16, 64, 4, 3),
    (32, 16, 32, 2, 3),
], SPLIT_DEPTH)  # fmt: skip

KERNELS = (
    FORWARD, FORWARD_FP32, FORWARD_INT8, QUERY_GRADIENT, QUERY_GRADIENT_FP32, KEY_GRADIENT, KEY_GRADIENT_FP32,
    *_attention_codes.KERNELS,
)  # fmt: skip

# With so many programs or more, each multiprocessor gets dozens, and the order of one head's blocks decides little.
_MOST_SORTED = 4096


# ------------------------------------------------------------------------------------------------------------ launches


def _sizes(query: Tensor, key: Tensor, counts: Tensor, indices: Tensor, block_size: int, scale: float) -> dict:
    return {
        "queries": query.shape[2], "keys": key.shape[2], "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1], "longest": indices.shape[3], "scale": scale,
        "tune": max(query.shape[2], key.shape[2]).bit_length(), "HEAD_DIM": query.shape[3],
        "BLOCK_SIZE": block_size, "PRECISION": precision(query), **list_strides(counts),
        **scaling(scale),
    }  # fmt: skip


def _row_programs(query: Tensor):
    """The grid of kernels whose programs have rows of the query."""
    batch, heads, queries, _ = query.shape
    return lambda meta: (batch * heads * triton.cdiv(queries, meta["BLOCK_M"]),)


def plan_forward(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, block_size: int, scale: float,
    lengths: Tensor | None, int8: bool, output: Tensor, lse: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches that write ``output`` [B, H, Lq, D], of any strides, and ``lse`` [B, H, Lq], row-major."""
    if output.numel() == 0:
        return []
    value, before = plain(value), []
    kernel = FORWARD_FP32 if query.dtype == torch.float32 else FORWARD
    operands = {"query": plain(query), "key": plain(key), "query_scales": None, "key_scales": None, "mean": None}
    floats = None
    if int8:
        kernel, floats = FORWARD_INT8, operands["query"]
        mean, before = _attention_codes.plan_mean(operands["key"], lengths)
        q, q_scales, first = _attention_codes.plan_codes(floats, None, None, block_size)
        k, k_scales, second = _attention_codes.plan_codes(operands["key"], mean, lengths, block_size)
        before += [first, second]
        operands = {"query": q, "key": k, "query_scales": q_scales, "key_scales": k_scales, "mean": mean}
    q, k = operands["query"], operands["key"]
    arguments = {
        **operands, "value": value, "counts": counts, "indices": indices, "lengths": lengths, "output": output,
        "lse": lse, "floats": floats, **strides(q=q, k=k, v=value, o=output, f=q if floats is None else floats),
        **_sizes(query, key, counts, indices, block_size, scale), "SCORE_DIM": q.shape[3],
    }  # fmt: skip
    return [*before, Launch(kernel, arguments, _row_programs(query))]


def plan_query_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, counts: Tensor,
    indices: Tensor, block_size: int, scale: float, lengths: Tensor | None, output: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes the query's gradient, row-major; the lists are of keys."""
    arguments = {
        "grad": grad, "query": query, "key": key, "value": value, "lse": lse, "delta": delta, "counts": counts,
        "indices": indices, "lengths": lengths, "output": output, **strides(g=grad, q=query, k=key, v=value),
        **_sizes(query, key, counts, indices, block_size, scale),
    }  # fmt: skip
    kernel = QUERY_GRADIENT_FP32 if query.dtype == torch.float32 else QUERY_GRADIENT
    return Launch(kernel, arguments, _row_programs(query))


def plan_key_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, counts: Tensor,
    indices: Tensor, block_size: int, scale: float, lengths: Tensor | None, grad_key: Tensor, grad_value: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes the gradients of key and value, row-major; the lists are of queries."""
    batch, key_heads, keys, _ = key.shape
    blocks = triton.cdiv(keys, block_size)
    order = None
    if batch * key_heads * blocks < _MOST_SORTED:
        work = counts.expand(batch, query.shape[1], blocks).unflatten(1, (key_heads, -1)).sum(2)
        order = torch.argsort(work.flatten(), descending=True, stable=True)
    arguments = {
        "grad": grad, "query": query, "key": key, "value": value, "lse": lse, "delta": delta, "counts": counts,
        "indices": indices, "lengths": lengths, "order": order, "grad_key": grad_key, "grad_value": grad_value,
        **strides(g=grad, q=query, k=key, v=value), **_sizes(query, key, counts, indices, block_size, scale),
    }  # fmt: skip
    kernel = KEY_GRADIENT_FP32 if query.dtype == torch.float32 else KEY_GRADIENT
    return Launch(kernel, arguments, lambda meta: (batch * key_heads * blocks * (block_size // meta["BLOCK_N"]),))


# ---------------------------------------------------------------------------------------------------------- public API


def forward(
    query: Tensor, key: Tensor, value: Tensor, kv_counts: Tensor, kv_indices: Tensor, block_size: int, scale: float,
    key_lengths: Tensor | None, int8_qk: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, log-sum-exp); arguments as ``pydenoise.ops.block_sparse_attention.prepare`` returns them."""
    output = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for launch in plan_forward(
        query, key, value, kv_counts, kv_indices, block_size, scale, key_lengths, int8_qk, output, lse
    ):
        launch.run()
    return output, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, kv_counts: Tensor,
    kv_indices: Tensor, q_counts: Tensor, q_indices: Tensor, block_size: int, scale: float,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value, row-major; not checked. The ``q_`` lists are the ``kv_`` ones transposed."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    if query.numel() == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_()
    tensors = (*map(plain, (grad, query, key, value)), lse.contiguous(), delta.contiguous())
    options = (block_size, scale, key_lengths)
    plan_query_gradient(*tensors, kv_counts, kv_indices, *options, grads[0]).run()
    plan_key_gradients(*tensors, q_counts, q_indices, *options, *grads[1:]).run()
    return tuple(grads)
