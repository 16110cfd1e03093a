"""The hyperspectral bench cases: every provider computes the same noise; floors and bars. No time is asserted."""

import pytest

from pydenoise.benchmarks import blocks_hyperspectral as bench
from pydenoise.benchmarks import suites
from pydenoise.benchmarks.providers import Setting, Skip

SUITE = suites.Suite("hyperspectral", bench.hyperspectral_cases, bench.PROVIDERS, bench.expected_results, bench.BOUNDS)


@pytest.mark.parametrize("residual", [True, False])
def test_providers_agree(residual):
    case = bench.NoiseBench("noise", "hysime", "test", (), bands=24, size=(20, 30), residual=residual)
    record = suites.run_case(SUITE, case, bench.PROVIDERS, Setting(1), suites.Options(repeats=2))
    assert {name: state["status"] for name, state in record["providers"].items()} == {
        provider.name: "ok" for provider in bench.PROVIDERS
    }


def test_cases():
    assert len(bench.hyperspectral_cases(quick=True)) == 1
    cases = bench.hyperspectral_cases()
    assert len({case.key for case in cases}) == len(cases)
    assert cases[0].bars[0].speedup == cases[0].bands / 4
    assert cases[0].flops() == 3 * cases[1].flops() == 3 * 64**2 * 128**2
    with pytest.raises(Skip, match="would take minutes"):
        bench.PROVIDERS[2].prepare(cases[-1], Setting(1))
