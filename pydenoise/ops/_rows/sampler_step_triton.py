"""Triton row of ``sampler_step``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops._rows.sampler_step_cuda import too_large
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def _unsupported(sample, output, unconditional, base, history, noise, threshold, table, rows, *args) -> str | None:
    model_input = args[7]
    others = [t.dtype for t in (output, unconditional, model_input) if t is not None]
    return _triton.unsupported(sample, _FLOATS, *others) or too_large(sample, rows)


def _run(*args) -> Tensor:
    from pydenoise.kernels import sampler_step
    from pydenoise.ops.sampler_step import empty_statistics  # the op imports its rows

    sample, history, rows, statistics = args[0], args[4], args[8], args[12]
    sums = empty_statistics(sample, rows, history, statistics)
    sampler_step.sampler_step(*args, sums)
    return sums


ROWS = (Backend("sampler_step", "triton", 110, _unsupported, _run, _MEASURED),)
