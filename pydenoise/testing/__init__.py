"""Case tables, the tolerance policy and the rows under test: tests and benches read the same ones."""

from pydenoise.testing.policy import (
    FACTOR,
    FLOOR_ROUNDINGS,
    WINOGRAD_RELATIVE_ERROR,
    arrange,
    assert_accurate,
    error_bound,
    relative_error,
)
from pydenoise.testing.weighted_conv import CONV_CASES, ConvCase

__all__ = [
    "CONV_CASES",
    "FACTOR",
    "FLOOR_ROUNDINGS",
    "WINOGRAD_RELATIVE_ERROR",
    "ConvCase",
    "arrange",
    "assert_accurate",
    "error_bound",
    "relative_error",
]
