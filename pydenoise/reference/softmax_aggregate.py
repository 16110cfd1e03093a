"""Feature maps added up under a softmax over them, pixel by pixel, in plain torch: the oracle."""

import torch
from torch import Tensor


def accurate(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_of(hidden: Tensor, weight: Tensor | None) -> Tensor:
    """[B, N, h, w]: ``hidden`` [B, K, h, w] through a 1x1 convolution of ``weight`` [N, K], or itself for ``None``."""
    dtype = accurate(hidden.dtype)
    if weight is None:
        return hidden.to(dtype)
    return torch.einsum("nk,bkhw->bnhw", weight.to(dtype), hidden.to(dtype))


def softmax_aggregate(features: Tensor, hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum over n of shares[:, n] * features[:, n], shares = softmax of the logits over n)."""
    shares = logits_of(hidden, weight).softmax(1)
    out = (shares[:, :, None] * features.to(shares.dtype)).sum(1)
    return out.to(features.dtype), shares


def softmax_aggregate_backward(
    grad: Tensor, grad_shares: Tensor | None, features: Tensor, shares: Tensor, wants_features: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of features (``None`` if not wanted) and of the logits, from those of the sum and of the shares."""
    wide = grad.to(shares.dtype)[:, None]
    dots = (wide * features.to(shares.dtype)).sum(2)
    if grad_shares is not None:
        dots = dots + grad_shares
    grad_logits = shares * (dots - (shares * dots).sum(1, keepdim=True))
    grad_features = (shares[:, :, None] * wide).to(features.dtype) if wants_features else None
    return grad_features, grad_logits
