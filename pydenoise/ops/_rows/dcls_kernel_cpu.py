"""CPU rows of the construction of DCLS kernels: the C++ kernels of ``pydenoise._C``, in float32."""

import torch
from torch import Tensor

from pydenoise.ops._rows import _cpu
from pydenoise.ops.registry import Backend

_MEASURED = "bench/notes-blocks-dcls.md, the only compiled CPU backend"


def _unsupported(first: Tensor, *args) -> str | None:
    return _cpu.unsupported_floats(first)


def _single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _run(weight, P, SIG, size, axes, centres, gauss, normalized, spread):
    kernel = torch.ops.pydenoise.dcls_kernel_cpu.default(
        _single(weight), _single(P), _single(SIG), size, axes, centres, gauss, normalized, spread
    )
    return kernel.to(weight.dtype)


def _run_backward(grad, weight, P, SIG, size, axes, centres, gauss, normalized, spread):
    tensors = (_single(tensor) for tensor in (grad, weight, P, SIG))
    grads = torch.ops.pydenoise.dcls_kernel_cpu_backward.default(
        *tensors, size, axes, centres, gauss, normalized, spread
    )
    dweight, dP, dSIG = (g.to(weight.dtype) for g in grads)
    return dweight, dP, None if SIG is None else dSIG


ROWS = (
    Backend("dcls_kernel", "cpu", 100, _unsupported, _run, _MEASURED),
    Backend("dcls_kernel_backward", "cpu", 100, _unsupported, _run_backward, _MEASURED),
)
