"""Triton kernels, one file per op. Needs torch and triton only; nothing here is imported by ``import pydenoise``."""
