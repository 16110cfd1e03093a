"""Triton row of block importances."""

from pydenoise.ops._rows._triton_attention import MEASURED, unsupported
from pydenoise.ops.registry import Backend


def _unsupported(query, *args) -> str | None:
    return unsupported(query)


def _run(*args):
    from pydenoise.kernels import block_importance

    return block_importance.forward(*args)


ROWS = (Backend("block_importance", "triton", 110, _unsupported, _run, MEASURED),)
