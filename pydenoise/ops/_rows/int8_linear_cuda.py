"""CUDA C++ rows of ``int8_linear``."""

ROWS = ()
