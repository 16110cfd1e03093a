"""The examples of the user pages run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("sparse-*.md"))


@pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch, capsys):
    for package in ("transformers", "diffusers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks, "the page has no example"
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    assert "dense and" in capsys.readouterr().out
