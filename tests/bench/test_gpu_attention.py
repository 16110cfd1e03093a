"""bench/gpu_attention.py on the CPU, with the reference in place of the GPU's rows. No time is asserted."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pydenoise.ops import block_sparse_attention, registry

FOLDER = Path(__file__).parents[2] / "bench"
ON_CPU = {"backends": ("reference",), "device": "cpu"}


def load(name: str):
    """A script of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_attention = load("gpu_attention")
gpu = load("gpu")


@pytest.mark.parametrize("name", ["gqa", "lengths", "holes", "no_queries"])
def test_the_reference_passes_every_check(name):
    done = dict(gpu_attention.checks(name, dtypes=(torch.float32, torch.bfloat16), **ON_CPU))
    assert set(done.values()) == {None}, done
    whats = {" ".join(key.split()[1:-3]) for key in done if key.startswith("block")}
    assert "forward" in whats and (name == "no_queries" or len(whats) == 5)


def test_confidence_is_checked_too():
    done = dict(gpu_attention.checks("guided", dtypes=(torch.float32,), **ON_CPU))
    assert len(done) == 3 and set(done.values()) == {None} and all("token_confidence" in name for name in done)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda output, lse: (output + 0.01, lse), "output: error"),
        (lambda output, lse: (output * torch.nan, lse), "output: error nan"),
        (lambda output, lse: (output, lse.masked_fill(lse == -torch.inf, 0)), "lse: -inf in other places"),
        (lambda output, lse: (output[:, :1], lse), "output: shape"),
    ],
)
def test_wrong_rows_are_found(monkeypatch, spoil, said):
    rows = registry.rows

    def spoiled(op):
        broken = [replace(row, run=lambda *a, run=row.run: spoil(*run(*a))) for row in rows(op)]
        return broken if op == block_sparse_attention.OP else rows(op)

    monkeypatch.setattr(registry, "rows", spoiled)
    done = dict(gpu_attention.checks("holes", dtypes=(torch.float32,), **ON_CPU))
    assert said in done["block_sparse_attention forward holes float32 reference"]


def test_rows_that_are_not_there_or_raise_are_told_apart():
    wrong = gpu_attention._attempt(None, (), lambda r: [], "cpu")
    assert wrong == "skipped: no such row"

    def fail(*args):
        raise RuntimeError("launch failed\nmore")

    row = registry.Backend("op", "x", 1, lambda *a: None, fail, "")
    assert gpu_attention._attempt(row, (), lambda r: [], "cpu") == "RuntimeError: launch failed"


def test_a_sequence_is_timed_with_the_pattern_and_compared():
    sequence = gpu_attention.sequences(dry=True)[0]
    options = {"rounds": 1, "with_compile": False, "peak": 0.1, **ON_CPU}
    row = gpu_attention.time_sequence(sequence, gpu_attention.on_cpu, **options)
    assert not row["not_run"], row["not_run"]
    assert {"sdpa flash", "reference", "reference int8", "mask, lse known reference"} <= set(row["ms"])
    assert set(row["speedup_over_dense"]) == {n for n in row["ms"] if n != "sdpa flash"}
    assert "importance reference" not in row["of_peak"] and row["density"] == pytest.approx(0.3, abs=0.03)
    assert any("over dense" in line for line in gpu_attention.describe_row(row))


def test_training_runs_the_backward_pass():
    sequence = gpu_attention.sequences(dry=True)[2]
    assert sequence.train and sequence.flops(1.0) == 3.5 * replace(sequence, train=False).flops(1.0)
    row = gpu_attention.time_sequence(sequence, gpu_attention.on_cpu, rounds=1, with_compile=False, **ON_CPU)
    assert set(row["ms"]) == {"sdpa flash", "reference"} and not row["not_run"]


def test_wrong_and_failing_providers_are_not_timed(monkeypatch):
    def calls(problem, backends, with_compile):
        def broken(*qkv):
            raise RuntimeError("no kernel image")

        dense = gpu_attention.dense_calls("cpu")["sdpa flash"]
        return {
            "sdpa flash": problem.attention(dense),
            "triton": problem.attention(dense),  # dense where it should be sparse
            "cuda": problem.attention(broken),
        }

    monkeypatch.setattr(gpu_attention, "attention_calls", calls)
    sequence = replace(gpu_attention.sequences(dry=True)[0], train=True)
    row = gpu_attention.time_sequence(sequence, gpu_attention.on_cpu, rounds=1, **ON_CPU)
    assert set(row["ms"]) == {"sdpa flash"}
    assert row["not_run"]["triton"].startswith("WRONG") and row["not_run"]["cuda"] == "RuntimeError: no kernel image"


def test_bars_are_those_of_the_specification():
    ms = {"sdpa flash": 110.0, "sdpa cudnn": 100.0, "flex": 60.0, "triton": 50.0, "cuda": 40.0, "cuda int8": 34.0}
    ms["mask, lse known triton"] = 71.0
    row = gpu_attention._row(gpu_attention.Sequence(65536), 0.3, ms, {}, 700.0)
    verdicts = {(bar["provider"], bar["bar"]): bar["met"] for bar in row["bars"]}
    assert verdicts["triton", "<= 53 ms"] and not verdicts["cuda", "<= 39 ms"] and verdicts["cuda int8", "<= 35 ms"]
    assert not verdicts["mask, lse known triton", "<= 70 ms"]
    assert not verdicts["triton", ">= 1.3x flex"] and verdicts["cuda", ">= 1.3x flex"]
    assert row["speedup_over_dense"]["cuda"] == 2.5  # over the faster of torch's kernels
    assert verdicts["triton", "> 1x dense"]
    lengths = {s.length for s in gpu_attention.sequences() if not s.train}
    assert lengths == {4096, 8192, 16384, 32768, 65536}


def test_the_dry_run_ends_well(capsys):
    assert gpu_attention.main(["--dry", "--filter", "single"]) == 0
    assert "0 checks failed" in capsys.readouterr().out


def test_the_script_has_the_part_and_counts_what_it_says(tmp_path):
    args = gpu.parse(["--parts", "attention", "--only", "check"])
    assert args.parts == ["attention"] and gpu.parse([]).parts == list(gpu.PARTS)
    run = gpu.Run(args, tmp_path / "result.json", {})
    outcomes = [("a", None), ("b", "skipped: no such row"), ("c", "error 1"), ("d", "skipped: no such row")]
    assert gpu.tally(run, "attention", iter(outcomes)) == 1
    assert run.result["check_attention"] == {
        "passed": 1, "skipped": 2, "failures": [{"check": "c", "wrong": "error 1"}],
        "reasons": {"skipped: no such row": 2},
    }  # fmt: skip
