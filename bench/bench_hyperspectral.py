"""Hyperspectral tools: noise estimation against the loops it replaces, and cubes in tiles against whole ones.

    python bench/bench_hyperspectral.py [--threads 1] [--seconds 4]     # interleaved, with ratios; then tiles
    pytest bench/bench_hyperspectral.py --benchmark-only                # one provider after the other

The floor of the noise estimate is the product Y Y^T (and, with residuals, another of its size) at the rate of float64.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pydenoise import _native
from pydenoise.benchmarks import measure
from pydenoise.benchmarks.blocks_hyperspectral import PROVIDERS, hyperspectral_cases
from pydenoise.benchmarks.providers import Setting, Skip
from pydenoise.testing.hyperspectral import add_noise, low_rank_cube

TILED = """
import sys, time
import numpy as np, torch
torch.set_num_threads({threads})
from pydenoise.hyperspectral import WaveletDenoiser, denoise_tiles
from pydenoise.testing.memory import resident_bytes
pixels = np.load({source!r}, mmap_mode="r")
out = np.lib.format.open_memmap({target!r}, mode="w+", dtype=pixels.dtype, shape=pixels.shape)
before = resident_bytes("VmHWM") // 1024
start, cpu = time.perf_counter(), time.process_time()
denoise_tiles(pixels, rank=4, denoiser=WaveletDenoiser(levels=2, spins=4), tile={tile}, out=out)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(seconds, cpu, resident_bytes("VmHWM") // 1024, before)
"""


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("call", hyperspectral_cases(quick=False)[:2], ids=lambda call: call.name)
def test_hyperspectral(time_contender, call, provider):
    time_contender(call, provider)


def noise(options) -> None:
    """HySime's noise, interleaved with its rivals."""
    setting = Setting(options.threads)
    rate = _native.extension().module.measure_peak("fma_f32", 0.5, options.threads)
    for case in hyperspectral_cases():
        calls = {}
        for provider in PROVIDERS:
            try:
                calls[provider.name] = provider.prepare(case, setting).run
            except Skip:
                continue
        timings = measure.interleave(calls, rounds=50, budget_seconds=options.seconds)
        best = {name: timing.minimum for name, timing in timings.items()}
        line = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in best.items())
        ratios = ", ".join(
            f"{ratio.of_minima:.1f}x ({ratio.median:.1f}x) {name}"
            for name in calls
            if name != "ours-hysime" and (ratio := measure.paired_ratio(timings["ours-hysime"], timings[name]))
        )
        floor = case.flops() / (rate / 2)
        print(
            f"{case.name}: {line}; {ratios}; floor {1e3 * floor:.1f} ms ({floor / best['ours-hysime']:.0%})", flush=True
        )


def tiles(options) -> None:
    """FastHyDe on cubes on disk, in tiles and whole: seconds and peak of memory, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for side in (512, 1024, 1536):
            source = Path(folder) / "in.npy"
            cube = add_noise(low_rank_cube(32, (512, 512), 4, torch.float32), 0.02).permute(1, 2, 0).numpy()
            file = np.lib.format.open_memmap(source, mode="w+", dtype=np.float32, shape=(side, side, 32))
            for top in range(0, side, 512):
                for left in range(0, side, 512):
                    file[top : top + 512, left : left + 512] = cube
            del file
            for tile in (256, 0):
                target = str(Path(folder) / "out.npy")
                code = TILED.format(threads=options.threads, source=str(source), target=target, tile=tile)
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                seconds, cpu, peak, before = map(float, done.stdout.split())
                name = f"tiles of {tile}" if tile else "whole"
                size = side * side * 32 * 4 / 2**20
                memory = f"peak {peak / 1024:.0f} MiB, {before / 1024:.0f} at the start"
                print(
                    f"{side}² x 32 ({size:.0f} MiB), {name}: {seconds:.1f} s ({cpu:.1f} s of CPU), {memory}", flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--only", choices=("noise", "tiles"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in (noise, tiles):
        if options.only in (None, part.__name__):
            part(options)


if __name__ == "__main__":
    main()
