"""CUDA C++ row of block-sparse attention."""

import torch

from pydenoise.ops._rows._cuda_attention import rows_of_16_bytes, unsupported
from pydenoise.ops.registry import Backend


def _unsupported(query, key, *args) -> str | None:
    return unsupported(query, key)


def _attention(query, key, value, kv_counts, kv_indices, block_size, scale, key_lengths, int8_qk):
    output = torch.empty_like(query)
    written = rows_of_16_bytes(output)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    torch.ops.pydenoise.block_sparse_attention_cuda.default(
        rows_of_16_bytes(query), rows_of_16_bytes(key), rows_of_16_bytes(value), kv_counts, kv_indices, block_size,
        scale, key_lengths, int8_qk, written, lse,
    )  # fmt: skip
    return output if written is output else output.copy_(written), lse


_MEASURED = "not measured yet: above Triton (bench/notes-sparse-attention.md)"

ROWS = (Backend("block_sparse_attention", "cuda", 300, _unsupported, _attention, _MEASURED),)
