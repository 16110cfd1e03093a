"""DCLS: construction of kernels and whole layers, against torch.

python bench/bench_dcls_kernel.py [--threads 1] [--seconds 4] [--cases construct]   # interleaved, with ratios
pytest bench/bench_dcls_kernel.py --benchmark-only                                  # one provider after the other
"""

import argparse
from dataclasses import replace

import pytest
import torch

from pydenoise import _native
from pydenoise.benchmarks import blocks_dcls, measure
from pydenoise.benchmarks.providers import Setting, Skip


@pytest.mark.parametrize("contender", blocks_dcls.PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("call", blocks_dcls.dcls_cases(), ids=lambda call: call.key)
def test_dcls(benchmark, request, call, contender):
    if request.config.getoption("--quick"):
        picture = None if call.picture is None else (2, 9)
        call = replace(call, channels=4, components=3, kernel=5, picture=picture)
    try:
        prepared = contender.prepare(call, Setting(torch.get_num_threads()))
    except Skip as reason:
        pytest.skip(str(reason))
    benchmark.group = call.key
    benchmark(prepared.run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--cases", default="", help="only cases whose group/name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(options.threads)
    flops = _native.extension().module.measure_peak("fma_f32", 0.5, options.threads)
    print(f"{options.threads} threads, {flops / 1e9:.0f} GFLOP/s; best, median")
    for case in blocks_dcls.dcls_cases():
        if options.cases not in case.key:
            continue
        contenders = {}
        for provider in blocks_dcls.PROVIDERS:
            try:
                contenders[provider.name] = provider.prepare(case, setting).run
            except Skip:
                continue
        timings = measure.interleave(contenders, rounds=60, budget_seconds=options.seconds)
        ours = timings[blocks_dcls.OURS]
        print(f"{case.key}: floor {1e3 * case.flops() / flops:.3f} ms")
        for name, timing in timings.items():
            line = f"    {name:<18} {1e3 * timing.minimum:9.3f} ms, {1e3 * timing.median:9.3f}"
            if timing is not ours:
                ratio = measure.paired_ratio(ours, timing)
                line += f"; ours is {ratio.of_minima:.3g}x, {ratio.median:.3g}x [{ratio.low:.3g}, {ratio.high:.3g}]"
            print(line)


if __name__ == "__main__":
    main()
