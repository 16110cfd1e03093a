"""The int8 suites: their cases, reference, providers and kept conversions, on tiny stand-ins. No time is asserted."""

import pytest
import torch

from pydenoise.benchmarks import conversions, int8_cases, int8_layers, suites, unet, unet_cases
from pydenoise.benchmarks.cases import Bar
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Setting, Skip, choose
from pydenoise.benchmarks.workloads import WORKLOADS, build_workload

PEAKS = Peaks(100e9, 200e9, {1 << 20: 80e9, 1 << 28: 10e9}, vnni_dot=400e9)
OPTIONS = suites.Options(repeats=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path))
    return tmp_path / "bench"


def run_one(suite: str, key: str, *names: str) -> dict:
    suite = suites.get_suite(suite)
    case = next(case for case in suite.cases(True) if case.key == key)
    return suites.run_case(suite, case, choose(suite.providers, names), Setting(1), OPTIONS)


# ------------------------------------------------------------------------------------------------------ int8-layers


def test_work_of_a_layer_by_hand():
    case = int8_cases.Int8Conv("", "", "", (), 2, 8, 16, 10, 3, 2)
    assert case.output_shape == (2, 16, 5, 5)
    assert case.operations() == 2 * 2 * 16 * 5 * 5 * 8 * 9
    assert case.moved_bytes("int8") == (2 * 8 * 100 + 8 * 16 * 9) + 4 * 2 * 16 * 25
    assert case.floor_seconds(PEAKS, "int8") == pytest.approx(
        max(case.operations() / 400e9, case.moved_bytes("int8") / 80e9)
    )
    linear = int8_cases.Int8Linear("", "", "", (), 10, 20, 30)
    assert linear.operations() == 2 * 10 * 20 * 30 and linear.moved_bytes("bf16") == 2 * (20 * 40 + 300)


@pytest.mark.parametrize("key", [case.key for case in int8_cases.int8_cases(True)])
def test_layers_of_all_providers_agree_with_the_reference(key):
    providers = [p.name for p in int8_layers.PROVIDERS]
    record = run_one("int8-layers", key, *providers)
    states = {name: state["status"] for name, state in record["providers"].items()}
    assert not {"wrong", "failed"} & set(states.values()), record["providers"]
    assert states["torch-channels-last"] == "ok" and (key.startswith("norm") or states["onednn-int8"] == "ok")
    exact = [s["error"] for n, s in record["providers"].items() if "error" in s and n in ("ours-cpu", "onednn-int8")]
    assert key.startswith("norm") or max(exact) < 1e-6


def test_the_reference_on_bands_is_the_reference(monkeypatch):
    case = int8_cases.Int8Conv("3x3", "conv", "", (), 2, 4, 5, 40)
    monkeypatch.setattr(int8_layers, "REFERENCE_OPERATIONS", 0)
    bands = int8_layers.expected_results(case, Setting(1))["output"]
    monkeypatch.undo()
    ((index, whole),) = int8_layers.expected_results(case, Setting(1))["output"]
    assert len(bands) == 3 and index[0] == slice(0, 1)
    for (_, _, rows), values in bands:
        torch.testing.assert_close(values, whole[:, :, rows], rtol=1e-12, atol=1e-12)


def test_a_bar_on_the_floor_is_undecided_where_only_the_best_sample_meets_it():
    bar = Bar(of_floor=0.8, subjects=("a", "b", "c", "absent"))
    fractions = {"a": (0.9, 0.95), "b": (0.7, 0.9), "c": (0.5, 0.6)}
    states = {n: {"floor_fraction": m, "best_floor_fraction": best} for n, (m, best) in fractions.items()}
    verdicts = {v["subject"]: v["verdict"] for v in suites.judge_floor(bar, states)}
    assert verdicts == {"a": "met", "b": "undecided", "c": "missed"}


# ------------------------------------------------------------------------------------------------------------- unet


def test_operations_are_those_of_convolutions_and_linear_layers():
    features = 8
    by_hand = 2 * 16 * 16 * 9 * (features + features * features + features)
    assert unet_cases.operations("tiny-dncnn", 1) == by_hand
    assert unet_cases.operations("tiny-dncnn", 2) == 2 * by_hand


def test_the_workloads_are_those_of_the_published_table():
    pytest.importorskip("diffusers")
    assert unet_cases.operations("ddpm-cifar10", 1) == pytest.approx(12.1e9, rel=0.01)
    assert unet_cases.operations("conditional", 1) == pytest.approx(23.8e9, rel=0.01)
    assert unet_cases.operations("dncnn", 1) == pytest.approx(72.6e9, rel=0.01)
    network = build_workload("ddpm-cifar10").network
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(35.7e6, rel=0.01)


def test_workloads_are_the_same_every_time_and_batches_differ():
    state = torch.random.get_rng_state()
    first, second = build_workload("tiny-dncnn", 2), build_workload("tiny-dncnn", 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.inputs[0], second.inputs[0]) and first.inputs[0].shape == (2, 1, 16, 16)
    assert all(map(torch.equal, first.network.state_dict().values(), second.network.state_dict().values()))
    assert not torch.equal(first.calibration[0][0], first.calibration[1][0])


def test_cases_name_workloads():
    for quick in (False, True):
        assert {case.workload for case in unet_cases.unet_cases(quick)} <= set(WORKLOADS)


def test_a_network_that_is_not_there_is_skipped_with_the_reason(monkeypatch):
    def missing():
        raise Skip("no such network")

    monkeypatch.setitem(WORKLOADS, "tiny-dncnn", (missing, None))
    unet_cases.operations.cache_clear()
    try:
        record = run_one("unet", "unet/tiny-dncnn", "torch", "ours-fp32")
        assert {s["status"] for s in record["providers"].values()} == {"skipped"}
        assert record["providers"]["torch"]["reason"] == "no such network" and record["operations"] is None
    finally:
        unet_cases.operations.cache_clear()


@pytest.mark.parametrize("key", ["unet/tiny-dncnn", pytest.param("unet/tiny-unet", marks=pytest.mark.slow)])
def test_ours_and_torch_agree_with_the_reference(key):
    if key != "unet/tiny-dncnn":
        pytest.importorskip("diffusers")
    record = run_one("unet", key, "ours-int8", "ours-fp32", "torch", "torch-channels-last")
    states = record["providers"]
    assert {name: state["status"] for name, state in states.items()} == dict.fromkeys(states, "ok"), states
    assert states["torch"]["snr_db"] > 100 > states["ours-int8"]["snr_db"] > 15


def test_onnxruntime_runs_in_float_and_int8_from_kept_files(cache):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    record = run_one("unet", "unet/tiny-dncnn", "onnxruntime", "onnxruntime-int8")
    states = record["providers"]
    assert {state["status"] for state in states.values()} == {"ok"}, states
    assert states["onnxruntime"]["snr_db"] > 100 > states["onnxruntime-int8"]["snr_db"] > 15
    assert {path.name.rsplit("-", 1)[0] for path in cache.iterdir()} == {"onnx", "onnxruntime-int8"}


def test_openvino_runs_in_int8(cache):
    for package in ("onnx", "openvino", "nncf"):
        pytest.importorskip(package)
    state = run_one("unet", "unet/tiny-dncnn", "openvino-int8")["providers"]["openvino-int8"]
    assert state["status"] == "ok" and 100 > state["snr_db"] > 15


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_inductor_packages_run(cache, precision):
    if precision == "int8":
        pytest.importorskip("torchao")
    name = "inductor" if precision == "fp32" else f"inductor-{precision}"
    state = run_one("unet", "unet/tiny-dncnn", name)["providers"][name]
    assert state["status"] == "ok", state


def test_a_missing_package_skips_its_provider(monkeypatch, cache):
    def absent(module, package=None):
        raise Skip(f"{package or module} is not installed; pip install {package or module}")

    monkeypatch.setattr(conversions, "require", absent)
    states = run_one("unet", "unet/tiny-dncnn", "openvino-int8", "onnxruntime-int8", "inductor-int8")["providers"]
    assert {state["status"] for state in states.values()} == {"skipped"}
    assert "pip install torchao" in states["inductor-int8"]["reason"]


# --------------------------------------------------------------------------------------------------- kept conversions


def test_a_conversion_is_made_once_for_the_same_weights_and_versions(cache, monkeypatch):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "model").write_text("converted")

    workload = build_workload("tiny-dncnn")
    first = conversions.cached(workload, "some", ("numpy",), make)
    assert conversions.cached(build_workload("tiny-dncnn"), "some", ("numpy",), make) == first and len(made) == 1
    assert (first / "model").read_text() == "converted"
    with torch.no_grad():
        next(workload.network.parameters()).add_(1)
    assert conversions.cached(workload, "some", ("numpy",), make) != first
    monkeypatch.setattr(conversions, "version", lambda package: "another")
    assert conversions.cached(build_workload("tiny-dncnn"), "some", ("numpy",), make) != first
    assert len(made) == 3


def test_a_failed_conversion_leaves_nothing(cache):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("cannot convert")

    with pytest.raises(RuntimeError, match="cannot convert"):
        conversions.cached(build_workload("tiny-dncnn"), "some", (), fail)
    assert not list(cache.iterdir())


def test_both_suites_are_commands():
    assert {"int8-layers", "unet"} <= set(suites.SUITES)
    assert suites.SUITES["unet"].providers is unet.PROVIDERS
