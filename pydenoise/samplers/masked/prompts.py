"""Prompts of different lengths as one padded batch.

Row b of a batch holds its prompt, then its generated region, then padding: position 0 is the first token of every
prompt, so a sample's positions are those it has alone. The model is told by ``attention_mask`` (1 for tokens, 0 for
padding) or by ``lengths``, the number of tokens in each row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Prompt = Tensor | Sequence


def prompts_of(
    input_ids: Prompt, attention_mask: Tensor | None, mask_token_id: int, device: torch.device | str | None
) -> list[Tensor]:
    """Each prompt as int64 [P_b] without padding. Looks at the values, once."""
    if isinstance(input_ids, Tensor):
        prompts = _rows_of(input_ids if device is None else input_ids.to(device), attention_mask)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: belongs to padded input_ids; a list of prompts has no padding")
        prompts = _each_of(input_ids, device)
    for b, prompt in enumerate(prompts):
        if prompt.numel() and (prompt.min() < 0 or (prompt == mask_token_id).any()):
            raise ValueError(f"input_ids: prompt {b} holds the mask token {mask_token_id} or a negative token")
    return prompts


def _each_of(input_ids: Prompt, device: torch.device | str | None) -> list[Tensor]:
    if isinstance(input_ids, str) or not isinstance(input_ids, Sequence):
        raise TypeError(f"input_ids: expected a tensor or a list of prompts, got {type(input_ids).__name__}")
    if not len(input_ids):
        raise ValueError("input_ids: expected at least one prompt")
    prompts = []
    for b, prompt in enumerate(input_ids):
        if not isinstance(prompt, Tensor):
            prompt = torch.tensor(prompt, dtype=torch.int64 if len(prompt) == 0 else None)
        _check_dtype(prompt)
        if prompt.dim() != 1:
            raise ValueError(f"input_ids: prompt {b}: expected tokens [P], got shape {tuple(prompt.shape)}")
        prompts.append(prompt.to(device=device or prompt.device, dtype=torch.int64))
    if len({prompt.device for prompt in prompts}) > 1:
        raise ValueError("input_ids: expected prompts on one device")
    return prompts


def _rows_of(tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    _check_dtype(tokens)
    if tokens.dim() not in (1, 2) or tokens.dim() == 2 and not tokens.shape[0]:
        raise ValueError(f"input_ids: expected [B, P] with B >= 1, or [P], got shape {tuple(tokens.shape)}")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids {tuple(tokens.shape)}, got {tuple(attention_mask.shape)}"
        )
    if tokens.dim() == 1:
        tokens, attention_mask = tokens[None], None if attention_mask is None else attention_mask[None]
    tokens = tokens.to(torch.int64)
    if attention_mask is None:
        return list(tokens)
    keep = attention_mask.to(tokens.device) != 0
    prompts = []
    for b, (row, kept) in enumerate(zip(tokens, keep.tolist(), strict=True)):
        count = sum(kept)
        begin = kept.index(True) if count else 0
        if not all(kept[begin : begin + count]):
            raise ValueError(f"attention_mask: row {b} has padding inside the prompt, expected it on one side")
        prompts.append(row[begin : begin + count])
    return prompts


def _check_dtype(tokens: Tensor) -> None:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"input_ids: expected integers, got {tokens.dtype}")


def padded(rows: list[Tensor], pad: int, multiple: int = 1) -> Tensor:
    """The rows in one tensor [B, L], L a multiple of ``multiple``, padded on the right."""
    length = -(-max(row.shape[0] for row in rows) // multiple) * multiple
    batch = rows[0].new_full((len(rows), length), pad)
    for b, row in enumerate(rows):
        batch[b, : row.shape[0]] = row
    return batch
