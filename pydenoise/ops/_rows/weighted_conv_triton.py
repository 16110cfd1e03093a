"""Triton rows of weighted convolution."""

ROWS = ()
