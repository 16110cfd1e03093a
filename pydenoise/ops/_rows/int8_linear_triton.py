"""Triton rows of ``int8_linear``."""

ROWS = ()
