"""Numbers and planned layers against the golden int8 cases, made by independent code in float64."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pydenoise.quantization import (
    LayerStatistics,
    Scheme,
    encode,
    plan_layer,
    quantize_weight,
    range_parameters,
    simulate,
)

CONVOLUTIONS = ("c0_basic", "c1_stride2_odd", "c2_1x1", "c5_depthwise", "c7_resblock_silu", "c9_positive",
                "c10_negative", "c11_zero")  # fmt: skip
LINEARS = ("l0", "l1_odd", "l2_m1")
CASES = CONVOLUTIONS + LINEARS


@cache
def _file():
    return np.load(Path(__file__).parent.parent / "data" / "int8.npz")


def case(name: str) -> dict[str, torch.Tensor]:
    """The tensors of one case."""
    data = _file()
    return {key.split("/")[1]: torch.from_numpy(data[key]) for key in data.files if key.startswith(f"{name}/")}


def layer(values: dict[str, torch.Tensor]) -> nn.Module:
    """The float layer of a case."""
    weight = values["w"]
    if weight.dim() == 2:
        module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        sh, sw, ph, pw, dh, dw, groups = values["cfg"].tolist()
        module = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], weight.shape[2:], (sh, sw), (ph, pw), (dh, dw), groups
        )
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(values["b"])
    return module.eval()


@pytest.mark.parametrize("name", CASES)
def test_golden_inputs(name):
    values = case(name)
    x = values["x"]
    for kind, symmetric in (("sym", True), ("asym", False)):
        scale, zero_point = range_parameters(x.min(), x.max(), symmetric)
        if name == "c11_zero":
            assert scale == 1.0  # the golden file has 1e-12 there; the codes are the same
        else:
            assert scale == values[f"{kind}_scale"]
        assert zero_point is None if symmetric else zero_point == values["asym_zp"]
        assert torch.equal(encode(x, scale, zero_point), values[f"{kind}_xq"])


@pytest.mark.parametrize("name", CASES)
def test_golden_weights(name):
    values = case(name)
    codes, scale = quantize_weight(values["w"])
    assert torch.equal(codes, values["wq"])
    assert torch.equal(scale, values["w_scale"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_planned_layers(name, kind):
    """Calibrated on its own input, a layer's plan holds the golden numbers and computes the golden output."""
    values = case(name)
    x, module = values["x"], layer(values)
    statistics = LayerStatistics.of(name, module, 1, 1 << 16, 0)
    statistics.observe(x, torch.zeros(1, dtype=torch.int64))
    plan = plan_layer(module, statistics, Scheme("per_tensor", symmetric=kind == "sym"))
    assert torch.equal(plan.weight, values["wq"]) and torch.equal(plan.weight_scale, values["w_scale"])
    if name != "c11_zero":
        assert plan.input_scale == values[f"{kind}_scale"]
    assert plan.input_zero_point is None if kind == "sym" else plan.input_zero_point == values["asym_zp"]
    y = simulate(plan, module, x, dtype=torch.float64, padded=True)
    torch.testing.assert_close(y, values[f"{kind}_y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LINEARS)
def test_planned_layers_per_token(name):
    values = case(name)
    module = layer(values)
    plan = plan_layer(module, None, Scheme("per_token", symmetric=True), name)
    y = simulate(plan, module, values["x"], dtype=torch.float64)
    torch.testing.assert_close(y, values["tok_y"], rtol=1e-6, atol=1e-6)  # code times scale is float32


def test_split_shortcut():
    """Two inputs of one convolution, each with a scale and a weight scale of its own."""
    values = case("split_concat")
    whole = nn.Conv2d(64, 32, 3, padding=1).eval()
    with torch.no_grad():
        whole.weight.copy_(values["w"])
        whole.bias.copy_(values["b"])
    statistics = LayerStatistics.of("shortcut", whole, 1, 1 << 16, 0)
    statistics.observe(torch.cat((values["xa"], values["xb"]), 1), torch.zeros(1, dtype=torch.int64))
    total = 0
    for index, name in enumerate(("xa", "xb")):
        part = nn.Conv2d(32, 32, 3, padding=1, bias=index == 0).eval()
        with torch.no_grad():
            part.weight.copy_(whole.weight[:, 32 * index : 32 * index + 32])
            if index == 0:
                part.bias.copy_(whole.bias)
        half = statistics.slice_channels(32 * index, 32 * index + 32)
        plan = plan_layer(part, half, Scheme("per_tensor", symmetric=True))
        assert torch.equal(plan.weight, values[f"split_wq{index}"])
        assert plan.input_scale == values[f"s{index}"]
        total = total + simulate(plan, part, values[name], dtype=torch.float64, padded=True)
    torch.testing.assert_close(total, values["split_y"], rtol=1e-10, atol=1e-10)
