"""The masked-diffusion language model: its layers, the likelihood bound, checkpoints, and the one that is shipped."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pydenoise.models import MaskedLM, WeightsError, load_masked_lm, save_masked_lm
from pydenoise.models.bpe import BPE
from pydenoise.models.masked_lm import (
    SHIPPED,
    SelfAttention,
    mask_tokens,
    masked_nll,
    read_notes,
    rotate,
    spread_counts,
)
from pydenoise.models.text import load_corpus, tokens_of

TOKENIZER = BPE()
VOCABULARY = TOKENIZER.vocabulary


@pytest.fixture
def model():
    model = MaskedLM(VOCABULARY, width=32, layers=2, heads=2, hidden=48).eval()
    for weight in model.parameters():  # as they are at first, no layer does anything
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)
    return model


# ------------------------------------------------------------------------------------------------------------- layers


def test_attention_by_its_definition():
    attention = SelfAttention(16, 2).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    angles = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.01, 1.0, 0.01]).repeat(2)[None, :8]
    angles = torch.cat((angles[:, :4], angles[:, :4]), -1).double()
    weight = attention.qkv.weight.reshape(3, 2, 8, 16)
    q, k, v = torch.einsum("shdc,blc->sbhld", weight, x)
    q, k = (t / (t.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() for t in (q, k))
    q, k = (rotate(t, angles.cos(), angles.sin()) for t in (q, k))
    expected = torch.einsum("bhls,bhsd->blhd", (q @ k.mT / math.sqrt(8)).softmax(-1), v).flatten(2)
    torch.testing.assert_close(attention(x, angles.cos(), angles.sin(), None), attention.proj(expected))


def test_rotary_positions_count_differences_only():
    model = MaskedLM(VOCABULARY, width=32, layers=1, heads=2)
    cos, sin = model._positions(40, torch.zeros((), dtype=torch.float64))
    q, k = torch.randn(2, 16, dtype=torch.float64)
    products = rotate(q.expand(40, -1), cos, sin) @ rotate(k.expand(40, -1), cos, sin).T
    torch.testing.assert_close(products[3:, 3:], products[:-3, :-3])
    assert not torch.allclose(products[0, 1], products[0, 2])


def test_every_position_sees_both_sides(model):
    tokens = torch.randint(0, VOCABULARY, (1, 12))
    before = model(tokens)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % VOCABULARY
    assert before.shape == (1, 12, VOCABULARY)
    assert (model(changed) - before).abs().amax(-1).min() > 0


def test_padding_does_not_count(model):
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    logits = model(tokens, torch.tensor([9, 5]))
    torch.testing.assert_close(logits[0], model(tokens[:1])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[1, :5], model(tokens[1:, :5])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(model, dtype):
    tokens = torch.randint(0, VOCABULARY + 1, (1, 8), dtype=torch.int32)
    logits = model.to(dtype)(tokens)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1, 2],), TypeError, "tokens: expected a tensor"),
        ((torch.zeros(4, dtype=torch.int64),), ValueError, r"tokens: expected int64 or int32 \[B, L\]"),
        ((torch.zeros(1, 4),), ValueError, "tokens: expected int64"),
        ((torch.zeros(1, 4, dtype=torch.int64), torch.tensor([1, 2])), ValueError, r"lengths: .* shape \[1\]"),
        ((torch.zeros(1, 4, dtype=torch.int64), 3), ValueError, "lengths: expected a tensor"),
    ],
)
def test_bad_arguments(model, args, error, message):
    with pytest.raises(error, match=message):
        model(*args)


@pytest.mark.parametrize(
    "sizes", [{"vocabulary": 0}, {"layers": 1.5}, {"width": 36, "heads": 4}, {"heads": True}, {"rope_base": math.inf}]
)
def test_constructor_arguments(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        MaskedLM(**({"vocabulary": 10} | sizes))


# --------------------------------------------------------------------------------------------------------- likelihood


def test_masks_are_where_and_as_many_as_they_should_be():
    tokens = torch.randint(0, 50, (3, 20))
    hidden, masked = mask_tokens(tokens, 77, torch.tensor([1, 7, 12]), start=8)
    assert masked.sum(1).tolist() == [1, 7, 12] and not masked[:, :8].any()
    assert torch.equal(hidden, torch.where(masked, 77, tokens))


def test_counts_are_spread_evenly():
    counts = torch.stack([spread_counts(10, 50) for _ in range(200)])
    assert counts.min() == 1 and counts.max() == 50
    assert ((counts.sort(1).values - 1) // 5 == torch.arange(10)).float().mean() > 0.8
    assert abs(counts.double().mean() - 25.5) < 0.5


def test_the_bound_of_a_model_that_knows_frequencies_only():
    """Without context, the bound is the cross-entropy of the tokens, whatever is masked."""
    frequencies = torch.tensor([0.5, 0.25, 0.25])
    tokens = torch.tensor([[0, 0, 1, 2]]).repeat(400, 1)

    def model(hidden):
        assert (hidden == 3).any(1).all()
        return frequencies.log().expand(*hidden.shape, 3)

    nll = masked_nll(model, tokens, mask_token=3, batch=64)
    entropy = -(frequencies * frequencies.log()).sum().item()
    assert nll.shape == (400,) and abs(nll.mean().item() - entropy) < 0.05
    after = masked_nll(model, tokens, 3, mask_token=3)  # only the last token, the one of 1/4
    torch.testing.assert_close(after, torch.full((400,), math.log(4)))


def test_the_bound_repeats_with_a_generator(model):
    tokens = torch.randint(0, VOCABULARY, (4, 16))
    with torch.no_grad():
        first, again = (masked_nll(model, tokens, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        pieces = masked_nll(model, tokens, generator=torch.Generator().manual_seed(3), batch=3)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, pieces, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="start: expected a position in the text, 0 to 15, got 16"):
        masked_nll(model, tokens, 16)


def test_it_learns():
    """The alphabet again and again: soon every masked letter is known from its neighbours."""
    model = MaskedLM(VOCABULARY, width=32, layers=2, heads=2, hidden=64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    alphabet = TOKENIZER.encode("abcdefgh" * 2)
    assert masked_nll(model, alphabet[None]).item() == pytest.approx(math.log(VOCABULARY))
    for _ in range(130):
        batch = torch.stack([alphabet.roll(shift) for shift in range(16)])
        loss = masked_nll(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1  # by the frequencies alone: ln 8 = 2.08


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_saving_and_loading(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_masked_lm(model, TOKENIZER, path, notes={"minutes": 5, "by": ["me"]})
    loaded, tokenizer = load_masked_lm(path)
    tokens = torch.randint(0, VOCABULARY + 1, (1, 8))
    assert torch.equal(loaded(tokens), model(tokens)) and not loaded.training
    assert tokenizer.merges == TOKENIZER.merges and loaded.config == model.config
    assert read_notes(path) == {"minutes": 5, "by": ["me"]}
    save_masked_lm(model, TOKENIZER, path, dtype=torch.bfloat16)
    assert load_file(path)["head.weight"].dtype == torch.bfloat16
    assert next(load_masked_lm(path)[0].parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="tokenizer: expected the model's"):
        save_masked_lm(model, BPE([(5, 6)]), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, meta: state.pop("head.weight"), "do not fit .* Missing key"),
        (lambda state, meta: state.update({"head.weight": torch.zeros(3, 32)}), "do not fit .* size mismatch"),
        (lambda state, meta: state["norm.weight"].fill_(math.nan), "not finite"),
        (lambda state, meta: meta.update(format="another"), "do not say that it is a pydenoise masked"),
        (lambda state, meta: meta.update(config='{"depth": 3}'), "do not fit .*depth"),
        (lambda state, meta: meta.update(config="{"), "damaged"),
        (lambda state, meta: meta.update(merges="[[5, 6]]"), "99 tokens for a model of 98"),
    ],
)
def test_other_files_are_refused(model, tmp_path, change, message):
    from safetensors import safe_open

    path = tmp_path / "m.safetensors"
    save_masked_lm(model, TOKENIZER, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state, metadata)
    save_file(state, path, metadata)
    with pytest.raises(WeightsError, match=message):
        load_masked_lm(path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(WeightsError, match="no such weights file"):
        load_masked_lm(path)
    path.write_bytes(b"something else")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_masked_lm(path)


# -------------------------------------------------------------------------------------------------------- the shipped


def test_the_shipped_model_knows_python():
    """Held-out source is far more likely than by the frequencies of its tokens, and at no length out of reach."""
    model, tokenizer = load_masked_lm()
    assert SHIPPED.stat().st_size < 5e6
    tokens = tokens_of(load_corpus().validation[:8], tokenizer)
    counts = torch.bincount(tokens, minlength=tokenizer.vocabulary).double()
    shares = counts[counts > 0] / counts.sum()
    unigram = -(shares * shares.log()).sum().item()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for length in (256, 1024):
            texts = tokens[: 2048 // length * length].view(-1, length)
            assert masked_nll(model, texts, generator=generator).mean() < unigram - 0.8
        before, word, after = (tokenizer.encode(part) for part in ("    def __init__(", "self", ", name):\n"))
        hidden = torch.cat((before, torch.full_like(word, model.mask_token), after))
        probabilities = F.softmax(model(hidden[None])[0, len(before)], -1)
    assert len(word) == 1 and probabilities[word] > 0.5


def test_the_shipped_model_says_how_it_was_made():
    notes = read_notes()
    assert notes["command"].startswith("python examples/train_masked_lm.py")
    assert {"arguments", "minutes", "perplexity_per_token", "characters_per_token", "versions"} <= set(notes)
