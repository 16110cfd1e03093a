"""Joined feature maps, ensembles and task routing on a CPU: against torch.

    python bench/bench_softmax_aggregate.py [--threads 1] [--seconds 4] [--only aggregate] [--cpu-time]
    pytest bench/bench_softmax_aggregate.py --benchmark-only

The first interleaves the contenders and prints ratios; the second times one after the other. The floor of a sum of
feature maps is its maps and hidden channels read once and the result written once, at the rate of memory.
"""

import argparse

import pytest
import torch

from pydenoise.benchmarks import blocks_afa

PAIRS = [
    (case, name) for case in blocks_afa.CASES if "compiled" not in case.name for name in (blocks_afa.OURS, case.against)
]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_blocks(benchmark, case, name):
    benchmark.group = case.name
    benchmark(case.make()[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument(
        "--cpu-time", action="store_true", help="ratios of the processor's own time: see blocks_afa.rows"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = tuple(case for case in blocks_afa.CASES if options.only in case.name)
    for row in blocks_afa.rows(options.seconds, cases, options.cpu_time):
        print(row, flush=True)


if __name__ == "__main__":
    main()
