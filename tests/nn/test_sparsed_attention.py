"""SparseDAttention: its schedule, its patterns, and what it does with batches, padding, guidance and changes."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import pydenoise.functional as PF
from pydenoise.nn import SparseDAttention, SparseDSchedule
from pydenoise.nn.sparsed_schedule import Phase

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")

SKIPS = (0, 0.1, 0.2, 0.29, 0.5, 0.9, 0.99)


def qkv(length=200, batch=2, heads=4, kv_heads=None, size=16, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return (torch.randn(batch, n, length, size, generator=generator) * 1.5).to(**options)

    return draw(heads), draw(kv_heads or heads), draw(kv_heads or heads)


def dense(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize("skip", SKIPS)
def test_schedule_of_the_code(skip):
    for steps in range(1, 70):
        end = int(steps * skip) + 1
        phases = [SparseDSchedule(skip).phase(step, steps) for step in range(steps)]
        assert [phase is Phase.SPARSE for phase in phases] == [step > end for step in range(steps)]
        assert [step for step, phase in enumerate(phases) if phase is Phase.PATTERN] == (
            [end] if end + 1 < steps else []
        )
        assert SparseDSchedule(skip).dense_steps(steps) == min(int(steps * skip) + 2, steps)


@pytest.mark.parametrize("skip", SKIPS)
def test_schedule_of_the_paper(skip):
    schedule = SparseDSchedule(skip, "paper")
    for steps in range(2, 70):
        phases = [schedule.phase(step, steps) for step in range(steps)]
        full = int(steps * skip)
        assert sum(phase in (Phase.DENSE, Phase.PATTERN) for phase in phases) == full == schedule.dense_steps(steps)
        assert all(phase is Phase.SPARSE for phase in phases[max(full, 1) :])
        assert phases[max(full, 1) - 1] is (Phase.PATTERN if full else Phase.PATTERN_AND_SPARSE)
    assert schedule.phase(0, 1) is Phase.DENSE


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("schedule", ["code", "paper"])
@pytest.mark.parametrize("mode", ["reference", "per_side"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation(schedule, mode, kv_heads, dtype):
    """Dense, then sparse by the pattern of the last dense step, in every layer."""
    steps, new_tokens, layers = 10, 77, ("first", "second")
    attention = SparseDAttention(0.2, 0.3, 16, schedule=schedule, mode=mode)
    dense_steps, patterns = SparseDSchedule(0.2, schedule).dense_steps(steps), {}
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for step in range(steps):
        attention.begin_step(step, steps, new_tokens=new_tokens)
        for number, layer in enumerate(layers):
            q, k, v = qkv(kv_heads=kv_heads, seed=10 * step + number, dtype=dtype)
            output = attention(q, k, v, layer=layer)
            if step < dense_steps:
                assert_close(output, dense(q, k, v), **tolerance)
            else:
                assert_close(output, PF.block_sparse_attention(q, k, v, patterns[layer]))
            if step == dense_steps - 1:
                lse = torch.logsumexp(
                    q.float() @ k.float().repeat_interleave(4 // kv_heads, 1).mT / math.sqrt(q.shape[-1]), -1
                )
                patterns[layer] = PF.sparsed_block_mask(
                    q, k, select=0.3, block_size=16, new_tokens=new_tokens, mode=mode, lse=lse
                )
                assert attention.pattern(layer) == patterns[layer]
    report = attention.report()
    assert (report.dense_steps, report.sparse_steps) == (dense_steps, steps - dense_steps)
    assert [(e.dense_calls, e.sparse_calls, e.pattern_step) for e in report.layers] == [
        (dense_steps, steps - dense_steps, dense_steps - 1)
    ] * 2
    assert [e.density for e in report.layers] == [patterns[layer].density for layer in layers]
    assert not report.changes


def test_paper_without_dense_steps_uses_the_pattern_at_once():
    attention, (q, k, v) = SparseDAttention(0, 0.3, 16, schedule="paper"), qkv()
    attention.begin_step(0, 4, new_tokens=40)
    expected = PF.sparsed_block_mask(q, k, select=0.3, block_size=16, new_tokens=40)
    assert_close(attention(q, k, v), PF.block_sparse_attention(q, k, v, expected))
    assert attention.pattern() == expected and attention.report().dense_steps == 0


GOLDEN = np.load(Path(__file__).parent.parent / "data" / "sparse_attention.npz")


@pytest.mark.parametrize("case", GOLDEN["names"].tolist())
@pytest.mark.parametrize("mode", ["reference", "per_side"])
@pytest.mark.parametrize("percent", [10, 30, 50, 80])
def test_golden_patterns(case, mode, percent):
    *_, block, new, _ = GOLDEN["meta_B_Hq_Hk_L_D_bs_new_g"][GOLDEN["names"].tolist().index(case)].tolist()
    q, k, v = (torch.from_numpy(GOLDEN[f"{case}_{name}"]) for name in "qkv")
    attention = SparseDAttention(0.2, percent / 100, block, mode=mode)
    for step in (0, 1, 2):
        attention.begin_step(step, 3, new_tokens=new)
        output = attention(q, k, v)
    assert torch.equal(attention.pattern().to_dense(), torch.from_numpy(GOLDEN[f"{case}_{mode}_{percent}_mask"]))
    if f"{case}_{mode}_{percent}_out" in GOLDEN:
        assert_close(output.double(), torch.from_numpy(GOLDEN[f"{case}_{mode}_{percent}_out"]), rtol=1e-4, atol=1e-5)


def test_pattern_scale_is_the_quirk_of_the_llada_port():
    case = "b"
    *_, block, new, _ = GOLDEN["meta_B_Hq_Hk_L_D_bs_new_g"][GOLDEN["names"].tolist().index(case)].tolist()
    q, k, v = (torch.from_numpy(GOLDEN[f"{case}_{name}"]) for name in "qkv")
    attention = SparseDAttention(0.2, 0.3, block, pattern_scale=1 / math.sqrt(q.shape[1]))
    for step in (0, 1):
        attention.begin_step(step, 3, new_tokens=new)
        assert_close(attention(q, k, v), dense(q, k, v))
    assert torch.equal(attention.pattern().to_dense(), torch.from_numpy(GOLDEN[f"{case}_llada_30_mask"]))


def test_everything_selected_is_dense_attention():
    attention = SparseDAttention(0, 1.0, 32)
    q, k, v = qkv()
    for step in range(4):
        attention.begin_step(step, 4, new_tokens=50)
        assert_close(attention(q, k, v), dense(q, k, v))
    assert attention.report().density == 1 and attention.report().recall == pytest.approx(1)
    assert attention.report().sparse_steps == 2


def test_scales():
    q, k, v = qkv()
    attention = SparseDAttention(scale=0.1, block_size=16)
    attention.begin_step(0, 9)
    assert_close(attention(q, k, v), dense(q, k, v, scale=0.1))
    assert_close(attention(q, k, v, scale=0.3), dense(q, k, v, scale=0.3))


def test_new_tokens_none_is_one_selection_over_all_blocks():
    attention, (q, k, v) = SparseDAttention(0, 0.2, 16), qkv(160)
    for new_tokens in (None, 160, 1000):
        for step in (0, 1):
            attention.begin_step(step, 3, new_tokens=new_tokens)
            attention(q, k, v)
        kept = attention.pattern()
        assert kept == PF.sparsed_block_mask(q, k, select=0.2, block_size=16, new_tokens=160)
        assert (kept.kv_counts == 3).all()  # max(1, int(10 * 0.2) + 1)


def test_recall_is_the_mass_of_the_kept_blocks():
    attention, (q, k, v) = SparseDAttention(0, 0.3, 16), qkv()
    lengths = torch.tensor([200, 90])
    for step in (0, 1):
        attention.begin_step(step, 3, new_tokens=60)
        attention(q, k, v, key_lengths=lengths)
    valid = torch.arange(200) < lengths[:, None]
    weights = (q @ k.mT / 4).masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    weights = weights * (torch.arange(200) < torch.tensor([208, 96])[:, None])[:, None, :, None]  # whole blocks
    kept = (weights * attention.pattern().to_token_mask()).sum() / weights.sum()
    entry = attention.report().layers[0]
    assert entry.recall == pytest.approx(kept.item(), rel=1e-5)
    assert 0 < entry.recall < 1 and entry.pattern_seconds > 0 and entry.attention_seconds > 0


# ------------------------------------------------------------------------------------------- branches, steps, changes


def test_guidance_has_a_pattern_for_each_branch():
    attention = SparseDAttention(0, 0.3, 16)
    inputs = {"conditional": qkv(seed=1), "unconditional": qkv(seed=2)}
    for step in range(4):
        for branch, (q, k, v) in inputs.items():
            attention.begin_step(step, 4, new_tokens=100, branch=branch)
            output = attention(q, k, v)
            if step > 1:
                mask = PF.sparsed_block_mask(q, k, select=0.3, block_size=16, new_tokens=100)
                assert attention.pattern(branch=branch) == mask
                assert_close(output, PF.block_sparse_attention(q, k, v, mask))
    assert attention.pattern() != attention.pattern(branch="unconditional")
    report = attention.report()
    assert [e.branch for e in report.layers] == list(inputs) and (report.dense_steps, report.sparse_steps) == (2, 2)


def test_step_zero_forgets():
    attention = SparseDAttention(0, 0.3, 16)
    for seed in (0, 1):
        q, k, v = qkv(seed=seed)
        for branch in ("conditional", "unconditional"):
            attention.begin_step(0, 3, branch=branch)
            assert attention.pattern() is None and attention.report().sparse_steps == 0
        for step in range(3):
            attention.begin_step(step, 3)
            attention(q, k, v)
        assert attention.pattern() == PF.sparsed_block_mask(q, k, select=0.3, block_size=16, new_tokens=200)
    assert len(attention.report().layers) == 1


CHANGES = {
    "length 200 -> 232": {"length": 232},
    "batch 2 -> 1": {"batch": 1},
    "key lengths None -> (200, 100)": {"key_lengths": torch.tensor([200, 100])},
    "new tokens 100 -> 50": {"new_tokens": 50},
}


@pytest.mark.parametrize("why", CHANGES)
def test_a_change_computes_the_pattern_again(why):
    """The call that shows the change is full attention, the next one uses the new pattern; the report says so."""
    options = dict(CHANGES[why])
    new_tokens, lengths = options.pop("new_tokens", 100), options.pop("key_lengths", None)
    attention = SparseDAttention(0, 0.3, 16)
    for step in range(3):
        attention.begin_step(step, 5, new_tokens=100)
        attention(*qkv())
    q, k, v = qkv(**options)
    valid = None if lengths is None else (torch.arange(200) < lengths[:, None])[:, None, None]
    attention.begin_step(3, 5, new_tokens=new_tokens)
    assert_close(attention(q, k, v, key_lengths=lengths), dense(q, k, v, attn_mask=valid))
    mask = PF.sparsed_block_mask(q, k, select=0.3, block_size=16, new_tokens=new_tokens, key_lengths=lengths)
    assert attention.pattern() == mask
    attention.begin_step(4, 5, new_tokens=new_tokens)
    assert_close(attention(q, k, v, key_lengths=lengths), PF.block_sparse_attention(q, k, v, mask, key_lengths=lengths))
    report = attention.report()
    assert report.changes == [f"step 3, layer 0 (conditional): {why}"] and why in str(report)


def test_a_layer_first_called_late_gets_its_pattern_then():
    attention, (q, k, v) = SparseDAttention(0, 0.3, 16), qkv()
    attention.begin_step(3, 5)
    assert_close(attention(q, k, v), dense(q, k, v))
    assert "no pattern was computed in an earlier step" in attention.report().changes[0]
    attention.begin_step(4, 5)
    assert_close(attention(q, k, v), PF.block_sparse_attention(q, k, v, attention.pattern()))


def test_calls_outside_of_steps_are_errors():
    attention, (q, k, v) = SparseDAttention(0, 0.3, 16), qkv()
    with pytest.raises(RuntimeError, match="does not know the denoising step.*begin_step"):
        attention(q, k, v)
    with attention.step(0, 3), attention.dense():
        pass
    with pytest.raises(RuntimeError, match="does not know the denoising step"):
        attention(q, k, v)
    with pytest.raises(KeyError), attention.step(1, 3):
        attention(q, k, v)
        raise KeyError
    with pytest.raises(RuntimeError, match="does not know the denoising step"):
        attention(q, k, v)
    with attention.dense():  # works without a step and leaves no trace
        assert_close(attention(q, k, v), dense(q, k, v))
    with attention.step(2, 3):
        with attention.dense():
            assert_close(attention(q, k, v), dense(q, k, v))
        assert not torch.allclose(attention(q, k, v), dense(q, k, v))
    assert attention.report().layers[0].sparse_calls == 1


# -------------------------------------------------------------------------------------------------- padding and masks


def masks_of(lengths, keys):
    valid = torch.arange(keys) < lengths[:, None]
    additive = torch.zeros(valid.shape).masked_fill(~valid, -torch.inf)
    yield "lengths", {"key_lengths": lengths}
    yield "[B, 1, 1, Lk]", {"attn_mask": valid[:, None, None]}
    yield "[B, 1, Lq, Lk]", {"attn_mask": valid[:, None, None].expand(-1, -1, keys, -1)}
    yield "[B, H, Lq, Lk], written", {"attn_mask": valid[:, None, None].expand(-1, 4, keys, -1).contiguous()}
    yield "minus infinity", {"attn_mask": additive[:, None, None]}
    yield "lowest float", {"attn_mask": additive[:, None, None].clamp(min=torch.finfo(torch.float32).min)}
    yield "-1e4", {"attn_mask": additive[:, None, None].clamp(min=-1e4)}


@pytest.mark.parametrize("name", [name for name, _ in masks_of(torch.tensor([200, 90]), 200)])
def test_padding(name):
    """A padded batch gives what each of its parts gives alone, dense or with everything selected; sparse as the op."""
    lengths = torch.tensor([200, 90])
    options, (q, k, v) = dict(masks_of(lengths, 200))[name], qkv()
    for select in (0.3, 1.0):
        attention = SparseDAttention(0, select, 16)
        for step in range(3):
            attention.begin_step(step, 3, new_tokens=60)
            output = attention(q, k, v, **options)
            if step < 2 or select == 1:
                for i, n in enumerate(lengths.tolist()):
                    alone = dense(q[i : i + 1, :, :n], k[i : i + 1, :, :n], v[i : i + 1, :, :n])
                    assert_close(output[i : i + 1, :, :n], alone)
        mask = PF.sparsed_block_mask(q, k, select=select, block_size=16, new_tokens=60, key_lengths=lengths)
        assert attention.pattern() == mask
        assert_close(output, PF.block_sparse_attention(q, k, v, mask, key_lengths=lengths))


def test_masks_that_leave_out_nothing_are_no_masks():
    q, k, v = qkv()
    attention = SparseDAttention(0, 0.3, 16)
    for step, mask in enumerate((None, torch.ones(200, 200, dtype=torch.bool), torch.zeros(2, 4, 1, 200))):
        attention.begin_step(step, 3)
        attention(q, k, v, attn_mask=mask)
    assert not attention.report().changes


OTHER_MASKS = {
    "its padding is on the left": (torch.arange(200) >= torch.tensor([[0], [50]]))[:, None, None],
    "it leaves out keys before valid ones": (torch.arange(200) % 3 > 0).expand(1, 1, 1, 200),
    "it is not the same for all queries and heads": torch.ones(200, 200, dtype=torch.bool).tril(),
    "it adds values other than 0 and minus infinity": torch.linspace(-1, 1, 200).expand(200, 200),
}


@pytest.mark.parametrize("why", OTHER_MASKS)
def test_other_masks(why):
    q, k, v = qkv()
    mask = OTHER_MASKS[why]
    attention = SparseDAttention(0, 0.3, 16)
    attention.begin_step(2, 3)
    with pytest.raises(ValueError, match=f"attn_mask: .*layer 0, {why}.*other_masks='dense'"):
        attention(q, k, v, attn_mask=mask)
    attention = SparseDAttention(0, 0.3, 16, other_masks="dense")
    attention.begin_step(2, 3)
    for _ in range(2):
        assert_close(attention(q, k, v, attn_mask=mask), dense(q, k, v, attn_mask=mask))
    report = attention.report()
    assert report.masked_calls == {"0": 2} and "full attention for 2 calls of 0" in str(report)


def test_a_mask_changed_in_place_is_read_again():
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    attention = SparseDAttention(0, 0.3, 16)
    attention.begin_step(0, 3)
    attention(q, k, v, attn_mask=mask)
    mask[1, ..., 50:] = False
    assert_close(attention(q, k, v, attn_mask=mask), dense(q, k, v, attn_mask=mask))


# ------------------------------------------------------------------------------------------- gradients, casts, copies


def test_gradients_flow_through_every_phase():
    attention = SparseDAttention(0, 0.3, 16)
    for step in range(3):
        q, k, v = (t.requires_grad_() for t in qkv(seed=step))
        attention.begin_step(step, 3)
        weight = torch.randn(q.shape)
        grads = torch.autograd.grad((attention(q, k, v) * weight).sum(), (q, k, v))
        kept = None if step < 2 else attention.pattern().to_token_mask()
        expected = torch.autograd.grad((dense(q, k, v, attn_mask=kept) * weight).sum(), (q, k, v))
        assert_close(grads, expected, rtol=1e-4, atol=1e-4)  # of gradients up to 20


def test_int8_scores():
    """The option reaches the kernel in the sparse steps."""
    q, k, v = qkv(size=32)
    attention = SparseDAttention(0, 0.3, 16, qk_dtype="int8")
    for step in range(3):
        attention.begin_step(step, 3)
        output = attention(q, k, v)
    assert torch.equal(output, PF.block_sparse_attention(q, k, v, attention.pattern(), qk_dtype="int8"))
    assert not torch.equal(output, PF.block_sparse_attention(q, k, v, attention.pattern()))


def test_autocast_casts_as_torch_does():
    q, k, v = qkv()
    attention = SparseDAttention(0, 0.3, 16)
    attention.begin_step(0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = attention(q, k, v.bfloat16()), dense(q, k, v)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_copies_go_their_own_ways():
    q, k, v = qkv()
    attention = SparseDAttention(0, 0.3, 16)
    for step in range(3):
        attention.begin_step(step, 3)
        attention(q, k, v)
    twin = copy.deepcopy(attention)
    assert twin.pattern() == attention.pattern()
    twin.begin_step(0, 3)
    assert twin.pattern() is None and attention.pattern() is not None
    assert not attention.state_dict() and not list(attention.parameters())


def test_compiled_models_break_the_graph_there():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SparseDAttention(0, 0.3, 16)

        def forward(self, q, k, v):
            return self.attention(q * 2, k, v) + 1

    model, (q, k, v) = Model(), qkv()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for step in range(4):
        with model.attention.step(step, 4):
            assert_close(compiled(q, k, v), model(q, k, v))
    assert model.attention.report().layers[0].sparse_calls == 4
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with model.attention.step(0, 4), pytest.raises(torch._dynamo.exc.Unsupported, match="SparseD decides in Python"):
        whole(q, k, v)
    torch._dynamo.reset()


def test_report_as_json_and_text():
    attention, (q, k, v) = SparseDAttention(0.2, 0.3, 16), qkv()
    assert "no step was begun" in str(attention.report()) and attention.report().density is None
    for step in range(5):
        attention.begin_step(step, 5, new_tokens=100)
        attention(q, k, v, layer="middle")
    report = attention.report()
    data = json.loads(report.to_json())
    assert data["layers"][0]["layer"] == "middle" and data["layers"][0]["shape"] == [2, 4, 200, 16, 200]
    assert data["density"] == report.density and data["pattern_seconds"] == report.pattern_seconds
    text = str(report)
    assert "3 dense and 2 sparse of 5 steps" in text and "middle" in text and f"recall {report.recall:.1%}" in text
    assert "skip=0.2, select=0.3, block_size=16" in repr(attention)


# ------------------------------------------------------------------------------------------------------------- errors

BAD_OPTIONS = [
    ({"select": 0}, ValueError, "select: .*got 0"),
    ({"select": 1.01}, ValueError, "select: .*got 1.01"),
    ({"select": float("nan")}, ValueError, "select: "),
    ({"select": "0.3"}, TypeError, "select: .*str"),
    ({"skip": 1}, ValueError, "skip: .*got 1"),
    ({"skip": -0.1}, ValueError, "skip: .*got -0.1"),
    ({"skip": None}, TypeError, "skip: .*NoneType"),
    ({"block_size": 48}, ValueError, "block_size: .*16, 32, 64, 128, got 48"),
    ({"block_size": 64.0}, TypeError, "block_size: .*float"),
    ({"schedule": "text"}, ValueError, "schedule: .*'code', 'paper', got 'text'"),
    ({"mode": "both"}, ValueError, "mode: .*'reference', 'per_side', got 'both'"),
    ({"qk_dtype": "int4"}, ValueError, "qk_dtype: .*'int8', got 'int4'"),
    ({"other_masks": "ignore"}, ValueError, "other_masks: .*'error', 'dense', got 'ignore'"),
    ({"backend": "metal"}, ValueError, "backend: .*got 'metal'"),
    ({"scale": "1"}, TypeError, "scale: .*str"),
    ({"pattern_scale": True}, TypeError, "pattern_scale: .*bool"),
]


@pytest.mark.parametrize("options, error, text", BAD_OPTIONS, ids=lambda value: str(value))
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        SparseDAttention(**options)


BAD_STEPS = [
    ((-1, 5), {}, ValueError, "step: expected 0 to 4"),
    ((5, 5), {}, ValueError, "step: expected 0 to 4.*got 5"),
    ((0, 0), {}, ValueError, "num_steps: .*got 0"),
    ((0.0, 5), {}, TypeError, "step: .*float"),
    ((0, True), {}, TypeError, "num_steps: .*bool"),
    ((0, 5), {"new_tokens": -1}, ValueError, "new_tokens: .*got -1"),
    ((0, 5), {"new_tokens": 1.5}, TypeError, "new_tokens: .*float"),
    ((0, 5), {"branch": 1}, TypeError, "branch: .*int"),
]


@pytest.mark.parametrize("args, options, error, text", BAD_STEPS, ids=lambda value: str(value))
def test_bad_steps(args, options, error, text):
    with pytest.raises(error, match=text):
        SparseDAttention().begin_step(*args, **options)


def bad_calls():
    q, k, v = qkv(64)
    mask = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    yield "is_causal", (q, k, v), {"is_causal": True}, ValueError, "is_causal: .*bidirectional.*layer 'name' is causal"
    yield "dropout", (q, k, v), {"dropout_p": 0.1}, ValueError, "dropout_p: .*layer 'name' passes 0.1"
    yield "dims", (q[0], k, v), {}, ValueError, "query: "
    yield "heads", (q, k[:, :3], v[:, :3]), {}, ValueError, "key: .*divides"
    yield "values", (q, k, v[:, :, :10]), {}, ValueError, "value: "
    yield "dtype", (q, k.half(), v), {}, TypeError, "key: "
    yield "no tensor", ([1], k, v), {}, TypeError, "query: "
    yield "both", (q, k, v), {"attn_mask": mask, "key_lengths": torch.tensor([64, 64])}, ValueError, "got both"
    yield "mask shape", (q, k, v), {"attn_mask": mask[..., :10]}, ValueError, "attn_mask: .*broadcasts"
    yield "mask dtype", (q, k, v), {"attn_mask": mask.int()}, TypeError, "attn_mask: .*int32"
    yield "mask type", (q, k, v), {"attn_mask": [1]}, TypeError, "attn_mask: .*list"
    yield "lengths shape", (q, k, v), {"key_lengths": torch.tensor([64])}, ValueError, r"key_lengths: expected \[2\]"
    yield "lengths range", (q, k, v), {"key_lengths": torch.tensor([65, 1])}, ValueError, "0 to 64.*got 65"
    yield "lengths dtype", (q, k, v), {"key_lengths": torch.tensor([1.0, 1.0])}, TypeError, "key_lengths: .*float"


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_calls(case):
    _, tensors, options, error, text = case
    attention = SparseDAttention(block_size=16)
    attention.begin_step(0, 5)
    with pytest.raises(error, match=text):
        attention(*tensors, layer="name", **options)


def test_a_named_backend_that_is_missing_says_so():
    attention = SparseDAttention(0, 0.3, 16, backend="cuda")
    with attention.step(2, 3), pytest.raises(RuntimeError, match="cuda"):
        attention(*qkv())
