"""Argument checks that the ops on [B, H, L, D] queries and keys share."""

import math

import torch
from torch import Tensor

from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._quantized import check_floats, values_are_known


def adjacent(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its last dim is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def check_query(query: object) -> None:
    """``query`` is floating-point [B, H, Lq, D]."""
    check_floats("query", query)
    if query.dim() != 4:
        raise ValueError(f"query: expected [B, H, Lq, D], got shape {tuple(query.shape)}")
    if query.shape[3] < 1:
        raise ValueError(f"query: expected a last dim of at least 1, got shape {tuple(query.shape)}")


def check_key(name: str, key: object, query: Tensor) -> None:
    """``key`` is [B, Hkv, Lk, D] of the query's kind; Hkv divides H."""
    check_tensor(name, key)
    if key.dtype != query.dtype:
        raise TypeError(f"{name}: expected dtype {query.dtype} (that of query), got {key.dtype}")
    if key.device != query.device:
        raise ValueError(f"{name}: expected device {query.device} (that of query), got {key.device}")
    batch, heads, _, size = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != size or key.shape[2] < 1:
        raise ValueError(f"{name}: expected [{batch}, Hkv, Lk, {size}] with Lk >= 1, got shape {tuple(key.shape)}")
    if key.shape[1] < 1 or heads % key.shape[1]:
        raise ValueError(f"{name}: expected a number of heads that divides query's {heads}, got {key.shape[1]}")


def scale_of(scale: object, size: int) -> float:
    """``scale`` as a float; ``None``: 1 / sqrt(size)."""
    if scale is None:
        return 1 / math.sqrt(size)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return float(scale)


def key_lengths_of(lengths: object, query: Tensor, keys: int) -> Tensor | None:
    """``lengths`` as int32 [B] on the query's device. Values are looked at on CPUs, where that costs no wait."""
    if lengths is None:
        return None
    check_tensor("key_lengths", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"key_lengths: expected an integer tensor, got {lengths.dtype}")
    if tuple(lengths.shape) != (query.shape[0],):
        raise ValueError(f"key_lengths: expected [{query.shape[0]}], one for each batch, got {tuple(lengths.shape)}")
    if lengths.device != query.device:
        raise ValueError(f"key_lengths: expected device {query.device} (that of query), got {lengths.device}")
    if values_are_known(lengths) and lengths.numel():
        low, high = (x.item() for x in torch.aminmax(lengths))
        if low < 0 or high > keys:
            raise ValueError(f"key_lengths: expected 0 to {keys} (the keys there are), got {low if low < 0 else high}")
    return lengths.detach().to(torch.int32).contiguous()
