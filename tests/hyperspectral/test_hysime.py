"""Noise by regression and HySime's subspace: golden data, the L regressions one by one, identities, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pydenoise.hyperspectral import BandMoments, hysime, regression_noise
from pydenoise.testing.hyperspectral import add_noise, low_rank_cube

GOLDEN = Path(__file__).parent.parent / "data" / "blocks_hyperspectral.npz"


def one_by_one(pixels):
    """Residuals of L least-squares fits, each with all other bands as predictors."""
    residuals = torch.empty_like(pixels)
    for band in range(len(pixels)):
        others = torch.cat((pixels[:band], pixels[band + 1 :])).T
        target = pixels[band][:, None]
        residuals[band] = (target - others @ torch.linalg.lstsq(others, target).solution)[:, 0]
    return residuals


def test_golden():
    """Made outside the package from the public HyDe code, which adds 1e-6 to all entries of R: hence the tolerance."""
    with np.load(GOLDEN) as data:
        pixels, expected = (torch.from_numpy(data[name]) for name in ("noise_Y", "noise_W"))
    noise = regression_noise(pixels)
    torch.testing.assert_close(noise.residual(pixels), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_matrix_is_all_regressions(dtype):
    cube = add_noise(low_rank_cube(bands=17, size=(13, 29)), 0.01).to(dtype)
    noise = regression_noise(cube)
    expected = one_by_one(cube.double().flatten(1))
    residual = noise.residual(cube)
    assert residual.dtype == dtype
    assert residual.shape == cube.shape
    torch.testing.assert_close(residual.double().flatten(1), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(noise.variance, expected.square().mean(1), rtol=1e-6, atol=0)
    inverse = torch.linalg.inv(cube.double().flatten(1) @ cube.double().flatten(1).T)
    torch.testing.assert_close(noise.variance, 1 / (17 * 0 + 13 * 29 * inverse.diagonal()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scales", [1.0, torch.logspace(-6, 6, 40, dtype=torch.float64)])
def test_variances_are_recovered(scales):
    sigma = torch.linspace(0.01, 0.03, 40, dtype=torch.float64)
    cube = add_noise(low_rank_cube(bands=40, size=(100, 120), rank=3), sigma) * torch.as_tensor(scales).view(-1, 1, 1)
    estimate = regression_noise(cube).variance.sqrt() / scales
    assert (estimate / sigma - 1).abs().max() < 0.12  # each band
    assert abs((estimate / sigma).mean() - 1) < 0.05


def test_nothing_of_the_callers_is_changed():
    cube = add_noise(low_rank_cube(), 0.01)
    moments = BandMoments.of(cube)
    copies = cube.clone(), moments.products.clone(), moments.total.clone()
    hysime(cube)
    hysime(moments)
    regression_noise(moments)
    for value, copy in zip((cube, moments.products, moments.total), copies, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_clean_cube_has_its_rank_and_no_noise(rank, dtype):
    cube = low_rank_cube(bands=30, size=(40, 50), rank=rank, dtype=dtype)
    found = hysime(cube)
    assert found.noise.variance.sqrt().max() < 2e-6 * cube.abs().max()
    pixels = cube.double().flatten(1)
    kept = found.basis @ (found.basis.T @ pixels)
    assert (kept - pixels).norm() < 1e-5 * pixels.norm()
    if dtype == torch.float64:
        assert found.rank == rank


def test_noise_hides_only_what_is_below_it():
    cube = low_rank_cube(bands=30, size=(60, 60), rank=4)
    found = hysime(add_noise(cube, 1e-3))
    assert found.rank == 4
    directions = torch.linalg.svd(cube.flatten(1)).U[:, :4]
    assert torch.linalg.svdvals(found.basis.T @ directions).min() > 0.98
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(4, dtype=torch.float64))
    assert (found.gains[:-1] >= found.gains[1:]).all() and (found.gains > 0).all()
    assert hysime(cube, rank=2).rank == 2


def test_noise_alone_has_next_to_no_signal():
    noise = torch.randn(20, 50, 60, dtype=torch.float64)
    found = hysime(noise)
    assert found.rank == 0
    torch.testing.assert_close(found.noise.variance, torch.ones(20, dtype=torch.float64), rtol=0.1, atol=0)


def test_bands_of_zeros_and_equal_bands():
    cube = add_noise(low_rank_cube(), 0.01)
    cube[3] = 0
    cube[5] = cube[6]
    noise = regression_noise(cube)
    assert noise.variance[3] == 0
    assert noise.variance[5] < 1e-9 and noise.variance[6] < 1e-9
    assert (noise.variance[[0, 1, 2, 4]].sqrt() > 0.005).all()
    assert torch.isfinite(hysime(cube).basis).all()
    assert not regression_noise(torch.zeros(3, 4, 5)).variance.any()


def test_moments_add_up_and_do_not_depend_on_order_of_memory():
    cube = add_noise(low_rank_cube(dtype=torch.float32), 0.01)
    whole = BandMoments.of(cube)
    parts = BandMoments.of(cube[:, :7]) + BandMoments.of(cube[:, 7:])
    turned = BandMoments.of(cube.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    for other in (parts, turned, BandMoments.of(cube.flatten(1))):
        assert other.count == whole.count
        torch.testing.assert_close(other.products, whole.products, rtol=1e-13, atol=0)
        torch.testing.assert_close(other.total, whole.total, rtol=1e-13, atol=1e-12)
    weights = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    scaled = BandMoments.of(cube.double() * weights.view(-1, 1, 1))
    torch.testing.assert_close(whole.weighted(weights).products, scaled.products, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("cube", "error", "message"),
    [
        (np.zeros((3, 4, 5)), TypeError, "cube: expected a tensor"),
        (torch.zeros(3, 4, 5, dtype=torch.int32), TypeError, "cube: expected float32 or float64"),
        (torch.zeros(3, 4, 5, dtype=torch.bfloat16), TypeError, "cube: expected float32 or float64"),
        (torch.rand(1, 4, 5), ValueError, "at least 2 bands"),
        (torch.rand(3, 0, 5), ValueError, "at least one pixel"),
        (torch.rand(2, 3, 4, 5), ValueError, r"cube: expected \[bands, H, W\]"),
        (torch.rand(30, 5, 6), ValueError, "30 pixels cannot tell the noise of 30 bands"),
        (torch.full((3, 4, 5), float("nan")), ValueError, "not finite"),
        (torch.full((3, 4, 5), float("inf")), ValueError, "not finite"),
    ],
)
def test_bad_cubes(cube, error, message):
    with pytest.raises(error, match=message):
        regression_noise(cube)
    with pytest.raises(error, match=message):
        hysime(cube)


def test_bad_rank_and_moments():
    for rank in (0, 21):
        with pytest.raises(ValueError, match="rank: expected an integer of 1 to 20"):
            hysime(low_rank_cube(), rank)
    with pytest.raises(ValueError, match="do not add up"):
        BandMoments.of(torch.rand(3, 4, 5)) + BandMoments.of(torch.rand(4, 4, 5))
