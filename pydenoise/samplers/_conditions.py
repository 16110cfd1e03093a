"""The keyword arguments of a denoiser, for a batch, a piece of it, and the two halves of guidance."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Conditions:
    """``conditioning`` and ``unconditional`` of a run, checked against its batch.

    With guidance the model is called once for both halves: the unconditional one first.
    """

    def __init__(self, conditioning, unconditional, x: Tensor, guided: bool):
        self.given = _named("conditioning", conditioning)
        other = _named("unconditional", unconditional)
        self.guided, self._batch = guided, x.shape[0]
        if not guided and unconditional is not None:
            raise ValueError("unconditional: given without a guidance_scale")
        if guided and unconditional is None:
            raise ValueError("unconditional: guidance needs what the model is told without the condition")
        if guided and set(other) != set(self.given):
            raise ValueError(
                f"unconditional: expected the names {sorted(self.given)} (those of conditioning), got {sorted(other)}"
            )
        self.other = other
        for name, values in (("conditioning", self.given), ("unconditional", other)):
            for key, value in values.items():
                _check(f"{name}[{key!r}]", value, x)

    def part(self, part: slice) -> dict[str, object]:
        """The keyword arguments for a piece of the batch, both halves of guidance together."""
        rows = range(self._batch)[part]
        given = {name: _slice(value, part, self._batch) for name, value in self.given.items()}
        if not self.guided:
            return given
        other = {name: _slice(value, part, self._batch) for name, value in self.other.items()}
        return {name: _together(name, other[name], given[name], len(rows)) for name in given}


def _named(name: str, value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: expected a mapping of keyword arguments, got {type(value).__name__}")
    return dict(value)


def _check(name: str, value: object, x: Tensor) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check(f"{name}[{key!r}]", inner, x)
        return
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name}: expected a batch of {x.shape[0]} or 1, got shape {tuple(value.shape)}")


def _slice(value: object, part: slice, batch: int) -> object:
    if isinstance(value, Mapping):
        return {key: _slice(inner, part, batch) for key, inner in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return value[part]
    return value


def _together(name: str, other: object, given: object, batch: int) -> object:
    """Unconditional rows, then conditional ones; what is no tensor must be the same in both."""
    if isinstance(given, Mapping) and isinstance(other, Mapping):
        if set(given) != set(other):
            raise ValueError(f"unconditional[{name!r}]: expected the names {sorted(given)}, got {sorted(other)}")
        return {key: _together(f"{name}.{key}", other[key], given[key], batch) for key in given}
    if isinstance(given, Tensor) and isinstance(other, Tensor) and given.dim() > 0 and other.dim() == given.dim():
        if other.shape[1:] != given.shape[1:] or other.dtype != given.dtype:
            raise ValueError(
                f"unconditional[{name!r}]: expected {given.dtype} {tuple(given.shape[1:])} for each sample, got "
                f"{other.dtype} {tuple(other.shape[1:])}"
            )
        return torch.cat([t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in (other, given)])
    if isinstance(given, Tensor) or isinstance(other, Tensor):
        same = isinstance(given, Tensor) and isinstance(other, Tensor) and torch.equal(given, other)
    else:
        same = given is other or given == other
    if not same:
        raise ValueError(f"unconditional[{name!r}]: only tensors of a batch can differ between the halves of guidance")
    return given
