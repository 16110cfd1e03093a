"""Operators: argument checks, fake kernels, autograd and backend rows, one file per op."""
