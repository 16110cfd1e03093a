"""The token that masked diffusion puts at a position, and how sure the model is of it, in plain torch: the oracle."""

import torch
from torch import Tensor

from pydenoise.reference._philox import gumbel, words


def scores(logits: Tensor, unconditional: Tensor | None, rows: Tensor | None, guidance: float) -> Tensor:
    """Guided logits [R, V] in float32 (float64 for float64): ``u + (guidance + 1) (c - u)``.

    A token whose conditional logit is -inf stays impossible. A row number out of range gives a row of NaN.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    conditional = _taken(logits, rows).to(dtype)
    if unconditional is None:
        return conditional
    other = _taken(unconditional, rows).to(dtype)
    guided = other + (guidance + 1) * (conditional - other)
    return torch.where(conditional == -torch.inf, conditional, guided)


def _taken(logits: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return logits
    count = logits.shape[0]
    inside = (rows >= 0) & (rows < count)
    if count == 0:
        return logits.new_full((rows.shape[0], logits.shape[1]), torch.nan)
    return logits[rows.clamp(0, count - 1)].masked_fill(~inside[:, None], torch.nan)


def noise_keys(count: int, keys: Tensor | None, seed: int, device: torch.device) -> Tensor:
    """int64 [count, 2], the seed and the number of every row: ``keys``, or ``seed`` and 0, 1, 2, ..."""
    if keys is not None:
        return keys
    numbers = torch.arange(count, device=device)
    return torch.stack([torch.full_like(numbers, seed), numbers], 1)


def token_confidence(
    logits: Tensor,
    unconditional: Tensor | None,
    rows: Tensor | None,
    keys: Tensor | None,
    guidance: float,
    temperature: float,
    seed: int,
    step: int,
    forbidden: list[int],
    uncounted: list[int],
    eos: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, confidence, probability of ``eos``), each [R]; the last is empty where ``eos`` is negative.

    The token is the argmax of guided logits plus ``temperature`` times Gumbel noise over all but the ``forbidden``
    tokens. Its confidence is its softmax probability, without noise, over all tokens but the forbidden and the
    ``uncounted`` ones, which have probability 0. Rows with NaN or inf, or with nothing above -inf: token -1 and NaN.
    """
    values = scores(logits, unconditional, rows, guidance)
    columns = torch.arange(values.shape[1], device=values.device)
    excluded = _among(columns, forbidden)
    values = values.masked_fill(excluded, -torch.inf)
    noised = values
    if temperature > 0:
        number = noise_keys(values.shape[0], keys, seed, values.device)
        noised = values + temperature * gumbel(words(number, step, values.shape[1]), values.dtype)
    best = noised.amax(1, keepdim=True)
    token = torch.where(noised == best, columns, columns.shape[0]).amin(1)  # the first, whatever the device
    counted = values.masked_fill(_among(columns, uncounted), -torch.inf)
    top = counted.amax(1, keepdim=True)
    probability = (counted - torch.where(top == -torch.inf, 0.0, top)).exp()
    total = probability.sum(1)
    total = torch.where(total == 0, 1.0, total)  # nothing counts: all probabilities are 0
    wrong = values.isnan().any(1) | ~best[:, 0].isfinite()
    at = token.clamp_max(columns.shape[0] - 1)[:, None]
    confidence = (probability.gather(1, at)[:, 0] / total).masked_fill(wrong, torch.nan)
    watched = values.new_empty(0)
    if eos >= 0:
        watched = (probability[:, eos] / total).masked_fill(wrong, torch.nan)
    return token.masked_fill(wrong, -1), confidence, watched


def _among(columns: Tensor, tokens: list[int]) -> Tensor:
    found = torch.zeros_like(columns, dtype=torch.bool)
    for token in tokens:
        found = found | (columns == token)
    return found
