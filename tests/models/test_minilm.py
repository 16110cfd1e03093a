"""MiniLM: the architecture against transformers, padding, attention of one's own, and the published weights."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pydenoise.models import MiniLM, WeightsError
from pydenoise.models.minilm import published_names
from pydenoise.models.weights import find_minilm
from pydenoise.models.wordpiece import WordPiece


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return MiniLM(50, width=64, layers=2, heads=2, hidden=96, positions=20).eval()


@pytest.fixture(scope="module")
def published():
    try:
        weights, vocabulary = find_minilm()
    except WeightsError as error:
        pytest.skip(str(error))
    return MiniLM.from_safetensors(weights), WordPiece.from_file(vocabulary)


def save_as_published(model, path, change=lambda state: None):
    state = {theirs: model.state_dict()[own].clone() for own, theirs in published_names(model).items()}
    change(state)
    save_file(state, path)


def test_the_network_is_transformers_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, layer_norm_eps=1e-12, **sizes)
    theirs = transformers.BertModel(config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    path = tmp_path / "bert.safetensors"
    save_file({name: value.clone() for name, value in theirs.state_dict().items()}, path)
    ours = MiniLM.from_safetensors(path)
    tokens, lengths = torch.randint(0, 50, (3, 11)), torch.tensor([11, 4, 7])
    with torch.inference_mode():
        expected = theirs(tokens, attention_mask=(torch.arange(11) < lengths[:, None]).long()).last_hidden_state
        result = ours(tokens, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(result[row, :length], expected[row, :length], atol=1e-4, rtol=1e-4)


def test_padding_does_not_count(small):
    tokens, lengths = torch.randint(0, 50, (2, 9)), torch.tensor([9, 5])
    both = small.embed(tokens, lengths)
    torch.testing.assert_close(both[1:], small.embed(tokens[1:, :5]))
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))


def test_attention_of_ones_own(small):
    calls = []

    def attend(query, key, value, attn_mask=None):
        calls.append((query.shape, attn_mask))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)

    tokens = torch.randint(0, 50, (2, 9))
    assert torch.equal(small(tokens, attend=attend), small(tokens))
    assert calls == [((2, 2, 9, 32), None)] * 2
    small(tokens, torch.tensor([9, 5]), attend)
    assert calls[-1][1].shape == (2, 1, 1, 9) and calls[-1][1].sum((1, 2, 3)).tolist() == [9, 5]


def test_sizes_come_from_the_file(small, tmp_path):
    save_as_published(small, tmp_path / "m.safetensors")
    loaded = MiniLM.from_safetensors(tmp_path / "m.safetensors")
    tokens = torch.randint(0, 50, (1, 20))
    assert torch.equal(loaded(tokens), small(tokens)) and not loaded.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("encoder.layer.1.output.dense.bias"),
            "'encoder.layer.1.output.dense.bias' is missing",
        ),
        (
            lambda state: state.pop("embeddings.word_embeddings.weight"),
            "'embeddings.word_embeddings.weight' is missing",
        ),
        (lambda state: state.update({"embeddings.LayerNorm.bias": torch.zeros(3)}), "not a MiniLM: .* size mismatch"),
        (lambda state: state["embeddings.LayerNorm.bias"].fill_(torch.inf), "not finite"),
    ],
)
def test_other_files_are_refused(small, tmp_path, change, message):
    save_as_published(small, tmp_path / "m.safetensors", change)
    with pytest.raises(WeightsError, match=message):
        MiniLM.from_safetensors(tmp_path / "m.safetensors")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(WeightsError, match="no such weights file"):
        MiniLM.from_safetensors(path)
    path.write_bytes(b"something else")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        MiniLM.from_safetensors(path)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1],), TypeError, "tokens: expected a tensor"),
        ((torch.zeros(1, 4),), ValueError, "tokens: expected int64"),
        ((torch.zeros(1, 21, dtype=torch.int64),), ValueError, "tokens: expected 1 to 20 a text, got 21"),
        ((torch.zeros(2, 4, dtype=torch.int64), torch.ones(3)), ValueError, r"lengths: .* shape \[2\]"),
    ],
)
def test_bad_arguments(small, args, error, message):
    with pytest.raises(error, match=message):
        small(*args)


def test_constructor_arguments():
    with pytest.raises(ValueError, match="width: expected a multiple of heads"):
        MiniLM(50, width=10, heads=3)


# -------------------------------------------------------------------------------------------------- published weights


def test_similar_sentences_lie_closer_than_others(published):
    model, tokenizer = published
    sentences = [
        "A man is playing a guitar on the street.", "Someone performs music outdoors with a guitar.",
        "The stock market fell sharply on Monday.", "Shares lost a lot of value at the start of the week.",
        "Bake the cake for forty minutes.", "Leave the dough in the oven for a little over half an hour.",
    ]  # fmt: skip
    with torch.inference_mode():
        embeddings = model.embed(*tokenizer.batch(sentences))
    cosines = embeddings @ embeddings.T
    pairs = torch.tensor([cosines[i, i + 1] for i in (0, 2, 4)])
    others = torch.tensor([cosines[i, j] for i in range(6) for j in range(i) if i // 2 != j // 2])
    assert pairs.min() > 0.4 > 0.3 > others.max()


def test_published_values(published):
    """The sentence that the model's own page embeds; the values are transformers' BertModel's on the same file."""
    model, tokenizer = published
    transformers = pytest.importorskip("transformers")
    weights, _ = find_minilm()
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    theirs = transformers.BertModel(transformers.BertConfig(vocab_size=30522, layer_norm_eps=1e-12, **sizes)).eval()
    state = {name: value for name, value in load_file(weights).items() if name != "embeddings.position_ids"}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    tokens, lengths = tokenizer.batch(["This is an example sentence", "Each sentence is converted"])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        hidden = theirs(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
        expected = F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
        torch.testing.assert_close(model.embed(tokens, lengths), expected, atol=1e-5, rtol=1e-4)
