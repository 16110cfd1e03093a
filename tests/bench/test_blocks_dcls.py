"""The cases of DCLS: every provider gives the reference's results on tiny stand-ins. No time is asserted."""

import pytest

from pydenoise.benchmarks import blocks_dcls
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import RESULT_BOUNDS, Setting, Skip
from pydenoise.benchmarks.suites import check_results

pytestmark = pytest.mark.usefixtures("one_thread")

PEAKS = Peaks(100e9, 200e9, {1 << 20: 80e9}, vnni_dot=400e9)
QUICK = {case.key: case for case in blocks_dcls.dcls_cases(True)}


@pytest.mark.parametrize("provider", blocks_dcls.PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("key", QUICK)
def test_results(key, provider):
    case = QUICK[key]
    try:
        contender = provider.prepare(case, Setting(1))
    except Skip:
        assert case.kept or case.picture is None
        return
    contender.run()
    expected = blocks_dcls.expected_results(case, Setting(1))
    outputs = contender.outputs()
    assert check_results(outputs, expected, RESULT_BOUNDS["fp32"]).get("status", "ok") == "ok"
    if provider.ours:
        assert set(outputs) == set(expected)


def test_cases():
    cases = blocks_dcls.dcls_cases()
    assert len({case.key for case in cases}) == len(cases) == 10
    for case in (*cases, *QUICK.values()):
        assert case.floor_seconds(PEAKS, "fp32") > 0 and case.describe()["flops"] == case.flops()
        assert case.bars and {bar.subjects for bar in case.bars} == {("dcls",)}
    names = {provider.name for provider in blocks_dcls.PROVIDERS}
    assert all(set(bar.against) <= names for case in cases for bar in case.bars)
