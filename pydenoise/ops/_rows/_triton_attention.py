"""What the Triton rows of sparse attention ask of their tensors."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_COLUMNS = 256
MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda, a guess"


def unsupported(query: Tensor) -> str | None:
    reason = _triton.unsupported(query, DTYPES)
    if reason is None and query.shape[3] > MOST_COLUMNS:
        reason = f"heads of {query.shape[3]} values are longer than {MOST_COLUMNS}"
    return reason
