"""Attention mass of blocks of keys: argument checks, the torch op, and the backend rows."""

import torch
from torch import Tensor

from pydenoise.block_mask import blocks_of, check_block_size
from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._attention import adjacent, check_key, check_query, key_lengths_of, scale_of
from pydenoise.ops._quantized import call, never
from pydenoise.ops.registry import Backend
from pydenoise.reference import block_importance as reference

OP = "block_importance"

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "block_importance(Tensor query, Tensor key, SymInt block_size, SymInt first_generated, float scale, Tensor? lse, "
    "Tensor? key_lengths, str backend) -> (Tensor, Tensor)"
)


def block_importance(
    query: Tensor,
    key: Tensor,
    block_size: int,
    *,
    new_tokens: int = 0,
    scale: float | None = None,
    lse: Tensor | None = None,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """How much attention each block of keys gets from each block of queries: over all keys, and over generated ones.

    Each value is the sum of ``softmax(scale * query @ key^T)`` over a block of queries and a block of keys, divided by
    ``block_size`` squared (also where a last block is short). Scores are streamed: memory grows with Lq + Lk, plus the
    results.

    Args:
        query: [B, H, Lq, D], float32, bfloat16 or float16. Any strides; a last dim that is not contiguous is copied.
        key: [B, Hkv, Lk, D] of its dtype and device; Hkv divides H.
        block_size: 16, 32, 64 or 128 tokens, of queries and of keys.
        new_tokens: how many of the last keys are being generated. The generated part begins with the first block that
            lies wholly inside them, and has at least the last block: block g = min(ceil((Lk - new_tokens) /
            block_size), nk - 1).
        scale: of the scores; ``None``: 1 / sqrt(D).
        lse: float32 [B, H, Lq], the log-sum-exp of each query's scores (``block_sparse_attention(...,
            return_lse=True)`` with the same scale and lengths gives it), which spares a pass over the keys.
        key_lengths: [B] integers from 0 to Lk: keys at or beyond a batch's length do not count.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference".

    Returns:
        (over_all [B, H, nq, nk], over_generated [B, H, nq, nk - g]), float32; nq and nk are Lq and Lk in blocks. The
        second is from a softmax over the generated part alone. No gradients.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: SparseD (2025), https://arxiv.org/abs/2509.24014, section 3, and its public code for pooling.
    """
    args = prepare(query, key, block_size, new_tokens=new_tokens, scale=scale, lse=lse, key_lengths=key_lengths)
    return call(OP, torch.ops.pydenoise.block_importance, args, backend)


def first_generated_block(keys: int, new_tokens: int, block_size: int) -> int:
    """The first block of ``keys`` tokens wholly inside the last ``new_tokens``, at most the last block."""
    return min(blocks_of(keys - new_tokens, block_size), blocks_of(keys, block_size) - 1)


def prepare(query, key, block_size, *, new_tokens=0, scale=None, lse=None, key_lengths=None) -> tuple:
    """Check everything and return the positional arguments of the rows."""
    check_query(query)
    check_key("key", key, query)
    check_block_size(block_size)
    keys = key.shape[2]
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool):
        raise TypeError(f"new_tokens: expected an int, got {type(new_tokens).__name__}")
    if not 0 <= new_tokens <= keys:
        raise ValueError(f"new_tokens: expected 0 to {keys} (the keys there are), got {new_tokens}")
    if lse is not None:
        lse = _lse_of(lse, query)
    return (
        adjacent(query.detach()), adjacent(key.detach()), block_size,
        first_generated_block(keys, new_tokens, block_size), scale_of(scale, query.shape[3]), lse,
        key_lengths_of(key_lengths, query, keys),
    )  # fmt: skip


def _lse_of(lse: object, query: Tensor) -> Tensor:
    check_tensor("lse", lse)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if lse.dtype != wide:
        raise TypeError(f"lse: expected dtype {wide}, got {lse.dtype}")
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse: expected {tuple(query.shape[:3])}, one for each query, got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse: expected device {query.device} (that of query), got {lse.device}")
    return lse.detach().contiguous()


@torch.library.impl(_library, "block_importance", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::block_importance", lib=_library)
def _fake(query, key, block_size, first_generated, scale, lse, key_lengths, backend):
    rows, columns = (-(-n // block_size) for n in (query.shape[2], key.shape[2]))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    over_all = query.new_empty((*query.shape[:2], rows, columns), dtype=wide)
    return over_all, over_all.new_empty((*query.shape[:2], rows, columns - first_generated))


registry.register(Backend(OP, "reference", 0, never, reference.block_importance, "the fallback: always last"))

from pydenoise.ops._rows import block_importance_cpu, block_importance_cuda, block_importance_triton  # noqa: E402

_ROWS = (block_importance_cpu, block_importance_cuda, block_importance_triton)

for _module in _ROWS:
    for _row in _module.ROWS:
        registry.register(_row)
