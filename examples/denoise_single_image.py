"""Denoise one noisy picture with nothing but itself, and look at the sigmas that the filter learned.

    python examples/denoise_single_image.py [--steps 300] [--noise 0.1] [--out sigma_maps.png]

A scene of rings and an edge, with noise added, so that the quality can be told. The model sees the noisy picture alone.
"""

import argparse
import math

import torch

from pydenoise.nn import SigmaRegion
from pydenoise.self_supervised import denoise_single_image


def scene(side: int) -> torch.Tensor:
    """Rings, a bright square and a ramp, [1, side, side], 0 to 1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    rings = 0.5 + 0.25 * torch.sin(14 * (x.square() + y.square()))
    square = ((x - 0.4).abs() < 0.3) & ((y + 0.4).abs() < 0.3)
    return torch.where(square, 0.9, rings * (0.7 + 0.3 * x))[None]


def psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    return -10 * math.log10((image.clamp(0, 1) - clean).square().mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--out", help="write a plot of the sigmas (needs matplotlib)")
    options = parser.parse_args()
    clean = scene(options.side)
    noisy = clean + options.noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    tell = max(1, options.steps // 5)

    def report(step: int, loss: float) -> None:
        if step % tell == 0:
            print(f"step {step}: loss {loss:.4f}")

    result = denoise_single_image(noisy, steps=options.steps, on_step=report)
    print(f"noisy {psnr(noisy, clean):.2f} dB, denoised {psnr(result.image, clean):.2f} dB")
    for stage, sigma in enumerate(result.sigma_maps):
        low, high = sigma.amin((0, 1)).tolist(), sigma.amax((0, 1)).tolist()
        ranges = (f"{n} {a:.2f} to {b:.2f}" for n, a, b in zip(("x", "y", "r"), low, high, strict=True))
        print(f"stage {stage}: sigma " + ", ".join(ranges))
    sharp = SigmaRegion((0, options.side // 2), (0, options.side // 2), sigma_r=0.02)
    with torch.no_grad():
        corner = result.model(noisy[None], [sharp])[0]
    print(f"with a narrow sigma r in one corner: {psnr(corner, clean):.2f} dB")
    if options.out:
        result.plot_sigma_maps().savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
