"""Text that is on the machine anyway, as characters: what the masked language model is trained and measured on."""

import re
import shutil
import subprocess
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

END, UNKNOWN = 0, 1  # the end of a file; a character that is not in the table
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = 2 + len(CHARACTERS)
SHOWN = "\N{SYMBOL FOR END OF TEXT}\N{REPLACEMENT CHARACTER}" + CHARACTERS + "\N{LIGHT SHADE}"  # the last: a mask
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo", "__phello__"}
HELD_OUT = 20  # one file in so many is for validation
BIBLE_SECONDS = 60

_TABLE = np.full(256, UNKNOWN, np.uint8)
_TABLE[np.frombuffer(CHARACTERS.encode("ascii"), np.uint8)] = np.arange(2, VOCABULARY, dtype=np.uint8)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens to measure on, int64, 1-D: whole files, each with ``END`` behind it."""

    name: str
    training: Tensor
    validation: Tensor


def encode(text: str) -> Tensor:
    """Tokens of a text, int64 [len(text) with tabs expanded]; a character beyond ASCII is ``UNKNOWN``."""
    codes = np.frombuffer(text.expandtabs(4).encode("utf-32-le", "replace"), np.uint32)
    return torch.from_numpy(_TABLE[np.minimum(codes, len(_TABLE) - 1)].astype(np.int64))


def decode(tokens: Tensor) -> str:
    """The text of tokens [L], for people to read: masks and what is no character have signs of their own."""
    if tokens.dim() != 1 or (tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= VOCABULARY):
        raise ValueError(f"tokens: expected numbers from 0 to {VOCABULARY} in one dimension, got {list(tokens.shape)}")
    return "".join(SHOWN[token] for token in tokens.tolist())


def load_corpus(source: str = "stdlib") -> Corpus:
    """The text of ``source``, with one file in twenty held out.

    Args:
        source: "stdlib": Python's own library, 13 MB of source; "bible": the King James Bible, 4 MB, which Debian's
            ``bible-kjv`` prints; else the path of a text file, or of a folder of ``.txt``, ``.md`` and ``.py`` files.

    Raises ValueError if there is no such text here.
    """
    parts = (
        _bible() if source == "bible" else _files(_standard_library() if source == "stdlib" else Path(source), source)
    )
    held_out = {name: zlib.crc32(name.encode()) % HELD_OUT == 0 for name in parts}  # the same on every machine
    if len(parts) > 1 and (all(held_out.values()) or not any(held_out.values())):
        held_out = {name: index % HELD_OUT == 0 for index, name in enumerate(sorted(parts))}
    if len(parts) == 1:
        parts, held_out = _cut(*parts.values())
    sides = []
    for side in (False, True):
        pieces = [encode(text + "\n") for name, text in sorted(parts.items()) if held_out[name] is side]
        sides.append(torch.cat([torch.cat((piece, torch.tensor([END]))) for piece in pieces]))
    return Corpus(source, *sides)


def _cut(text: str) -> tuple[dict[str, str], dict[str, bool]]:
    """A single text: its end is held out."""
    where = len(text) - len(text) // HELD_OUT
    return {"start": text[:where], "end": text[where:]}, {"start": False, "end": True}


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files(path: Path, source: str) -> dict[str, str]:
    if path.is_file():
        paths = [path]
    else:
        paths = [file for suffix in (".txt", ".md", ".py") for file in path.rglob(f"*{suffix}")]
        paths = [file for file in paths if not SKIPPED & set(file.relative_to(path).parts)]
    texts = {
        str(file.relative_to(path)): file.read_text("utf-8", "replace").strip() for file in paths if file.is_file()
    }
    texts = {name: text for name, text in texts.items() if text}
    if sum(map(len, texts.values())) < 2 * HELD_OUT:
        raise ValueError(f"source: expected 'stdlib', 'bible', or a file or folder with text, found none in {source!r}")
    return texts


def _bible() -> dict[str, str]:
    """The 66 books, without the numbers of the verses."""
    program = shutil.which("bible")
    if program is None:
        raise ValueError(
            "source: 'bible' is printed by the program `bible`: apt-get install bible-kjv (Debian, Ubuntu)"
        )
    done = subprocess.run([program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, timeout=BIBLE_SECONDS)
    books: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if match := re.match(r"(\d?[A-Za-z]+)\d+:\d+ (.*)", line):
            books.setdefault(match[1], []).append(match[2])
    if not books:
        raise ValueError(f"source: `{program}` printed no verses: {done.stderr.strip()[:200]}")
    return {name: "\n".join(verses) for name, verses in books.items()}
