"""Triton kernels of quantization against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch
from torch import Tensor

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.ops import quantize as ops
from pydenoise.ops import registry
from pydenoise.reference import activations
from pydenoise.reference import quantize as reference

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import quantize as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 10, 5, 7), (3, 11, 20), (6,), (2, 3, 4, 1, 6))


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5).to(dtype).to(DEVICE)


def positions(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """(scale, zero point) per pixel or token."""
    shape = (x.shape[0], 1, *x.shape[2:]) if granularity == "pixel" else (*x.shape[:-1], 1)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(shape, generator=generator) + 0.01
    return scale.to(DEVICE), torch.randint(-128, 128, shape, generator=generator).to(DEVICE)


def on_cpu(args: tuple) -> tuple:
    return tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)


def check(actual: Tensor, expected: Tensor, off: int = 0) -> None:
    """``off`` is by how much a code may differ; 0: equal bits."""
    actual = actual.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    layout = torch.channels_last if actual.dim() == 4 and actual.shape[1] > 1 else torch.contiguous_format
    assert actual.is_contiguous(memory_format=layout)
    assert (actual.int() - expected.int()).abs().max() <= off if off else torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_exact(shape, dtype):
    x = draw(*shape, dtype=dtype)
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    granularities = ("pixel", "token") if len(shape) == 4 else ("token",)
    for scale, zero_point in ((0.05, 0), (0.05, 7), *(positions(x, g) for g in granularities)):
        args = ops.prepare(x, scale, zero_point)
        check(kernels.quantize(*args), reference.quantize(*on_cpu(args)))


def test_halfway_values_round_to_even():
    """Every half step, and its two neighbours, under a scale that is no power of two."""
    scale = torch.tensor(0.3)
    x = (torch.arange(-140, 140) + 0.5) * scale
    infinity = torch.tensor(float("inf"))
    x = torch.cat([x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)]).to(DEVICE)
    for zero_point in (0, -3):
        args = ops.prepare(x, scale.to(DEVICE), zero_point)
        check(kernels.quantize(*args), reference.quantize(*on_cpu(args)))


@pytest.mark.parametrize("activation", activations.INPUT_ACTIVATIONS)
def test_activations(activation):
    for shape in ((2, 10, 5, 7), (3, 11, 20)):
        x = draw(*shape)
        channels = shape[1 if len(shape) == 4 else -1] // (2 if activation == "geglu" else 1)
        factors = draw(channels, seed=1).abs()
        args = ops.prepare(x, 0.05, 3, activation=activation, channel_scale=factors)
        check(kernels.quantize(*args), reference.quantize(*on_cpu(args)), off=1)


@pytest.mark.parametrize("symmetric", (False, True), ids=("affine", "symmetric"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic(shape, dtype, symmetric):
    x = draw(*shape, dtype=dtype)
    x.view(-1)[-1] = float("nan")
    x[0] *= 1e-4
    for granularity in ("pixel", "token") if len(shape) == 4 else ("token",):
        args = ops.prepare_dynamic(x, granularity=granularity, symmetric=symmetric)
        codes, scale, zero_point = kernels.quantize_dynamic(*args)
        expected = reference.quantize_dynamic(*on_cpu(args))
        check(codes, expected[0])
        assert torch.equal(scale.cpu().nan_to_num(-1), expected[1].nan_to_num(-1)) and scale.is_contiguous()
        assert torch.equal(zero_point.cpu(), expected[2]) and zero_point.dtype == torch.int32


@pytest.mark.parametrize("activation", ("silu", "geglu"))
def test_dynamic_with_activation(activation):
    factors = draw(5 if activation == "geglu" else 10, seed=1).abs()
    args = ops.prepare_dynamic(draw(2, 10, 5, 7), granularity="pixel", activation=activation, channel_scale=factors)
    codes, scale, zero_point = kernels.quantize_dynamic(*args)
    expected = reference.quantize_dynamic(*on_cpu(args))
    check(codes, expected[0], off=1)
    torch.testing.assert_close(scale.cpu(), expected[1], rtol=1e-6, atol=0)
    assert (zero_point.cpu() - expected[2]).abs().max() <= 1


def test_ranges_too_narrow_for_a_scale():
    x = torch.tensor([[0.0, 0.0], [1e-42, -1e-42], [1e-37, 0.0]], device=DEVICE)
    for symmetric in (False, True):
        args = ops.prepare_dynamic(x, symmetric=symmetric)
        for actual, expected in zip(
            kernels.quantize_dynamic(*args), reference.quantize_dynamic(*on_cpu(args)), strict=True
        ):
            assert torch.equal(actual.cpu(), expected)


def test_rows_too_long_to_hold():
    args = ops.prepare_dynamic(draw(3, kernels._LONGEST_ROW + 5))
    (launch,) = [kernels.plan_dynamic(*args, *(t.to(DEVICE) for t in reference.quantize_dynamic(*on_cpu(args))))]
    assert not launch.arguments["WHOLE"]
    for actual, expected in zip(
        kernels.quantize_dynamic(*args), reference.quantize_dynamic(*on_cpu(args)), strict=True
    ):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize(shape, dtype):
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8).to(DEVICE)
    granularities = ("pixel", "token") if len(shape) == 4 else ("token",)
    for scale, zero_point in ((0.3, 0), (0.3, 7), *(positions(codes, g) for g in granularities)):
        args = ops.prepare_dequantize(codes, scale, zero_point, dtype=dtype)
        check(kernels.dequantize(*args), reference.dequantize(*on_cpu(args)))


def test_any_strides():
    """Channels in a slice, axes swapped, values strided: the same codes."""
    x = torch.cat([draw(2, 10, 5, 7)] * 2, 1)[:, ::2].transpose(2, 3)
    args = ops.prepare_dynamic(x, granularity="pixel", activation="geglu")
    dense = (x.contiguous(), *args[1:])
    for actual, expected in zip(kernels.quantize_dynamic(*args), kernels.quantize_dynamic(*dense), strict=True):
        assert torch.equal(actual, expected)
    tokens = draw(11, 3, 20).transpose(0, 1)[..., ::2]
    args = ops.prepare(tokens, 0.05, 3)
    check(kernels.quantize(*args), reference.quantize(*on_cpu(args)))


def test_empty():
    x = torch.zeros(0, 4, 5, 6, device=DEVICE)
    assert kernels.quantize(*ops.prepare(x, 1.0)).shape == (0, 4, 5, 6)
    codes, scale, _ = kernels.quantize_dynamic(*ops.prepare_dynamic(x, granularity="pixel"))
    assert codes.shape == (0, 4, 5, 6) and scale.shape == (0, 1, 5, 6)


VARIANTS = [variant for kernel in kernels.KERNELS for variant in kernel.variants]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant(variant):
    x = draw(2, 20, 2, 3)
    if variant.kernel == "quantize_dynamic":
        args = ops.prepare_dynamic(x, granularity="pixel")
        expected = reference.quantize_dynamic(*on_cpu(args))
        actual = [torch.zeros_like(t, device=DEVICE) for t in expected]
        kernels.plan_dynamic(*args, *actual).run(variant.config())
    else:
        args = ops.prepare(x, 0.05, 3)
        expected = [reference.quantize(*on_cpu(args))]
        actual = [torch.zeros_like(t, device=DEVICE) for t in expected]
        launch = kernels.plan_quantize(*args, actual[0])
        if variant.kernel == "dequantize":
            args = ops.prepare_dequantize(expected[0].to(DEVICE), 0.05, 3)
            expected = [reference.dequantize(*on_cpu(args))]
            actual = [torch.zeros_like(x)]
            launch = kernels.plan_dequantize(*args[:3], actual[0])
        launch.run(variant.config())
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), e)


def test_through_the_public_functions():
    x = draw(3, 11, 20)
    codes = PF.quantize(x, 0.05, 3, backend="triton")
    check(codes, PF.quantize(x.cpu(), 0.05, 3, backend="reference"))
    check(
        PF.dequantize(codes, 0.05, 3, backend="triton"),
        PF.dequantize(codes.cpu(), 0.05, 3, backend="reference"),
    )


def test_reasons(monkeypatch):
    for op in ("quantize", "quantize_dynamic"):
        row = next(row for row in registry.rows(op) if row.name == "triton")
        assert row.unsupported(draw(2, 3)) is None
        assert "float64" in row.unsupported(draw(2, 3).double())
        assert "meta" in row.unsupported(draw(2, 3).to("meta"))
        if _tiles.interpreting():
            assert "bfloat16" in row.unsupported(draw(2, 3).bfloat16())
    if _tiles.interpreting():
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(pdn.BackendUnavailable, match="not on cuda"):
            PF.quantize(draw(2, 3), 1.0, backend="triton")
