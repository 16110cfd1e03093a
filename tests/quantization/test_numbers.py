"""Scales, zero points and codes; weights, searches, measures of error. The golden cases are in test_golden.py."""

import math

import pytest
import torch

from pydenoise.quantization import (
    decode,
    encode,
    fake_quantize,
    fake_quantize_dynamic,
    quantize_weight,
    range_parameters,
    relative_error,
    search_range,
    snr_db,
)


@pytest.mark.parametrize("symmetric", [False, True])
def test_fake_quantize_is_encode_and_decode(symmetric):
    x = torch.randn(50, 40) * torch.logspace(-3, 3, 50).unsqueeze(1)
    scale, zero_point = range_parameters(x.amin(1) * 0.7, x.amax(1) * 0.9, symmetric)
    scale, zero_point = scale.unsqueeze(1), None if symmetric else zero_point.unsqueeze(1)
    assert torch.equal(fake_quantize(x, scale, zero_point), decode(encode(x, scale, zero_point), scale, zero_point))
    assert torch.equal(encode(x, scale, zero_point), encode(x.double(), scale, zero_point))


@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_scales_are_those_of_each_position(symmetric):
    x = torch.randn(2, 6, 3, 4)
    y = fake_quantize_dynamic(x, 1, symmetric)
    pixel = x[1, :, 2, 3]
    scale, zero_point = range_parameters(pixel.min(), pixel.max(), symmetric)
    assert torch.equal(y[1, :, 2, 3], fake_quantize(pixel, scale, zero_point))


def test_ranges_hold_zero_and_their_ends():
    for low, high in ((2.0, 5.0), (-5.0, -2.0), (-0.278, 6.0)):
        scale, zero_point = range_parameters(torch.tensor(low), torch.tensor(high))
        ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
        kept = fake_quantize(ends, scale, zero_point)
        assert kept[1] == 0.0
        assert (kept - ends).abs().max() <= scale * 0.5001


def test_tiny_and_bad_ranges():
    assert range_parameters(torch.tensor(0.0), torch.tensor(1e-37))[0] == 1.0
    with pytest.raises(ValueError, match="^high: expected finite"):
        range_parameters(torch.tensor(0.0), torch.tensor(math.inf))
    with pytest.raises(ValueError, match="^low: expected at most high"):
        range_parameters(torch.tensor(1.0), torch.tensor(0.0))


def test_weights_never_use_the_lowest_code():
    codes, scale = quantize_weight(torch.tensor([[-1.0, 0.5], [0.0, 0.0]]))
    assert codes.tolist() == [[-127, 64], [0, 0]]
    assert scale[1] == 1.0


@pytest.mark.parametrize(
    ("weight", "clip", "error", "name"),
    [
        (torch.ones(2, 2, dtype=torch.int8), "minmax", TypeError, "weight"),
        (torch.full((2, 2), math.nan), "minmax", ValueError, "weight"),
        (torch.empty(0, 2), "minmax", ValueError, "weight"),
        (torch.ones(2, 2), "best", ValueError, "clip"),
    ],
)
def test_bad_weights(weight, clip, error, name):
    with pytest.raises(error, match=rf"^{name}:"):
        quantize_weight(weight, clip=clip)


# ------------------------------------------------------------------------------------------------------------ search


def error_of(x, low, high, symmetric):
    scale, zero_point = range_parameters(low, high, symmetric)
    return (fake_quantize(x, scale, zero_point) - x).abs().pow(2.4).mean()


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_finds_the_best_shrink(symmetric):
    x = torch.linspace(-0.2, 4.0, 100_000)
    x[0] = 4.2
    low, high = search_range(x[None], x.amin()[None], x.amax()[None], symmetric)
    shrinks = [1 - 0.01 * i for i in range(20)]
    start = -x.abs().max() if symmetric else x.min()
    best = min(error_of(x, start * f, x.max() * f, symmetric) for f in shrinks)
    found = error_of(x, low[0], high[0], symmetric)
    assert found <= best * 1.0001
    assert high[0] < x.max()
    if not symmetric:
        assert low[0] == x.min(), "the near end stays: most values are there"


def test_rows_are_searched_by_themselves():
    x = torch.randn(3, 1000) * torch.tensor([[1.0], [5.0], [0.0]])
    x[0, 0] = 40.0
    x[1, 500:] = math.nan  # a shorter row
    together = search_range(x, x.nan_to_num(0).amin(1), x.nan_to_num(0).amax(1))
    for row in range(3):
        own = x[row][~x[row].isnan()]
        alone = search_range(own[None], own.amin()[None], own.amax()[None])
        assert together[0][row] == alone[0][0]
        assert together[1][row] == alone[1][0]


def test_weight_search_lowers_the_error():
    weight = torch.randn(8, 3000)
    weight[:, 0] = 4.5
    plain, searched = quantize_weight(weight), quantize_weight(weight, clip="search")
    assert (searched[1] <= plain[1]).all() and (searched[1] < plain[1]).any()
    worse, better = (decode(c, s.unsqueeze(1)) for c, s in (plain, searched))
    assert (better - weight).abs().pow(2.4).mean() < (worse - weight).abs().pow(2.4).mean()


def test_bad_searches():
    with pytest.raises(ValueError, match="^values:"):
        search_range(torch.ones(2, 3), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="^shrinks:"):
        search_range(torch.ones(1, 3), torch.zeros(1), torch.ones(1), shrinks=101)


# ------------------------------------------------------------------------------------------------------------- errors


def test_measures_of_error():
    x = torch.tensor([3.0, 4.0])
    assert snr_db(x, x) == math.inf
    assert relative_error(x, x) == 0.0
    assert snr_db(x, x * 1.1) == pytest.approx(20.0, abs=1e-5)
    assert relative_error(x, x * 1.1) == pytest.approx(0.1, rel=1e-5)
    assert snr_db(torch.zeros(2), x) == -math.inf
