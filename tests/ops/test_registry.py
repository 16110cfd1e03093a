"""The registry: order, selection, refusals with their reasons, the announced fallback, and ``explain``."""

import warnings

import pytest
import torch

import pydenoise as pdn
from pydenoise.ops import registry
from pydenoise.ops.registry import Backend, BackendUnavailable, FallbackWarning


@pytest.fixture
def op(monkeypatch):
    """An op of its own with three rows; ``cpu`` refuses negative numbers, ``cuda`` everything."""
    monkeypatch.setattr(registry, "_rows", {})
    rows = {
        "reference": (0, lambda x: None),
        "cuda": (20, lambda x: "there is no GPU"),
        "cpu": (10, lambda x: "negative" if x < 0 else None),
    }
    for name, (priority, unsupported) in rows.items():
        registry.register(Backend("double", name, priority, unsupported, lambda x, name=name: (name, 2 * x), "made up"))
    return "double"


def test_rows_come_by_priority(op):
    assert [row.name for row in registry.rows(op)] == ["cuda", "cpu", "reference"]
    assert registry.ops() == [op]


def test_auto_takes_the_first_that_can_run(op):
    assert registry.select(op, "auto", (1,)).run(1) == ("cpu", 2)
    with pytest.warns(FallbackWarning):
        assert registry.select(op, "auto", (-1,)).name == "reference"


def test_fallback_is_announced_once_with_reasons_and_counted_always(op):
    with pytest.warns(FallbackWarning, match="cuda: there is no GPU; cpu: negative"):
        registry.select(op, "auto", (-1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.select(op, "auto", (-1,))
        registry.select(op, "reference", (1,))  # asked for by name: no fallback
    assert registry.fallbacks[op] == 2


def test_named_backend_that_cannot_run_says_why(op):
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run this call: there is no GPU"):
        registry.select(op, "cuda", (1,))
    with pytest.raises(BackendUnavailable, match="has no 'triton' backend; it has cuda, cpu, reference"):
        registry.select(op, "triton", (1,))
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        registry.select(op, "fast", (1,))


def test_nobody_can_run(op, monkeypatch):
    monkeypatch.setitem(registry._rows, op, registry.rows(op)[:1])
    with pytest.raises(BackendUnavailable, match="no backend can run this call.\n  cuda: there is no GPU"):
        registry.select(op, "auto", (1,))


def test_bad_registrations(op):
    row = registry.rows(op)[0]
    with pytest.raises(ValueError, match="already registered"):
        registry.register(row)
    with pytest.raises(ValueError, match="backend: expected one of"):
        registry.register(Backend(op, "abacus", 1, lambda: None, lambda: None, ""))
    with pytest.raises(ValueError, match="no op named 'triple'; known ops: double"):
        registry.rows("triple")


def test_explain_prints_every_verdict(capsys):
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    explanation = pdn.explain("weighted_conv2d", x, w, None, padding=1)
    printed = capsys.readouterr().out
    names = [row.name for row in registry.rows("weighted_conv")]
    assert [name for name, _ in explanation.verdicts] == names
    assert all(name in printed for name in names) and explanation.chosen in names
    assert printed == f"{explanation}\n"


def test_explain_checks_arguments():
    with pytest.raises(ValueError, match="op: expected one of weighted_conv1d"):
        pdn.explain("conv4d")
    with pytest.raises(ValueError, match="channels"):
        pdn.explain("weighted_conv2d", torch.randn(1, 2, 8, 8), torch.randn(4, 3, 3, 3), None)
