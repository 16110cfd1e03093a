"""Triton rows of ``quantize``."""

ROWS = ()
