"""bench/windows.py: what it counts, and that windows stay small where the sample grows."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "bench" / "windows.py"


@pytest.fixture
def bench():
    """A script of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location("bench_windows", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_peak_counts_what_lives_at_once(bench):
    with bench.Peak() as peak:
        kept = torch.zeros(1000)
        view = kept[:10]
        for _ in range(3):
            other = torch.zeros(500)
            del other
    assert peak.most == 6000 and view.numel() == 10


def test_the_table(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WIDTHS", (64, 128))
    monkeypatch.setattr(bench, "WHOLE", 0)
    bench.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["64", "128"] and all(row[2] == "-" for row in rows)
    for narrow, wide in zip(rows[0][3:], rows[1][3:], strict=True):
        assert float(wide) < 1.1 * float(narrow)
