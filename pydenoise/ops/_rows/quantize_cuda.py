"""CUDA C++ rows of ``quantize``."""

ROWS = ()
