"""Triton row of the gradients of block-sparse attention."""

from pydenoise.ops._rows._triton_attention import MEASURED, unsupported
from pydenoise.ops.registry import Backend


def _unsupported(grad, query, *args) -> str | None:
    return unsupported(query)


def _run(*args):
    from pydenoise.kernels import block_sparse_attention

    return block_sparse_attention.backward(*args)


ROWS = (Backend("block_sparse_attention_backward", "triton", 110, _unsupported, _run, MEASURED),)
