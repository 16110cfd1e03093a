"""CPU rows of ode_stage: the C++ kernels of ``pydenoise._C``."""

import torch
from torch import Tensor

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend

_MEASURED = "bench/notes-blocks-continuous.md"


def _float32(film: Tensor | None) -> Tensor | None:
    return None if film is None else film.float()


def _run(state, slopes, weights, position_weights, drift, second, film, plane, eps, normalise, keep):
    return torch.ops.pydenoise.ode_stage_cpu.default(
        state, slopes, weights, position_weights, drift, second, _float32(film), plane, eps, normalise, keep
    )


def _unsupported_backward(grad: Tensor, point: Tensor, *args) -> str | None:
    return unsupported_floats(point)


def _run_backward(grad, point, moments, film, beside, eps, need_film):
    return torch.ops.pydenoise.ode_stage_backward_cpu.default(
        grad.to(point.dtype), point, moments, _float32(film), beside, need_film
    )


ROWS = (
    Backend("ode_stage", "cpu", 100, unsupported_floats, _run, _MEASURED),
    Backend("ode_stage_backward", "cpu", 100, _unsupported_backward, _run_backward, _MEASURED),
)
