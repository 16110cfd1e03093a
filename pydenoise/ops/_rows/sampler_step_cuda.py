"""CUDA C++ row of ``sampler_step``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import Backend

_PIECE = 512  # columns of the smallest block of threads, of CUDA and Triton


def too_large(sample: Tensor, rows: Tensor) -> str | None:
    """Kernels on a GPU number the elements of a sample with 30 bits, and their blocks of threads with 31."""
    batch = max(sample.shape[0], 1)
    units = max(rows.shape[0], batch)
    if units * (sample.numel() // units // _PIECE + 2) >= 2**31:
        return f"{sample.numel()} elements in {units} groups are too many"
    return _cuda.too_many(sample.numel() // batch, "elements of a sample")


def _unsupported(sample, output, unconditional, base, history, noise, threshold, table, rows, *args) -> str | None:
    return _cuda.unsupported(sample, _cuda.FLOATS) or too_large(sample, rows)


def _run(*args) -> Tensor:
    from pydenoise.ops.sampler_step import empty_statistics  # the op imports its rows

    sample, history, rows, statistics = args[0], args[4], args[8], args[12]
    sums = empty_statistics(sample, rows, history, statistics)
    if sample.numel() == 0:
        return sums.zero_()
    torch.ops.pydenoise.sampler_step_cuda.default(*args, sums)
    return sums


ROWS = (
    Backend(
        "sampler_step", "cuda", 300, _unsupported, _run, "not measured yet: above Triton; both are bound by memory"
    ),
)
