"""Triton rows of ``int8_conv2d``."""

ROWS = ()
