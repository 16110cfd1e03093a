"""Dynamic blocks of continuous U-Nets, fused and in plain torch.

    python bench/bench_dynamic_block.py [--threads 1] [--seconds 6] [--cases PATTERN]    # interleaved, with ratios
    python bench/bench_dynamic_block.py --providers ours inductor                        # against torch.compile
    pytest bench/bench_dynamic_block.py --benchmark-only                                 # one after the other

The floor is the arithmetic of the direct convolutions at the measured peak.
"""

from pydenoise.benchmarks import script
from pydenoise.benchmarks.blocks_continuous import BOUNDS, PROVIDERS, cases, expected_results
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("continuous", cases, PROVIDERS, expected_results, BOUNDS)


def test_dynamic_block(time_contender, case, provider):
    time_contender(case, provider)


if __name__ == "__main__":
    script.main(SUITE, __doc__)
