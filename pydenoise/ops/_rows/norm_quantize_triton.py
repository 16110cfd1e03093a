"""Triton rows of ``norm_quantize``."""

ROWS = ()
