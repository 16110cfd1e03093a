"""Hyperspectral cases: noise estimation by one matrix product, against the regressions one by one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, images
from pydenoise.hyperspectral import regression_noise
from pydenoise.testing.hyperspectral import add_noise, low_rank_cube

BOUNDS = {"fp32": 1e-3}  # of the largest residual: its signal is some thousand times larger, in float32 samples
LSTSQ_FLOPS = 1e11  # more than that is no case for L separate least-squares fits


@dataclass(frozen=True)
class NoiseBench(Case):
    """Noise of a cube [bands, *size]: variances alone, or with the residual image (``residual``)."""

    bands: int = 0
    size: tuple[int, int] = (0, 0)
    residual: bool = True

    def flops(self) -> float:
        """Of the product Y Y^T, half of which is enough, and of the residuals."""
        pixels = self.size[0] * self.size[1]
        return self.bands**2 * pixels * (3.0 if self.residual else 1.0)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float:
        """float64 has half the rate of float32."""
        return self.flops() / (peaks.flops("fp32") / 2)

    def describe(self) -> dict:
        return super().describe() | {
            "input": [self.bands, *self.size],
            "residual": self.residual,
            "flops": self.flops(),
        }


def hyperspectral_cases(quick: bool = False) -> list[Case]:
    """Noise of cubes of 64 to 224 bands. The bar: L / 4 times the speed of L least-squares fits."""
    if quick:
        return [NoiseBench("noise 8 bands", "hysime", "smoke test", (), bands=8, size=(16, 20))]
    cases = []
    for bands, side in ((64, 128), (128, 128), (224, 128), (224, 512)):
        for residual in (True, False):
            what = "residuals" if residual else "variances"
            bars = (Bar(against=("lstsq",), speedup=bands / 4, subjects=("ours-hysime",)),)
            bars += (Bar(against=("downdates",), speedup=2.0, subjects=("ours-hysime",)),)
            name = f"{what}, {bands} bands, {side}²"
            size = (side, side)
            cases.append(
                NoiseBench(name, "hysime", "noise of every band", bars, bands=bands, size=size, residual=residual)
            )
    return cases


def bench_cube(case: NoiseBench) -> Tensor:
    """A noisy cube of ten spectra, float32."""
    return add_noise(low_rank_cube(case.bands, case.size, 10, torch.float32), 1e-3)


def lstsq_noise(pixels: Tensor) -> Tensor:
    """Residuals of L separate least-squares fits (normal equations of L - 1 bands, factored anew for each)."""
    residuals = torch.empty_like(pixels)
    keep = torch.ones(len(pixels), dtype=torch.bool)
    for band in range(len(pixels)):
        keep[band] = False
        others = pixels[keep]
        solution = torch.linalg.solve(others @ others.T, others @ pixels[band])
        residuals[band] = pixels[band] - solution @ others
        keep[band] = True
    return residuals


def downdate_noise(pixels: Tensor) -> Tensor:
    """The published loop: one inverse, from which each band is taken out by a rank-one downdate; L vector products."""
    products = pixels @ pixels.T
    inverse = torch.linalg.inv(products)
    residuals = torch.empty_like(pixels)
    for band in range(len(pixels)):
        reduced = inverse - inverse[:, band : band + 1] * inverse[band] / inverse[band, band]
        right = products[:, band].clone()
        right[band] = 0
        solution = reduced @ right
        solution[band] = 0
        residuals[band] = pixels[band] - solution @ pixels
    return residuals


def _results(case: NoiseBench, residual: Tensor) -> dict[str, Tensor]:
    """Compared as deviations, or as residuals."""
    return {"noise": images(residual)} if case.residual else {"noise": images(residual.square().mean(1).sqrt())}


def _ours(case: NoiseBench, setting: Setting) -> Contender:
    cube = bench_cube(case).to(setting.device)

    def run() -> Tensor:
        noise = regression_noise(cube)
        return noise.residual(cube).flatten(1) if case.residual else noise.variance.sqrt()

    return Contender(run, lambda: {"noise": images(run())})


def _loop(function, least_squares: bool):
    def prepare(case: NoiseBench, setting: Setting) -> Contender:
        if least_squares and case.bands**3 * case.size[0] * case.size[1] * 2 > LSTSQ_FLOPS:
            raise Skip("L fits of L - 1 bands would take minutes")
        pixels = bench_cube(case).flatten(1).double().to(setting.device)
        return Contender(lambda: function(pixels), lambda: _results(case, function(pixels)))

    return prepare


PROVIDERS = (
    Provider("ours-hysime", "ours, one product", _ours, ours=True),
    Provider("downdates", "published loop", _loop(downdate_noise, False)),
    Provider("lstsq", "L fits", _loop(lstsq_noise, True)),
)


def expected_results(case: NoiseBench, setting: Setting) -> dict:
    """By QR, in float64, from the same float32 samples."""
    pixels = bench_cube(case).flatten(1).double()
    root = torch.linalg.qr(pixels.T, "r").R  # R^T R = Y Y^T, without forming it
    inverse = torch.cholesky_inverse(root.T.contiguous() * root.diagonal().sign(), upper=False)
    residual = inverse / inverse.diagonal()[:, None] @ pixels
    return {"noise": [((Ellipsis,), _results(case, residual)["noise"])]}
