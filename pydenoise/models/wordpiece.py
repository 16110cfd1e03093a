"""WordPiece: the tokens of BERT's uncased models.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", NAACL 2019;
Wu et al., "Google's Neural Machine Translation System", 2016 (the longest piece first).
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pydenoise.models.weights import WeightsError

PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST_WORD = 100  # characters; a longer word is unknown
IDEOGRAPHS = (  # every one is a word
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class WordPiece:
    """Text to tokens. ``pieces``: the vocabulary in the order of the tokens; pieces inside a word begin with ``##``."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces = list(pieces)
        self.numbers = {piece: number for number, piece in enumerate(self.pieces)}
        missing = [piece for piece in (PADDING, UNKNOWN, START, END) if piece not in self.numbers]
        if missing:
            raise ValueError(f"pieces: {', '.join(missing)} missing in a vocabulary of {len(self.pieces)}")

    @classmethod
    def from_file(cls, path: str | Path) -> "WordPiece":
        """Of a ``vocab.txt`` with one piece a line. Raises :class:`WeightsError` if it is none."""
        try:
            return cls(Path(path).read_text("utf-8").rstrip("\n").split("\n"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: not a vocabulary: {error}") from error

    def encode(self, text: str, longest: int = 512) -> list[int]:
        """The tokens of a text, between a start and an end token, at most ``longest`` in all."""
        if longest < 2:
            raise ValueError(f"longest: expected at least 2, for the start and the end, got {longest}")
        tokens = [token for word in split_words(text) for token in self._pieces_of(word)]
        return [self.numbers[START], *tokens[: longest - 2], self.numbers[END]]

    def batch(self, texts: Sequence[str], longest: int = 512) -> tuple[Tensor, Tensor]:
        """(tokens int64 [B, L], padded at the end; lengths int64 [B])."""
        if isinstance(texts, str) or not texts:
            raise ValueError("texts: expected one text or more, in a list")
        encoded = [self.encode(text, longest) for text in texts]
        lengths = torch.tensor([len(tokens) for tokens in encoded])
        batch = torch.full((len(texts), int(lengths.max())), self.numbers[PADDING])
        for row, tokens in zip(batch, encoded, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return batch, lengths

    def _pieces_of(self, word: str) -> list[int]:
        """From the front, always the longest piece that there is; one unknown token if the word cannot be had so."""
        tokens, start = [], 0
        while start < len(word) <= LONGEST_WORD:
            candidates = ((end, ("##" if start else "") + word[start:end]) for end in range(len(word), start, -1))
            found = next(((end, self.numbers[piece]) for end, piece in candidates if piece in self.numbers), None)
            if found is None:
                return [self.numbers[UNKNOWN]]
            start, token = found
            tokens.append(token)
        return tokens or [self.numbers[UNKNOWN]]


def split_words(text: str) -> Iterator[str]:
    """Lower-case words without accents; every punctuation mark and ideograph is a word."""
    plain = unicodedata.normalize("NFD", "".join(_clean(character) for character in text).lower())
    word = ""
    for character in plain:
        category = unicodedata.category(character)
        if category == "Mn":
            continue
        alone = _is_punctuation(character, category)
        if alone or character.isspace():
            if word:
                yield word
            word = ""
            if alone:
                yield character
        else:
            word += character
    if word:
        yield word


def _clean(character: str) -> str:
    """Blanks for all white space, nothing for control characters, blanks around ideographs."""
    if character in "\t\n\r" or unicodedata.category(character) == "Zs":
        return " "
    if unicodedata.category(character)[0] == "C" or character == "\N{REPLACEMENT CHARACTER}":
        return ""
    if any(first <= ord(character) <= last for first, last in IDEOGRAPHS):
        return f" {character} "
    return character


def _is_punctuation(character: str, category: str) -> bool:
    """Also the signs of ASCII that Unicode counts as symbols, such as ``$`` and ``^``."""
    return category[0] == "P" or (
        character.isascii() and not character.isalnum() and character.isprintable() and character != " "
    )
