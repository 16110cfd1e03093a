"""How much attention each block of keys gets from each block of queries, in plain torch, row by row."""

import torch
from torch import Tensor


def block_importance(
    query: Tensor,
    key: Tensor,
    block_size: int,
    first_generated: int,
    scale: float,
    lse: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(over all keys [B, H, nq, nk], over the keys from block ``first_generated`` on [B, H, nq, nk - first_generated]).

    Each is the sum of a softmax over a block of queries x a block of keys, over ``block_size`` squared.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, queries, _ = query.shape
    rows, columns = (-(-n // block_size) for n in (queries, key.shape[2]))
    over_all = torch.empty(batch, heads, rows, columns, dtype=wide, device=query.device)
    over_generated = over_all.new_empty(batch, heads, rows, columns - first_generated)
    if query.numel() == 0:
        return over_all, over_generated
    keys = key.to(wide).repeat_interleave(heads // key.shape[1], 1)
    lengths = torch.full((batch,), key.shape[2], device=key.device) if key_lengths is None else key_lengths
    beyond = (torch.arange(key.shape[2], device=key.device) >= lengths[:, None])[:, None, None]
    for row in range(rows):
        tokens = slice(row * block_size, (row + 1) * block_size)
        scores = (query[:, :, tokens].to(wide) @ keys.mT * scale).masked_fill(beyond, -torch.inf)
        total = torch.logsumexp(scores, -1) if lse is None else lse[:, :, tokens].to(wide)
        over_all[:, :, row] = _pooled(scores, total, block_size)
        generated = scores[..., first_generated * block_size :]
        over_generated[:, :, row] = _pooled(generated, torch.logsumexp(generated, -1), block_size)
    return over_all, over_generated


def _pooled(scores: Tensor, total: Tensor, size: int) -> Tensor:
    """Mean of exp(scores - total) over blocks of ``size`` columns and all rows, always of ``size`` squared elements."""
    weights = (scores - total.masked_fill(total == -torch.inf, 0)[..., None]).exp().sum(-2)
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % size))
    return padded.unflatten(-1, (-1, size)).sum(-1) / size**2
