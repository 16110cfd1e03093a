"""Bias correction: the mean error of a quantized layer, channel by channel, is added to its bias.

Rounding weights shifts the mean of an output channel wherever the inputs have a mean: ``b += E[y_fp - y_q]``. Source:
Nagel et al., "Data-Free Quantization", ICCV 2019, section 4.2.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def bias_correction(pairs: Iterable[tuple[Tensor, Tensor]], dim: int = 1) -> Tensor:
    """``E[y_fp - y_q]`` per output channel, to be added to the bias.

    Args:
        pairs: (full-precision output, quantized output) of the same input, each of one shape; any number of pairs.
        dim: where the channels are: 1 for images [N, C, H, W], -1 for tokens [..., C].

    Returns:
        float32 [C].

    Raises:
        ValueError: no pairs, empty ones, or two outputs of different shapes.
    """
    total, count = None, 0
    for expected, actual in pairs:
        if expected.shape != actual.shape:
            raise ValueError(f"pairs: two outputs of shapes {list(expected.shape)} and {list(actual.shape)}")
        error = (expected.double() - actual.double()).movedim(dim, -1)
        error = error.reshape(-1, error.shape[-1])
        total = error.sum(0) if total is None else total + error.sum(0)
        count += error.shape[0]
    if total is None or count == 0:
        raise ValueError("pairs: expected at least one output")
    return (total / count).to(torch.float32)
