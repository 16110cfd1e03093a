"""What the CPU rows ask of a tensor and of the compiled library."""

from functools import cache

import torch
from torch import Tensor

from pydenoise import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def unavailable() -> str | None:
    """Why the compiled library cannot be used, or ``None``."""
    library = _native.extension()
    return library.module.isa_environment_error() if library.loaded else library.reason


def unsupported(tensor: Tensor, allowed: tuple[torch.dtype, ...] | None = None) -> str | None:
    """Why kernels for ``allowed`` dtypes (``None``: any) cannot read ``tensor``."""
    if allowed is not None and tensor.dtype not in allowed:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        return f"dtype {tensor.dtype} is not {', '.join(names) + ' or ' if names else ''}{last}"
    if not tensor.is_cpu:
        return f"tensors are on {tensor.device.type}, not on the cpu"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout} is not strided"
    return unavailable()


def unsupported_floats(tensor: Tensor, *args: object) -> str | None:
    """Why kernels for float32, bfloat16 and float16 cannot read ``tensor``, or ``None``."""
    return unsupported(tensor, FLOATS)
