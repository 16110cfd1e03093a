"""Cubes in tiles: the result of the whole cube, in memory that does not depend on its size."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pydenoise.hyperspectral import FFDNetDenoiser, WaveletDenoiser, denoise_tiles, fasthyde, moments_of
from pydenoise.models import FFDNet
from pydenoise.testing.hyperspectral import add_noise, low_rank_cube
from pydenoise.testing.memory import unsupported


def cube_of(size=(90, 120), dtype=np.float32):
    cube = add_noise(low_rank_cube(bands=12, size=size, rank=3), 0.02).permute(1, 2, 0).numpy()
    return cube.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(cube * 1000).astype(dtype)


def whole(pixels, denoiser, noise="non-iid", scale=1.0):
    values = torch.from_numpy(pixels.astype(np.float64) / scale).permute(2, 0, 1)
    return fasthyde(values, noise, denoiser=denoiser).permute(1, 2, 0).numpy() * scale


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int16])
def test_tiles_equal_the_whole(dtype, batch):
    pixels, denoiser = cube_of(dtype=dtype), WaveletDenoiser(levels=2)
    result = denoise_tiles(pixels, denoiser=denoiser, tile=48, batch=batch)
    assert result.dtype == dtype
    expected = whole(pixels, denoiser)
    tolerance = 1e-4 if np.dtype(dtype).kind == "f" else 0.52
    # Not one threshold of all may have met a value at its edge: those may fall on either side.
    assert (np.abs(result - expected) > tolerance).mean() < 1e-3
    assert np.abs(expected - pixels).max() > 5 * tolerance


def test_tiles_of_a_network_equal_the_whole():
    torch.manual_seed(0)
    pixels, denoiser = cube_of(), FFDNetDenoiser(FFDNet(1, 8, 3))
    result = denoise_tiles(pixels, denoiser=denoiser, tile=32)
    np.testing.assert_allclose(result, whole(pixels, denoiser), atol=1e-4)
    blended = denoise_tiles(pixels, denoiser=denoiser, tile=32, overlap=8, blend=True)
    assert np.abs(blended - result).max() < 0.05


def test_counts():
    rates = low_rank_cube(bands=12, size=(90, 120), rank=3).permute(1, 2, 0).numpy() * 30
    counts = np.random.default_rng(0).poisson(rates).astype(np.uint16)
    result = denoise_tiles(counts, noise="poisson", denoiser="wavelet", tile=0)
    expected = whole(counts, "wavelet", "poisson")
    assert (np.abs(result - expected) > 0.52).mean() < 1e-3


def test_scaled_samples():
    pixels = cube_of(dtype=np.uint16)
    options = {"denoiser": "wavelet", "tile": 0}
    plain = denoise_tiles(pixels, **options, sigma=20.0).astype(int)
    scaled = denoise_tiles(pixels, **options, sigma=0.02, scale=1000.0)
    assert np.abs(plain - scaled).max() <= 1


def test_moments_are_those_of_the_whole():
    pixels = cube_of((700, 300))
    seen = []
    moments = moments_of(pixels, on_window=seen.append)
    values = pixels.reshape(-1, 12).astype(np.float64)
    assert moments.count == len(values) == sum(seen)
    np.testing.assert_allclose(moments.products.numpy(), values.T @ values, rtol=1e-12)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 5), np.float32), "pixels: expected"),
        (np.zeros((4, 5, 0), np.float32), "pixels: expected"),
        (np.zeros((4, 5, 1), np.float32), "at least 2 bands"),
        (np.full((9, 9, 3), np.nan, np.float32), "not finite"),
        (np.zeros((2, 2, 5), np.float32), "more pixels are needed"),
    ],
)
def test_bad_cubes(pixels, message):
    with pytest.raises(ValueError, match=message):
        denoise_tiles(pixels, denoiser="wavelet")


@pytest.mark.slow
@pytest.mark.skipif(unsupported() is not None, reason=str(unsupported()))
def test_memory_does_not_grow_with_the_cube(tmp_path):
    """From 100 to 400 MB of cube, on disk: the peak of the process stays where it is, within a few per cent.

    Both cubes have tiles with margins on all sides, and windows of the full size.
    """
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(1)\n"
        "from pydenoise.hyperspectral import denoise_tiles, WaveletDenoiser\n"
        "from pydenoise.testing.memory import resident_bytes\n"
        "pixels = np.load(sys.argv[1], mmap_mode='r')\n"
        "out = np.lib.format.open_memmap(sys.argv[2], mode='w+', dtype=pixels.dtype, shape=pixels.shape)\n"
        "denoise_tiles(pixels, denoiser=WaveletDenoiser(levels=2, spins=1), tile=256, out=out)\n"
        "print(resident_bytes('VmHWM'))\n"
    )
    peaks = []
    for side in (1024, 2048):
        tile = np.random.default_rng(0).random((512, 512, 24)).astype(np.float32)
        path = tmp_path / f"{side}.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(side, side, 24))
        for top in range(0, side, 512):
            for left in range(0, side, 512):
                file[top : top + 512, left : left + 512] = tile
        del file
        command = [sys.executable, "-c", code, path, tmp_path / "out.npy"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks
