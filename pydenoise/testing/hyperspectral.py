"""Synthetic hyperspectral cubes with real structure: photographs as abundance maps, times smooth made-up spectra.

No measured cube comes inside a package. The linear mixing model (every pixel a mixture of few spectra) is what such
cubes are modelled by; here the maps are photographs from scikit-image, so edges and textures are real and the spectra
are not.
"""

import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "camera", "brick", "moon")


def smooth_spectra(materials: int, bands: int) -> Tensor:
    """[materials, bands], float64, in (0, 1): each a few broad bumps at places and widths of its own."""
    generator = torch.Generator().manual_seed(7)
    wavelength = torch.linspace(0, 1, bands, dtype=torch.float64)
    centre = torch.rand(materials, 4, 1, generator=generator, dtype=torch.float64)
    width = 0.08 + 0.2 * torch.rand(materials, 4, 1, generator=generator, dtype=torch.float64)
    height = torch.rand(materials, 4, 1, generator=generator, dtype=torch.float64)
    bumps = height * (-((wavelength - centre) / width).square() / 2).exp()
    return 0.05 + 0.9 * bumps.sum(1) / bumps.sum(1).amax(1, keepdim=True)


def photograph_cube(bands: int = 64, size: int = 128, materials: int = 6) -> Tensor:
    """A clean cube [bands, size, size], float32, values in (0, 1), of rank ``materials`` (1 to 6).

    Needs scikit-image.
    """
    from skimage import data

    maps = []
    for index, name in enumerate(PHOTOGRAPHS[:materials]):
        picture = torch.from_numpy(getattr(data, name)()).double()
        picture = picture if picture.dim() == 2 else picture[:, :, index % 3]
        top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
        if min(top, left) < 0:
            raise ValueError(f"size: expected at most {min(picture.shape)}, that of {name}, got {size}")
        maps.append(picture[top : top + size, left : left + size] + 1)
    abundances = torch.stack(maps)
    abundances /= abundances.sum(0)
    return torch.einsum("kl,khw->lhw", smooth_spectra(materials, bands), abundances).float()


def low_rank_cube(
    bands: int = 20, size: tuple[int, int] = (30, 40), rank: int = 4, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A cube of exactly that rank, without photographs: smooth spectra, abundances that are smooth with an edge."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.linspace(0, 1, n, dtype=torch.float64) for n in size)
    phase = torch.rand(rank, 3, 1, generator=generator, dtype=torch.float64) * 6
    maps = torch.sin(phase[:, 0] + 5 * rows)[:, :, None] * torch.cos(phase[:, 1] + 4 * columns)[:, None] + 1.2
    maps[:, :, size[1] // 2 :] *= phase[:, 2, :, None] / 6 + 0.5
    return torch.einsum("kl,khw->lhw", smooth_spectra(rank, bands), maps).to(dtype)


def add_noise(cube: Tensor, sigma: float | Tensor, seed: int = 0) -> Tensor:
    """``cube`` plus normal noise of ``sigma``, a number or one for each band."""
    noise = torch.randn(cube.shape, generator=torch.Generator().manual_seed(seed), dtype=cube.dtype)
    return cube + noise * torch.as_tensor(sigma, dtype=cube.dtype).view(-1, 1, 1)


def psnr(estimate: Tensor, clean: Tensor) -> float:
    """Mean over the bands of the peak signal-to-noise ratio in dB, the peak being the band's largest clean value."""
    error = (estimate - clean).double().square().flatten(1).mean(1)
    peak = clean.double().flatten(1).amax(1).square()
    return (10 * (peak / error).log10()).mean().item()
