"""Triton kernel of the int8 matrix product against the exact reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch
from torch import Tensor

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.ops import registry
from pydenoise.ops.int8_linear import prepare
from pydenoise.reference import int8_linear as reference

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

import triton  # noqa: E402
from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import int8_linear as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
EPILOGUE_ERROR = 1e-6  # relative to the largest output

# name: (rows' shape, depth, outputs, zero point, per token)
CASES = {
    "one_row": ((1,), 128, 256, 4, False),
    "vector": ((), 40, 17, None, False),
    "few_rows": ((7,), 70, 50, -128, True),  # the weights' sums are added up beside the products
    "tokens": ((2, 37), 70, 50, 5, True),  # a kernel of its own adds them up
    "tensor": ((100,), 33, 20, 5, False),
    "symmetric": ((3, 30), 96, 32, None, True),
    "one_channel": ((70,), 1, 1, 3, False),
}


def arguments(name: str, out_dtype: torch.dtype = torch.float32, fused: bool = True, activation: str = "gelu") -> tuple:
    rows, depth, outputs, zero_point, per_token = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def codes(*shape):
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    scale, zero = 0.013, 0 if zero_point is None else zero_point
    if per_token:
        scale = normal(*rows, 1).abs() * 0.01 + 0.001
        zero = 0 if zero_point is None else codes(*rows, 1).int()
    options = {"out_scale": 0.4} if out_dtype == torch.int8 else {}
    if fused:
        residual = normal(*rows, outputs).half()
        options |= {"bias": normal(outputs), "residual": residual, "activation": activation}
    weight_scale = normal(outputs).abs() * 0.01 + 0.001
    x, w = codes(*rows, depth), codes(outputs, depth)
    return prepare(x, w, scale, weight_scale, input_zero_point=zero, out_dtype=out_dtype, **options)


def on_cpu(args: tuple) -> tuple:
    return tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)


def check(actual: Tensor, args: tuple) -> None:
    expected = reference.int8_linear(*on_cpu(args))
    actual = actual.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and actual.is_contiguous()
    difference = (actual.double() - expected.double()).abs()
    if actual.dtype == torch.int32:
        assert torch.equal(actual, expected)
    elif actual.dtype == torch.int8:
        assert difference.max() <= 1 and difference.mean() < 0.01
    else:
        bound = max(EPILOGUE_ERROR, torch.finfo(actual.dtype).eps)
        assert difference.max() <= bound * expected.double().abs().max()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case[-1]])
def test_accumulators_are_exact(name):
    args = arguments(name, torch.int32, fused=False)
    check(kernels.forward(*args), args)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.int8), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name, dtype):
    args = arguments(name, dtype)
    check(kernels.forward(*args), args)


@pytest.mark.parametrize("activation", ("none", "relu", "silu", "gelu_tanh", "leaky_relu_0.01", "leaky_relu_0.2"))
def test_activations(activation):
    args = arguments("tokens", activation=activation)
    check(kernels.forward(*args), args)


@pytest.mark.parametrize("variant", kernels.LINEAR.variants, ids=lambda variant: variant.name)
def test_every_variant(variant):
    """Every tile that can be launched computes the right thing, with more than one tile along every axis."""
    name = "tokens" if dict(variant.meta)["BLOCK_M"] > 64 else "few_rows"
    args = arguments(name)
    output = torch.empty(reference.int8_linear(*on_cpu(args)).shape, device=DEVICE)
    for launch in kernels.plan(*args[:8], *args[9:], output):
        launch.run(variant.config() if launch.kernel is kernels.LINEAR else None)
    check(output, args)


def test_small_tiles():
    """More row tiles than one group of them, so that the last group is smaller."""
    args = arguments("tensor")
    output = torch.empty(reference.int8_linear(*on_cpu(args)).shape, device=DEVICE)
    *before, launch = kernels.plan(*args[:8], *args[9:], output)
    for earlier in before:
        earlier.run()
    launch.run(triton.Config({"BLOCK_M": 8 if _tiles.interpreting() else 16, "BLOCK_O": 16, "BLOCK_K": 32}))
    check(output, args)


def test_non_contiguous_input():
    args = arguments("tokens")
    turned = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(kernels.forward(turned, *args[1:]), kernels.forward(*args))


def test_empty():
    args = arguments("tokens", fused=False)
    assert kernels.forward(args[0][:0], args[1], args[2][:0], args[3], args[4][:0], *args[5:]).shape == (0, 37, 50)


def test_through_the_public_function():
    args = arguments("tensor", fused=False)
    actual = PF.int8_linear(*args[:4], input_zero_point=args[4], backend="triton")
    check(actual, args)


def test_reasons(monkeypatch):
    args = arguments("tensor")
    row = next(row for row in registry.rows("int8_linear") if row.name == "triton")
    assert row.unsupported(*args) is None
    assert "meta" in row.unsupported(args[0].to("meta"), *args[1:])
    if _tiles.interpreting():
        assert "bfloat16" in row.unsupported(*args[:8], torch.bfloat16, *args[9:])
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(pdn.BackendUnavailable, match="not on cuda"):
            PF.int8_linear(args[0], args[1], 1.0, 1.0, backend="triton")
