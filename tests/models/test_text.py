"""Texts: which files are taken, which are held out, and what is said where there are none."""

import shutil

import pytest

from pydenoise.models import text
from pydenoise.models.bpe import BPE, END


def test_standard_library():
    corpus = text.load_corpus()
    sizes = [sum(map(len, texts)) for texts in (corpus.training, corpus.validation)]
    assert sizes[0] > 5e6 and 0.01 < sizes[1] / sizes[0] < 0.2
    assert not set(corpus.training) & set(corpus.validation)
    assert any("class OrderedDict" in part for part in corpus.training + corpus.validation)


def test_folder(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"this is text number {number}")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text("not taken")
    corpus = text.load_corpus(str(tmp_path))
    assert sorted(corpus.training + corpus.validation) == sorted(f"this is text number {n}" for n in range(40))
    assert corpus.training and corpus.validation
    again = text.load_corpus(str(tmp_path))
    assert again == corpus


def test_of_a_single_file_the_end_is_held_out(tmp_path):
    (tmp_path / "a.md").write_text("0123456789" * 10)
    corpus = text.load_corpus(str(tmp_path / "a.md"))
    assert corpus.training == ["0123456789" * 9 + "01234"] and corpus.validation == ["56789"]


def test_tokens_of():
    tokenizer = BPE()
    tokens = text.tokens_of(["ab", "c"], tokenizer)
    assert tokens.tolist() == [*tokenizer.encode("ab\n"), END, *tokenizer.encode("c\n"), END]


def test_no_text(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="source: expected 'stdlib', 'bible', or a file or folder"):
        text.load_corpus(str(tmp_path / "nothing"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="apt-get install bible-kjv"):
        text.load_corpus("bible")


def test_bible(tmp_path, monkeypatch):
    """A program that prints as Debian's does."""
    program = tmp_path / "bible"
    verses = "\n".join(f"{book}{n}:1 And it came to pass {n}," for book in ("Ge", "1Sa", "Rev") for n in range(9))
    program.write_text(f"#!/bin/sh\ntest \"$*\" = '-f gen1:1-rev22:21' && cat <<END\n{verses}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    corpus = text.load_corpus("bible")
    books = corpus.training + corpus.validation
    assert len(books) == 3 and all(book.startswith("And it came to pass 0,\nAnd it came") for book in books)
    program.write_text("#!/bin/sh\necho 'no data file' >&2\n")
    with pytest.raises(ValueError, match="printed no verses: no data file"):
        text.load_corpus("bible")
