"""Gated wavelets against grouped convolutions, slices and folded slices in torch, and against a copy.

    python bench/bench_wavelet_gate.py [--threads 1] [--seconds 6] [--cases "wavelet block"]   # interleaved
    pytest bench/bench_wavelet_gate.py --benchmark-only                                        # one after the other

The floor is what has to be read and written, at the measured rate of a copy of as many bytes.
"""

from pydenoise.benchmarks import script
from pydenoise.benchmarks.blocks_wavelet import PROVIDERS, expected_results, wavelet_cases
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("wavelet", wavelet_cases, PROVIDERS, expected_results)


def test_wavelet_gate(time_contender, case, provider):
    time_contender(case, provider)


if __name__ == "__main__":
    script.main(SUITE, __doc__)
