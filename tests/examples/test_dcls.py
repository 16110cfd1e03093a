"""The example of learnable spacings finds the echoes."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "examples" / "dcls.py"


def test_echoes_are_found(capsys):
    spec = importlib.util.spec_from_file_location("dcls_example", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    lines = capsys.readouterr().out.splitlines()[-len(example.ECHOES) :]
    for line, ((down, right), strength) in zip(lines, sorted(example.ECHOES.items()), strict=True):
        place, rest = line.strip("(").split("):", 1)
        found = [float(part) for part in (*place.split(","), rest.split()[0])]
        assert all(abs(a - b) < 0.1 for a, b in zip(found, (down, right, strength), strict=True)), line
