"""Checks of the options that the masked samplers share."""

import math


def check_int(name: str, value: object, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if int(value) < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value}")
    return int(value)


def check_number(name: str, value: object, low: float, high: float = math.inf) -> float:
    """``value`` as a finite float from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(
            f"{name}: expected a finite number {'>= ' + format(low, 'g') if high == math.inf else f'{low:g}..{high:g}'}"
            f", got {value}"
        )
    return float(value)


class NotANumber(ValueError):
    """The model's logits have no answer (NaN, +inf, or nothing above -inf); the message names the step."""

    @classmethod
    def at(cls, step: int) -> "NotANumber":
        return cls(f"model: logits with NaN, +inf or nothing above -inf at step {step}")
