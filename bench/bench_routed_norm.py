"""Task routing: what a transformer block does beside its products, and whole blocks, against torch.

    python bench/bench_routed_norm.py [--threads 1] [--seconds 6] [--cases "routing block"]   # interleaved, with ratios
    python bench/bench_routed_norm.py --providers ours-routing compiled-routing               # against torch.compile
    pytest bench/bench_routed_norm.py --benchmark-only                                        # one after the other

The floor is nine tensors read or written at the measured rate of memory; of a block the arithmetic of its products.
"""

from pydenoise.benchmarks import script
from pydenoise.benchmarks.blocks_routing import BOUNDS, PROVIDERS, expected_results, routing_cases
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("routing", routing_cases, PROVIDERS, expected_results, BOUNDS)


def test_routing(time_contender, case, provider):
    time_contender(case, provider)


if __name__ == "__main__":
    script.main(SUITE, __doc__)
