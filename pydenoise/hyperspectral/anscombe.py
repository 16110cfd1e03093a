"""Anscombe's transform: counts with Poisson noise become values with noise of standard deviation 1.

Source: Anscombe, Biometrika 1948; the inverse is the closed form that is unbiased to within 0.02 counts at a mean of 1
and above, Makitalo and Foi, "A closed-form approximation of the exact unbiased inverse of the Anscombe
variance-stabilizing transformation", IEEE TIP 2011.
"""

import math

from torch import Tensor


def anscombe(counts: Tensor) -> Tensor:
    """2 sqrt(counts + 3/8). Raises ``ValueError`` for negative counts."""
    if counts.numel() and counts.min() < 0:
        raise ValueError("cube: Poisson noise means counts, and there are negative values")
    return 2 * (counts + 0.375).sqrt()


def inverse_anscombe(values: Tensor) -> Tensor:
    """The counts whose noisy transforms have the mean ``values``; nothing below zero."""
    z = values.clamp(min=2 * math.sqrt(0.375))
    root = math.sqrt(1.5)
    counts = z.square() / 4 - 0.125 + (root / 4 + (-1.375 + 0.625 * root / z) / z) / z
    return counts.clamp(min=0)
