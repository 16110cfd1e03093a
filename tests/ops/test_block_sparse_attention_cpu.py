"""What the contract test of block-sparse attention does not know of its CPU row: memory layouts, order of work."""

import pytest
import torch

from pydenoise.block_mask import BlockMask
from pydenoise.ops import block_sparse_attention as op
from pydenoise.ops import registry

B, H, L, D = 2, 3, 70, 24
ROW = next(row for row in registry.rows(op.OP) if row.name == "cpu")
MASK = BlockMask.from_dense(torch.rand(B, H, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.7, 32, L, L)

LAYOUTS = {
    "heads first": lambda draw: draw(B, H, L, D),
    "projected": lambda draw: draw(B, L, H, D).transpose(1, 2),
    "fused": lambda draw: draw(B, L, 3, H, D)[:, :, 1].transpose(1, 2),
    "heads outermost": lambda draw: draw(H, B, L, D).transpose(0, 1),
    "every second token": lambda draw: draw(B, H, 2 * L, D)[:, :, ::2],
    "expanded": lambda draw: draw(1, H, L, D).expand(B, H, L, D),
    "one head of more": lambda draw: draw(B, L, 5, H, D)[:, :, 2, :].permute(0, 2, 1, 3),
}


@pytest.fixture(autouse=True)
def needs_the_library():
    query = torch.zeros(1)
    if (reason := ROW.unsupported(query)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(name, dtype):
    """Read in place, with the same bits as dense tensors give; the result lies as torch.empty_like lays it."""
    generator = torch.Generator().manual_seed(0)
    tensors = [LAYOUTS[name](lambda *shape: torch.randn(*shape, generator=generator).to(dtype)) for _ in range(3)]
    args = op.prepare(*tensors, MASK)
    output, lse = ROW.run(*args)
    dense_output, dense_lse = ROW.run(*op.prepare(*(t.contiguous() for t in tensors), MASK))
    assert output.stride() == torch.empty_like(tensors[0]).stride()
    assert torch.equal(output, dense_output) and torch.equal(lse, dense_lse)


@pytest.mark.parametrize("int8", [False, True])
def test_lists_of_very_different_lengths(int8):
    """Blocks are computed in the order of their work; each result lands where it belongs."""
    keep = torch.arange(3)[None, None] < torch.tensor([[0, 3, 1], [2, 0, 3], [1, 2, 0]])[:, :, None]
    mask = BlockMask.from_dense(keep[None].expand(B, -1, -1, -1).contiguous(), 32, L, L)
    tensors = [torch.randn(B, H, L, D, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    args = op.prepare(*tensors, mask, qk_dtype="int8" if int8 else None)
    output, lse = ROW.run(*args)
    for head in range(H):
        one = [t[:, head : head + 1] for t in tensors]
        alone = ROW.run(*op.prepare(*one, mask[:, head : head + 1], qk_dtype="int8" if int8 else None))
        assert torch.equal(output[:, head : head + 1], alone[0]) and torch.equal(lse[:, head : head + 1], alone[1])
