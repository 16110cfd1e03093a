"""Text that is on the machine anyway: what the masked language model is trained and measured on."""

import re
import shutil
import subprocess
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pydenoise.models.bpe import BPE, END

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}  # encodings: tables
SUFFIXES = (".py", ".txt", ".md")
HELD_OUT = 20  # one text in so many is for validation
BIBLE_SECONDS = 60


@dataclass(frozen=True)
class Corpus:
    """Whole texts to train on, and others to measure on."""

    name: str
    training: list[str]
    validation: list[str]


def load_corpus(source: str = "stdlib") -> Corpus:
    """The texts of ``source``, with one in twenty held out: which one follows from its name alone.

    Args:
        source: "stdlib": Python's own library, its tests left out, 11 MB; "bible": the King James Bible, 4 MB, which
            Debian's ``bible-kjv`` prints; else the path of a text file (its end is held out), or of a folder of
            ``.py``, ``.txt`` and ``.md`` files.

    Raises ValueError if there is no such text here.
    """
    texts = _bible() if source == "bible" else _files(_standard_library() if source == "stdlib" else Path(source))
    if sum(map(len, texts.values())) < 2 * HELD_OUT:
        raise ValueError(f"source: expected 'stdlib', 'bible', or a file or folder with text, found none in {source!r}")
    if len(texts) == 1:
        (text,) = texts.values()
        where = len(text) - len(text) // HELD_OUT
        return Corpus(source, [text[:where]], [text[where:]])
    names = sorted(texts)
    held_out = {name for name in names if zlib.crc32(name.encode()) % HELD_OUT == 0} or {names[0]}
    held_out = held_out if len(held_out) < len(names) else {names[0]}
    return Corpus(
        source, [texts[name] for name in names if name not in held_out], [texts[name] for name in sorted(held_out)]
    )


def tokens_of(texts: list[str], tokenizer: BPE) -> Tensor:
    """All texts in a row, an end token behind each: int64, 1-D."""
    end = torch.tensor([END])
    return torch.cat([part for text in texts for part in (tokenizer.encode(text + "\n"), end)])


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files(path: Path) -> dict[str, str]:
    if path.is_file():
        return {path.name: path.read_text("utf-8", "replace").strip()}
    files = {file.relative_to(path): file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()}
    texts = {
        str(name): file.read_text("utf-8", "replace").strip()
        for name, file in files.items()
        if not SKIPPED & set(name.parts)
    }
    return {name: text for name, text in texts.items() if text}


def _bible() -> dict[str, str]:
    """The 66 books, a verse a line, without their numbers."""
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
