"""CUDA C++ rows of weighted convolution."""

ROWS = ()
