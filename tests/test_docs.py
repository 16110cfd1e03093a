"""The examples of the user pages run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {  # and what each one prints
    "blocks-afa": "channels of the first and the last timestep: 0 to 50, 13 to 63",
    "blocks-bilateral": "root mean square error 0.099, denoised 0.02",
    "blocks-continuous": "million parameters",
    "blocks-dcls": "P[0] moved by +2",
    "blocks-hyperspectral": "4 components; noise of",
    "blocks-wavelet": "doubled: (2, 16, 32, 32)",
    "samplers": "means of the classes: tensor([-",
    "sparse-attention": "dense and",
}


@pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")
@pytest.mark.parametrize("page", PAGES)
def test_examples(page, tmp_path, monkeypatch, capsys):
    for package in ("transformers", "diffusers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    page, printed = DOCS / f"{page}.md", PAGES[page]
    text = page.read_text()
    namespace: dict = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks, "the page has no example"
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    assert printed in capsys.readouterr().out
