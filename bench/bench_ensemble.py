"""Ensembles: all networks stacked, against one after the other.

python bench/bench_ensemble.py [--threads 1] [--seconds 6] [--cases "*digits*"]   # interleaved, with ratios
pytest bench/bench_ensemble.py --benchmark-only                                   # one after the other
"""

from pydenoise.benchmarks import script
from pydenoise.benchmarks.blocks_ensemble import BOUNDS, PROVIDERS, ensemble_cases, expected_results
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("ensemble", ensemble_cases, PROVIDERS, expected_results, BOUNDS)


def test_ensemble(time_contender, case, provider):
    time_contender(case, provider)


if __name__ == "__main__":
    script.main(SUITE, __doc__)
