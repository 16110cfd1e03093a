"""Byte-pair encoding: tokens of frequent runs of characters, learned from the text itself.

Source: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL 2016.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

END, UNKNOWN = 0, 1  # the end of a text; a character that is not in the table
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
LETTERS = {character: number for number, character in enumerate(CHARACTERS, start=2)}
SIGNS = {END: "\N{SYMBOL FOR END OF TEXT}", UNKNOWN: "\N{REPLACEMENT CHARACTER}"}
MASK_SIGN = "\N{LIGHT SHADE}"
WORDS = re.compile(r" ?[A-Za-z]+|\d|\n *| +|[^\sA-Za-z\d]+|.", re.DOTALL)  # no token reaches beyond one of these


class BPE:
    """Text to tokens and back; only ASCII's printable characters and line ends have tokens.

    Args:
        merges: pairs of tokens in the order in which they were learned; pair i became the token 98 + i.
    """

    def __init__(self, merges: Iterable[Sequence[int]] = ()):
        self.merges = [(int(left), int(right)) for left, right in merges]
        self.pieces = [SIGNS[END], SIGNS[UNKNOWN], *CHARACTERS]
        for number, (left, right) in enumerate(self.merges):
            if not (2 <= left < len(self.pieces) and 2 <= right < len(self.pieces)):
                raise ValueError(f"merges: pair {number}, ({left}, {right}), names tokens that are not there yet")
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._ranks = {pair: number for number, pair in enumerate(self.merges)}
        self._known: dict[str, list[int]] = {}

    @classmethod
    def learn(cls, texts: Iterable[str], vocabulary: int) -> "BPE":
        """Merge the most frequent pair again and again until there are ``vocabulary`` tokens (or no pair is left).

        Of equally frequent pairs that of lower numbers comes first: the same texts give the same tokens.
        """
        if vocabulary < len(CHARACTERS) + 2:
            raise ValueError(f"vocabulary: expected at least {len(CHARACTERS) + 2}, got {vocabulary}")
        counts = Counter(word for text in texts for word in WORDS.findall(text.expandtabs(4)))
        words = [letters(word) for word in counts]
        pairs = _Pairs(words, list(counts.values()))
        merges = []
        while len(CHARACTERS) + 2 + len(merges) < vocabulary and (pair := pairs.most_frequent()) is not None:
            pairs.merge(pair, len(CHARACTERS) + 2 + len(merges))
            merges.append(pair)
        return cls(merges)

    @property
    def vocabulary(self) -> int:
        """Number of tokens: they are 0 to ``vocabulary`` - 1."""
        return len(self.pieces)

    def encode(self, text: str) -> Tensor:
        """Tokens, int64 [n]. A tab counts as four columns' blanks; other characters become ``UNKNOWN``."""
        tokens: list[int] = []
        for word in WORDS.findall(text.expandtabs(4)):
            if word not in self._known:
                self._known[word] = self._encode_word(word)
            tokens += self._known[word]
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens [n], for people to read: ends, unknown characters and masks have signs of their own."""
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected one dimension, got {list(tokens.shape)}")
        numbers = tokens.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) <= self.vocabulary:
            raise ValueError(f"tokens: expected 0 to {self.vocabulary} (a mask), got {min(numbers)} to {max(numbers)}")
        return "".join([*self.pieces, MASK_SIGN][number] for number in numbers)

    def _encode_word(self, word: str) -> list[int]:
        """Pairs in the order in which they were learned."""
        tokens = letters(word)
        while len(tokens) > 1:
            rank = min(self._ranks.get(pair, len(self.merges)) for pair in zip(tokens, tokens[1:], strict=False))
            if rank == len(self.merges):
                break
            tokens = merged(tokens, self.merges[rank], len(CHARACTERS) + 2 + rank)
        return tokens


def letters(word: str) -> list[int]:
    """A token for every character."""
    return [LETTERS.get(character, UNKNOWN) for character in word]


def merged(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """``tokens`` with ``token`` in place of each ``pair``, from the left."""
    result, index = [], 0
    while index < len(tokens):
        if tuple(tokens[index : index + 2]) == pair:
            result.append(token)
            index += 2
        else:
            result.append(tokens[index])
            index += 1
    return result


class _Pairs:
    """How often each pair of neighbours stands in the words, and in which words; kept while words change."""

    def __init__(self, words: list[list[int]], counts: list[int]):
        self.words, self.counts = words, counts
        self.frequency: Counter[tuple[int, int]] = Counter()
        self.places: dict[tuple[int, int], set[int]] = {}
        for index in range(len(words)):
            self._count(index, 1)

    def most_frequent(self) -> tuple[int, int] | None:
        best = max(self.frequency.items(), key=lambda item: (item[1], -item[0][0], -item[0][1]), default=(None, 0))
        return best[0] if best[1] > 1 else None

    def merge(self, pair: tuple[int, int], token: int) -> None:
        for index in self.places.pop(pair):
            self._count(index, -1)
            self.words[index] = merged(self.words[index], pair, token)
            self._count(index, 1)
        self.frequency.pop(pair, None)

    def _count(self, index: int, sign: int) -> None:
        word = self.words[index]
        for pair in zip(word, word[1:], strict=False):
            if UNKNOWN not in pair:
                self.frequency[pair] += sign * self.counts[index]
                self.places.setdefault(pair, set()).add(index)
