"""Int8Chain: convolutions that hand int8 codes on."""

import pytest
import torch
from torch import nn

from pydenoise.nn import FusedConv2d, Int8Chain, Int8Conv2d
from pydenoise.quantization import Scheme, calibrate, snr_db
from pydenoise.quantization.plan import plan_layer

STATIC = Scheme("per_tensor")


def make(activation=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), activation(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        activation(), nn.Dropout(0.5), nn.Conv2d(16, 3, 3, padding=1),
    ).eval()  # fmt: skip


def planner(net, x, scheme):
    statistics = calibrate(net, [x], timestep_argument=None).layers
    return lambda request: plan_layer(request.layer, statistics[request.names[0]], scheme)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU])
@torch.no_grad()
def test_dynamic(activation):
    net = make(activation)
    chain = Int8Chain.from_float(net)
    for batch, size in ((2, (9, 7)), (1, (4, 5)), (0, (3, 3))):
        x = torch.randn(batch, 3, *size)
        y = chain(x, residual=x)
        assert y.shape == x.shape
        assert batch == 0 or snr_db(x + net(x), y) > 35
    assert chain(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_static_chain_stays_int8(monkeypatch):
    """One quantization, of the input; and the same codes as layer by layer."""
    net, x = make(), torch.randn(4, 3, 12, 12)
    chain = Int8Chain.from_float(net, planner(net, x, STATIC))
    first, second, third = chain.layers
    h = first(x, out_dtype=torch.int8, out_scale=second.input_scale, out_zero_point=second.input_zero_point)
    h = second((h, second.input_scale, second.input_zero_point), out_dtype=torch.int8, out_scale=third.input_scale,
               out_zero_point=third.input_zero_point)  # fmt: skip
    expected = third((h, third.input_scale, third.input_zero_point))
    calls, quantize = [], Int8Conv2d.quantize
    monkeypatch.setattr(Int8Conv2d, "quantize", lambda self, *args: calls.append(self) or quantize(self, *args))
    assert torch.equal(chain(x), expected) and calls == [first]
    assert snr_db(net(x), expected) > 28


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@torch.no_grad()
def test_smoothing(activation):
    """Factors pass a ReLU into the layer before; behind a SiLU they are applied to floats."""
    net, x = make(activation), torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-1, 1, 16).reshape(-1, 1, 1, 1))
    chain = Int8Chain.from_float(net, planner(net, x, Scheme("per_tensor", smooth=0.5)))
    assert (chain.layers[1].channel_scale is None) == (activation is nn.ReLU)
    assert chain.layers[0].channel_scale is not None
    assert snr_db(net(x), chain(x)) > snr_db(net(x), Int8Chain.from_float(net, planner(net, x, STATIC))(x))


@torch.no_grad()
def test_gain_and_fused_layers():
    net, x = make(), torch.randn(1, 3, 8, 8)
    assert snr_db(x - net(x), Int8Chain.from_float(net, gain=-1.0)(x, residual=x)) > 35
    fused = [FusedConv2d.from_float(net[0], activation="relu"),
             FusedConv2d.from_float(net[2], batch_norm=net[3], activation="relu"), net[6]]  # fmt: skip
    chain = Int8Chain.from_float(fused, {"0": "per_pixel", "1": "per_pixel", "2": "per_pixel"})
    assert torch.equal(chain(x), Int8Chain.from_float(net)(x))


def test_copies_and_checkpoints(stands, on_meta):
    net, x = make(), torch.randn(2, 3, 6, 5)
    for plans in ("per_pixel", planner(net, x, STATIC)):
        stands(Int8Chain.from_float(net, plans), lambda: Int8Chain.from_float(on_meta(net)), x)


def test_errors():
    conv = nn.Conv2d(3, 3, 1)
    for layers, error, word in (
        ([], ValueError, "at least one"),
        ([nn.ReLU()], TypeError, "expected a convolution at '0'"),
        ([conv, nn.ReLU(), nn.ReLU()], TypeError, "expected a convolution at '2'"),
        ([conv, nn.Tanh()], ValueError, "1: expected SiLU"),
        ([conv, nn.Conv2d(4, 3, 1)], ValueError, "cannot feed"),
    ):
        with pytest.raises(error, match=word):
            Int8Chain.from_float(layers)
    with pytest.raises(ValueError, match="gain"):
        Int8Chain.from_float([conv, nn.ReLU()], gain=-1.0)
    with pytest.raises(ValueError, match="'0' of a chain cannot stay in float"):
        Int8Chain.from_float([conv], "float")
