"""CPU rows of adaptive_bilateral_filter: the C++ kernels of ``pydenoise._C``."""

import torch

from pydenoise.ops._rows._cpu import unsupported_floats
from pydenoise.ops.registry import Backend


def _forward(*args):
    return torch.ops.pydenoise.adaptive_bilateral_filter_cpu.default(*args)


def _unsupported_backward(grad, input, *args):
    return unsupported_floats(input)


def _backward(*args):
    *args, mask = args
    grads = torch.ops.pydenoise.adaptive_bilateral_filter_backward_cpu.default(*args, *mask)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


_MEASURED = "bench/notes-blocks-bilateral.md"
ROWS = (
    Backend("adaptive_bilateral_filter", "cpu", 100, unsupported_floats, _forward, _MEASURED),
    Backend("adaptive_bilateral_filter_backward", "cpu", 100, _unsupported_backward, _backward, _MEASURED),
)
