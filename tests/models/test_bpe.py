"""Byte-pair encoding: what is learned, that nothing is lost, and what has no token."""

import pytest
import torch

from pydenoise.models.bpe import BPE, CHARACTERS, END, UNKNOWN, WORDS

TEXT = "def low(self):\n    return self.lower() + 1\n\n\ndef lowest(self):\n    return self.low()\n"
LETTERS = 2 + len(CHARACTERS)


def test_the_most_frequent_pair_comes_first():
    tokenizer = BPE.learn(["ab ab ab cd cd xab"], LETTERS + 2)
    assert tokenizer.pieces[LETTERS:] == ["ab", " c"]  # 4 times; then 2 times, as " ab" is, of lower numbers
    assert tokenizer.decode(tokenizer.encode("ab xab")) == "ab xab"
    assert len(tokenizer.encode("ab xab")) == 4


def test_merges_are_what_counting_anew_gives():
    """The pairs are counted as words change; counting all words again after every merge gives the same merges."""
    words, merges = [[CHARACTERS.index(c) + 2 for c in word] for word in WORDS.findall(TEXT * 3)], []
    for token in range(LETTERS, LETTERS + 12):
        counts: dict[tuple[int, int], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        merges.append(best)
        for word in words:
            index = 0
            while index < len(word) - 1:
                if (word[index], word[index + 1]) == best:
                    word[index : index + 2] = [token]
                index += 1
    assert BPE.learn([TEXT] * 3, LETTERS + 12).merges == merges


def test_nothing_is_lost():
    tokenizer = BPE.learn([TEXT], 150)
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT) / 2
    other = "\n\n   for x_1 in range(10):\tprint(f'{x_1}') # {}[]|~^\n"
    assert tokenizer.decode(tokenizer.encode(other)) == other.expandtabs(4)
    assert BPE(tokenizer.merges).encode(other).tolist() == tokenizer.encode(other).tolist()


def test_what_has_no_token():
    tokens = BPE().encode("aé\r")
    assert tokens.tolist() == [CHARACTERS.index("a") + 2, UNKNOWN, UNKNOWN]
    assert BPE().decode(torch.tensor([UNKNOWN, END, LETTERS])) == "\ufffd␃░"
    assert BPE().encode("").shape == (0,)


def test_learning_stops_when_nothing_is_left():
    assert BPE.learn(["abab"], 1000).vocabulary == LETTERS + 1  # "ab" twice; no other pair comes twice


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BPE([(2, LETTERS)]), "merges: pair 0"),
        (lambda: BPE([(UNKNOWN, 5)]), "merges: pair 0"),
        (lambda: BPE.learn(["a"], 50), f"vocabulary: expected at least {LETTERS}"),
        (lambda: BPE().decode(torch.zeros(1, 2)), "tokens: expected one dimension"),
        (lambda: BPE().decode(torch.tensor([LETTERS + 1])), f"tokens: expected 0 to {LETTERS}"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
