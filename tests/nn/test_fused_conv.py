"""FusedConv layers: accuracy against the float64 oracle, packing that follows the weights, borders of the fast path."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pydenoise as pdn
from pydenoise.nn.fused_conv import FUSED, FusedConv2d, fold_batch_norm
from pydenoise.reference import weighted_conv as reference
from pydenoise.testing import CONV_CASES, WINOGRAD_RELATIVE_ERROR, assert_accurate, relative_error

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def plain_conv(case, tensors):
    geometry = (case.kernel, case.stride, case.padding, case.dilation, case.groups, case.bias)
    conv = PLAIN[case.dims](case.in_channels, case.out_channels, *geometry).to(tensors["weight"].dtype)
    with torch.no_grad():
        conv.weight.copy_(tensors["weight"])
        if case.bias:
            conv.bias.copy_(tensors["bias"])
    return conv.eval()


def run_plain(conv, case, x, residual):
    y = reference.activate(conv(x), case.activation)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype):
    tensors = case.tensors(dtype)
    conv = plain_conv(case, tensors)
    x, residual = tensors["input"], tensors["residual"]
    layer = FUSED[case.dims].from_float(conv, activation=case.activation, algorithm="direct")
    exact = copy.deepcopy(conv).double()
    with torch.no_grad():
        baseline = run_plain(conv, case, x, residual)
        oracle = run_plain(exact, case, x.double(), None if residual is None else residual.double())
        assert_accurate(layer(x, residual), oracle, baseline)
        if dtype is torch.float32 and oracle.numel():
            layer = FUSED[case.dims].from_float(conv, activation=case.activation)
            assert relative_error(layer(x, residual), oracle) <= WINOGRAD_RELATIVE_ERROR


def layer_and_parts(activation="silu", **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1, **options).eval()
    norm = nn.BatchNorm2d(10).eval()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.normal_()
        norm.running_var.uniform_(0.5, 2)
    return FusedConv2d.from_float(conv, batch_norm=norm, activation=activation), conv, norm


def test_batch_norm_is_folded_in_float64():
    layer, conv, norm = layer_and_parts("none", bias=False)
    weight, bias = fold_batch_norm(conv.weight, conv.bias, norm)
    assert weight.dtype == bias.dtype == torch.float64
    assert torch.equal(layer.weight, weight.float()) and torch.equal(layer.bias, bias.float())
    x = torch.randn(2, 6, 7, 8)
    with torch.no_grad():
        oracle = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double()))
        assert_accurate(layer(x), oracle, norm(conv(x)))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    conv = nn.Conv2d(3, 4, (3, 5), padding=(1, 2), padding_mode=mode).eval()
    layer = FusedConv2d.from_float(conv, activation="relu")
    x = torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        assert torch.allclose(layer(x), conv(x).relu(), atol=1e-5)
        assert layer(x, torch.ones(2, 4, 6, 7).double()).dtype == torch.float64


def test_residuals_of_other_shapes_and_dtypes_follow_torch():
    layer, conv, norm = layer_and_parts()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        y = nn.functional.silu(norm(conv(x)))
        sums = (torch.randn(10, 1, 1), torch.randn(1, 10, 5, 5), torch.randn(2, 10, 5, 5).double(), torch.tensor(2.0))
        for residual in sums:
            got = layer(x, residual)
            assert got.dtype == (y + residual).dtype and torch.allclose(got, y + residual, atol=1e-5)
        with pytest.raises(RuntimeError):
            layer(x, torch.randn(2, 10, 4, 5))


def test_stride_and_unbatched_input_with_residual():
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1).eval()
    layer = FusedConv2d.from_float(conv)
    x = torch.randn(6, 9, 12)
    with torch.no_grad():
        y = conv(x)
        residual = torch.randn_like(y)
        assert torch.allclose(layer(x, residual), y + residual, atol=1e-5)
        residual = residual[:, :1]
        assert torch.allclose(layer(x, residual), y + residual, atol=1e-5)


def test_packed_form_follows_the_weight():
    layer, _, _ = layer_and_parts("none")
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert torch.allclose(layer(x), 2 * first, atol=1e-5)
        other, _, _ = layer_and_parts("none")
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), first)
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        assert layer.to(torch.float64)(x.double()).dtype == torch.float64


def test_copies_and_pickles_share_no_packed_form():
    layer, _, _ = layer_and_parts()
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        want = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), want)
            twin.weight.zero_()
            assert not torch.equal(twin(x), want) and torch.equal(layer(x), want)


def test_made_in_inference_mode():
    with torch.inference_mode():
        layer, conv, norm = layer_and_parts()
        x = torch.randn(1, 6, 5, 5)
        assert torch.allclose(layer(x), nn.functional.silu(norm(conv(x))), atol=1e-5)


def test_gradients_of_input_and_residual():
    layer, conv, norm = layer_and_parts("gelu")
    x = torch.randn(1, 6, 5, 5, requires_grad=True)
    residual = torch.randn(1, 10, 5, 5, requires_grad=True)
    got = torch.autograd.grad(layer(x, residual).square().sum(), (x, residual))
    want = torch.autograd.grad((nn.functional.gelu(norm(conv(x))) + residual).square().sum(), (x, residual))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_compiles_without_graph_breaks():
    layer, _, _ = layer_and_parts()
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_casts_and_layout():
    conv = nn.Conv2d(6, 10, 3).eval()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        cast = FusedConv2d.from_float(conv, dtype=torch.bfloat16, output_dtype=torch.float32)
        assert cast(x).dtype == torch.float32 and torch.allclose(cast(x), conv(x), atol=0.05)
        kept = FusedConv2d.from_float(conv, keep_layout=True)
        assert kept(x).is_contiguous()
        assert FusedConv2d.from_float(conv)(x).is_contiguous(memory_format=torch.channels_last)


def test_negated():
    conv = nn.Conv2d(6, 6, 3, padding=1).eval()
    layer = FusedConv2d.from_float(conv, negate=True)
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        assert torch.allclose(layer(x, x), x - conv(x), atol=1e-5)


def test_weighted_convolution_is_folded():
    conv = pdn.nn.WeightedConv2d(4, 4, 3, padding=1, density=(0.5,)).eval()
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        assert torch.allclose(FusedConv2d.from_float(conv)(x), conv(x), atol=1e-5)


def test_bad_arguments():
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(TypeError, match="conv: expected a torch.nn.Conv2d, got Linear"):
        FusedConv2d.from_float(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="batch_norm"):
        FusedConv2d.from_float(conv, batch_norm=nn.GroupNorm(1, 4))
    with pytest.raises(ValueError, match="batch_norm: expected 4 features"):
        FusedConv2d.from_float(conv, batch_norm=nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="running statistics"):
        FusedConv2d.from_float(conv, batch_norm=nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="activation"):
        FusedConv2d.from_float(conv, activation="tanh")
    with pytest.raises(ValueError, match="negate"):
        FusedConv2d.from_float(conv, negate=True, activation="relu")
    with pytest.raises(ValueError, match="groups"):
        FusedConv2d(4, 6, 3, groups=4)
    layer = FusedConv2d.from_float(conv)
    with pytest.raises(ValueError, match="input"), torch.no_grad():
        layer(torch.randn(1, 5, 6, 6), torch.randn(1, 4, 4, 4))
    for wrong in (torch.randn(1, 5, 6, 6), torch.randn(2, 6), torch.randn(1, 4, 2, 2)):
        with pytest.raises(ValueError, match="input"):
            layer(wrong)
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(1, 4, 6, 6).double())
