"""Planned layers and the choice of a scheme: errors are measured on a float layer with known difficulties."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydenoise.quantization import (
    LayerStatistics,
    Scheme,
    calibrate,
    candidates,
    choose,
    choose_layer,
    measure,
    plan_layer,
    relative_error,
    simulate,
)


def calibrated(layer, *inputs, buckets=1):
    """Statistics of ``layer`` on inputs, the i-th of bucket i."""
    item = LayerStatistics.of("layer", layer, buckets, 1 << 16, 0)
    for index, x in enumerate(inputs):
        item.observe(x, torch.tensor([index % buckets]))
    return item


def conv(**options):
    return nn.Conv2d(8, 12, 3, padding=1, **options).eval()


def silu_images(n=4):
    return F.silu(torch.randn(n, 8, 16, 16))


SCHEMES = [
    Scheme("per_tensor"),
    Scheme("per_tensor", symmetric=True, clip="search"),
    Scheme("per_tensor", clip="search", weight_clip="search", smooth=0.6, bias_correction=True),
    Scheme("per_timestep", buckets=2, smooth=0.5),
    Scheme("per_pixel"),
    Scheme("per_pixel", symmetric=True, smooth=0.5, bias_correction=True),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}, {"bias": False}], ids=str)
def test_convolutions_stay_close(options, scheme):
    layer, x = conv(**options), silu_images()
    item = calibrated(layer, x, x, buckets=2 if scheme.buckets == 2 else 1)
    plan = plan_layer(layer, item, scheme)
    error = relative_error(layer(x), simulate(plan, layer, x, padded=True))
    assert error < (0.03 if scheme.symmetric else 0.015)
    assert plan.weight.dtype == torch.int8 and plan.weight.shape == layer.weight.shape
    assert (plan.input_scale is None) == scheme.is_dynamic
    assert (plan.channel_scale is None) == (scheme.smooth is None)
    if scheme.granularity == "per_timestep":
        assert plan.input_scale.shape == (2,) and plan.input_zero_point.dtype == torch.int32


@pytest.mark.parametrize("scheme", [*SCHEMES[:4], Scheme("per_token")], ids=str)
def test_linear_layers_stay_close(scheme):
    layer, x = nn.Linear(16, 24).eval(), torch.randn(3, 10, 16)
    item = calibrated(layer, x, x, buckets=2 if scheme.buckets == 2 else 1)
    plan = plan_layer(layer, item, scheme)
    assert relative_error(layer(x), simulate(plan, layer, x)) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(dtype):
    layer, x = conv().to(dtype), silu_images().to(dtype)
    plan = plan_layer(layer, calibrated(layer, x), Scheme("per_tensor", bias_correction=True))
    assert plan.weight_scale.dtype == plan.bias.dtype == plan.input_scale.dtype == torch.float32


def test_affine_beats_symmetric_after_silu():
    """SiLU's minimum is -0.278: a symmetric range wastes nearly half of its codes."""
    layer, x = conv(), silu_images()
    item = calibrated(layer, x)
    with torch.no_grad():
        layer.weight.div_(layer.weight.abs().amax((1, 2, 3), keepdim=True)).mul_(127).round_()  # kept exactly
    gains = [measure(layer, item, plan_layer(layer, item, Scheme(symmetric=s))).snr_db for s in (False, True)]
    assert 4.0 < gains[0] - gains[1] < 7.0


def test_bias_correction_takes_out_the_mean():
    layer, x = conv(), 1.0 + F.relu(torch.randn(8, 8, 16, 16))
    item = calibrated(layer, x)
    plain, fixed = (plan_layer(layer, item, Scheme(bias_correction=b)) for b in (False, True))
    off = [(simulate(p, layer, x) - F.conv2d(x, layer.weight, layer.bias)).mean((0, 2, 3)) for p in (plain, fixed)]
    assert off[1].abs().max() < 0.2 * off[0].abs().max()
    assert measure(layer, item, fixed).snr_db > measure(layer, item, plain).snr_db + 1.0


def test_smoothing_helps_uneven_channels():
    layer = conv()
    x = silu_images() * torch.tensor([30.0, *[1.0] * 7]).reshape(-1, 1, 1)
    with torch.no_grad():
        layer.weight[:, 0] /= 30.0
    item = calibrated(layer, x)
    plain, smooth = (measure(layer, item, plan_layer(layer, item, Scheme(smooth=s))).snr_db for s in (None, 0.5))
    assert smooth > plain + 15.0


def test_given_factors_are_used():
    layer, x = nn.Linear(16, 8).eval(), torch.randn(5, 16)
    factors = torch.logspace(-0.3, 0.3, 16)
    plan = plan_layer(layer, calibrated(layer, x), Scheme(), factors=factors)
    torch.testing.assert_close(plan.channel_scale, 1 / factors)
    assert relative_error(layer(x), simulate(plan, layer, x)) < 0.05


def test_a_table_of_scales_serves_every_timestep():
    """A scale 8 times too wide costs about 17 dB."""
    layer, x = conv(), silu_images()
    item = calibrated(layer, x, x * 8, buckets=2)
    schemes = (Scheme("per_timestep", buckets=2), Scheme())
    timed, single = (measure(layer, item, plan_layer(layer, item, scheme)) for scheme in schemes)
    assert timed.per_bucket[0] > single.per_bucket[0] + 13.0
    assert timed.per_bucket[1] == pytest.approx(single.per_bucket[1], abs=0.2)


def test_unseen_buckets_take_the_nearest():
    layer, x = conv(), silu_images()
    item = LayerStatistics.of("layer", layer, 6, 1 << 16, 0)
    item.observe(x, torch.tensor([1]))
    item.observe(x * 4, torch.tensor([4]))
    for clip in ("minmax", "search"):
        scale = plan_layer(layer, item, Scheme("per_timestep", buckets=6, clip=clip)).input_scale
        assert torch.equal(scale[[0, 1, 2]], scale[[1, 1, 1]]) and torch.equal(scale[[3, 4, 5]], scale[[4, 4, 4]])
        assert scale[4] > 3 * scale[1]
    assert measure(layer, item, plan_layer(layer, item, Scheme())).per_bucket[0] is None


def test_constant_inputs_have_valid_scales():
    layer = conv()
    for value in (0.0, 2.0, -3.0):
        item = calibrated(layer, torch.full((1, 8, 9, 9), value))
        for scheme in (Scheme(), Scheme(symmetric=True), Scheme(clip="search"), Scheme(smooth=0.5)):
            plan = plan_layer(layer, item, scheme)
            assert plan.input_scale > 0 and math.isfinite(plan.input_scale)
        assert "constant" in choose_layer(layer, item).reason


# ------------------------------------------------------------------------------------------------------------- choice


def test_easy_inputs_get_the_cheapest_kind():
    layer = conv()
    decision = choose_layer(layer, calibrated(layer, silu_images()))
    assert decision.scheme.granularity == "per_tensor" and decision.snr_db > 31
    cheapest = [scheme for scheme in candidates("conv2d") if scheme.cost == 0]
    assert [m.scheme for m in decision.measurements] == cheapest  # the others need not be measured
    assert decision.plan.scheme == decision.scheme


def test_timestep_dependent_ranges_get_a_table():
    layer = conv()
    item = calibrated(layer, silu_images(), silu_images() * 30, buckets=2)
    assert choose_layer(layer, item, target_db=34.0).scheme.granularity == "per_timestep"


def test_uneven_pixels_get_a_scale_each():
    layer = conv()
    x = silu_images() * (1.0 + 40.0 * (torch.rand(4, 1, 16, 16) > 0.98))
    few = [Scheme("per_tensor"), Scheme("per_pixel")]
    decision = choose_layer(layer, calibrated(layer, x), schemes=few, target_db=34.0)
    assert decision.scheme.granularity == "per_pixel"


def test_float_is_the_last_resort():
    layer = conv()
    item = calibrated(layer, silu_images())
    best = choose_layer(layer, item, target_db=200.0)
    assert best.plan is not None and "below 200 dB" in best.reason
    for options in ({"float_below": 100.0}, {"schemes": [Scheme(), Scheme("float")]}):
        decision = choose_layer(layer, item, target_db=200.0, **options)
        assert decision.scheme.is_float and decision.plan is None and decision.snr_db == math.inf
        assert "dB" in decision.reason and decision.measurements


def test_a_large_bias_hides_no_error():
    layer = conv()
    item = calibrated(layer, silu_images())
    before = measure(layer, item, plan_layer(layer, item, Scheme())).snr_db
    with torch.no_grad():
        layer.bias.fill_(100.0)
    assert measure(layer, item, plan_layer(layer, item, Scheme())).snr_db == pytest.approx(before, abs=0.01)


def test_choice_over_a_model():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(12, 3, 1)).eval()
    calibration = calibrate(model, [silu_images()])
    decisions = choose(model, calibration)
    assert list(decisions) == ["0", "2"]
    named = choose(model, calibrate(model, [silu_images()], scheme="per_pixel"), layers=["2"])
    assert named["2"].scheme == Scheme("per_pixel") and list(named) == ["2"]
    with pytest.raises(ValueError, match="^layers: '7' was not calibrated"):
        choose(model, calibration, layers=["7"])
    with pytest.raises(ValueError, match="^calibration: is of another model"):
        choose(nn.Sequential(nn.Linear(2, 2)).eval(), calibration)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda c, s: plan_layer(nn.ReLU(), s, Scheme()), TypeError, "layer"),
        (lambda c, s: plan_layer(c, s, Scheme("float")), ValueError, "scheme"),
        (lambda c, s: plan_layer(c, None, Scheme()), ValueError, "statistics"),
        (lambda c, s: plan_layer(c, None, Scheme("per_pixel", bias_correction=True)), ValueError, "statistics"),
        (lambda c, s: plan_layer(nn.Linear(8, 2), s, Scheme()), ValueError, "statistics"),
        (lambda c, s: plan_layer(c, LayerStatistics("x", "conv2d", 8), Scheme()), ValueError, "statistics"),
        (lambda c, s: plan_layer(c, s, Scheme("per_timestep", buckets=3)), ValueError, "scheme"),
        (lambda c, s: plan_layer(c, s, Scheme(), factors=torch.ones(3)), ValueError, "factors"),
        (lambda c, s: plan_layer(c, s, Scheme(), factors=-torch.ones(8)), ValueError, "factors"),
        (lambda c, s: choose_layer(c, s, schemes=[]), ValueError, "schemes"),
    ],
)
def test_bad_arguments_are_named(make, error, name):
    layer = conv()
    with pytest.raises(error, match=rf"^{name}:"):
        make(layer, calibrated(layer, silu_images()))
