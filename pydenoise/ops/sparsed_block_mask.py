"""SparseD's pattern: importances of blocks by the compiled kernels, the largest of them by torch."""

import torch
from torch import Tensor

from pydenoise.block_mask import BlockMask, lists_from_dense
from pydenoise.ops import block_importance
from pydenoise.reference import sparsed_block_mask as reference


def sparsed_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    select: float,
    block_size: int = 128,
    new_tokens: int = 0,
    mode: str = "reference",
    scale: float | None = None,
    lse: Tensor | None = None,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
) -> BlockMask:
    """The blocks of keys that SparseD keeps for each block of queries of each head.

    Two selections are joined: the largest blocks of the prompt's part by a softmax over all keys, and the largest of
    the generated part by a softmax over that part alone (see :func:`block_importance` for where it begins). Of n
    blocks, ``max(1, int(n * select) + 1)`` are taken, at most n. Ties go to the lower block.

    Args:
        query: [B, H, Lq, D]; key: [B, Hkv, Lk, D], after rotary embedding, as for :func:`block_importance`.
        select: the share of blocks to keep, in (0, 1].
        block_size, new_tokens, scale, lse, key_lengths, backend: as for :func:`block_importance`. Blocks wholly beyond
            a batch's length are not kept.
        mode: "reference": the first selection is the largest of all columns, less those of the generated part, as the
            public code does. "per_side": the largest of the prompt's columns, as the paper's text says.

    Returns:
        A :class:`pydenoise.BlockMask` [B, H]. Nothing waits for a CUDA device.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: SparseD (2025), https://arxiv.org/abs/2509.24014, section 3.2, and its public code.
    """
    check_select(select)
    if mode not in reference.MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, reference.MODES))}, got {mode!r}")
    importances = block_importance.block_importance(
        query, key, block_size, new_tokens=new_tokens, scale=scale, lse=lse, key_lengths=key_lengths, backend=backend
    )
    return mask_from_importances(
        *importances, select, block_size, query.shape[2], key.shape[2], mode=mode, key_lengths=key_lengths
    )


def check_select(select: object) -> None:
    """``select`` is a share of blocks, in (0, 1]."""
    if not isinstance(select, (int, float)) or isinstance(select, bool):
        raise TypeError(f"select: expected a number, got {type(select).__name__}")
    if not 0 < select <= 1:
        raise ValueError(f"select: expected a share above 0 and up to 1, got {select}")


def mask_from_importances(
    over_all: Tensor,
    over_generated: Tensor,
    select: float,
    block_size: int,
    query_length: int,
    key_length: int,
    *,
    mode: str = "reference",
    key_lengths: Tensor | None = None,
) -> BlockMask:
    """The :class:`BlockMask` of what :func:`block_importance` gave."""
    blocks = over_all.shape[-1]
    valid = None
    if key_lengths is not None:
        valid = torch.arange(blocks, device=over_all.device) * block_size < key_lengths.to(over_all.device)[:, None]
    kept = reference.sparsed_block_mask(over_all, over_generated, select, mode, valid)
    longest = reference.longest_row(blocks, blocks - over_generated.shape[-1], select, mode)
    return BlockMask(*lists_from_dense(kept, longest), block_size, query_length, key_length, check=False)
