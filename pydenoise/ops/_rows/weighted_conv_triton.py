"""Triton rows of weighted convolution. Triton is imported when a call could run on it, not before."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from pydenoise.ops.registry import Backend

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)
_MEASURED = "not yet measured on a GPU; placed above cpu (other device) and below cuda (which takes a few shapes only)"


@cache
def _kernels():
    from pydenoise.kernels import weighted_conv

    return weighted_conv


@cache
def _not_installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install pydenoise[triton])"
    return None


@cache
def _unsupported_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        return f"compute capability {capability[0]}.{capability[1]} is below {least}"
    return None


def _unsupported_on_cpu(dtype: torch.dtype) -> str | None:
    """CPU tensors run in Triton's interpreter only, which is chosen when the kernels are imported."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return "tensors are on cpu, not on cuda (and TRITON_INTERPRET=1 is not set)"
    reason = _not_installed()
    if reason is None and not _kernels().interpreting():
        reason = "TRITON_INTERPRET=1 was set after the kernels had been imported"
    if reason is None and dtype == torch.bfloat16:
        reason = "Triton's interpreter computes bfloat16 wrongly"
    return reason


def _unsupported_tensor(tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout} is not torch.strided"
    if tensor.dtype not in _DTYPES:
        return f"dtype {tensor.dtype} is not float32, float16 or bfloat16"
    if tensor.device.type == "cpu":
        return _unsupported_on_cpu(tensor.dtype)
    if tensor.device.type != "cuda":
        return f"tensors are on {tensor.device.type}, not on cuda"
    return _not_installed() or _unsupported_gpu(tensor.device.index)


def _unsupported(input: Tensor, *args) -> str | None:
    return _unsupported_tensor(input)


def _run(input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm) -> Tensor:
    return _kernels().forward(input, weight, density, bias, residual, stride, padding, dilation, groups, activation)


def _run_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask):
    return _kernels().backward(grad, input, weight, density, stride, padding, dilation, groups, mask)


ROWS = (
    Backend("weighted_conv", "triton", 110, _unsupported, _run, _MEASURED),
    Backend("weighted_conv_backward", "triton", 110, _unsupported, _run_backward, _MEASURED),
)
