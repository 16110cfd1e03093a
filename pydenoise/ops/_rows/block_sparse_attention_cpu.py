"""CPU row of block-sparse attention: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _attention(query, key, value, kv_counts, kv_indices, block_size, scale, key_lengths, int8_qk):
    run = torch.ops.pydenoise.block_sparse_attention_cpu.default
    return run(query, key, value, kv_counts, kv_indices, block_size, scale, key_lengths, int8_qk)


ROWS = (
    Backend("block_sparse_attention", "cpu", 100, unsupported_floats, _attention, "bench/notes-sparse-attention.md"),
)
