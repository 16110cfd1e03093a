"""The gradient of one row of ``sampler_step``: its transpose, in plain torch.

A row (``pydenoise/step_row.py``) is linear in the sample, the base, the history, the model's output and the noise,
apart from the limit of x0 and the scale that a learned variance gives the noise. So what flows back through it is again
a linear combination with the same coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._loop import CallState

_KEPT = (C.KEPT_SAMPLE, C.KEPT_BASE, C.KEPT_M, C.KEPT_OUT, *range(C.KEPT_HISTORY, C.KEPT_HISTORY + C.SLOTS))


@dataclass(frozen=True)
class Limit:
    """How x0 is limited: to [-clip, clip], or by its ``quantile`` over a sample (dynamic thresholding)."""

    clip: float
    quantile: float | None
    most: float

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 limited; differentiable."""
        if self.quantile is None:
            return x0.clamp(-self.clip, self.clip)
        values = x0.flatten(1).abs().sort(1).values
        place = self.quantile * (values.shape[1] - 1)
        low = int(place)
        high = min(low + 1, values.shape[1] - 1)
        bound = torch.lerp(values[:, low], values[:, high], place - low).clamp(1.0, self.most)
        bound = bound.view(-1, *[1] * (x0.dim() - 1))
        return torch.maximum(torch.minimum(x0, bound), -bound) / bound

    def backward(self, x0: Tensor, grad: Tensor) -> Tensor:
        """The gradient with respect to x0 before the limit."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            return torch.autograd.grad(self(x0), x0, grad)[0]


@dataclass(frozen=True)
class RowGradients:
    """Gradients of what entered a row; ``variance`` and ``other`` where there are such outputs of the model."""

    state: CallState
    prediction: Tensor
    variance: Tensor | None
    other: Tensor | None
    noise: Tensor | None


def transposed_row(
    row: Sequence[float],
    x: Tensor,
    prediction: Tensor,
    other: Tensor | None,
    grads: CallState,
    limit: Limit,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
) -> RowGradients:
    """Take the gradients with respect to what a row left behind to what it was given.

    Args:
        row: its coefficients.
        x, prediction, other, variance: what it was given, all of one dtype: ``prediction`` is the model's output (the
            conditional one with guidance), ``other`` the unconditional one.
        grads: gradients with respect to x', the base and the history afterwards.
        noise: z, where ``variance`` scales it.
    """
    slot, guided = int(row[C.SLOT]), row[C.GUIDANCE]
    keeps = grads.base is not None and any(row[column] for column in _KEPT)
    on_out, on_kept = grads.sample, grads.base if keeps else None

    def spread(column: int, kept_column: int | None = None) -> Tensor:
        """The gradient of a tensor that enters x' with one coefficient and what is kept with another."""
        total = row[column] * on_out
        return total if on_kept is None or kept_column is None else total + row[kept_column] * on_kept

    if on_kept is not None:
        on_out = on_out + row[C.KEPT_OUT] * on_kept
    on_m = spread(C.M, C.KEPT_M)
    if slot >= 0 and grads.history is not None:
        on_m = on_m + grads.history[slot]
    on_x0 = None
    if row[C.M_X0]:
        y = prediction if other is None else other + guided * (prediction - other)
        before = row[C.X0_SAMPLE] * x + row[C.X0_OUTPUT] * y
        on_x0 = limit.backward(before, row[C.M_X0] * on_m)

    sample = spread(C.SAMPLE, C.KEPT_SAMPLE) + row[C.M_SAMPLE] * on_m
    output = spread(C.OUTPUT) + row[C.M_OUTPUT] * on_m
    if on_x0 is not None:
        sample, output = sample + row[C.X0_SAMPLE] * on_x0, output + row[C.X0_OUTPUT] * on_x0
    base = None
    if grads.base is not None:
        base = spread(C.BASE, C.KEPT_BASE) if keeps else spread(C.BASE) + grads.base
    history = None
    if grads.history is not None:
        passed = [spread(C.HISTORY + j, C.KEPT_HISTORY + j) for j in range(len(grads.history))]
        history = torch.stack([p if j == slot else p + grads.history[j] for j, p in enumerate(passed)])

    std, on_variance = row[C.NOISE], None
    if variance is not None:
        low, high = row[C.LOG_SMALL], row[C.LOG_LARGE]
        std = std * torch.exp(low + (variance + 1) / 2 * (high - low))
        on_variance = torch.zeros_like(variance) if noise is None else on_out * std * noise * ((high - low) / 2)
    return RowGradients(
        CallState(sample, base, history),
        output if other is None else guided * output,
        on_variance,
        None if other is None else (1 - guided) * output,
        std * on_out,
    )
