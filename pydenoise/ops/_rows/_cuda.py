"""What the CUDA C++ rows ask of a tensor and its machine, and the memory order that their kernels take."""

from functools import cache

import torch
from torch import Tensor

from pydenoise import _native

MIN_CAPABILITY = (8, 0)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIZE = 2**30  # of any axis, and of the pixels of an image


@cache
def _unsupported_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "torch is built for ROCm, not for CUDA"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def unsupported(tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> str | None:
    """Why a kernel for ``allowed`` dtypes cannot run on ``tensor``."""
    reason = _native.cuda_extension().reason
    if reason is not None:
        return reason
    if not tensor.is_cuda:
        return f"tensors are on {tensor.device.type}, not on a CUDA device"
    if tensor.dtype not in allowed:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        return f"dtype {tensor.dtype} is not {', '.join(names) + ' or ' if names else ''}{last}"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout} is not strided"
    return _unsupported_gpu(tensor.device.index)


def too_many(count: int, what: str) -> str | None:
    """A kernel numbers ``what`` with 32 bits."""
    return f"{count} {what} are more than 2^30" if count >= MAX_SIZE else None


def channels_inside(image: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H, W, C]: a view."""
    return image.permute(0, 2, 3, 1)


def as_image(tensor: Tensor) -> Tensor:
    """[N, H, W, C] as [N, C, H, W]: a view."""
    return tensor.permute(0, 3, 1, 2)


def codes_for_copies(codes: Tensor, per_group: int) -> Tensor:
    """int8 [..., C] with adjacent channels: itself, or a copy.

    Also a copy where a group's channels are a multiple of the 16 bytes that the tensor-core kernels move at a time, but
    lie at other addresses (a slice of channels, say): their rate is worth more.
    """
    if codes.stride(-1) == 1 or codes.shape[-1] == 1:
        apart = any(n > 1 and s % 16 for n, s in zip(codes.shape[:-1], codes.stride(), strict=False))
        if per_group % 16 or not (apart or codes.data_ptr() % 16):
            return codes
    return codes.clone(memory_format=torch.contiguous_format)


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` itself if it is row-major, else a copy that is."""
    return None if tensor is None else tensor.contiguous()
