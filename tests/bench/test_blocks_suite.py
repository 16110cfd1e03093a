"""The suite of blocks: every provider gives the reference's results on tiny cases; floors, bars. No time asserted."""

import pytest
import torch

from pydenoise.benchmarks import blocks_aggregate, blocks_ensemble, blocks_routing, blocks_wavelet, script, suites
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import NO_PART, RESULT_BOUNDS, Setting, Skip

pytestmark = pytest.mark.usefixtures("one_thread")

PEAKS = Peaks(100e9, 200e9, {1 << 20: 80e9, 1 << 28: 10e9}, vnni_dot=400e9)
SUITE = suites.SUITES["blocks"]
QUICK = {case.key: case for case in SUITE.cases(True)}
KINDS = {  # module, cases, bounds
    "wavelet": (blocks_wavelet, blocks_wavelet.wavelet_cases, RESULT_BOUNDS),
    "aggregate": (blocks_aggregate, blocks_aggregate.aggregate_cases, RESULT_BOUNDS),
    "ensemble": (blocks_ensemble, blocks_ensemble.ensemble_cases, blocks_ensemble.BOUNDS),
    "routing": (blocks_routing, blocks_routing.routing_cases, blocks_routing.BOUNDS),
}
UNCHECKED = {"copy-wavelet", "copy-wavelet-bf16", "restricted-routing"}


@pytest.mark.parametrize("key", QUICK)
def test_quick_cases_run(key):
    providers = [provider for provider in SUITE.providers if provider.default]
    record = suites.run_case(SUITE, QUICK[key], providers, Setting(1, quick=True), suites.Options(repeats=1))
    states = record["providers"]
    assert {state["status"] for state in states.values()} <= {"ok", "skipped"}, states
    assert any(states[provider.name]["status"] == "ok" for provider in providers if provider.ours)
    assert all(state.get("reason") for state in states.values() if state["status"] == "skipped")


@pytest.mark.parametrize("kind", KINDS)
def test_every_provider_gives_what_the_reference_gives(kind):
    module, cases, bounds = KINDS[kind]
    ran = set()
    for case in cases(True):
        expected = module.expected_results(case, Setting(1))
        assert all(part.dtype == torch.float64 and part.any() for parts in expected.values() for _, part in parts)
        for provider in [provider for provider in module.PROVIDERS if provider.default]:
            try:
                contender = provider.prepare(case, Setting(1))
            except Skip as reason:
                assert str(reason) == NO_PART
                continue
            ran.add(provider.name)
            contender.run()
            assert (contender.outputs is None) == (provider.name in UNCHECKED)
            if contender.outputs is not None:
                outputs = contender.outputs()
                assert set(outputs) == set(expected)
                verdict = suites.check_results(outputs, expected, bounds[provider.precision])
                assert verdict.get("status", "ok") == "ok", (case.key, provider.name, verdict)
    assert ran == {provider.name for provider in module.PROVIDERS if provider.default}


@pytest.mark.parametrize("kind", KINDS)
def test_floors_and_descriptions(kind):
    for quick in (False, True):
        for case in KINDS[kind][1](quick):
            floor = case.floor_seconds(PEAKS, "fp32")
            assert floor is None if kind == "ensemble" else floor > 0
            assert case.describe()["group"].startswith(kind)


def test_floors_by_hand():
    cases = {case.key: case for case in SUITE.cases(False)}
    image = 8 * 256 * 64 * 64
    assert cases["wavelet/down"].moved_bytes() == 4 * image * 1.25
    assert cases["wavelet bf16/up"].moved_bytes() == 2 * image * 2
    assert cases["wavelet training/up"].moved_bytes() == 4 * image * (2 + 3)
    assert cases["wavelet block/forward"].moved_bytes() == 4 * image * 2.25
    assert cases["wavelet/up"].floor_seconds(PEAKS, "fp32") == pytest.approx(8 * image / 10e9)
    assert cases["aggregate/2x3x320x64x64"].moved_bytes() == 4 * 2 * 64**2 * (3 * 320 + 128 + 320)
    width = int(0.8 * 1024)
    assert cases["routing parts/8x256x1024"].moved_bytes() == 4 * 8 * 256 * (8 * 1024 + width)
    products = 2 * 512 * 1024 * (3 * width + 9 * 1024) + 4 * 512 * 256 * 1024
    assert cases["routing block/2x256x1024"].flops() == products


def test_bars():
    bars = {case.key: case.bars for case in SUITE.cases(False)}
    assert [(bar.against, bar.speedup, bar.of_floor) for bar in bars["wavelet/up channels_last"]] == [
        (("convolution-wavelet",), 8.0, None), ((), None, 0.8),
    ]  # fmt: skip
    assert not any(bars[key] for key in ("wavelet bf16/up", "wavelet training/up", "wavelet block/forward"))
    assert [bar.speedup for bar in bars["aggregate training/2x3x1280x8x8"]] == [2.5]
    assert [bar.speedup for bar in bars["routing parts/2x256x384"]] == [3.0]
    assert [(bar.against, bar.speedup) for bar in bars["routing block/2x256x384"]] == [
        (("eager-routing",), 1.1), (("compiled-routing",), 1.03),
    ]  # fmt: skip


def test_the_scripts_print_the_tables_of_their_suite(capsys):
    suite = suites.Suite(
        "wavelet", blocks_wavelet.wavelet_cases, blocks_wavelet.PROVIDERS, blocks_wavelet.expected_results
    )
    words = ["--quick", "--threads", "1", "--cases", "wavelet/*", "--providers", "ours-wavelet", "copy-wavelet"]
    script.main(suite, "Gated wavelets.\n\nMore.", words)
    printed = capsys.readouterr().out
    assert "down channels_last" in printed and "vs copy of the input" in printed and "bf16/up" not in printed
    with pytest.raises(SystemExit) as stop:
        script.main(suite, "Gated wavelets.", ["--cases", "nope"])
    assert stop.value.code == 2 and "matches 'nope'; its groups are wavelet" in capsys.readouterr().err
