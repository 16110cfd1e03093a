"""Attention masks that say no more than how many keys of each batch are valid: padding on the right."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to a score, this or less leaves a weight of 0: models write -1e4, the dtype's lowest value, or -inf.
_MASKED = -1e4


@dataclass(frozen=True)
class KeyPadding:
    """Valid keys of each batch: int32 [B] on the device, and the same numbers here. Both ``None``: every key is valid.

    ``reason``: why a mask is not plain padding; the lengths are then ``None`` and mean nothing.
    """

    lengths: Tensor | None = None
    values: tuple[int, ...] | None = None
    reason: str | None = None


class KeyPaddings:
    """Reads masks and lengths; what came last is not read again (on a GPU that would wait for the device)."""

    def __init__(self) -> None:
        self._last: tuple | None = None

    def __deepcopy__(self, memo: dict) -> "KeyPaddings":
        return KeyPaddings()

    def __reduce__(self):
        return KeyPaddings, ()

    def of(self, attn_mask: Tensor | None, key_lengths: Tensor | None, query: Tensor, keys: int) -> KeyPadding:
        """The padding that ``attn_mask`` or ``key_lengths`` describes, for queries [B, H, Lq, D] and ``keys`` keys.

        Raises ``TypeError`` or ``ValueError`` for both at once, and for what is neither a mask nor lengths.
        """
        if attn_mask is None and key_lengths is None:
            return KeyPadding()
        if attn_mask is not None and key_lengths is not None:
            raise ValueError("attn_mask: expected either attn_mask or key_lengths, got both")
        source = key_lengths if attn_mask is None else attn_mask
        if not isinstance(source, Tensor):
            name = "attn_mask" if key_lengths is None else "key_lengths"
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(source).__name__}")
        state = (tuple(query.shape[:3]), keys, None if source.is_inference() else source._version)
        if self._last is not None and state[2] is not None and self._last[0]() is source and self._last[1] == state:
            return self._last[2]
        found = _from_lengths(source, query, keys) if attn_mask is None else _from_mask(source, query, keys)
        self._last = (weakref.ref(source), state, found)
        return found


def _from_lengths(lengths: Tensor, query: Tensor, keys: int) -> KeyPadding:
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"key_lengths: expected an integer tensor, got {lengths.dtype}")
    if tuple(lengths.shape) != (query.shape[0],):
        raise ValueError(f"key_lengths: expected [{query.shape[0]}], one for each batch, got {tuple(lengths.shape)}")
    if lengths.device != query.device:
        raise ValueError(f"key_lengths: expected device {query.device} (that of query), got {lengths.device}")
    values = tuple(lengths.tolist())
    wrong = [value for value in values if not 0 <= value <= keys]
    if wrong:
        raise ValueError(f"key_lengths: expected 0 to {keys} (the keys there are), got {wrong[0]}")
    return _padding(lengths, values, keys)


def _padding(lengths: Tensor, values: tuple[int, ...], keys: int) -> KeyPadding:
    if all(value == keys for value in values):
        return KeyPadding()
    return KeyPadding(lengths.detach().to(torch.int32), values)


def _from_mask(mask: Tensor, query: Tensor, keys: int) -> KeyPadding:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask: expected a boolean or floating-point tensor, got {mask.dtype}")
    batch, heads, queries, _ = query.shape
    sizes = (*(1,) * (4 - mask.dim()), *mask.shape)
    if len(sizes) != 4 or any(n not in (1, m) for n, m in zip(sizes, (batch, heads, queries, keys), strict=True)):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {(batch, heads, queries, keys)}, got {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise ValueError(f"attn_mask: expected device {query.device} (that of query), got {mask.device}")
    return _read(mask.detach()[(None,) * (4 - mask.dim())], batch, keys)


def _read(mask: Tensor, batch: int, keys: int) -> KeyPadding:
    """Of ``mask`` [b, h, q, k], each size 1 or full."""
    for axis in (1, 2):  # what is expanded is the same for all; the rest is compared
        if mask.shape[axis] and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    if 0 in mask.shape:
        return KeyPadding()
    row = mask[:, :1, :1]
    if mask.shape[1:3] != (1, 1) and not torch.equal(mask, row.expand_as(mask)):
        return KeyPadding(reason="it is not the same for all queries and heads")
    row = row[:, 0, 0].expand(-1, keys)
    if row.dtype == torch.bool:
        valid = row
    else:
        valid = row == 0
        if not (valid | (row <= _MASKED)).all():
            return KeyPadding(reason="it adds values other than 0 and minus infinity to the scores")
    lengths = valid.sum(-1, dtype=torch.int32)
    if not torch.equal(valid, torch.arange(keys, device=mask.device) < lengths[:, None]):
        left = torch.equal(valid, torch.arange(keys, device=mask.device) >= keys - lengths[:, None])
        return KeyPadding(reason="its padding is on the left" if left else "it leaves out keys before valid ones")
    lengths = lengths.expand(batch)
    return _padding(lengths, tuple(lengths.tolist()), keys)
