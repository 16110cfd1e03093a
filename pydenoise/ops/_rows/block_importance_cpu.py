"""CPU row of block importance: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows.quantize_cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _unsupported(query, *args):
    return unsupported_floats(query)


def _importance(query, key, block_size, first_generated, scale, lse, key_lengths):
    run = torch.ops.pydenoise.block_importance_cpu.default
    return run(query, key, block_size, first_generated, scale, lse, key_lengths)


ROWS = (Backend("block_importance", "cpu", 100, _unsupported, _importance, "bench/notes-sparse-attention.md"),)
"""Why 100: the only compiled backend for CPU tensors."""
