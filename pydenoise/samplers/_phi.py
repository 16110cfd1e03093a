"""The phi functions of exponential integrators."""

import math

_SERIES_BELOW = 1.0  # where the recurrence would cancel
_SERIES_TERMS = 20


def phi(order: int, z: float) -> float:
    """phi_1(z) = (e^z - 1) / z, phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z, for ``order`` from 1 and any z.

    Source: Hochbruck & Ostermann, Exponential integrators, Acta Numerica 19 (2010), section 2.1.
    """
    if abs(z) < _SERIES_BELOW:
        term = value = 1 / math.factorial(order)
        for j in range(order + 1, order + _SERIES_TERMS):
            term *= z / j
            value += term
        return value
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1 / math.factorial(k)) / z
    return value


def scaled_phi(order: int, h: float) -> float:
    """h phi_order(-h) for a step h > 0; also where h is infinite: 1, and 1 / (order - 1)! of the higher ones."""
    if math.isinf(h):
        return 1 / math.factorial(order - 1)
    return -math.expm1(-h) if order == 1 else h * phi(order, -h)
