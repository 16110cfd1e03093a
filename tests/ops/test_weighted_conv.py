"""Weighted convolution, the functional: bad arguments, autocast, torch.compile, second derivatives, precision."""

import pytest
import torch
import torch.nn.functional as F

from pydenoise import BackendUnavailable, _native
from pydenoise import functional as PF
from pydenoise.ops import weighted_conv as op
from pydenoise.reference.activations import CONV_ACTIVATIONS
from pydenoise.testing import assert_accurate

_RANDOM = torch.Generator().manual_seed(0)
INPUT, WEIGHT = torch.randn(2, 4, 9, 8, generator=_RANDOM), torch.randn(6, 4, 3, 3, generator=_RANDOM)
DENSITY, BIAS = torch.rand(3, 3, generator=_RANDOM) + 0.5, torch.randn(6, generator=_RANDOM)
needs_compiled = pytest.mark.skipif(not _native.extension().loaded, reason=_native.extension().reason or "")


def call(**changed):
    """A correct call with some arguments exchanged."""
    arguments = {"input": INPUT, "weight": WEIGHT, "density": DENSITY, "bias": BIAS} | changed
    return PF.weighted_conv2d(**arguments)


def test_is_conv2d_on_the_product():
    torch.testing.assert_close(call(), F.conv2d(INPUT, WEIGHT * DENSITY, BIAS), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call(input=INPUT[0]), call()[0])
    residual = torch.randn(6, 7, 6)
    torch.testing.assert_close(call(input=INPUT[0], residual=residual), call()[0] + residual)


BAD = {
    "input is no tensor": (dict(input=[1.0]), TypeError, "input: expected a torch.Tensor, got list"),
    "input of integers": (
        dict(input=INPUT.long()),
        TypeError,
        "input: expected a floating-point tensor, got torch.int64",
    ),
    "input of too few axes": (dict(input=INPUT[0, 0]), ValueError, "input: expected 4 dimensions"),
    "input of too many axes": (dict(input=INPUT[None]), ValueError, "input: expected 4 dimensions"),
    "input channels": (dict(input=INPUT[:, :3]), ValueError, r"input: expected 4 channels .* got 3"),
    "input smaller than the kernel": (
        dict(input=INPUT[:, :, :2]),
        ValueError,
        "input: the kernel spans 3 along spatial axis 0",
    ),
    "input without pixels": (dict(input=INPUT[:, :, :0]), ValueError, "input: the kernel spans 3"),
    "dilated kernel larger than the input": (dict(dilation=5), ValueError, "input: the kernel spans 11"),
    "weight is no tensor": (dict(weight=3), TypeError, "weight: expected a torch.Tensor, got int"),
    "weight dtype": (dict(weight=WEIGHT.double()), TypeError, "weight: expected dtype torch.float32"),
    "weight device": (dict(weight=WEIGHT.to("meta")), ValueError, "weight: expected device cpu"),
    "weight rank": (dict(weight=WEIGHT[0]), ValueError, "weight: expected a non-empty"),
    "weight empty": (dict(weight=WEIGHT[:0]), ValueError, "weight: expected a non-empty"),
    "density is no tensor": (dict(density=0.5), TypeError, "density: expected a torch.Tensor, got float"),
    "density shape": (dict(density=DENSITY[:2]), ValueError, r"density: expected the kernel's shape \(3, 3\)"),
    "density dtype": (dict(density=DENSITY.half()), TypeError, "density: expected dtype"),
    "density device": (dict(density=DENSITY.to("meta")), ValueError, "density: expected device"),
    "density with NaN": (dict(density=DENSITY / 0 - DENSITY / 0), ValueError, "density: every entry must be finite"),
    "density with infinity": (dict(density=DENSITY / 0), ValueError, "density: every entry must be finite"),
    "bias is no tensor": (dict(bias=True), TypeError, "bias: expected a torch.Tensor"),
    "bias shape": (dict(bias=BIAS[:5]), ValueError, r"bias: expected shape \(6,\)"),
    "bias dtype": (dict(bias=BIAS.double()), TypeError, "bias: expected dtype"),
    "bias device": (dict(bias=BIAS.to("meta")), ValueError, "bias: expected device"),
    "residual is no tensor": (dict(residual=1.0), TypeError, "residual: expected a torch.Tensor"),
    "residual shape": (dict(residual=INPUT), ValueError, r"residual: expected the output's shape \(2, 6, 7, 6\)"),
    "residual dtype": (dict(residual=torch.zeros(2, 6, 7, 6).half()), TypeError, "residual: expected dtype"),
    "stride zero": (dict(stride=0), ValueError, "stride: expected ints >= 1"),
    "stride negative": (dict(stride=(1, -1)), ValueError, "stride: expected ints >= 1"),
    "stride count": (dict(stride=(1, 1, 1)), ValueError, "stride: expected one int or 2 ints"),
    "stride float": (dict(stride=1.5), TypeError, "stride: expected ints, got float"),
    "stride bool": (dict(stride=True), TypeError, "stride: expected ints, got bool"),
    "dilation zero": (dict(dilation=0), ValueError, "dilation: expected ints >= 1"),
    "dilation None": (dict(dilation=None), TypeError, "dilation: expected ints"),
    "padding negative": (dict(padding=-1), ValueError, "padding: expected ints >= 0"),
    "padding word": (dict(padding="full"), ValueError, "padding: expected ints, 'same' or 'valid', got 'full'"),
    "padding per side": (dict(padding=(1, 1, 1, 1)), ValueError, "padding: expected 2 ints"),
    "padding same with a stride": (dict(padding="same", stride=2), ValueError, "padding: 'same' needs stride 1"),
    "groups zero": (dict(groups=0), ValueError, "groups: expected a positive divisor"),
    "groups negative": (dict(groups=-1), ValueError, "groups: expected a positive divisor"),
    "groups no divisor": (dict(groups=4), ValueError, "groups: expected a positive divisor of C_out = 6"),
    "groups float": (dict(groups=1.0), TypeError, "groups: expected an int, got float"),
    "activation": (dict(activation="tanh"), ValueError, "activation: expected one of 'none', 'relu'"),
    "backend": (dict(backend="fast"), ValueError, "backend: expected 'auto' or one of"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_bad_arguments(name, grad):
    changed, error, message = BAD[name]
    weight = changed.get("weight", WEIGHT)
    if grad and isinstance(weight, torch.Tensor):
        changed = changed | {"weight": weight.clone().requires_grad_()}
    with pytest.raises(error, match=message):
        call(**changed)


def test_backend_without_its_device():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run this call"):
        call(backend="cuda")


@pytest.mark.parametrize("shape", [(0, 4, 9, 8), (0, 4, 3, 3)])
def test_empty_batch_forward_and_backward(shape):
    x = torch.randn(shape).requires_grad_()
    weight = WEIGHT.clone().requires_grad_()
    y = call(input=x, weight=weight, activation="silu")
    assert y.shape == (0, 6, shape[2] - 2, shape[3] - 2)
    y.sum().backward()
    assert x.grad.shape == shape and not weight.grad.any()


@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
def test_second_derivatives(activation):
    tensors = [torch.randn(1, 2, 4, 5), torch.randn(3, 2, 3, 2), torch.rand(3, 2) + 0.5, torch.randn(3)]
    leaves = [t.double().requires_grad_() for t in tensors]

    def function(*args):
        return PF.weighted_conv2d(*args, stride=(1, 2), padding=1, activation=activation, backend="reference")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@needs_compiled
def test_second_derivative_through_the_compiled_forward():
    x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)

    def penalty(dtype, backend):
        leaf, weight, density = (t.to(dtype).requires_grad_() for t in (x, w, DENSITY))
        y = PF.weighted_conv2d(leaf, weight, density, padding=1, activation="silu", backend=backend)
        (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (weight, density))

    for actual, oracle, baseline in zip(
        penalty(torch.float32, "cpu"),
        penalty(torch.float64, "reference"),
        penalty(torch.float32, "reference"),
        strict=True,
    ):
        assert_accurate(actual, oracle, baseline)


def test_autocast_computes_and_returns_bfloat16():
    weight = WEIGHT.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(weight=weight, activation="relu")
        plain = F.relu(F.conv2d(INPUT, weight * DENSITY, BIAS))
    exact = F.relu(F.conv2d(INPUT.double(), WEIGHT.double() * DENSITY, BIAS.double()))
    y.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()
    assert_accurate(y, exact, plain)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        y = PF.weighted_conv2d(INPUT.double(), WEIGHT.double(), DENSITY.double(), backend="reference")
    assert y.dtype == torch.float64


def program(x, w, d, b, r):
    y = PF.weighted_conv2d(x, w, d, b, padding="same", activation="silu", residual=r)
    return PF.weighted_conv2d(y, w[:4, :, :1, :1], None, stride=2).square().mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_forward_and_backward(dynamic):
    """No graph break, and the same values and gradients as in eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in ((9, 8), (7, 12)):
        tensors = [
            torch.randn(2, 4, *size),
            torch.randn(4, 4, 3, 3),
            torch.rand(3, 3),
            torch.randn(4),
            torch.randn(2, 4, *size),
        ]
        results = []
        for function in (program, compiled):
            leaves = [t.clone().requires_grad_() for t in tensors]
            value = function(*leaves)
            results.append([value, *torch.autograd.grad(value, leaves)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def test_compile_inference():
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    tensors = (
        torch.randn(2, 4, 9, 8),
        torch.randn(4, 4, 3, 3),
        torch.rand(3, 3),
        torch.randn(4),
        torch.randn(2, 4, 9, 8),
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), program(*tensors), rtol=1e-4, atol=1e-5)


def test_raw_op_refuses_gradients_with_an_activation():
    args = op.prepare(2, INPUT, WEIGHT.clone().requires_grad_(), DENSITY, BIAS, None, 1, 0, 1, 1, "relu")
    with pytest.raises(RuntimeError, match="activation='none'"):
        torch.ops.pydenoise.weighted_conv(*args, "auto")


def test_precision_setting_chooses_the_algorithm():
    def algorithm():
        return op.prepare(2, INPUT, WEIGHT, None, None, None, 1, 0, 1, 1, "none")[-1]

    torch.set_float32_matmul_precision("highest")
    assert algorithm() == "direct"
    torch.set_float32_matmul_precision("high")
    assert algorithm() == "auto"


def test_inference_mode():
    with torch.inference_mode():
        torch.testing.assert_close(call(), F.conv2d(INPUT, WEIGHT * DENSITY, BIAS), rtol=1e-4, atol=1e-4)


@needs_compiled
def test_packed_weight_gives_the_same_values_and_checks_its_input():
    packed = op.pack(WEIGHT, DENSITY, (1, 1), (1, 1), 1, "direct")
    y = op.weighted_conv_packed(INPUT, packed, BIAS, None, (1, 1, 1, 1), "relu")
    torch.testing.assert_close(y, call(padding=1, activation="relu"), rtol=1e-4, atol=1e-4)
    good = (INPUT, packed, BIAS, None, (1, 1, 1, 1), "none")
    bad = {
        "input: expected a CPU tensor of dtype": (TypeError, 0, INPUT.double()),
        "bias: expected a CPU tensor of dtype": (TypeError, 2, BIAS.double()),
        "residual: expected a CPU tensor of dtype": (TypeError, 3, torch.zeros(2, 6, 9, 8).double()),
        "input: expected": (ValueError, 0, INPUT[:, :3]),
        "residual: expected the output's shape": (ValueError, 3, INPUT),
    }
    for message, (error, position, value) in bad.items():
        with pytest.raises(error, match=message):
            op.weighted_conv_packed(*good[:position], value, *good[position + 1 :])


def test_a_density_that_was_finite_is_looked_at_again_after_it_changed():
    x, weight, density = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(3, 3)
    for _ in range(2):
        PF.weighted_conv2d(x, weight, density)
    density[1, 1] = float("nan")
    with pytest.raises(ValueError, match="density: every entry must be finite"):
        PF.weighted_conv2d(x, weight, density)
