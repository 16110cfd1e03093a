"""Attention over listed blocks of keys: argument checks, the torch op with its gradients, and the backend rows."""

import torch
from torch import Tensor

from pydenoise.block_mask import BlockMask, transpose_lists
from pydenoise.ops import registry
from pydenoise.ops._attention import adjacent, check_key, check_query, key_lengths_of, scale_of
from pydenoise.ops._quantized import call, never
from pydenoise.ops.registry import Backend
from pydenoise.reference import block_sparse_attention as reference

OP = "block_sparse_attention"
OP_BACKWARD = "block_sparse_attention_backward"

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor kv_counts, Tensor kv_indices, "
    "SymInt block_size, float scale, Tensor? key_lengths, bool int8_qk, Tensor? q_counts, Tensor? q_indices, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "block_sparse_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta, "
    "Tensor kv_counts, Tensor kv_indices, Tensor q_counts, Tensor q_indices, SymInt block_size, float scale, "
    "Tensor? key_lengths, str backend) -> (Tensor, Tensor, Tensor)"
)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    qk_dtype: str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each block of queries sees the blocks of keys that ``block_mask`` lists for it.

    ``softmax(scale * query @ key^T) @ value`` over the listed keys, for each head; what is not listed is not read.

    Args:
        query: [B, H, Lq, D], float32, bfloat16 or float16. Any strides; a last dim that is not contiguous is copied.
        key, value: [B, Hkv, Lk, D] of its dtype and device, Lk >= 1; Hkv divides H (grouped-query attention).
        block_mask: of Lq queries and Lk keys, on the same device; its batch and heads are 1 or B and H.
        scale: of the scores; ``None``: 1 / sqrt(D).
        key_lengths: [B] integers from 0 to Lk: keys at or beyond a batch's length do not count (padding on the right).
        return_lse: also return the log-sum-exp of each query's scores.
        qk_dtype: ``None``, or "int8" for scores from int8 codes (one scale for each block, keys less their mean; see
            SageAttention): faster and less exact, without gradients.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference".

    Returns:
        [B, H, Lq, D] in ``query``'s dtype and, where dense, its memory order; with ``return_lse`` also float32
        [B, H, Lq], the natural logarithm. Queries without any key to attend to give 0 and -inf. A NaN stays with the
        queries that read it (int8 codes share scales and means: there it spreads over its block and head).
        Differentiable in query, key and value, through the log-sum-exp too.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: SparseD (2025), https://arxiv.org/abs/2509.24014; FlashAttention, https://arxiv.org/abs/2205.14135; for
    int8 scores, SageAttention, https://arxiv.org/abs/2410.02367.
    """
    args = prepare(query, key, value, block_mask, scale=scale, key_lengths=key_lengths, qk_dtype=qk_dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args[:3]):
        if args[-1]:
            raise ValueError("qk_dtype: 'int8' has no gradients, but query, key or value requires one")
        output, lse = torch.ops.pydenoise.block_sparse_attention(*args, *block_mask.transposed(), backend)
    else:
        output, lse = call(OP, _without_transposed, args, backend)
    return (output, lse) if return_lse else output


def _without_transposed(*args):
    *args, backend = args
    return torch.ops.pydenoise.block_sparse_attention(*args, None, None, backend)


def prepare(query, key, value, block_mask, *, scale=None, key_lengths=None, qk_dtype=None) -> tuple:
    """Check everything and return the positional arguments of the rows."""
    check_query(query)
    check_key("key", key, query)
    check_key("value", value, query)
    if value.shape != key.shape:
        raise ValueError(f"value: expected the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    _check_mask(block_mask, query, key.shape[2])
    if qk_dtype not in (None, "int8"):
        raise ValueError(f"qk_dtype: expected None or 'int8', got {qk_dtype!r}")
    return (
        adjacent(query), adjacent(key), adjacent(value), block_mask.kv_counts, block_mask.kv_indices,
        block_mask.block_size, scale_of(scale, query.shape[3]), key_lengths_of(key_lengths, query, key.shape[2]),
        qk_dtype == "int8",
    )  # fmt: skip


def prepare_backward(grad, output, lse, grad_lse, args: tuple, transposed: tuple | None = None) -> tuple:
    """The backward rows' arguments, from the forward's ``args`` and results."""
    query, key, value, kv_counts, kv_indices, block_size, scale, key_lengths, _ = args
    delta = (grad.to(lse.dtype) * output).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    if transposed is None:
        transposed = transpose_lists(kv_counts, kv_indices, -(-key.shape[2] // block_size))
    lists = (kv_counts, kv_indices, *transposed)
    return adjacent(grad), query, key, value, lse, delta.contiguous(), *lists, block_size, scale, key_lengths


def _check_mask(mask: object, query: Tensor, keys: int) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"block_mask: expected a pydenoise.BlockMask, got {type(mask).__name__}")
    batch, heads, queries, _ = query.shape
    if (mask.query_length, mask.key_length) != (queries, keys):
        raise ValueError(
            f"block_mask: expected one of {queries} queries and {keys} keys, got one of {mask.query_length} and "
            f"{mask.key_length}"
        )
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(
            f"block_mask: expected 1 or {batch} batches and 1 or {heads} heads, got {mask.shape[0]} and {mask.shape[1]}"
        )
    if mask.device != query.device:
        raise ValueError(f"block_mask: expected device {query.device} (that of query), got {mask.device}")


# ------------------------------------------------------------------------------------ torch op: fake kernel, autograd


@torch.library.impl(_library, "block_sparse_attention", "CompositeExplicitAutograd")
def _run(*args):
    *args, _, _, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::block_sparse_attention", lib=_library)
def _fake(query, *args):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.impl(_library, "block_sparse_attention_backward", "CompositeExplicitAutograd")
def _run_backward(*args):
    *args, backend = args
    return registry.select(OP_BACKWARD, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::block_sparse_attention_backward", lib=_library)
def _fake_backward(grad, query, key, value, *args):
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup_context(ctx, inputs, output):
    *args, q_counts, q_indices, backend = inputs
    query, key, value, kv_counts, kv_indices, block_size, scale, key_lengths, int8_qk = args
    if int8_qk:
        raise ValueError("qk_dtype: 'int8' has no gradients")
    ctx.save_for_backward(query, key, value, kv_counts, kv_indices, key_lengths, q_counts, q_indices, *output)
    ctx.options, ctx.backend = (block_size, scale), backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    nothing = (None,) * 9
    if grad is None and grad_lse is None:
        return None, None, None, *nothing
    query, key, value, kv_counts, kv_indices, key_lengths, q_counts, q_indices, output, lse = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(query)
    args = (query, key, value, kv_counts, kv_indices, *ctx.options, key_lengths, False)
    transposed = None if q_counts is None else (q_counts, q_indices)
    args = prepare_backward(grad, output, lse, grad_lse, args, transposed)
    return *torch.ops.pydenoise.block_sparse_attention_backward(*args, ctx.backend), *nothing


torch.library.register_autograd(
    "pydenoise::block_sparse_attention", _backward, setup_context=_setup_context, lib=_library
)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_backward(grad, query, key, value, lse, delta, kv_counts, kv_indices, q_counts, q_indices, *options):
    return reference.block_sparse_attention_backward(
        grad, query, key, value, lse, delta, kv_counts, kv_indices, *options
    )


registry.register(Backend(OP, "reference", 0, never, reference.block_sparse_attention, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import (  # noqa: E402
    block_sparse_attention_backward_cpu,
    block_sparse_attention_backward_cuda,
    block_sparse_attention_backward_triton,
    block_sparse_attention_cpu,
    block_sparse_attention_cuda,
    block_sparse_attention_triton,
)

_ROWS = (
    block_sparse_attention_cpu,
    block_sparse_attention_backward_cpu,
    block_sparse_attention_cuda,
    block_sparse_attention_backward_cuda,
    block_sparse_attention_triton,
    block_sparse_attention_backward_triton,
)

for _module in _ROWS:
    for _row in _module.ROWS:
        registry.register(_row)
