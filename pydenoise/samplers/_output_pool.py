"""Fresh tensors for a loop that is not ours, without fresh memory for each."""

import weakref

import numpy as np
import torch
from torch import Tensor

SMALLEST = 512 * 1024  # bytes; below, the allocator keeps memory itself
MOST = 4  # buffers that are kept
ALIGNMENT = 64


class OutputPool:
    """Uninitialised tensors like a given one. Large ones on a CPU get memory again that nobody holds any more.

    A new buffer of some megabytes costs a page fault for each of its pages, more than the step that fills it. Whoever
    keeps an output, or a view of it, keeps its memory: it is given again only after the last of them is gone.
    """

    def __init__(self):
        self._kept: list[tuple[np.ndarray, weakref.ref]] = []

    def take(self, like: Tensor) -> Tensor:
        """A contiguous tensor of ``like``'s shape, dtype and device."""
        size = like.numel() * like.element_size()
        if like.device.type != "cpu" or size < SMALLEST:
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        memory = self._unused(size)
        holder = memory[:]  # the tensor's storage holds this view, and nobody else does
        self._kept.append((memory, weakref.ref(holder)))
        return torch.from_numpy(holder).view(like.dtype).view(like.shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous tensor."""
        if tensor.numel() * tensor.element_size() < SMALLEST or tensor.device.type != "cpu":
            return tensor.clone()
        return self.take(tensor).copy_(tensor)

    def _unused(self, size: int) -> np.ndarray:
        for place, (memory, holder) in enumerate(self._kept):
            if holder() is None and memory.nbytes == size:
                return self._kept.pop(place)[0]
        while len(self._kept) >= MOST:
            self._kept.pop(0)
        raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size]
