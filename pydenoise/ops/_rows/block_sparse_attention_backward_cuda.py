"""CUDA C++ row of the gradients of block-sparse attention."""

import torch

from pydenoise.ops._rows._cuda_attention import rows_of_16_bytes, unsupported
from pydenoise.ops.registry import Backend


def _unsupported(grad, query, key, *args) -> str | None:
    return unsupported(query, key)


def _gradients(
    grad, query, key, value, lse, delta, kv_counts, kv_indices, q_counts, q_indices, block_size, scale, key_lengths
):
    grads = tuple(t.new_empty(t.shape) for t in (query, key, value))
    torch.ops.pydenoise.block_sparse_attention_backward_cuda.default(
        *(rows_of_16_bytes(t) for t in (grad, query, key, value)), lse, delta, kv_counts, kv_indices, q_counts,
        q_indices, block_size, scale, key_lengths, *grads,
    )  # fmt: skip
    return grads


_MEASURED = "not measured yet: above Triton (bench/notes-sparse-attention.md)"

ROWS = (Backend("block_sparse_attention_backward", "cuda", 300, _unsupported, _gradients, _MEASURED),)
