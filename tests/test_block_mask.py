"""BlockMask: conversions both ways, checks on construction, slicing, pictures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pydenoise as pdn
from pydenoise.block_mask import BlockMask, blocks_of


@st.composite
def masks(draw):
    """(a mask, its dense form)."""
    block = draw(st.sampled_from([16, 32, 64, 128]))
    queries, keys = draw(st.integers(0, 300)), draw(st.integers(1, 300))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), blocks_of(queries, block), blocks_of(keys, block))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return BlockMask.from_dense(dense, block, queries, keys), dense


@settings(max_examples=60, deadline=None)
@given(masks())
def test_conversions_and_counts(given_mask):
    mask, dense = given_mask
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.kv_counts, dense.sum(-1, dtype=torch.int32))
    assert mask.density == pytest.approx(dense.float().mean().item() if dense.numel() else 0.0)
    assert mask == BlockMask(mask.kv_counts, mask.kv_indices, mask.block_size, mask.query_length, mask.key_length)
    counts, indices = mask.transposed()
    back = BlockMask(counts, indices, mask.block_size, mask.key_length, max(mask.query_length, 1))
    if mask.query_length:
        assert torch.equal(back.to_dense(), dense.mT)
    tokens = mask.to_token_mask()
    assert tokens.shape == (*dense.shape[:2], mask.query_length, mask.key_length)
    block = mask.block_size
    for i in range(0, mask.query_length, 37):
        row = dense[:, :, i // block].repeat_interleave(block, -1)
        assert torch.equal(tokens[:, :, i], row[..., : mask.key_length])
    assert repr(mask) in str(mask)


@settings(max_examples=15, deadline=None)
@given(masks().filter(lambda pair: pair[0].query_length > 0))
def test_flex_both_ways(given_mask):
    mask, _ = given_mask
    assert BlockMask.from_flex(mask.to_flex()) == mask


def test_flex_attention_reads_it_the_same_way():
    """FlexAttention's eager path, which reads the mask_mod, against the masked formula."""
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 100, 16, generator=generator) for _ in range(3))
    kept = torch.rand(2, 3, 4, 4, generator=generator) < 0.6
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, 32, 100, 100)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.to_token_mask())
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=mask.to_flex()), expected)


def test_from_flex_of_a_part_of_a_block():
    from torch.nn.attention.flex_attention import create_block_mask

    window = create_block_mask(lambda b, h, q, k: (q - k).abs() < 40, None, None, 256, 256, "cpu", 64)
    with pytest.raises(ValueError, match=r"mask: \d+ blocks are partial"):
        BlockMask.from_flex(window)
    kept = BlockMask.from_flex(window, partial="keep").to_dense()[0, 0]
    assert torch.equal(kept, (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1)
    with pytest.raises(ValueError, match="partial: expected 'raise' or 'keep'"):
        BlockMask.from_flex(window, partial="drop")
    tall = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 256, 256, "cpu", (128, 64))
    with pytest.raises(ValueError, match="square blocks, got 128 x 64"):
        BlockMask.from_flex(tall)


def test_full():
    mask = pdn.BlockMask.full(64, 100, 200)
    assert mask.shape == (1, 1, 2, 4) and mask.density == 1 and mask.to_token_mask().all()
    assert pdn.BlockMask.full(16, 5, 5, batch=2, heads=3).shape == (2, 3, 1, 1)


def test_int16_at_rest():
    mask = BlockMask.full(16, 16, 100)
    assert mask.kv_indices.dtype == torch.int16
    assert BlockMask(mask.kv_counts, mask.kv_indices.int(), 16, 16, 100).kv_indices.dtype == torch.int16
    long = 16 * 40000
    mask = BlockMask(
        torch.ones(1, 1, 1, dtype=torch.int32), torch.tensor([[[[39999]]]], dtype=torch.int32), 16, 1, long
    )
    assert mask.kv_indices.dtype == torch.int32 and mask.to_dense()[0, 0, 0, 39999] and mask.density == 1 / 40000


def test_slices():
    dense = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_dense(dense, 16, 20, 30)
    assert torch.equal(mask[1].to_dense(), dense[1:2])
    assert torch.equal(mask[-1, 1:3].to_dense(), dense[-1:, 1:3])
    assert torch.equal(mask[:, [0, 3]].to_dense(), dense[:, [0, 3]])
    assert mask[1] != mask[2] or torch.equal(dense[1], dense[2])
    with pytest.raises(IndexError, match="index 4 is out of range for 4 heads"):
        mask[0, 4]
    with pytest.raises(IndexError, match="sliced by batch and head"):
        mask[0, 0, 0]


def test_to():
    mask = BlockMask.full(16, 20, 30)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.shape == mask.shape
    assert (mask == 3) is False


def lists(counts, indices, dtype=torch.int32):
    return torch.tensor([[counts]], dtype=torch.int32), torch.tensor([[indices]], dtype=dtype)


@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        ([2, 1], [[1, 0], [0, 0]], r"kv_indices: expected ascending .* got 1 before 0 in batch 0, head 0, row 0"),
        ([2, 2], [[0, 1], [1, 1]], r"got 1 before 1 in batch 0, head 0, row 1"),
        ([1, 1], [[0], [3]], r"kv_indices: expected block numbers from 0 to 2, got 3"),
        ([1, 1], [[0], [-1]], r"kv_indices: expected block numbers from 0 to 2, got -1"),
        ([1, 2], [[0], [1]], r"kv_counts: expected 0 to 1 blocks, got 2"),
        ([1, -1], [[0], [1]], r"kv_counts: expected 0 to 1 blocks, got -1"),
        ([1], [[0]], r"kv_counts: expected \[B, H, 2\] \(20 queries in blocks of 16\), got shape \(1, 1, 1\)"),
        ([1, 1], [[0]], r"kv_indices: expected \[1, 1, 2, k\], got shape \(1, 1, 1, 1\)"),
    ],
)
def test_wrong_lists(counts, indices, message):
    with pytest.raises(ValueError, match=message):
        BlockMask(*lists(counts, indices), 16, 20, 40)


def test_unused_places_hold_anything():
    mask = BlockMask(*lists([1, 0], [[2, -5], [99, 99]]), 16, 20, 40)
    assert mask.to_dense().sum() == 1 and mask.to_dense()[0, 0, 0, 2]


def test_wrong_arguments():
    counts, indices = lists([1, 1], [[0], [1]])
    with pytest.raises(ValueError, match="block_size: expected one of 16, 32, 64, 128, got 48"):
        BlockMask(counts, indices, 48, 20, 40)
    with pytest.raises(TypeError, match="block_size: expected an int, got float"):
        BlockMask(counts, indices, 16.0, 20, 40)
    with pytest.raises(ValueError, match="key_length: expected a positive number of tokens, got 0"):
        BlockMask(counts, indices, 16, 20, 0)
    with pytest.raises(TypeError, match="query_length: expected an int, got Tensor"):
        BlockMask(counts, indices, 16, torch.tensor(20), 40)
    with pytest.raises(TypeError, match="kv_counts: expected dtype torch.int32, got torch.int64"):
        BlockMask(counts.long(), indices, 16, 20, 40)
    with pytest.raises(TypeError, match="kv_indices: expected dtype torch.int16 or torch.int32, got torch.int64"):
        BlockMask(counts, indices.long(), 16, 20, 40)
    with pytest.raises(TypeError, match="kv_indices: expected a tensor, got list"):
        BlockMask(counts, [[0]], 16, 20, 40)
    with pytest.raises(TypeError, match="blocks: expected a boolean tensor, got torch.float32"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 3), 16, 20, 40)
    with pytest.raises(ValueError, match=r"blocks: expected \[B, H, 2, 3\], got shape \(1, 1, 3, 2\)"):
        BlockMask.from_dense(torch.ones(1, 1, 3, 2, dtype=torch.bool), 16, 20, 40)


def test_picture(tmp_path):
    dense = torch.rand(1, 5, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_dense(dense, 16, 96, 96)
    figure = mask.plot(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000
    assert sum(bool(axis.images) for axis in figure.axes) == 5
    assert len(mask.plot(heads=[1, 3]).axes) == 2


def test_text_of_a_large_mask_stays_small():
    text = str(BlockMask.full(16, 16 * 500, 16 * 700))
    assert len(text.splitlines()) == 25 and "@" * 64 in text
