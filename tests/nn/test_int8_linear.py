"""Int8Linear: against the float layer, its schemes, checkpoints and errors."""

import pytest
import torch
from torch import nn

import pydenoise.functional as PF
from pydenoise.nn import Int8Linear
from pydenoise.nn.int8_linear import joined
from pydenoise.quantization import LayerStatistics, Scheme, quantize_weight, snr_db

STATIC = Scheme("per_tensor")


def make(inputs=33, outputs=17, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, **options).eval()


@pytest.mark.parametrize("leading", [(5,), (1, 1), (2, 7), (0, 3), (2, 3, 4), ()], ids=str)
@torch.no_grad()
def test_against_the_float_layer(leading):
    linear = make()
    layer, x = Int8Linear.from_float(linear), torch.randn(*leading, 33)
    assert layer(x).shape == linear(x).shape
    assert x.numel() == 0 or snr_db(linear(x), layer(x)) > 35
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_equals_the_op():
    linear, x, residual = make(), torch.randn(2, 5, 33), torch.randn(2, 5, 17)
    layer = Int8Linear.from_float(linear, STATIC, input_range=(-3.0, 4.0), activation="gelu")
    weight, weight_scale = quantize_weight(linear.weight)
    scale, zero_point = layer.input_scale, layer.input_zero_point
    codes = PF.quantize(x, scale, zero_point)
    expected = PF.int8_linear(
        codes, weight, scale, weight_scale, input_zero_point=zero_point, bias=linear.bias, activation="gelu",
        residual=residual,
    )  # fmt: skip
    assert torch.equal(layer(x, residual=residual), expected)
    assert torch.equal(layer((codes, scale, zero_point), residual=residual), expected)
    dynamic = Int8Linear.from_float(linear)
    assert torch.equal(dynamic(PF.quantize_dynamic(x)), dynamic(x))


@torch.no_grad()
def test_geglu_input():
    layer, x = Int8Linear.from_float(make()), torch.randn(2, 5, 66)
    value, gate = x.chunk(2, -1)
    expected = layer(value * nn.functional.gelu(gate))
    assert snr_db(expected, layer(layer.quantize(x, "geglu"))) > 45


@torch.no_grad()
def test_1x1_convolution_is_linear_over_pixels():
    conv = nn.Conv2d(33, 17, 1).eval()
    x = torch.randn(2, 33, 4, 5)
    tokens = Int8Linear.from_float(conv)(x.permute(0, 2, 3, 1))
    assert snr_db(conv(x).permute(0, 2, 3, 1), tokens) > 35


@torch.no_grad()
def test_joined_layers():
    layers, x = [make(seed=i, bias=i != 1) for i in range(3)], torch.randn(4, 33)
    layer = Int8Linear.from_float(joined(layers, "qkv"))
    expected = torch.cat([each(x) for each in layers], dim=-1)
    assert snr_db(expected, layer(x)) > 35
    apart = torch.cat([Int8Linear.from_float(each)(x) for each in layers], dim=-1)
    assert torch.equal(layer(x), apart)
    with pytest.raises(ValueError, match="qkv: expected layers with the same number of inputs"):
        joined([make(3), make(4)], "qkv")


@pytest.mark.parametrize("scheme", ["per_token", STATIC, Scheme("per_token", symmetric=True, smooth=0.5)], ids=str)
def test_copies_and_checkpoints(stands, on_meta, scheme):
    linear, x = make(), torch.randn(2, 5, 33)
    statistics = LayerStatistics.of("linear", linear, 1, 1 << 16, 0)
    statistics.observe(x, torch.zeros(1, dtype=torch.int64))
    layer = Int8Linear.from_float(linear, scheme, statistics=statistics)
    assert snr_db(linear(x), layer(x)) > 35
    stands(layer, lambda: Int8Linear(33, 17), x)
    stands(layer, lambda: Int8Linear.from_float(on_meta(linear)), x)


def test_errors():
    with pytest.raises(TypeError, match="l1: expected a torch.nn.Linear or a 1x1"):
        Int8Linear.from_float(nn.ReLU(), name="l1")
    with pytest.raises(ValueError, match="l1: expected a 1x1 convolution"):
        Int8Linear.from_float(nn.Conv2d(3, 3, 3), name="l1")
    with pytest.raises(ValueError, match="in_features"):
        Int8Linear(0, 3)
    layer = Int8Linear.from_float(make())
    with pytest.raises(ValueError, match=r"input: expected \[\.\.\., 33\]"):
        layer(torch.randn(2, 32))
    with pytest.raises(ValueError, match="residual"):
        layer(torch.randn(2, 33), residual=torch.randn(2, 16))
    with pytest.raises(RuntimeError, match="another model: weight_shape"):
        Int8Linear(33, 16).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="another model: kind"):
        from pydenoise.nn import Int8Conv2d

        Int8Conv2d(33, 17, 1).load_state_dict(layer.state_dict())
