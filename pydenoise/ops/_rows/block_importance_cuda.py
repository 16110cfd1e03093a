"""CUDA C++ row of the importance of blocks."""

import torch

from pydenoise.ops._rows._cuda_attention import rows_of_16_bytes, unsupported
from pydenoise.ops.registry import Backend


def _unsupported(query, key, *args) -> str | None:
    return unsupported(query, key)


def _importance(query, key, block_size, first_generated, scale, lse, key_lengths):
    batch, heads, queries, _ = query.shape
    rows, columns = (-(-n // block_size) for n in (queries, key.shape[2]))
    over_all = query.new_empty((batch, heads, rows, columns), dtype=torch.float32)
    over_generated = query.new_empty((batch, heads, rows, columns - first_generated), dtype=torch.float32)
    torch.ops.pydenoise.block_importance_cuda.default(
        rows_of_16_bytes(query), rows_of_16_bytes(key), block_size, first_generated, scale, lse, key_lengths, over_all,
        over_generated,
    )  # fmt: skip
    return over_all, over_generated


_MEASURED = "not measured yet: above Triton (bench/notes-sparse-attention.md)"

ROWS = (Backend("block_importance", "cuda", 300, _unsupported, _importance, _MEASURED),)
