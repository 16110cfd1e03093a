"""bench/gpu_samplers.py on the CPU, with the reference in place of the GPU's rows. No time is asserted."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pydenoise.ops import registry, sampler_step

FOLDER = Path(__file__).parents[2] / "bench"
ON_CPU = {"backends": ("reference",), "device": "cpu"}


def load(name: str):
    """A script of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_samplers = load("gpu_samplers")
gpu = load("gpu")


@pytest.mark.parametrize("name", ["everything", "noise_keys", "unread", "moments", "empty_batch", "run DDIM"])
def test_the_reference_passes_every_check(name):
    done = dict(gpu_samplers.checks(name, dtypes=(torch.float32, torch.bfloat16), **ON_CPU))
    assert done and set(done.values()) == {None}, done


@pytest.mark.parametrize(
    "spoil, case, said",
    [
        (lambda args, sums: args[13].add_(0.01), "ddim", "out: error"),
        (lambda args, sums: args[13].view(-1)[5:6].fill_(torch.nan), "ddim", "out: another shape, or NaN elsewhere"),
        (lambda args, sums: args[4].mul_(1.001), "multistep", "history: error"),
        (lambda args, sums: args[17].fill_(3), "ddim", "faults: [3]"),
        (lambda args, sums: sums.mul_(1.01), "moments", "sums: error"),
    ],
)
def test_wrong_rows_are_found(monkeypatch, spoil, case, said):
    rows = registry.rows

    def spoiled(op):
        def run(*args, run):
            sums = run(*args)
            spoil(args, sums)
            return sums

        return [replace(row, run=lambda *a, run_=row.run: run(*a, run=run_)) for row in rows(op)]

    monkeypatch.setattr(registry, "rows", spoiled)
    done = dict(gpu_samplers.checks(case, dtypes=(torch.float32,), **ON_CPU))
    assert said in done[f"sampler_step {case} float32 reference"]


def test_rows_that_are_not_there_or_raise_are_told_apart(monkeypatch):
    done = dict(gpu_samplers.checks("ddim", dtypes=(torch.float32,), backends=("x",), device="cpu"))
    assert done["sampler_step ddim float32 x"] == "skipped: no such row"

    def fail(*args):
        raise RuntimeError("launch failed\nmore")

    row = registry.Backend(sampler_step.OP, "y", 1, lambda *a: None, fail, "")
    monkeypatch.setattr(registry, "rows", lambda op: [row])
    done = dict(gpu_samplers.checks("ddim", dtypes=(torch.float32,), backends=("y",), device="cpu"))
    assert done["sampler_step ddim float32 y"] == "RuntimeError: launch failed"


@pytest.mark.parametrize("step", gpu_samplers.steps(dry=True), ids=lambda step: step.solver)
def test_a_step_is_timed_and_compared(step):
    options = {"rounds": 1, "with_compile": False, "bandwidth": 1.0, **ON_CPU}
    row = gpu_samplers.time_step(step, gpu_samplers.on_cpu, **options)
    assert not row["not_run"], row["not_run"]
    assert set(row["us"]) == {"reference", "torch"} and set(row["speedup_over_torch"]) == {"reference"}
    assert any("GB/s" in line for line in gpu_samplers.describe_row(row))


def test_wrong_and_failing_providers_are_not_timed(monkeypatch):
    def broken():
        raise RuntimeError("no kernel image")

    def providers(lane, backends, with_compile):
        return {"torch": lane.plain, "cuda": broken, "triton": lambda: lane.out.fill_(1), "x": "no such row"}

    monkeypatch.setattr(gpu_samplers, "_providers", providers)
    row = gpu_samplers.time_step(gpu_samplers.steps(dry=True)[0], gpu_samplers.on_cpu, rounds=1, **ON_CPU)
    assert set(row["us"]) == {"torch"} and row["not_run"]["cuda"] == "RuntimeError: no kernel image"
    assert row["not_run"]["triton"].startswith("WRONG") and row["not_run"]["x"] == "no such row"


def test_bytes_and_bars_are_those_of_the_specification():
    step = gpu_samplers.Step("DDIM", (64, 4, 256, 256))
    assert step.moved_bytes() == 3 * 4 * 64 * 4 * 65536  # the specification counts 3 streams, and 5 for 2M
    assert gpu_samplers.Step("DPM++2M", (1, 4, 64, 64), torch.bfloat16).moved_bytes() == 5 * 2 * 4 * 4096
    row = gpu_samplers._row(step, {"torch": 1.0, "cuda": 0.1, "triton": 0.5}, {}, 2000.0)
    assert {bar["provider"]: bar["met"] for bar in row["bars"]} == {"cuda": True, "triton": False}
    assert row["speedup_over_torch"] == {"cuda": 10.0, "triton": 2.0}
    noise = gpu_samplers.Step("noise", (64, 4, 256, 256))
    row = gpu_samplers._row(noise, {"torch": 1.0, "cuda": 0.9, "triton": 1.1}, {}, 2000.0)
    assert [bar["met"] for bar in row["bars"]] == [True, False]


def test_loops_are_timed():
    solver, shape = gpu_samplers.loops(dry=True)[0]
    row = gpu_samplers.time_loop(solver, shape, rounds=1, **ON_CPU)
    assert set(row["us_per_call"]) == {"reference step by step"} and not row["not_run"]


def test_the_script_has_the_part():
    assert gpu.parse(["--parts", "samplers"]).parts == ["samplers"] and "samplers" in gpu.parse([]).parts
    assert gpu_samplers.main(["--dry", "--filter", "one_number"]) == 0
