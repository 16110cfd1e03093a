"""WordPiece: words, pieces, batches; and the same tokens as the tokenizers package gives."""

import pytest

from pydenoise.models import WeightsError
from pydenoise.models.weights import find_minilm
from pydenoise.models.wordpiece import WordPiece, split_words

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "able", "!", "cafe", "中", "$", "##un"]
TEXTS = [
    "Unaffable, isn't it?", "  Café\u00a0 NAÏVE\tÅngström  ", "costs $5.00 (or 4,50 €)…", "中文 and 日本語", "x" * 101,
    "",
    "a_b-c^d`e~f|g", "zero\u200bwidth \ufffd\x00 control\x07", "I\u0307stanbul ﬁne ½ ①",
    "don\u2019t \u2014 \u201cquote\u201d",
    "e\u0301 ñ ü ß ẞ", "#hashtag @name http://example.org/?q=1&r=2", "snake_case CamelCase x1y2", "naïve\nnew\r\nlines",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return WordPiece(PIECES)


def test_words():
    assert list(split_words("Ça va, señor?\n$5")) == ["ca", "va", ",", "senor", "?", "$", "5"]
    assert list(split_words("a中b")) == ["a", "中", "b"]
    assert list(split_words("\x00a\u200bb\ufffd")) == ["ab"]


def test_the_longest_piece_comes_first(tokenizer):
    words = [PIECES[token] for token in tokenizer.encode("unaffable able! Café unx 中")]
    assert words == ["[CLS]", "un", "##aff", "##able", "able", "!", "cafe", "[UNK]", "中", "[SEP]"]


def test_long_texts_are_cut(tokenizer):
    assert tokenizer.encode("able " * 9, 4) == [2, 8, 8, 3]
    with pytest.raises(ValueError, match="longest: expected at least 2"):
        tokenizer.encode("able", 1)


def test_batch(tokenizer):
    tokens, lengths = tokenizer.batch(["able", "able able"])
    assert tokens.tolist() == [[2, 8, 3, 0], [2, 8, 8, 3]] and lengths.tolist() == [3, 4]
    for bad in ("able", []):
        with pytest.raises(ValueError, match="texts: expected one text or more"):
            tokenizer.batch(bad)


def test_vocabularies(tmp_path):
    with pytest.raises(ValueError, match=r"pieces: \[CLS\], \[SEP\] missing"):
        WordPiece(["[PAD]", "[UNK]"])
    with pytest.raises(WeightsError, match="not a vocabulary"):
        WordPiece.from_file(tmp_path / "none")
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    assert WordPiece.from_file(tmp_path / "vocab.txt").pieces == PIECES


def test_the_same_tokens_as_the_tokenizers_package():
    tokenizers = pytest.importorskip("tokenizers")
    try:
        _, path = find_minilm()
    except WeightsError as error:
        pytest.skip(str(error))
    theirs = tokenizers.BertWordPieceTokenizer(str(path), lowercase=True)
    ours = WordPiece.from_file(path)
    for text in [*TEXTS, " ".join(TEXTS)]:
        assert ours.encode(text) == theirs.encode(text).ids, text
