"""Feature maps added up under a softmax over them, against torch.

    python bench/bench_softmax_aggregate.py [--threads 1] [--seconds 6] [--cases "aggregate training"]   # interleaved
    pytest bench/bench_softmax_aggregate.py --benchmark-only                                 # one after the other

The floor is the maps and hidden channels read once and the result written once, at the measured rate of memory.
"""

from pydenoise.benchmarks import script
from pydenoise.benchmarks.blocks_aggregate import PROVIDERS, aggregate_cases, expected_results
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("aggregate", aggregate_cases, PROVIDERS, expected_results)


def test_softmax_aggregate(time_contender, case, provider):
    time_contender(case, provider)


if __name__ == "__main__":
    script.main(SUITE, __doc__)
