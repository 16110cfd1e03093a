"""Triton rows of ode_stage. Triton is imported when a call could run on it, not before."""

from functools import cache

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "placed above cpu, which is for another device"


@cache
def _kernels():
    from pydenoise.kernels import ode_stage

    return ode_stage


def _unsupported(state: Tensor, *args) -> str | None:
    return _triton.unsupported(state, _FLOATS)


def _unsupported_backward(grad: Tensor, point: Tensor, *args) -> str | None:
    return _triton.unsupported(point, _FLOATS)


def _run(*args) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().ode_stage(*args)


def _run_backward(*args) -> tuple[Tensor, Tensor]:
    return _kernels().ode_stage_backward(*args)


ROWS = (
    Backend("ode_stage", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("ode_stage_backward", "triton", 110, _unsupported_backward, _run_backward, _MEASURED),
)
