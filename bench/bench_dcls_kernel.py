"""DCLS: construction of kernels and whole layers, against torch.

    python bench/bench_dcls_kernel.py [--threads 1] [--seconds 6] [--cases construct]   # interleaved, with ratios
    pytest bench/bench_dcls_kernel.py --benchmark-only                                  # one after the other

The floor is the arithmetic at the measured peak.
"""

from pydenoise.benchmarks import script
from pydenoise.benchmarks.blocks_dcls import PROVIDERS, dcls_cases, expected_results
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("dcls", dcls_cases, PROVIDERS, expected_results)


def test_dcls(time_contender, case, provider):
    time_contender(case, provider)


if __name__ == "__main__":
    script.main(SUITE, __doc__)
