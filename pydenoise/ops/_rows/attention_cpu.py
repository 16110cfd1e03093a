"""CPU row of attention: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _attention(query, key, value, num_heads, scale, mask):
    return torch.ops.pydenoise.attention_cpu.default(query, key, value, num_heads, scale, mask)


ROWS = (Backend("attention", "cpu", 100, unsupported_floats, _attention, "bench/notes-attention.md"),)
