"""Checks that the functions of this package share."""

import torch
from torch import Tensor


def check_cube(cube: object, name: str = "cube", finite: bool = True) -> Tensor:
    """A float32 or float64 tensor [bands, H, W] of at least two bands and one pixel, without NaN or infinity."""
    if not isinstance(cube, Tensor):
        raise TypeError(f"{name}: expected a tensor [bands, H, W], got {type(cube).__name__}")
    if cube.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {cube.dtype}")
    if cube.dim() != 3 or cube.shape[0] < 2 or 0 in cube.shape:
        raise ValueError(
            f"{name}: expected [bands, H, W] of at least 2 bands and at least one pixel, got {list(cube.shape)}"
        )
    if finite and not torch.isfinite(cube).all():
        raise ValueError(f"{name}: holds values that are not finite")
    return cube


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer of ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected an integer of {limit}, got {value}")
    return value


def check_number(name: str, value: object, zero: bool = False) -> float:
    """A finite number above zero, or of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (0 <= value < float("inf")) or (value == 0 and not zero):
        raise ValueError(f"{name}: expected a finite number {'of at least' if zero else 'above'} zero, got {value}")
    return float(value)


def check_sigma(sigma: float | Tensor, bands: int) -> Tensor:
    """The noise's standard deviation of every band, [bands] in float64: positive."""
    values = sigma.double() if isinstance(sigma, Tensor) else torch.tensor(check_number("sigma", sigma)).double()
    if values.dim() == 0:
        values = values.expand(bands)
    if values.shape != (bands,):
        raise ValueError(f"sigma: expected a number, or one for each of {bands} bands, got {list(values.shape)}")
    if not (torch.isfinite(values).all() and (values > 0).all()):
        raise ValueError("sigma: expected finite numbers above zero")
    return values
