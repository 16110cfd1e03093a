"""The bench harness's logic: statistics, floors, bars, selection and reports. No time is asserted."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydenoise.benchmarks import cases, measure, suites
from pydenoise.benchmarks.cases import Bar
from pydenoise.benchmarks.measure import Timing
from pydenoise.benchmarks.peaks import Peaks, measure_peaks
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, choose
from pydenoise.cli import bench as command

PEAKS = Peaks(100e9, 200e9, {1 << 20: 80e9, 1 << 24: 40e9, 1 << 28: 10e9})


class Clock:
    """A clock that moves only when work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float):
        def call():
            self.now += seconds

        return call


def timing(*seconds: float) -> Timing:
    return Timing(1, list(seconds), list(seconds))


# ---------------------------------------------------------------------------------------------------- measurement


def test_every_contender_gets_one_sample_a_round():
    clock = Clock()
    calls = {"slow": clock.work(0.004), "fast": clock.work(0.001)}
    result = measure.interleave(calls, rounds=7, clock=clock, settle_seconds=0)
    assert {name: len(t.seconds) for name, t in result.items()} == {"slow": 7, "fast": 7}
    assert result["slow"].median == pytest.approx(0.004)
    assert measure.paired_ratio(result["fast"], result["slow"]).median == pytest.approx(4)


def test_fast_calls_are_repeated_within_a_sample():
    clock = Clock()
    result = measure.interleave({"tiny": clock.work(1e-5)}, rounds=2, clock=clock, settle_seconds=0)
    assert result["tiny"].inner == math.ceil(measure.MIN_SAMPLE_SECONDS / 1e-5)
    assert result["tiny"].median == pytest.approx(1e-5)


def test_the_budget_ends_a_case_but_not_before_the_least_number_of_rounds():
    clock = Clock()
    calls = {"long": clock.work(10.0)}
    result = measure.interleave(calls, rounds=50, budget_seconds=1.0, clock=clock, settle_seconds=0)
    assert len(result["long"].seconds) == measure.MIN_ROUNDS


def test_the_order_of_contenders_changes_between_rounds():
    order: list[str] = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    calls = dict.fromkeys(samplers, lambda: None)
    measure.interleave(calls, rounds=6, samplers=samplers, settle_seconds=0)
    rounds = {tuple(order[i : i + 3]) for i in range(0, len(order), 3)}
    assert len(rounds) > 1 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)


def test_the_garbage_collector_is_restored():
    import gc

    with pytest.raises(RuntimeError):
        measure.interleave({"bad": lambda: (_ for _ in ()).throw(RuntimeError())}, rounds=1)
    assert gc.isenabled()


def test_median_range_comes_from_order_statistics():
    assert measure.median_range([1.0, 2.0, 3.0]) == (1.0, 3.0)  # too few rounds: the extremes
    # 15 samples: P(fewer than 4 of 15 below the median) = 1.8 %, fewer than 5: 5.9 %
    assert measure.median_range([float(i) for i in range(1, 16)]) == (4.0, 12.0)


def test_ratios_are_paired_within_rounds():
    drifting = measure.paired_ratio(timing(1, 2, 4), timing(2, 4, 8))
    assert (drifting.median, drifting.low, drifting.high, drifting.of_minima) == (2, 2, 2, 2)
    with pytest.raises(ValueError, match="equally many rounds"):
        measure.paired_ratio(timing(1), timing(1, 2))


# ------------------------------------------------------------------------------------------------- floors and bars


def test_the_floor_is_the_larger_of_arithmetic_and_movement():
    assert PEAKS.floor_seconds(100e9, 4, "fp32") == pytest.approx(1.0)
    assert PEAKS.floor_seconds(100e9, 4, "bf16") == pytest.approx(0.5)
    assert PEAKS.floor_seconds(1, 1 << 28, "fp32") == pytest.approx((1 << 28) / 10e9)


def test_bandwidth_is_that_of_the_working_set():
    assert PEAKS.bandwidth(1 << 19) == 80e9
    assert PEAKS.bandwidth((1 << 20) + 1) == 40e9
    assert PEAKS.bandwidth(1 << 40) == 10e9
    disturbed = Peaks(1.0, 1.0, {1 << 20: 1e9, 1 << 24: 40e9})
    assert disturbed.bandwidth(1) == 40e9


def test_peaks_merge_to_the_better_measurement():
    other = Peaks(50e9, 300e9, {1 << 20: 90e9, 1 << 24: 30e9, 1 << 28: 10e9})
    merged = PEAKS.merged(other)
    assert (merged.fma_f32, merged.bf16_dot, merged.copy[1 << 20], merged.copy[1 << 24]) == (100e9, 300e9, 90e9, 40e9)


def test_peaks_are_measured_and_say_where_they_come_from():
    peaks = measure_peaks(1, seconds=0.002)
    assert peaks.fma_f32 > 0 and peaks.bf16_dot > 0 and all(rate > 0 for rate in peaks.copy.values())
    assert set(peaks.source) == {"fma_f32", "bf16_dot", "vnni_dot", "copy"} and peaks.vnni_dot > 0


def test_work_of_a_case_by_hand():
    case = next(c for c in cases.weighted_conv_cases() if c.key == "inference/3x3 64→64 64²")
    assert case.flops() == 2 * 64 * 64 * 64 * 64 * 9
    assert case.moved_bytes("fp32") == 4 * (2 * 64 * 64 * 64 + 64 * 64 * 9)
    training = next(c for c in cases.weighted_conv_cases() if c.training and "3x3 64→64" in c.name)
    assert training.flops() == 3 * 2 * 8 * 32 * 32 * 64 * 64 * 9


def test_work_of_the_networks_is_that_of_their_modules():
    from pydenoise.benchmarks.networks import build_network

    for case in cases.network_cases(quick=True):
        convolutions = [m for m in build_network(case).modules() if isinstance(m, torch.nn.Conv2d)]
        assert [(m.in_channels, m.out_channels) for m in convolutions] == list(case.layers)
        assert all(m.kernel_size == (3, 3) for m in convolutions)


@pytest.mark.parametrize(
    "other, verdict",
    [((3.0,) * 8, "met"), ((1.0,) * 8, "missed"), ((1.0, 3.0) * 4, "undecided")],
)
def test_a_bar_is_undecided_where_the_range_holds_it(other, verdict):
    bar = Bar(("torch", "absent"), speedup=1.5, subjects=("ours",))
    verdicts = suites.judge(bar, ["ours", "ours-too"], {"ours": timing(*[1.0] * 8), "torch": timing(*other)})
    assert [(v["subject"], v["against"], v["verdict"]) for v in verdicts] == [("ours", "torch", verdict)]


def test_bars_on_time_and_on_extra_time():
    timings = {"ours": timing(*[30e-6] * 6), "torch": timing(*[10e-6] * 6)}
    bars = Bar(("torch",), extra_seconds=15e-6, subjects=("ours",)), Bar(seconds=40e-6, subjects=("ours",))
    assert [suites.judge(bar, ["ours"], timings)[0]["verdict"] for bar in bars] == ["missed", "met"]


# ------------------------------------------------------------------------------------------------ providers, cases


def test_case_keys_are_unique_and_bars_name_providers():
    for suite in suites.SUITES.values():
        names = {provider.name for provider in suite.providers}
        assert len(names) == len(suite.providers)
        for quick in (False, True):
            every = suite.cases(quick)
            assert len({case.key for case in every}) == len(every)
            for bar in [bar for case in every for bar in case.bars]:
                assert set(bar.against) <= names and set(bar.subjects) & names


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'nothing'; known: weighted_conv, networks"):
        suites.get_suite("nothing")
    with pytest.raises(ValueError, match="'fast'; known: ours-cpu"):
        choose(suites.SUITES["weighted_conv"].providers, ["torch", "fast"])
    with pytest.raises(ValueError, match="its groups are inference"):
        suites.select_cases(suites.get_suite("weighted_conv"), suites.Options(cases="no such"))


def _run_one(*providers: Provider, precision_case: str = "inference/3x3 16→16 16²") -> dict:
    suite = suites.get_suite("weighted_conv")
    case = next(c for c in suite.cases(True) if c.key == precision_case)
    return suites.run_case(suite, case, providers, Setting(1), suites.Options(repeats=2))


def test_skipped_failed_and_wrong_providers_are_told_apart():
    def skips(case, setting):
        raise Skip("not installed")

    def fails(case, setting):
        raise RuntimeError("broken")

    good = next(p for p in suites.SUITES["weighted_conv"].providers if p.name == "torch")

    def lies(case, setting):
        contender = good.prepare(case, setting)
        return Contender(contender.run, lambda: {"output": contender.outputs()["output"] * 1.001})

    record = _run_one(good, Provider("a", "a", skips), Provider("b", "b", fails), Provider("c", "c", lies))
    states = record["providers"]
    assert {name: state["status"] for name, state in states.items()} == {
        "torch": "ok", "a": "skipped", "b": "failed", "c": "wrong",
    }  # fmt: skip
    assert states["a"]["reason"] == "not installed" and states["b"]["reason"] == "RuntimeError: broken"
    assert "off by" in states["c"]["reason"] and "timing" not in states["c"]


def test_a_result_that_is_not_finite_or_of_another_shape_is_wrong():
    expected = {"output": [((Ellipsis,), torch.ones(1, 2, 3, 3, dtype=torch.float64))]}
    assert suites.check_results({"output": torch.full((1, 2, 3, 3), math.nan)}, expected, 1e-5)["status"] == "wrong"
    assert suites.check_results({"output": torch.ones(1, 2, 3, 2)}, expected, 1e-5)["status"] == "wrong"


@pytest.mark.parametrize("key", ["epilogue/3x3 16→16 16²", "training/3x3 16→16 8² ×2 trainable"])
def test_torch_the_published_formulation_and_ours_agree_with_the_reference(key):
    names = ("ours-reference", "torch-channels-last", "torch-bf16", "published")
    chosen = choose(suites.SUITES["weighted_conv"].providers, names)
    record = _run_one(*chosen, precision_case=key)
    assert all(state["status"] == "ok" for state in record["providers"].values()), record["providers"]
    assert set(record["comparisons"]) == {"ours-reference"} and record["control"]["provider"] == "ours-reference"


def test_the_reference_on_bands_is_the_reference(monkeypatch):
    from pydenoise.benchmarks import convolution

    case = next(c for c in cases.weighted_conv_cases() if c.key == "inference/7x7 64→64 64²")
    monkeypatch.setattr(convolution, "REFERENCE_FLOPS", 0)
    bands = convolution.expected_results(case, Setting(1))["output"]
    monkeypatch.setattr(convolution, "REFERENCE_FLOPS", math.inf)
    ((_, whole),) = convolution.expected_results(case, Setting(1))["output"]
    assert len(bands) == 3
    for index, rows in bands:
        torch.testing.assert_close(rows, whole[index], rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- command


def _command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["bench", *words])
    return args.run(args)


def test_the_command_writes_a_table_json_and_a_plot(tmp_path, capsys):
    words = ("weighted_conv", "--quick", "--repeats", "2", "--threads", "1", "--cases", "inference")
    before = torch.get_num_threads()
    assert _command(*words, "--providers", "ours-reference,torch,ours-triton", "--out", str(tmp_path)) == 0
    assert torch.get_num_threads() == before
    printed = capsys.readouterr().out
    assert "ours reference" in printed and "peaks:" in printed and "skipped: ours-triton" in printed
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    (record,) = result["cases"]
    assert result["machine"]["threads"] == 1 and result["machine"]["versions"]["torch"] == torch.__version__
    assert record["providers"]["torch"]["timing"]["rounds"] == 2
    assert record["providers"]["torch"]["floor_fraction"] > 0
    assert {"median", "low", "high", "of_minima"} == set(record["comparisons"]["ours-reference"]["torch"]["speedup"])
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (("speed",), "no suite named 'speed'; known: weighted_conv, networks"),
        (("weighted_conv", "--providers", "mine"), "no provider named 'mine'; known: ours-cpu"),
        (("weighted_conv", "--cases", "nope"), "nothing in suite 'weighted_conv' matches 'nope'"),
    ],
)
def test_bad_names_exit_with_2_and_the_known_ones(words, message, tmp_path, capsys):
    assert _command(*words, "--out", str(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_exits_with_2_before_anything_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert _command("weighted_conv", "--quick", "--out", str(tmp_path / "file" / "below")) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--repeats", "0"), ("--threads", "-1"), ("--seconds", "nan"), ("--providers", ",")])
def test_bad_numbers_are_refused_by_the_parser(words, capsys):
    with pytest.raises(SystemExit) as stop:
        _command("weighted_conv", *words)
    assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- pytest-benchmark


def test_the_pytest_benchmark_entry_points_run(tmp_path):
    folder, written = Path(__file__).parents[2] / "bench", tmp_path / "times.json"
    words = ["--quick", "--benchmark-only", "--benchmark-max-time=0.01", f"--benchmark-json={written}"]
    chosen = ["-k", "skinny and (torch-channels-last or ours-triton)", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(folder), *words, *chosen]
    # A process of pytest-xdist would otherwise tell its own subprocess that it is one, where benchmarks do not run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(written.read_text())["benchmarks"]
    assert entry["extra_info"]["provider"] == "torch-channels-last"
