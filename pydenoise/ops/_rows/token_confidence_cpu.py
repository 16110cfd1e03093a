"""CPU row of token_confidence: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows.quantize_cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _unsupported(logits, *args):
    return unsupported_floats(logits)


def _token_confidence(*args):
    return torch.ops.pydenoise.token_confidence_cpu.default(*args)


ROWS = (Backend("token_confidence", "cpu", 100, _unsupported, _token_confidence, "bench/notes-sparse-attention.md"),)
