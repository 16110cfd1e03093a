"""Triton row of ``token_confidence``."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton
from pydenoise.ops.registry import Backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def _unsupported(logits: Tensor, *args) -> str | None:
    if logits.shape[1] >= 2**30:
        return f"{logits.shape[1]} tokens are more than 2^30"
    return _triton.unsupported(logits, _FLOATS)


def _run(*args) -> tuple[Tensor, Tensor, Tensor]:
    from pydenoise.kernels import token_confidence

    return token_confidence.token_confidence(*args)


ROWS = (Backend("token_confidence", "triton", 110, _unsupported, _run, _MEASURED),)
