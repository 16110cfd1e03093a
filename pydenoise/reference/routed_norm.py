"""Layer norm of some channels of tokens, modulated, behind a residual sum, in plain torch: the oracle."""

import torch
from torch import Tensor


def accurate(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _masked(input: Tensor, mask: Tensor | None) -> Tensor:
    """``input`` where the mask is not 0, else 0, whatever stands there."""
    return input if mask is None else torch.where(mask[:, None] != 0, input, 0.0)


def routed_norm(
    input: Tensor,
    mask: Tensor | None,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    total: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, carried, stats) of ``r = mask * input + gate * update``.

    ``output = (r - mean) * rstd * (1 + scale) + shift`` with the moments over ``total`` channels, those beside the C of
    ``input`` being 0; ``carried = input + gate * update`` (empty without an update); stats [B, T, 2]: -mean * rstd,
    which is what the norm makes of a 0, and rstd.
    """
    dtype = accurate(input.dtype)
    x = input.to(dtype)
    r, carried = _masked(x, mask), x.new_empty(0)
    if update is not None:
        more = gate[:, None].to(dtype) * update.to(dtype)
        r, carried = r + more, x + more
    rest = total - input.shape[-1]
    mean = r.sum(-1, keepdim=True) / total
    variance = (((r - mean) ** 2).sum(-1, keepdim=True) + rest * mean**2) / total
    rstd = (variance + eps).rsqrt()
    output = (r - mean) * rstd * (1 + scale[:, None].to(dtype)) + shift[:, None].to(dtype)
    return output.to(input.dtype), carried.to(input.dtype), torch.cat([-mean * rstd, rstd], -1)


def routed_norm_backward(
    grad: Tensor,
    grad_carried: Tensor | None,
    grad_constant: Tensor | None,
    input: Tensor,
    mask: Tensor | None,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    total: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input and update (empty without one), and of (shift, scale, gate) by sample: [B, 3, C].

    ``grad_constant`` [B, T] is that of stats[..., 0].
    """
    dtype = accurate(input.dtype)
    x, g = input.to(dtype), grad.to(dtype)
    r = _masked(x, mask)
    if update is not None:
        r = r + gate[:, None].to(dtype) * update.to(dtype)
    constant, rstd = stats.unsqueeze(-1).unbind(2)
    normed = r * rstd + constant
    pushed = g * (1 + scale[:, None].to(dtype))
    plain, product = pushed.sum(-1, keepdim=True), (pushed * normed).sum(-1, keepdim=True)
    if grad_constant is not None:  # as if it were one more channel
        plain = plain + grad_constant[..., None]
        product = product + grad_constant[..., None] * constant
    own = rstd * (pushed - plain / total - normed * (product / total))
    more = 0.0 if grad_carried is None else grad_carried.to(dtype)
    grad_input = _masked(own, mask) + more
    gates = grad_update = x.new_empty(0)
    both = own + more
    if update is not None:
        grad_update = gate[:, None].to(dtype) * both
        gates = (update.to(dtype) * both).sum(1)
    else:
        gates = torch.zeros_like(scale, dtype=dtype).expand(x.shape[0], -1)
    coefficients = torch.stack([g.sum(1), (g * normed).sum(1), gates], 1)
    return grad_input.to(input.dtype), grad_update.to(input.dtype), coefficients
