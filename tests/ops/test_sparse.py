"""Sparse attention: golden data, selection, and bad arguments of the three functionals."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.ops.block_importance import first_generated_block

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "sparse_attention.npz")
NAMES = [str(name) for name in GOLDEN["names"]]


def golden(name: str, dtype=torch.float32):
    """(query, key, value, block size, new tokens, first generated block) of a golden case."""
    meta = GOLDEN["meta_B_Hq_Hk_L_D_bs_new_g"][NAMES.index(name)]
    tensors = (torch.from_numpy(GOLDEN[f"{name}_{part}"]).to(dtype) for part in "qkv")
    return *tensors, *(int(meta[i]) for i in (5, 6, 7))


@pytest.mark.parametrize("name", NAMES)
def test_golden_importance(name):
    query, key, _, block, new, first = golden(name)
    over_all, over_generated = PF.block_importance(query, key, block, new_tokens=new)
    assert first_generated_block(key.shape[2], new, block) == first
    for actual, part in ((over_all, "all"), (over_generated, "gen")):
        expected = torch.from_numpy(GOLDEN[f"{name}_imp_{part}"]).float()
        torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_patterns(name, backend):
    """The same blocks, exactly: none of these cases has two importances that nearly tie."""
    query, key, _, block, new, _ = golden(name)
    for select in GOLDEN["select"]:
        for mode in ("reference", "per_side"):
            mask = PF.sparsed_block_mask(
                query, key, select=float(select), block_size=block, new_tokens=new, mode=mode, backend=backend
            )
            assert torch.equal(mask.to_dense(), torch.from_numpy(GOLDEN[f"{name}_{mode}_{round(select * 100)}_mask"]))
    mask = PF.sparsed_block_mask(
        query, key, select=0.3, block_size=block, new_tokens=new, scale=query.shape[1] ** -0.5, backend=backend
    )
    assert torch.equal(mask.to_dense(), torch.from_numpy(GOLDEN[f"{name}_llada_30_mask"]))


@pytest.mark.parametrize("name", NAMES)
def test_golden_patterns_in_bfloat16(name):
    """Only blocks whose importance is within 3 % of the last one taken may differ."""
    query, key, _, block, new, first = golden(name, torch.bfloat16)
    mask = PF.sparsed_block_mask(query, key, select=0.3, block_size=block, new_tokens=new).to_dense()
    expected = torch.from_numpy(GOLDEN[f"{name}_reference_30_mask"])
    importance = torch.cat(
        [torch.from_numpy(GOLDEN[f"{name}_imp_all"])[..., :first], torch.from_numpy(GOLDEN[f"{name}_imp_gen"])], -1
    )
    for at in (mask != expected).nonzero():
        batch, head, row, column = at.tolist()
        side = slice(0, first) if column < first else slice(first, None)
        values = importance[batch, head, row, side]
        last = values[expected[batch, head, row, side]].min()
        assert abs(importance[batch, head, row, column] / last - 1) < 0.03


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("select", [30, 50])
def test_golden_attention(name, select):
    query, key, value, block, _, _ = golden(name)
    blocks = torch.from_numpy(GOLDEN[f"{name}_reference_{select}_mask"])
    mask = pdn.BlockMask.from_dense(blocks, block, query.shape[2], key.shape[2])
    output, lse = PF.block_sparse_attention(query, key, value, mask, return_lse=True)
    expected = torch.from_numpy(GOLDEN[f"{name}_reference_{select}_out"])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=4e-6)
    if select == 30:
        torch.testing.assert_close(
            lse.double(), torch.from_numpy(GOLDEN[f"{name}_reference_30_lse"]), rtol=0, atol=4e-6
        )


def test_selecting_all_is_dense():
    query, key, value, block, new, _ = golden("b")
    mask = PF.sparsed_block_mask(query, key, select=1.0, block_size=block, new_tokens=new)
    assert mask.density == 1
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(PF.block_sparse_attention(query, key, value, mask), expected)


def test_ties_go_to_the_lower_block():
    query, key = torch.ones(1, 1, 64, 16), torch.ones(1, 1, 160, 16)
    mask = PF.sparsed_block_mask(query, key, select=0.3, block_size=16, new_tokens=64)
    # 10 blocks, the last 4 generated: 4 of all from the left, and 2 of the generated from the left
    assert mask.to_dense()[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]


def test_blocks_beyond_a_length_are_not_kept():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 128, 16, generator=generator) for _ in range(2))
    lengths = torch.tensor([40, 128])
    mask = PF.sparsed_block_mask(query, key, select=1.0, block_size=32, new_tokens=64, key_lengths=lengths)
    kept = mask.to_dense().any(2).any(1)
    assert kept.tolist() == [[True, True, False, False], [True] * 4]


def test_log_sum_exp_spares_a_pass_and_changes_nothing():
    query, key, value, block, new, _ = golden("b")
    full = pdn.BlockMask.full(block, query.shape[2], key.shape[2])
    _, lse = PF.block_sparse_attention(query, key, value, full, return_lse=True)
    options = {"select": 0.3, "block_size": block, "new_tokens": new}
    assert PF.sparsed_block_mask(query, key, lse=lse, **options) == PF.sparsed_block_mask(query, key, **options)


@pytest.mark.parametrize("select", [0, -0.1, 1.01, float("nan")])
def test_select_outside(select):
    with pytest.raises(ValueError, match="select: expected a share above 0 and up to 1"):
        PF.sparsed_block_mask(torch.ones(1, 1, 32, 16), torch.ones(1, 1, 32, 16), select=select)


_RANDOM = torch.Generator().manual_seed(0)
Q, K = torch.randn(2, 4, 40, 16, generator=_RANDOM), torch.randn(2, 2, 50, 16, generator=_RANDOM)
MASK = pdn.BlockMask.full(16, 40, 50)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (TypeError, {"query": [1]}, "query: expected a torch.Tensor, got list"),
        (TypeError, {"query": Q.long()}, "query: expected a floating-point tensor, got torch.int64"),
        (ValueError, {"query": Q[0]}, r"query: expected \[B, H, Lq, D\], got shape \(4, 40, 16\)"),
        (TypeError, {"key": K.half()}, r"key: expected dtype torch.float32 \(that of query\), got torch.float16"),
        (ValueError, {"key": K[:1]}, r"key: expected \[2, Hkv, Lk, 16\] with Lk >= 1, got shape \(1, 2, 50, 16\)"),
        (ValueError, {"key": K[:, :, :0]}, r"key: expected \[2, Hkv, Lk, 16\] with Lk >= 1, got shape"),
        (
            ValueError,
            {"key": torch.randn(2, 3, 50, 16)},
            "key: expected a number of heads that divides query's 4, got 3",
        ),
        (ValueError, {"value": K[:, :, :49]}, r"value: expected the shape of key, \(2, 2, 50, 16\), got"),
        (TypeError, {"block_mask": torch.ones(1)}, "block_mask: expected a pydenoise.BlockMask, got Tensor"),
        (
            ValueError,
            {"block_mask": pdn.BlockMask.full(16, 40, 49)},
            "block_mask: expected one of 40 queries and 50 keys",
        ),
        (
            ValueError,
            {"block_mask": pdn.BlockMask.full(16, 40, 50, heads=2)},
            "block_mask: expected 1 or 2 batches and 1 or 4",
        ),
        (ValueError, {"block_mask": MASK.to("meta")}, "block_mask: expected device cpu"),
        (TypeError, {"scale": "1"}, "scale: expected a number or None, got str"),
        (ValueError, {"scale": float("inf")}, "scale: expected a finite number, got inf"),
        (
            ValueError,
            {"key_lengths": torch.tensor([1, 51])},
            r"key_lengths: expected 0 to 50 \(the keys there are\), got 51",
        ),
        (ValueError, {"key_lengths": torch.tensor([-1, 5])}, "key_lengths: expected 0 to 50 .* got -1"),
        (
            ValueError,
            {"key_lengths": torch.tensor([1])},
            r"key_lengths: expected \[2\], one for each batch, got \(1,\)",
        ),
        (
            TypeError,
            {"key_lengths": torch.tensor([1.0, 2.0])},
            "key_lengths: expected an integer tensor, got torch.float32",
        ),
        (ValueError, {"qk_dtype": "int4"}, "qk_dtype: expected None or 'int8', got 'int4'"),
        (ValueError, {"backend": "gpu"}, "backend: expected 'auto' or one of"),
    ],
)
def test_bad_arguments_of_attention(error, change, message):
    arguments = {"query": Q, "key": K, "value": K, "block_mask": MASK} | change
    with pytest.raises(error, match=message):
        PF.block_sparse_attention(**arguments)


def test_int8_scores_have_no_gradients():
    with pytest.raises(ValueError, match="qk_dtype: 'int8' has no gradients"):
        PF.block_sparse_attention(Q.clone().requires_grad_(), K, K, MASK, qk_dtype="int8")


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"block_size": 8}, "block_size: expected one of 16, 32, 64, 128, got 8"),
        (TypeError, {"block_size": True}, "block_size: expected an int, got bool"),
        (ValueError, {"new_tokens": 51}, r"new_tokens: expected 0 to 50 \(the keys there are\), got 51"),
        (ValueError, {"new_tokens": -1}, "new_tokens: expected 0 to 50 .* got -1"),
        (TypeError, {"new_tokens": 1.0}, "new_tokens: expected an int, got float"),
        (
            TypeError,
            {"lse": torch.zeros(2, 4, 40, dtype=torch.float64)},
            "lse: expected dtype torch.float32, got torch.float64",
        ),
        (
            ValueError,
            {"lse": torch.zeros(2, 4, 41)},
            r"lse: expected \(2, 4, 40\), one for each query, got \(2, 4, 41\)",
        ),
    ],
)
def test_bad_arguments_of_importance(error, change, message):
    arguments = {"query": Q, "key": K, "block_size": 16} | change
    with pytest.raises(error, match=message):
        PF.block_importance(**arguments)


def test_bad_mode():
    with pytest.raises(ValueError, match="mode: expected one of 'reference', 'per_side', got 'both'"):
        PF.sparsed_block_mask(Q, Q, select=0.3, block_size=16, mode="both")


def test_explain(capsys):
    pdn.explain("block_sparse_attention", Q, K, K, MASK)
    pdn.explain("block_importance", Q, K, 16)
    assert "block_importance: auto takes" in capsys.readouterr().out
