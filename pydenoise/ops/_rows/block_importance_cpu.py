"""CPU row of block importance: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _importance(query, key, block_size, first_generated, scale, lse, key_lengths):
    run = torch.ops.pydenoise.block_importance_cpu.default
    return run(query, key, block_size, first_generated, scale, lse, key_lengths)


ROWS = (Backend("block_importance", "cpu", 100, unsupported_floats, _importance, "bench/notes-sparse-attention.md"),)
