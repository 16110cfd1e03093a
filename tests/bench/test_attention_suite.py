"""The attention suite: its cases, floors, patterns, providers and reference, on tiny stand-ins. No time is asserted."""

import io

import pytest
import torch
from rich.console import Console

from pydenoise.benchmarks import (
    attention,
    attention_cases,
    attention_generation,
    attention_memory,
    attention_peers,
    report,
    suites,
)
from pydenoise.benchmarks.attention_cases import (
    AttentionBench,
    ConfidenceBench,
    GenerationBench,
    MemoryBench,
    PatternBench,
    kept_blocks,
)
from pydenoise.benchmarks.attention_inputs import draw, mask_of
from pydenoise.benchmarks.cases import Bar
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, choose

PEAKS = Peaks(100e9, 200e9, {1 << 20: 80e9, 1 << 28: 10e9}, vnni_dot=400e9)
OPTIONS = suites.Options(repeats=2)
SMALL = {"heads": 2, "head_size": 32, "block_size": 32}


def run_one(key: str, providers, case=None) -> dict:
    suite = suites.get_suite("attention")
    case = next(c for c in suite.cases(True) if c.key == key) if case is None else case
    return suites.run_case(suite, case, providers, Setting(1), OPTIONS)


# ------------------------------------------------------------------------------------------------------------ cases


def test_work_is_that_of_the_kept_blocks():
    dense = AttentionBench("", "", "", (), 100, "fp32", 1.0, **SMALL)
    assert dense.pairs() == 2 * 100 * 100 and dense.flops() == 4 * 2 * 100 * 100 * 32
    assert dense.floor_seconds(PEAKS, "fp32") == pytest.approx(dense.flops() / 100e9)
    assert dense.floor_seconds(PEAKS, "bf16") == pytest.approx(dense.flops() / 200e9)
    int8 = dense.flops() / 2 * (1 / 400e9 + 1 / 200e9)
    assert dense.floor_seconds(PEAKS, "int8") == pytest.approx(int8) and dense.floor_seconds(PEAKS, "fp16") is None
    training = AttentionBench("", "", "", (), 100, "fp32", 1.0, training=True, **SMALL)
    assert training.flops() == 3.5 * dense.flops()
    sparse = AttentionBench("", "", "", (), 100, "fp32", 0.3, **SMALL)
    assert sparse.pairs() == mask_of(sparse, Setting(1)).to_token_mask().sum().item()
    pattern = PatternBench("", "", "", (), 100, "fp32", **SMALL)
    assert pattern.floor_seconds(PEAKS, "fp32") == pytest.approx(dense.flops() / 2 / 100e9)
    confidence = ConfidenceBench("", "", "", (), 4, 1000, "bf16")
    assert confidence.floor_seconds(PEAKS, "bf16") == pytest.approx(8000 / 80e9)


@pytest.mark.parametrize("n", [8, 16, 32])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.3])
def test_random_patterns_have_their_density_in_rows_of_almost_one_length(n, density):
    kept = kept_blocks("random", density, 8, n)
    assert kept.shape == (1, 8, n, n) and kept.sum().item() == int(8 * n * n * density + 1e-6)
    counts = kept.sum(-1)
    assert counts.min() >= int(n * density + 1e-6) and counts.max() <= -int(-n * density // 1)
    assert density == 1 or not torch.equal(kept[0, 0], kept[0, 1])
    assert torch.equal(kept, kept_blocks("random", density, 8, n))


def test_a_sparsed_pattern_keeps_the_share_on_the_generated_side_and_differs_between_rows():
    kept = kept_blocks("sparsed", 0.3, 8, 32)
    assert (kept[..., 16:].sum(-1) == int(16 * 0.3) + 1).all()
    prompt = kept[..., :16].sum(-1)
    assert prompt.max() <= int(32 * 0.3) + 1 and len(prompt.unique()) > 3
    with pytest.raises(ValueError, match="pattern: expected 'random' or 'sparsed', got 'diagonal'"):
        kept_blocks("diagonal", 0.3, 8, 32)


def test_optional_cases_run_only_when_they_are_named():
    suite = suites.get_suite("attention")
    usual = suites.select_cases(suite, suites.Options())
    assert not any(case.optional for case in usual) and not any("fp16" in case.group for case in usual)
    long = suites.select_cases(suite, suites.Options(cases="forward */64k*"))
    assert {case.length for case in long} == {65536} and all(case.rounds == 3 for case in long)
    assert suites.select_cases(suite, suites.Options(cases="training fp16"))
    usual = suites.select_cases(suite, suites.Options(cases="*k 0.3"))
    assert {case.length for case in usual} == {1024, 2048, 4096} and not any(case.optional for case in usual)


def test_bars_are_those_of_the_specification():
    cases = {case.key: case for case in attention_cases.attention_cases()}
    dense, flex = cases["forward bf16/4k 0.3"].bars
    assert (dense.speedup, dense.against, dense.subjects) == (
        8.0, ("sdpa-bf16", "sdpa-projection-bf16"), ("ours-cpu-bf16",),
    )  # fmt: skip
    assert (flex.speedup, flex.against) == (2.0, ("flex-bf16",))
    assert [bar.speedup for bar in cases["forward fp32/1k 0.5"].bars] == [2.6]
    assert [bar.speedup for bar in cases["pattern fp32/2k"].bars] == [1.0, 2.0]
    memory = cases["memory/attention 64k"]
    assert memory.bars[0].peak_bytes == int(1.2 * 4 * 8 * 65536 * 64 * 4) + (64 << 20)


def test_layouts_hold_the_same_values():
    case = AttentionBench("", "", "", (), 50, "bf16", **SMALL)
    heads, projection = (draw(case, Setting(1), "bf16", layout) for layout in ("heads", "projection"))
    assert all(map(torch.equal, heads, projection)) and heads[0].dtype == torch.bfloat16
    assert heads[0].is_contiguous() and projection[0].stride() == (50 * 3 * 64, 32, 3 * 64, 1)


# -------------------------------------------------------------------------------------------------------- providers

QUICK = [case.key for case in attention_cases.attention_cases(True) if not isinstance(case, MemoryBench)]
COMPILED = ("flex", "flex-bf16", "flex-fp16")


@pytest.mark.parametrize("key", QUICK)
def test_every_provider_that_runs_here_agrees_with_the_reference(key):
    names = [p.name for p in attention.PROVIDERS if p.name not in COMPILED]
    states = run_one(key, choose(attention.PROVIDERS, names))["providers"]
    said = {name: state.get("reason") for name, state in states.items() if state["status"] in ("wrong", "failed")}
    assert not said
    timed = {name for name, state in states.items() if "timing" in state}
    assert timed & {p.name for p in attention.PROVIDERS if not p.ours}


def reference_provider(precision: str) -> Provider:
    """Ours on the backend that is always there."""
    import pydenoise.functional as PF

    def prepare(case, setting):
        mask, tensors = mask_of(case, setting), draw(case, setting, precision, "heads")
        call = lambda *qkv: PF.block_sparse_attention(*qkv, mask, backend="reference")  # noqa: E731
        return attention._contender(case, call, tensors, "output")

    return Provider("ours-reference", "ours reference", prepare, precision, ours=True)


@pytest.mark.parametrize("key", ["forward fp32/100 0.3", "forward fp32/100 sparsed 0.3", "training fp32/100 0.5"])
def test_the_reference_backend_agrees_with_the_float64_results_on_some_rows(key):
    masked = choose(attention.PROVIDERS, ["sdpa-masked"])
    record = run_one(key, [reference_provider("fp32"), *masked])
    assert {state["status"] for state in record["providers"].values()} == {"ok"}, record["providers"]
    errors = record["providers"]["ours-reference"]["errors"]
    assert max(errors.values()) < 2e-6 and len(errors) == (4 if key.startswith("training") else 1)
    assert set(record["comparisons"]["ours-reference"]) == {"sdpa-masked"}


def test_a_wrong_pattern_is_found():
    def prepare(case, setting):
        tensors = draw(case, setting, "fp32", "heads")
        return attention._contender(case, attention_peers.sdpa, tensors, "output")  # dense where it should be sparse

    state = run_one("forward fp32/100 0.3", [Provider("liar", "liar", prepare)])["providers"]["liar"]
    assert state["status"] == "wrong"


@pytest.mark.slow
def test_flex_attention_is_compiled_and_agrees():
    record = run_one("forward fp32/100 sparsed 0.3", choose(attention.PROVIDERS, ["flex"]))
    assert record["providers"]["flex"]["status"] == "ok", record["providers"]


def test_flex_attention_says_why_it_does_not_run(monkeypatch):
    def broken(*args, **kwargs):
        def call(*args, **kwargs):
            raise NotImplementedError("no compiler\nhere")

        return call

    case = AttentionBench("", "", "", (), 64, "fp32", **SMALL)
    tensors = draw(case, Setting(1), "fp32", "heads")[:3]
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(Skip, match="does not compile here: NotImplementedError: no compiler here"):
        attention_peers.flex(case, Setting(1), mask_of(case, Setting(1)), tensors)
    training = AttentionBench("", "", "", (), 64, "fp32", training=True, **SMALL)
    with pytest.raises(Skip, match="for inference only"):
        attention_peers.flex(training, Setting(1), mask_of(case, Setting(1)), tensors)


def test_flex_attention_that_is_not_compiled_does_not_count(monkeypatch):
    def eager(function, **kwargs):
        return lambda query, key, value, block_mask: torch.softmax(query @ key.mT, -1) @ value

    case = AttentionBench("", "", "", (), 64, "fp32", **SMALL)
    monkeypatch.setattr(torch, "compile", eager)
    with pytest.raises(Skip, match="was not compiled: the call runs aten::_softmax"):
        attention_peers.flex(case, Setting(1), mask_of(case, Setting(1)), draw(case, Setting(1), "fp32", "heads")[:3])


# ----------------------------------------------------------------------------------------------------------- memory


def test_memory_is_measured_in_a_child_and_counts_inputs_and_outputs():
    case = MemoryBench("attention 2k", "memory", "", (), "attention", 2048)
    measured = attention_memory.measure_in_child(case, 1, "reference")
    assert measured["peak_bytes"] > case.needed_bytes() and measured["seconds"] > 0
    assert measured["inputs_bytes"] >= 0.75 * case.needed_bytes() * 0.95


def test_a_backend_that_is_not_there_skips_the_measurement():
    case = MemoryBench("pattern", "memory", "", (), "pattern", 256, "bf16", **SMALL)
    with pytest.raises(Skip, match="triton"):
        attention_memory.measure_in_child(case, 1, "triton")


def test_a_peak_is_judged_and_shown():
    bar = Bar(peak_bytes=300 << 20, subjects=("ours-memory",))
    case = MemoryBench("attention 64", "memory", "", (bar,), "attention", 64, **SMALL)
    peaks = {"few": 200 << 20, "many": 400 << 20}
    for name, verdict in (("few", "met"), ("many", "missed")):
        contender = Contender(memory=lambda name=name: {"peak_bytes": peaks[name], "seconds": 2.5})
        provider = Provider("ours-memory", "ours cpu", lambda case, setting, c=contender: c, ours=True)
        record = run_one("", [provider], case)
        assert [bar["verdict"] for bar in record["bars"]] == [verdict]
        assert "timing" not in record["providers"]["ours-memory"]
        console = Console(width=120, record=True, file=io.StringIO())
        result = {"providers": {"ours-memory": {"label": "ours cpu", "precision": "fp32", "ours": True}}}
        console.print(report._memory_table(result, "memory", [record]))
        text = console.export_text()
        assert f"{peaks[name] >> 20} MiB" in text and "2.5 s" in text and "≤300 MiB" in text


# ------------------------------------------------------------------------------------------------------- generation


def test_a_generation_is_timed_with_and_without_sparsed():
    record = run_one("generation fp32/64", choose(attention.PROVIDERS, ["ours-generation", "dense-generation"]))
    states = record["providers"]
    if states["ours-generation"]["status"] == "skipped":
        pytest.skip(states["ours-generation"]["reason"])
    assert {state["status"] for state in states.values()} == {"ok"}, states
    assert "sparse of 8 steps" in states["ours-generation"]["note"] and record["control"] is None
    assert set(record["comparisons"]["ours-generation"]) == {"dense-generation"}


def test_generation_models_are_the_same_and_predict_something():
    case = next(c for c in attention_cases.attention_cases(True) if isinstance(c, GenerationBench))
    tokens = torch.arange(case.length)[None] % case.vocabulary
    first, second = (attention_generation.build_model(case, Setting(1))(tokens) for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0.1


def test_the_suite_is_a_command():
    assert suites.SUITES["attention"].providers is attention.PROVIDERS
