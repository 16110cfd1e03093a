"""Dense attention in plain torch, heads next to each other in the last dim: the oracle and the fallback."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float, mask: Tensor | None) -> Tensor:
    """``softmax(scale * query @ key^T + mask) @ value`` for each head; rows whose keys are all masked give 0."""
    if query.numel() == 0:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(2)
