"""Triton rows of ``int8_conv2d``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def _unsupported(input: Tensor, *args) -> str | None:
    residual, out_dtype = args[11], args[13]
    return _triton.unsupported(input, (torch.int8,), out_dtype, *(() if residual is None else (residual.dtype,)))


def _run(*args) -> Tensor:
    from pydenoise.kernels import int8_conv2d

    return int8_conv2d.forward(*args)


ROWS = (Backend("int8_conv2d", "triton", 110, _unsupported, _run, _MEASURED),)
