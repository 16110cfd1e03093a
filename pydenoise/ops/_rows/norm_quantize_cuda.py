"""CUDA C++ rows of ``norm_quantize``."""

ROWS = ()
