"""CUDA C++ row of ``token_confidence``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend


def _unsupported(logits: Tensor, *args) -> str | None:
    return _cuda.unsupported(logits, _cuda.FLOATS) or _cuda.too_many(logits.shape[1], "tokens")


def _run(*args) -> tuple[Tensor, Tensor, Tensor]:
    logits, _, rows, *_, eos = args
    count = logits.shape[0] if rows is None else rows.shape[0]
    results = (
        logits.new_empty(count, dtype=torch.int64),
        logits.new_empty(count, dtype=torch.float32),
        logits.new_empty(count if eos >= 0 else 0, dtype=torch.float32),
    )
    torch.ops.pydenoise.token_confidence_cuda.default(*args, *results)
    return results


ROWS = (
    Backend(
        "token_confidence", "cuda", 300, _unsupported, _run, "not measured yet: above Triton; both are bound by memory"
    ),
)
