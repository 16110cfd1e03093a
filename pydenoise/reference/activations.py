"""The activations that the ops fuse: their names, their numbers in the compiled kernels, and what they compute."""

import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPES = {"leaky_relu_0.01": 0.01, "leaky_relu_0.1": 0.1, "leaky_relu_0.2": 0.2}  # below zero; 0.01: torch's own
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh", *LEAKY_SLOPES)
CONV_ACTIVATIONS = (*ACTIVATIONS, "softplus")  # of float convolutions
# On the way into quantization there is one more: the first half of the channels times GELU of the second half.
INPUT_ACTIVATIONS = (*ACTIVATIONS, "geglu")
# Those f with f(s x) = s f(x) for s > 0: a positive factor per channel passes through them.
HOMOGENEOUS = ("none", "relu", *LEAKY_SLOPES)
NUMBERS = {name: number for number, name in enumerate((*INPUT_ACTIVATIONS, "softplus"))}  # as in csrc/core/activation.h

_FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the elementwise ``activation``, one of ``CONV_ACTIVATIONS``, to ``x``."""
    slope = LEAKY_SLOPES.get(activation)
    return _FUNCTIONS[activation](x) if slope is None else F.leaky_relu(x, slope)


def leaky_relu_name(slope: object) -> str | None:
    """The name of the leaky ReLU of this slope, or ``None`` if the ops do not have it."""
    return next((name for name, known in LEAKY_SLOPES.items() if slope == known), None)
