"""The adaptive bilateral filter against its naive form in torch: time and peak memory, forward and training.

    python bench/bench_adaptive_bilateral_filter.py [--threads 1] [--size 512] [--seconds 6]  # interleaved, with ratios
    pytest bench/bench_adaptive_bilateral_filter.py --benchmark-only                          # one after the other

The floor is the arithmetic of every tap at the machine's measured rate.
"""

import argparse
from dataclasses import replace

import torch

from pydenoise.benchmarks.blocks_bilateral import (
    BOUNDS,
    PROVIDERS,
    BilateralBench,
    bilateral_cases,
    expected_results,
    measure_peak,
)
from pydenoise.benchmarks.measure import interleave, paired_ratio
from pydenoise.benchmarks.peaks import measure_peaks
from pydenoise.benchmarks.providers import Setting, Skip
from pydenoise.benchmarks.suites import Suite

SUITE = Suite("bilateral", bilateral_cases, PROVIDERS, expected_results, BOUNDS)


def test_bilateral(time_contender, case, provider):
    time_contender(case, provider)


def compare(case: BilateralBench, threads: int, seconds: float, peaks) -> None:
    """One line of times, one of memory."""
    calls = {}
    for provider in PROVIDERS:
        try:
            calls[provider.name] = provider.prepare(case, Setting(threads)).run
        except Skip:
            continue
    timings = interleave(calls, rounds=case.rounds or 15, budget_seconds=seconds)
    ours, other = timings["ours-bilateral"], timings["naive-bilateral"]
    ratio, floor = paired_ratio(ours, other), case.floor_seconds(peaks, "fp32")
    print(
        f"{case.key:>26}: ours {1e3 * ours.minimum:.2f} ms ({1e9 * ours.minimum / case.taps:.3f} ns/tap, floor "
        f"{1e3 * floor:.2f}), naive {1e3 * other.minimum:.1f} ms; {ratio.of_minima:.0f}x (median {ratio.median:.0f}x, "
        f"{ratio.low:.0f}-{ratio.high:.0f})",
        flush=True,
    )
    if threads == 1:  # what other processes of the machine took is not in it
        busy, other_busy = min(ours.cpu_seconds), min(other.cpu_seconds)
        print(
            f"{'':>26}  CPU time: ours {1e3 * busy:.2f} ms, naive {1e3 * other_busy:.1f} ms; {other_busy / busy:.0f}x"
        )
    bytes_ours, bytes_naive = (measure_peak(case, which, threads) for which in ("ours", "naive"))
    print(
        f"{'':>26}  memory: ours {bytes_ours / 2**20:.2f} MiB, naive {bytes_naive / 2**20:.0f} MiB; "
        f"{bytes_naive / max(bytes_ours, 1):.0f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    parser.add_argument("--cases", default="", help="only cases whose key holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peaks = measure_peaks(options.threads)
    print(
        f"{options.size} x {options.size}, {options.threads} threads, {peaks.fma_f32 / 1e9:.0f} GFLOP/s; best samples"
    )
    for case in bilateral_cases(False):
        if options.cases in case.key:
            compare(replace(case, size=options.size), options.threads, options.seconds, peaks)


if __name__ == "__main__":
    main()
