"""Denoise a hyperspectral cube six ways, and write one band of each as a picture.

Run: python examples/hyperspectral.py [--denoiser wavelet]     (ffdnet: after `pydenoise weights ffdnet`)

The cube is synthetic: photographs of scikit-image as abundance maps, times smooth made-up spectra, with normal noise of
another power in each band; for the last two lines also impulses and a dead line.
"""

import argparse
import time

import numpy as np
import torch

import pydenoise.hyperspectral as hyperspectral
from pydenoise.imaging import Picture, write_picture
from pydenoise.testing.hyperspectral import add_noise, photograph_cube, psnr

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--denoiser", choices=("ffdnet", "wavelet"), default="ffdnet")
parser.add_argument("--size", type=int, default=192)
options = parser.parse_args()
chosen = {"denoiser": options.denoiser}

clean = photograph_cube(bands=96, size=options.size)
sigma = torch.linspace(0.02, 0.15, len(clean))
noisy = add_noise(clean, sigma)
generator = torch.Generator().manual_seed(1)
struck = torch.rand(clean.shape, generator=generator) < 0.02
mixed = torch.where(struck, torch.rand(clean.shape, generator=generator), noisy)
mixed[20:40, :, options.size // 3] = 0
mask = torch.rand(clean.shape, generator=generator) > 0.2
mask[:, : options.size // 2] = True

found = hyperspectral.hysime(noisy)
error = (found.noise.variance.sqrt() / sigma - 1).abs().max()
print(f"HySime: {found.rank} components; noise of every band within {error:.0%}")

runs = {
    "FastHyDe": (noisy, lambda: hyperspectral.fasthyde(noisy, **chosen)),
    "FastHyIn, 10 % missing": (noisy * mask, lambda: hyperspectral.fasthyin(noisy, mask, **chosen)),
    "HyRes": (noisy, lambda: hyperspectral.hyres(noisy)),
    "HyMiNoR, outliers": (mixed, lambda: hyperspectral.hyminor(mixed)),
    "L1HyMixDe, outliers": (mixed, lambda: hyperspectral.l1hymixde(mixed, **chosen)),
}
band = len(clean) // 3
strip = [clean[band], noisy[band]]
for name, (source, run) in runs.items():
    start = time.perf_counter()
    result = run()
    strip.append(result[band])
    seconds = time.perf_counter() - start
    print(f"{name:<24} {psnr(source, clean):5.1f} dB -> {psnr(result, clean):5.1f} dB in {seconds:.1f} s")

peak = clean[band].max()
picture = (torch.cat(strip, 1) / peak).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
write_picture("hyperspectral.png", Picture(np.ascontiguousarray(picture[:, :, None])))
print(f"wrote hyperspectral.png: band {band}, clean, noisy, and by {', '.join(runs)}")
