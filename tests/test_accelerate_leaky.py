"""Leaky ReLU in ``accelerate``: fused with the slopes that the ops have, in float and between int8 layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydenoise as pdn
from pydenoise.models import CUNet
from pydenoise.nn import Int8Chain, Int8Conv2d
from pydenoise.quantization import Scheme, calibrate, snr_db
from pydenoise.quantization.plan import plan_layer
from pydenoise.reference.activations import LEAKY_SLOPES, activate, leaky_relu_name


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # tiny tensors
    torch.manual_seed(0)


def conv(cin, cout):
    return nn.Conv2d(cin, cout, 3, padding=1)


def small(*slopes):
    """Convolutions with a leaky ReLU between every two."""
    layers = [conv(3, 16)]
    for slope in slopes:
        layers += [nn.LeakyReLU(slope, inplace=True), conv(16, 16)]
    return nn.Sequential(*layers).eval()


class Called(nn.Module):
    """One convolution, and what a function makes of its output."""

    def __init__(self, function):
        super().__init__()
        self.a, self.function = conv(4, 4), function

    def forward(self, x):
        return self.function(self.a(x))


def accelerated(model, x, **options):
    fast, report = pdn.accelerate(model, x, measure=False, **options)
    return fast, report, {swap.name: swap.fused for swap in report.swapped}


def test_names_and_slopes():
    x = torch.tensor([-2.0, -0.0, 3.0, float("nan"), float("-inf")])
    for name, slope in LEAKY_SLOPES.items():
        assert leaky_relu_name(slope) == name
        torch.testing.assert_close(activate(x, name), F.leaky_relu(x, slope), equal_nan=True)
    assert leaky_relu_name(0.3) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_float(precision):
    model, x = small(*LEAKY_SLOPES.values()), torch.randn(2, 3, 13, 18)
    fast, report, fused = accelerated(model, x, precision=precision)
    assert list(fused.values()) == [*((name,) for name in LEAKY_SLOPES), ()] and not report.kept
    assert snr_db(model(x), fast(x)) > (90 if precision == "fp32" else 30)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: F.leaky_relu(y, 0.2),
        lambda y: F.leaky_relu(y, 0.2, True),
        lambda y: F.leaky_relu(y, negative_slope=0.2, inplace=True),
        lambda y: F.leaky_relu_(y, 0.2),
    ],
)
def test_functions(function):
    model, x = Called(function).eval(), torch.randn(1, 4, 7, 9)
    fast, _, fused = accelerated(model, x)
    assert fused == {"a": ("leaky_relu_0.2",)}
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_torchs_own_slope():
    assert accelerated(Called(F.leaky_relu).eval(), torch.randn(1, 4, 5, 5))[2] == {"a": ("leaky_relu_0.01",)}
    assert accelerated(Called(nn.LeakyReLU()).eval(), torch.randn(1, 4, 5, 5))[2] == {"a": ("leaky_relu_0.01",)}


def test_another_slope_stays():
    model, x = small(0.3), torch.randn(1, 3, 8, 8)
    fast, report, fused = accelerated(model, x)
    assert fused == {"0": (), "2": ()}
    assert {k.name: k.reason for k in report.kept} == {
        "1": "no fused form for LeakyReLU of slope 0.3: the fused slopes are 0.01, 0.1, 0.2"
    }
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert accelerated(Called(lambda y: F.leaky_relu(y, 0.3)).eval(), torch.randn(1, 4, 5, 5))[2] == {"a": ()}
    with pytest.raises(ValueError, match="LeakyReLU of slope 0.01, 0.1, 0.2, got 0.3"):
        Int8Chain.from_float(model)


@torch.no_grad()
def test_int8_layers_hand_codes_on():
    model, batches = small(0.1, 0.1, 0.1, 0.1), [torch.randn(1, 3, 20, 20) for _ in range(2)]
    fast, report, fused = accelerated(model, batches[0], precision="int8", calibration=batches, scheme="per_tensor")
    assert [fused[name] for name in "0246"] == [("leaky_relu_0.1",)] * 4
    assert {name for name, layer in fast.named_modules() if isinstance(layer, Int8Conv2d)} == {"2", "4", "6"}
    assert sum(node.kwargs.get("out_dtype") is torch.int8 for node in fast.graph.nodes) == 2
    assert report.snr_db > 25 and snr_db(model(batches[1]), fast(batches[1])) > 25


@torch.no_grad()
def test_smoothing_factors_pass():
    model, x = small(0.1, 0.1), torch.randn(2, 3, 12, 12)
    model[0].weight.mul_(torch.logspace(-1, 1, 16).reshape(-1, 1, 1, 1))
    statistics = calibrate(model, [x], timestep_argument=None).layers
    chains = [
        Int8Chain.from_float(model, lambda r, s=scheme: plan_layer(r.layer, statistics[r.names[0]], s))
        for scheme in (Scheme("per_tensor", smooth=0.5), Scheme("per_tensor"))
    ]
    assert chains[0].layers[1].channel_scale is None
    assert snr_db(model(x), chains[0](x)) > snr_db(model(x), chains[1](x)) > 20


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@torch.no_grad()
def test_cunet(precision):
    """Every convolution that a leaky ReLU follows takes it in; those behind transposed convolutions stay."""
    model, x = CUNet().eval(), torch.rand(1, 3, 64, 64)
    fast, report, fused = accelerated(model, x, precision=precision)
    leaky = [name for name, done in fused.items() if "leaky_relu_0.1" in done]
    assert len(leaky) == 17
    assert [k.name for k in report.kept if k.kind == "LeakyReLU"] == ["unet1.up.1", "unet2.up2.1", "unet2.up1.1"]
    assert snr_db(model(x), fast(x)) > (80 if precision == "fp32" else 25)
