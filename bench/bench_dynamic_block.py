"""Dynamic blocks of continuous U-Nets, fused and in plain torch.

    python bench/bench_dynamic_block.py [--threads 1] [--seconds 6] [--case PATTERN]   # interleaved, with ratios
    pytest bench/bench_dynamic_block.py --benchmark-only                               # one provider after the other

The floor is the arithmetic of the direct convolutions at the measured peak.
"""

import argparse
import fnmatch

import pytest
import torch

from pydenoise.benchmarks import blocks_continuous as blocks
from pydenoise.benchmarks import measure
from pydenoise.benchmarks.peaks import measure_peaks
from pydenoise.benchmarks.providers import Setting, Skip


@pytest.mark.parametrize("provider", [p for p in blocks.PROVIDERS if p.default], ids=lambda p: p.name)
@pytest.mark.parametrize("call", blocks.cases(), ids=lambda call: call.key)
def test_dynamic_block(time_contender, call, provider):
    time_contender(call, provider)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    parser.add_argument("--case", default="*", help="a shell pattern on the names of the cases")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the plain block too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting, peaks = Setting(options.threads), measure_peaks(options.threads, "cpu", 0.5)
    for case in blocks.cases():
        if not fnmatch.fnmatch(case.key, options.case):
            continue
        contenders = {}
        for provider in blocks.PROVIDERS:
            if not provider.default and not options.compiled:
                continue
            try:
                contenders[provider.name] = provider.prepare(case, setting)
            except Skip:
                continue
        calls = {name: contender.run for name, contender in contenders.items()}
        timings = measure.interleave(calls, rounds=400, budget_seconds=options.seconds)
        floor = case.floor_seconds(peaks, "fp32")
        print(f"{case.key}: floor {1e3 * floor:.2f} ms")
        rivals = [name for name in timings if not name.startswith("ours")]
        for name, timing in timings.items():
            ratios = [measure.paired_ratio(timing, timings[rival]) for rival in rivals if rival != name]
            text = ", ".join(f"{ratio.median:.2f}" for ratio in ratios)
            print(f"  {name:>20}: best {1e3 * timing.minimum:.2f} ms ({floor / timing.minimum:.0%}); faster than")
            print(f"  {'':>20}  {', '.join(r for r in rivals if r != name)}: {text}")


if __name__ == "__main__":
    main()
