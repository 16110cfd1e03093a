"""Which blocks SparseD keeps, from their importances: two selections of the largest, joined."""

import torch
from torch import Tensor

MODES = ("reference", "per_side")


def longest_row(blocks: int, first_generated: int, select: float, mode: str) -> int:
    """The most blocks that :func:`sparsed_block_mask` keeps in a row of ``blocks``."""
    prompt = _count(blocks if mode == "reference" else first_generated, select)
    return min(prompt, first_generated) + _count(blocks - first_generated, select)


def sparsed_block_mask(
    over_all: Tensor, over_generated: Tensor, select: float, mode: str, valid: Tensor | None = None
) -> Tensor:
    """Boolean [B, H, nq, nk] from the importances over all keys and over the generated ones.

    "reference" takes the largest of all columns and drops those of the generated part, as the public code does;
    "per_side" takes the largest among the prompt's, as the paper's text says. Both add the largest of the generated
    part by its own softmax. Ties go to the lower column. ``valid`` [B, nk]: columns that may be kept.
    """
    blocks, generated = over_all.shape[-1], over_generated.shape[-1]
    first = blocks - generated
    if mode == "reference":
        prompt = _largest(over_all, _count(blocks, select))[..., :first]
    else:
        prompt = _largest(over_all[..., :first], _count(first, select))
    kept = torch.cat([prompt, _largest(over_generated, _count(generated, select))], -1)
    return kept if valid is None else kept & valid[:, None, None]


def _count(columns: int, select: float) -> int:
    return min(max(1, int(columns * select) + 1), columns)


def _largest(importance: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of each row; equal ones from the left."""
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, order, True)
