"""CPU row of the gradients of block-sparse attention: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _unsupported(grad, query, *args):
    return unsupported_floats(query)


def _backward(grad, query, key, value, lse, delta, kv_counts, kv_indices, q_counts, q_indices, *options):
    run = torch.ops.pydenoise.block_sparse_attention_backward_cpu.default
    return run(grad, query, key, value, lse, delta, q_counts, q_indices, *options)


ROWS = (
    Backend("block_sparse_attention_backward", "cpu", 100, _unsupported, _backward, "bench/notes-sparse-attention.md"),
)
