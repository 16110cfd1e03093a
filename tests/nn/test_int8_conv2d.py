"""Int8Conv2d: against the float convolution, its schemes, checkpoints and errors."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import pydenoise.functional as PF
from pydenoise.nn import FusedConv2d, Int8Conv2d, WeightedConv2d
from pydenoise.quantization import LayerStatistics, Scheme, quantize_weight, snr_db
from pydenoise.quantization.plan import plan_layer

STATIC = Scheme("per_tensor")
CASES = {
    "plain": dict(kernel_size=3, padding=1),
    "stride, dilation": dict(kernel_size=(3, 5), stride=(2, 1), padding=(2, 3), dilation=(2, 1)),
    "groups": dict(kernel_size=3, groups=2),
    "same": dict(kernel_size=4, padding="same"),
    "no bias": dict(kernel_size=1, bias=False),
}


def make(channels=12, out=10, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Conv2d(channels, out, **{"kernel_size": 3, "padding": 1, **options}).eval()


def statistics_of(conv, x):
    statistics = LayerStatistics.of("conv", conv, 1, 1 << 16, 0)
    statistics.observe(x, torch.zeros(1, dtype=torch.int64))
    return statistics


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_against_the_float_convolution(options, batch):
    conv = make(**options)
    layer = Int8Conv2d.from_float(conv)
    for size in ((9, 11), (7, 8), (9, 11)):
        x = torch.randn(batch, 12, *size)
        y = layer(x)
        assert y.shape == conv(x).shape and y.dtype == x.dtype
        assert batch == 0 or snr_db(conv(x), y) > 35


@torch.no_grad()
def test_equals_the_op():
    conv, x = make(), torch.randn(2, 12, 9, 7)
    layer = Int8Conv2d.from_float(conv, STATIC, input_range=(-3.0, 4.0), activation="silu")
    weight, weight_scale = quantize_weight(conv.weight)
    scale, zero_point = layer.input_scale, layer.input_zero_point
    fused = dict(channel_bias=torch.randn(2, 10), film=torch.randn(2, 20), residual=torch.randn(2, 10, 18, 14))
    codes = PF.quantize(x, scale, zero_point)
    expected = PF.int8_conv2d(
        codes, weight, scale, weight_scale, input_zero_point=zero_point, bias=conv.bias, padding=1, activation="silu",
        upsample=2, **fused,
    )  # fmt: skip
    assert torch.equal(layer(x, upsample=2, **fused), expected)
    assert torch.equal(layer((codes, scale, zero_point), upsample=2, **fused), expected)
    assert torch.equal(layer(layer.quantize(x), upsample=2, **fused), expected)


@torch.no_grad()
def test_int8_output():
    conv, x = make(), torch.randn(1, 12, 5, 5)
    layer = Int8Conv2d.from_float(conv)
    codes = layer(x, out_dtype=torch.int8, out_scale=torch.tensor(0.05), out_zero_point=3)
    assert (codes.int() - PF.quantize(layer(x), 0.05, 3).int()).abs().max() <= 1
    assert layer(x, activation="relu").min() == 0 and layer(x).min() < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_input(dtype):
    """A layer calibrated in float32 takes half precision, and a cast of the model leaves its numbers alone."""
    conv, x = make(), torch.randn(2, 12, 6, 5)
    layer = Int8Conv2d.from_float(conv, STATIC, input_range=(-4, 4))
    y = layer(x.to(dtype))
    assert y.dtype == dtype and snr_db(conv(x), y) > 30
    cast = copy.deepcopy(layer).to(dtype)
    assert cast.weight_scale.dtype == cast.bias.dtype == cast.input_scale.dtype == torch.float32
    assert torch.equal(cast(x.to(dtype)), y)


@torch.no_grad()
def test_plans_and_statistics():
    conv, x = make(), torch.randn(4, 12, 9, 9) * torch.logspace(-1, 1, 12).reshape(-1, 1, 1)
    statistics = statistics_of(conv, x)
    error = []
    for scheme in (STATIC, Scheme("per_tensor", smooth=0.5, bias_correction=True)):
        layer = Int8Conv2d.from_float(conv, scheme, statistics=statistics)
        planned = Int8Conv2d.from_float(conv, plan_layer(conv, statistics, scheme))
        assert torch.equal(layer(x), planned(x))
        error.append(snr_db(conv(x), layer(x)))
    assert error[1] > error[0] + 3  # smoothing helps channels of such different sizes
    assert layer.channel_scale is not None and snr_db(2 * conv(x), Int8Conv2d.from_float(conv, gain=2.0)(x)) > 35


@torch.no_grad()
def test_smoothing_with_groups():
    conv, x = make(groups=3, out=9), torch.randn(2, 12, 9, 9) * torch.logspace(-1, 1, 12).reshape(-1, 1, 1)
    layer = Int8Conv2d.from_float(conv, Scheme("per_pixel", smooth=0.5), statistics=statistics_of(conv, x))
    assert snr_db(conv(x), layer(x)) > 35


@torch.no_grad()
def test_other_float_layers():
    x = torch.randn(1, 12, 7, 7)
    fused = FusedConv2d.from_float(make(), activation="relu")
    assert snr_db(fused(x), Int8Conv2d.from_float(fused)(x)) > 35
    weighted = WeightedConv2d(12, 10, 3, padding=1, density=[0.5]).eval()
    assert snr_db(weighted(x), Int8Conv2d.from_float(weighted)(x)) > 35
    assert snr_db(-make()(x), Int8Conv2d.from_float(make(), gain=-1.0)(x)) > 35


@torch.no_grad()
def test_padding_at_one_side():
    conv, x = make(padding=0, stride=2), torch.randn(1, 12, 6, 8)
    layer = Int8Conv2d.from_float(conv, padding=((0, 1), (0, 1)))
    assert snr_db(conv(nn.functional.pad(x, (0, 1, 0, 1))), layer(x)) > 35


@torch.no_grad()
def test_nan_is_not_hidden():
    """Only outputs that read a NaN are NaN."""
    x = torch.randn(1, 12, 8, 8)
    x[0, 3, 0, 0] = torch.nan
    bad = Int8Conv2d.from_float(make())(x).isnan().all(1)[0]
    assert bad[:2, :2].all() and bad.sum() == 4


@pytest.mark.parametrize(
    "scheme", ["per_pixel", STATIC, Scheme("per_tensor", symmetric=True), Scheme("per_tensor", smooth=0.5)], ids=str
)
def test_copies_and_checkpoints(stands, on_meta, scheme):
    conv, x = make(), torch.randn(2, 12, 5, 6)
    layer = Int8Conv2d.from_float(conv, scheme, statistics=statistics_of(conv, x))
    stands(layer, lambda: Int8Conv2d(12, 10, 3, padding=1), x)
    stands(layer, lambda: Int8Conv2d.from_float(on_meta(conv)), x)
    stands(layer, lambda: Int8Conv2d.from_float(make(seed=1, bias=False)), x)


def loaded(state, **options):
    return Int8Conv2d(
        **{"in_channels": 12, "out_channels": 10, "kernel_size": 3, "padding": 1, **options}
    ).load_state_dict(state)


def test_other_checkpoints_are_refused():
    layer = Int8Conv2d.from_float(make(), STATIC, input_range=(-1, 1))
    state = layer.state_dict()
    assert not any(loaded(state))
    for options, word in (
        (dict(out_channels=9), "weight_shape"),
        (dict(padding=0), "padding"),
        (dict(activation="relu"), "activation"),
    ):
        with pytest.raises(RuntimeError, match=f"another model: {word}"):
            loaded(state, **options)
    with pytest.raises(RuntimeError, match="Missing key.*input_scale"):
        loaded({key: value for key, value in state.items() if key != "input_scale"})
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        loaded({key: value for key, value in state.items() if key != "_extra_state"})
    with pytest.raises(RuntimeError, match="input_scale: expected positive finite"):
        loaded({**state, "input_scale": torch.tensor(torch.nan)})
    with pytest.raises(RuntimeError, match="input_zero_point: expected values from -128"):
        loaded({**state, "input_zero_point": torch.tensor(128, dtype=torch.int32)})
    for strict in (False, True):
        with pytest.raises(RuntimeError, match="checkpoint of the float model"):
            Int8Conv2d(12, 10, 3, padding=1).load_state_dict(make().state_dict(), strict=strict)
    newer = bytes(state["_extra_state"].tolist()).replace(b'"format": 1', b'"format": 9')
    with pytest.raises(RuntimeError, match="format 9"):
        loaded({**state, "_extra_state": torch.frombuffer(bytearray(newer), dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="cannot be read"):
        loaded({**state, "_extra_state": torch.zeros(3, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(scheme="auto"), "scheme"),
        (dict(scheme="float"), "float"),
        (dict(scheme=STATIC), "c1: statistics"),
        (dict(scheme="per_tensor", input_range=(-1, 1)), "c1: input_range"),
        (dict(scheme="per_pixel", input_range=(-1, 1)), "c1: input_range"),
        (dict(scheme=STATIC, input_range=(-1, torch.nan)), "c1: high"),
        (dict(scheme=STATIC, input_range=(torch.zeros(2), torch.ones(2))), "c1: input_range"),
        (dict(activation="tanh"), "activation"),
    ],
)
def test_bad_arguments(options, word):
    with pytest.raises(ValueError, match=word):
        Int8Conv2d.from_float(make(), name="c1", **options)


def test_bad_layers():
    with pytest.raises(TypeError, match="c1: expected a torch.nn.Conv2d, got Linear"):
        Int8Conv2d.from_float(nn.Linear(3, 3), name="c1")
    with pytest.raises(ValueError, match="c1: padding_mode"):
        Int8Conv2d.from_float(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), name="c1")
    conv = make()
    with torch.no_grad():
        conv.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="c1: weight"):
        Int8Conv2d.from_float(conv, name="c1")
    plan = plan_layer(make(), None, Scheme("per_pixel"))
    with pytest.raises(ValueError, match="c1: the plan is of another layer"):
        Int8Conv2d.from_float(make(out=9), plan, name="c1")
    with pytest.raises(ValueError, match="c1: weight_scale: expected positive"):
        Int8Conv2d.from_float(make(), replace(plan, name="c1", weight_scale=-plan.weight_scale))
    with pytest.raises(ValueError, match="overflow"):
        Int8Conv2d(131072, 1, 1, device="meta")


def test_bad_inputs():
    layer, x = Int8Conv2d.from_float(make()), torch.randn(2, 12, 5, 5)
    codes, scale, zero_point = layer.quantize(x)
    for input, error, word in (
        (x[:, :3], ValueError, r"input: expected \[N, 12, H, W\]"),
        (x.double(), TypeError, "input: expected float32"),
        (codes, TypeError, "codes need their scale"),
        ((codes, scale), ValueError, "tuple of 2"),
        ((codes, scale[:1], zero_point), ValueError, "scale of input"),
        ((codes, -1.0, 0), ValueError, "scale of input"),
        (None, TypeError, "input"),
    ):
        with pytest.raises(error, match=word):
            layer(input)
    for options, word in (
        (dict(channel_bias=torch.zeros(2, 9)), "channel_bias"),
        (dict(film=torch.zeros(2, 10)), "film"),
        (dict(residual=torch.zeros(2, 10, 4, 5)), "residual"),
        (dict(upsample=3), "upsample"),
        (dict(out_dtype=torch.int8), "out_scale"),
        (dict(out_dtype=torch.float64), "out_dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            layer(x, **options)


@torch.no_grad()
def test_changed_weights_are_noticed():
    layer, x = Int8Conv2d.from_float(make()), torch.randn(1, 12, 5, 5)
    before = layer(x)
    layer.weight.neg_()
    layer.bias.neg_()
    assert torch.allclose(layer(x), -before, atol=1e-5)


@pytest.mark.parametrize("scheme", ["per_pixel", STATIC], ids=str)
@torch.no_grad()
def test_compile_and_export(scheme):
    """One graph, of the torch ops; the packed weight stays outside."""
    layer = Int8Conv2d.from_float(make(), scheme, **({} if scheme == "per_pixel" else {"input_range": (-3, 3)}))
    x, residual = torch.randn(2, 12, 5, 6), torch.randn(2, 10, 5, 6)
    expected = layer(x, residual=residual)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, residual=residual), expected)
    exported = torch.export.export(layer, (x,), {"residual": residual}).module()
    assert torch.equal(exported(x, residual=residual), expected)
