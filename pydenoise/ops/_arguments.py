"""Argument checks that every op shares; each message names the argument, what came and what is allowed."""

from collections.abc import Sequence

from torch import Tensor


def check_tensor(name: str, value: object, like: Tensor | None = None) -> None:
    """``value`` is a tensor and, if ``like`` is given, of its dtype and on its device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if like is None:
        return
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} (that of input), got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of input), got {value.device}")


def int_tuple(name: str, value: int | Sequence[int], length: int, *, minimum: int) -> tuple[int, ...]:
    """``value`` as ``length`` ints of at least ``minimum``; one int stands for all."""
    if type(value) is int:
        values = (value,) * length
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value) * length if len(value) == 1 else tuple(value)
    else:
        values = (value,) * length
    if len(values) != length:
        raise ValueError(f"{name}: expected one int or {length} ints, got {values}")
    for item in values:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(f"{name}: expected ints, got {type(item).__name__} in {values}")
        if item < minimum:
            raise ValueError(f"{name}: expected ints >= {minimum}, got {values}")
    return values


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
