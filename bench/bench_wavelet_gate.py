"""Gated wavelets against grouped convolutions, slices and folded slices in torch, and against a copy.

    python bench/bench_wavelet_gate.py [--threads 1] [--shape 8 256 64 64] [--seconds 6]   # interleaved, with ratios
    pytest bench/bench_wavelet_gate.py --benchmark-only                                    # one after the other

The floor is what has to be read and written, at the rate of a copy of the input.
"""

import argparse

import pytest
import torch

from pydenoise.benchmarks import blocks_wavelet as blocks


@pytest.mark.parametrize("name", blocks.PROVIDERS)
@pytest.mark.parametrize("case", blocks.CASES, ids=lambda case: case.name)
def test_wavelet_gate(benchmark, request, case, name):
    shape = (2, 16, 16, 16) if request.config.getoption("--quick") else blocks.SHAPE
    call = blocks.calls(case, shape).get(name)
    if call is None:
        pytest.skip("no part of this case")
    benchmark.group = case.name
    benchmark(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", type=int, nargs=4, default=blocks.SHAPE, help="of the image: B C H W")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{tuple(options.shape)}, {options.threads} threads; best, and how many times faster (median of rounds)")
    for row in blocks.rows(tuple(options.shape), options.seconds):
        print(row)


if __name__ == "__main__":
    main()
