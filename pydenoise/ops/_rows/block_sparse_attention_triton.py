"""Triton row of block-sparse attention."""

from pydenoise.ops._rows._triton_attention import MEASURED, unsupported
from pydenoise.ops.registry import Backend


def _unsupported(query, *args) -> str | None:
    return unsupported(query)


def _run(*args):
    from pydenoise.kernels import block_sparse_attention

    return block_sparse_attention.forward(*args)


ROWS = (Backend("block_sparse_attention", "triton", 110, _unsupported, _run, MEASURED),)
