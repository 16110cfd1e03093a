"""What the Triton rows ask of a tensor and its machine; Triton is looked for only when a call could run on it."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)


@cache
def not_installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install pydenoise[triton])"
    return None


@cache
def _tiles():
    from pydenoise.kernels import _tiles

    return _tiles


@cache
def _unsupported_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"compute capability {capability[0]}.{capability[1]} is below {least}"
    return None


def _unsupported_on_cpu(dtypes: tuple[torch.dtype, ...]) -> str | None:
    """CPU tensors run in Triton's interpreter only, which is chosen when the kernels are imported."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return "tensors are on cpu, not on cuda (and TRITON_INTERPRET=1 is not set)"
    reason = not_installed()
    if reason is None and not _tiles().interpreting():
        reason = "TRITON_INTERPRET=1 was set after the kernels had been imported"
    if reason is None and torch.bfloat16 in dtypes:
        reason = "Triton's interpreter computes bfloat16 wrongly"
    return reason


def unsupported(tensor: Tensor, allowed: tuple[torch.dtype, ...], *others: torch.dtype) -> str | None:
    """Why kernels for ``allowed`` dtypes cannot run on ``tensor``; ``others`` are further dtypes of the call."""
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout} is not torch.strided"
    if tensor.dtype not in allowed:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        return f"dtype {tensor.dtype} is not {', '.join(names) + ' or ' if names else ''}{last}"
    if tensor.device.type == "cpu":
        return _unsupported_on_cpu((tensor.dtype, *others))
    if tensor.device.type != "cuda":
        return f"tensors are on {tensor.device.type}, not on cuda"
    return not_installed() or _unsupported_gpu(tensor.device.index)
