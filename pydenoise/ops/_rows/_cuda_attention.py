"""What the CUDA C++ rows of the attention ops ask of their tensors, and how they hand them over."""

from torch import Tensor

from pydenoise.ops._rows import _cuda

MAX_SIZE = 256  # of a head; csrc/block_sparse_attention/cuda.h: kMaxSize


def unsupported(query: Tensor, key: Tensor) -> str | None:
    """Why the kernels cannot run on ``query`` [B, H, Lq, D] and ``key``; the op has checked that they agree."""
    reason = _cuda.unsupported(query, _cuda.FLOATS)
    if reason is not None:
        return reason
    size = query.shape[-1]
    if size % 8 or size > MAX_SIZE:
        return f"heads of {size} numbers are not a multiple of 8, at most {MAX_SIZE}"
    return _cuda.too_many(max(query.shape[2], key.shape[2]), "tokens")


def rows_of_16_bytes(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its rows start at multiples of 16 bytes, else a copy."""
    step = 16 // tensor.element_size()
    apart = any(n > 1 and s % step for n, s in zip(tensor.shape[:-1], tensor.stride(), strict=False))
    return tensor.contiguous() if apart or tensor.stride(-1) != 1 else _aligned(tensor)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
