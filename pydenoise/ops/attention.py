"""Dense attention on what linear projections give: argument checks, the torch op, and the backend rows."""

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._attention import scale_of
from pydenoise.ops._quantized import call, check_floats, never
from pydenoise.ops.registry import Backend
from pydenoise.reference import attention as reference

OP = "attention"

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, SymInt num_heads, float scale, Tensor? mask, str backend) "
    "-> Tensor"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``softmax(scale * query @ key^T + mask) @ value`` for each head: dense and not causal, for inference.

    What :func:`torch.nn.functional.scaled_dot_product_attention` computes, on the layout of linear projections: the
    heads of a token lie next to each other, so nothing is transposed or copied. The parts of one fused projection
    (``qkv.chunk(3, dim=-1)``) are read in place.

    Args:
        query: [N, T, H * D], float32, bfloat16 or float16.
        key, value: [N, S, H * D] of its dtype and device, S >= 1. Rows of any stride; a last dim that is not contiguous
            is copied.
        num_heads: H; divides the last dim.
        scale: of the scores; ``None``: 1 / sqrt(D).
        mask: broadcasts to [N, H, T, S]: boolean (True keeps a key), or floating-point, added to the scores.
        backend: "auto" or one of "cpu", "reference".

    Returns:
        [N, T, H * D] in ``query``'s dtype, row-major; 0 where a query's keys are all masked, as in torch. No gradients.
        bfloat16 is multiplied as such where the processor can, and added up in float32.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Dao et al., FlashAttention (2022), https://arxiv.org/abs/2205.14135, for the softmax over blocks of keys.
    """
    args = prepare(query, key, value, num_heads, scale=scale, mask=mask)
    return call(OP, torch.ops.pydenoise.attention, args, backend)


def prepare(query, key, value, num_heads, *, scale=None, mask=None) -> tuple:
    """Check everything and return the positional arguments of the rows."""
    check_floats("query", query)
    if query.dim() != 3:
        raise ValueError(f"query: expected [N, T, H * D], got shape {tuple(query.shape)}")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    n, _, width = query.shape
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a positive divisor of query's last dim {width}, got {num_heads}")
    for name, tensor in (("key", key), ("value", value)):
        _check_like_query(name, tensor, query)
        if tensor.dim() != 3 or tensor.shape[0] != n or tensor.shape[2] != width or tensor.shape[1] < 1:
            raise ValueError(f"{name}: expected [{n}, S, {width}] with S >= 1, got shape {tuple(tensor.shape)}")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: expected as many tokens as key, {key.shape[1]}, got {value.shape[1]}")
    mask = _mask_of(mask, query, (n, num_heads, query.shape[1], key.shape[1]))
    return query.detach(), key.detach(), value.detach(), num_heads, scale_of(scale, width // num_heads), mask


def _check_like_query(name: str, tensor: object, query: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name}: expected dtype {query.dtype} (that of query), got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected device {query.device} (that of query), got {tensor.device}")


def _mask_of(mask: Tensor | None, query: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """``mask`` with 4 dims and all columns, boolean or float32 (float64 for a float64 query)."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask: expected a boolean or floating-point tensor, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"mask: expected device {query.device} (that of query), got {mask.device}")
    sizes = (*(1,) * (4 - mask.dim()), *mask.shape)
    if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(f"mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}")
    mask = mask.detach()[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        mask = mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    return mask.expand(-1, -1, -1, shape[3])


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::attention", lib=_library)
def _fake(query, key, value, num_heads, scale, mask, backend):
    return query.new_empty(query.shape)


def _reference(*args):
    return reference.attention(*args).contiguous()


registry.register(Backend(OP, "reference", 0, never, _reference, "the fallback: always last"))

from pydenoise.ops._rows import attention_cpu  # noqa: E402

for _row in attention_cpu.ROWS:
    registry.register(_row)
