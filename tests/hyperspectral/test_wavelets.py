"""The wavelet transform, thresholds and the median filter that the methods are made of."""

import math

import pytest
import torch

from pydenoise.hyperspectral.anscombe import anscombe, inverse_anscombe
from pydenoise.hyperspectral.median import adaptive_median
from pydenoise.hyperspectral.shrinkage import soft_threshold, sure_threshold
from pydenoise.hyperspectral.wavelets import compose, daubechies, decompose, extend, fitting_levels, reach

DB2 = [(1 + math.sqrt(3)), (3 + math.sqrt(3)), (3 - math.sqrt(3)), (1 - math.sqrt(3))]  # over 4 sqrt(2)
# Of db5, as tabulated in Daubechies, "Ten Lectures on Wavelets", table 6.1 (there to the same sum of sqrt(2)).
DB5 = [0.1601023979741929, 0.6038292697971895, 0.7243085284377726, 0.1384281459013203, -0.2422948870663823]
DB5 += [-0.0322448695846381, 0.0775714938400459, -0.0062414902127983, -0.0125807519990820, 0.0033357252854738]


def test_filters():
    assert daubechies(1) == pytest.approx([math.sqrt(0.5)] * 2)
    assert daubechies(2) == pytest.approx([value / (4 * math.sqrt(2)) for value in DB2])
    assert daubechies(5) == pytest.approx(DB5, abs=1e-12)
    for moments in range(1, 11):
        low = torch.tensor(daubechies(moments), dtype=torch.float64)
        for shift in range(moments):
            product = (low[2 * shift :] * low[: len(low) - 2 * shift]).sum()
            assert product == pytest.approx(float(shift == 0), abs=1e-8)
        signs = torch.tensor([(-1.0) ** i for i in range(2 * moments)], dtype=torch.float64)
        position = torch.arange(2 * moments, dtype=torch.float64) / (2 * moments)
        for power in range(moments):
            assert (signs * low * position**power).sum() == pytest.approx(0, abs=1e-6)
    for wrong in (0, 11, 2.0, True):
        with pytest.raises(ValueError, match="wavelet"):
            daubechies(wrong)


@pytest.mark.parametrize("moments", [1, 2, 5])
@pytest.mark.parametrize("size", [(32, 48), (64, 32)])
def test_the_transform_is_orthonormal(moments, size):
    images = torch.randn(3, 1, *size, dtype=torch.float64)
    levels = fitting_levels(min(size), moments, 4)
    approximation, details = decompose(images, moments, levels)
    energy = approximation.square().sum() + sum(part.square().sum() for part in details)
    assert energy == pytest.approx(images.square().sum().item(), rel=1e-10)
    torch.testing.assert_close(compose(approximation, details, moments), images)
    assert sum(part[0].numel() for part in details) + approximation[0].numel() == images[0].numel()


def test_against_pywavelets():
    pywt = pytest.importorskip("pywt")
    image = torch.randn(1, 1, 64, 96, dtype=torch.float64)
    for moments in range(1, 11):
        assert daubechies(moments) == pytest.approx(pywt.Wavelet(f"db{moments}").rec_lo, abs=1e-9)
        shift = moments - 1  # where its filter is centred
        approximation, details = decompose(image.roll((shift, shift), (2, 3)), moments, 1)
        coarse, others = pywt.dwt2(image[0, 0].numpy(), f"db{moments}", "periodization")
        torch.testing.assert_close(approximation[0, 0], torch.from_numpy(coarse), rtol=0, atol=1e-8)
        energies = sorted((part**2).sum() for part in others)
        assert sorted(details[0].square().sum((0, 2, 3)).tolist()) == pytest.approx(energies, rel=1e-8)


def test_polynomials_have_no_details():
    rows = torch.linspace(0, 1, 64, dtype=torch.float64)
    image = (rows[:, None] ** 2 + rows**3 - rows[:, None] * rows)[None, None]
    _, details = decompose(image, 5, 1)
    assert details[0][..., :27, :27].abs().max() < 1e-12  # not where the filter wraps around


def test_reach():
    """A pixel acts on no other pixel farther away, through thresholds or not."""
    for moments, levels in ((1, 3), (2, 3), (3, 2)):
        image = torch.zeros(1, 1, 128, 128, dtype=torch.float64)
        image[..., 64, 64] = 1
        approximation, details = decompose(image, moments, levels)
        result = compose(approximation, [torch.zeros_like(part) for part in details], moments)
        touched = result[0, 0].abs().amax(0).nonzero()[:, 0]
        assert max(64 - touched.min(), touched.max() - 64) <= reach(moments, levels)


def test_extension_reflects_as_often_as_it_takes():
    line = torch.tensor([1.0, 2.0, 3.0])[None]
    assert extend(line, (0, 4), (0, 3)).tolist() == [[3, 3, 2, 1, 1, 2, 3, 3, 2, 1]]
    assert extend(torch.tensor([[5.0]]), (2, 0), (1, 3)).unique().tolist() == [5]


def test_soft_threshold():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    assert soft_threshold(x, 1.0).tolist() == [-1, 0, 0, 0, 1]
    assert torch.equal(soft_threshold(x, 0.0), x)  # and no NaN at zero


def test_sure_is_the_least_of_all_thresholds():
    x = torch.randn(4, 500, dtype=torch.float64)
    x[:, :20] += 6
    threshold, risk = sure_threshold(x)
    tried = torch.cat((torch.zeros(1, dtype=torch.float64), torch.linspace(0, 8, 4001, dtype=torch.float64)))
    for row, best, least in zip(x, threshold, risk, strict=True):
        estimates = 500 - 2 * (row.abs() <= tried[:, None]).sum(1) + row.abs().minimum(tried[:, None]).square().sum(1)
        estimates[0] = 500  # no threshold
        assert least <= estimates.min() + 1e-9
        assert 0 < best < 8
    assert sure_threshold(torch.full((1, 10), 50.0))[0].tolist() == [0]  # nothing but signal: left alone
    errors = (
        (soft_threshold(x, threshold[:, None]) - torch.cat((torch.full((20,), 6.0), torch.zeros(480)))).square().sum(1)
    )
    assert abs(errors.mean() - risk.mean()) < 40


def test_anscombe():
    generator = torch.Generator().manual_seed(0)
    for mean in (2.0, 5.0, 40.0, 1000.0):
        counts = torch.poisson(torch.full((400_000,), mean, dtype=torch.float64), generator=generator)
        transformed = anscombe(counts)
        assert transformed.std() == pytest.approx(1, abs=0.08 if mean < 4 else 0.02)
        back = inverse_anscombe(transformed.mean())
        assert back == pytest.approx(mean, rel=0.01)
    assert inverse_anscombe(torch.tensor([-3.0, 0.0])).tolist() == pytest.approx([0, 0], abs=1e-3)
    with pytest.raises(ValueError, match="negative"):
        anscombe(torch.tensor([1.0, -0.5]))


def test_adaptive_median():
    image = torch.arange(20.0)[:, None] + torch.arange(30.0)
    spoiled = image.clone()
    spoiled[3:6, 10:13] = 1e4  # larger than a window of 3
    spoiled[15, 20] = -1e4
    filtered = adaptive_median(spoiled[None], 21)[0]
    assert filtered.max() < 60 and filtered.min() > -10
    assert (filtered - image).abs().max() <= 4
    assert torch.equal(adaptive_median(torch.ones(2, 1, 1), 5), torch.ones(2, 1, 1))
