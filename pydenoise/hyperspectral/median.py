"""The adaptive median filter: replaces outliers, and keeps what may be detail.

Source: Hwang and Haddad, "Adaptive Median Filters: New Algorithms and Results", IEEE TIP 1995.
"""

import torch
from torch import Tensor

VALUES_AT_ONCE = 1 << 24


def adaptive_median(images: Tensor, largest: int = 21) -> Tensor:
    """Filter images [K, H, W]; windows grow from 3 x 3 to ``largest`` while their median is an extreme of the window.

    A pixel that is not an extreme of its window stays as it is.
    """
    height, width = images.shape[-2:]
    out = images.clone().flatten()
    pending = torch.arange(images.numel(), device=images.device)
    for side in range(3, largest + 1, 2):
        undecided = [
            _decide(images, out, part, side, height, width) for part in pending.split(VALUES_AT_ONCE // side**2)
        ]
        pending = torch.cat(undecided) if undecided else pending
        if not len(pending):
            break
    return out.view_as(images)


def _decide(images: Tensor, out: Tensor, index: Tensor, side: int, height: int, width: int) -> Tensor:
    """Write the pixels ``index`` of ``out`` that a window of ``side`` decides; returns the others.

    Those others hold the window's median so far.
    """
    radius = side // 2
    offset = torch.arange(-radius, radius + 1, device=index.device)
    plane, place = index // (height * width), index % (height * width)
    rows = _reflect((place // width)[:, None] + offset, height)
    columns = _reflect((place % width)[:, None] + offset, width)
    windows = images[plane[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
    ordered = windows.sort(1).values
    low, middle, high = ordered[:, 0], ordered[:, ordered.shape[1] // 2], ordered[:, -1]
    value = images.flatten()[index]
    certain = (low < middle) & (middle < high)
    plain = certain & (low < value) & (value < high)
    out[index] = torch.where(plain, value, middle)
    return index[~certain]


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)
