"""Triton kernels of normalisation + quantization against the float64 reference.

Run as test_weighted_conv_triton.py says. Codes are within 1 of those of exact arithmetic, and few of them differ.
"""

import os

import pytest
import torch
from torch import Tensor

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.ops import norm_quantize as ops
from pydenoise.ops import registry
from pydenoise.reference import activations
from pydenoise.reference import norm_quantize as reference

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import norm_quantize as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
MOST_CHANGED = 0.01  # share of the codes that may differ by 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(args: tuple) -> tuple:
    """The reference's result in float64."""

    def wide(value):
        if not isinstance(value, Tensor):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    return tuple(map(wide, args))


def check(actual: tuple, expected: tuple, off: int = 1, changed: float = MOST_CHANGED) -> None:
    codes, scale, zero_point = (None if t is None else t.cpu() for t in actual)
    assert codes.dtype == torch.int8 and codes.shape == expected[0].shape
    layout = torch.channels_last if codes.dim() == 4 else torch.contiguous_format
    assert codes.is_contiguous(memory_format=layout)
    difference = (codes.int() - expected[0].int()).abs()
    assert difference.max() <= off and (difference > 0).double().mean() <= changed
    assert (scale is None) == (expected[1] is None)
    if scale is not None:
        assert scale.is_contiguous() and zero_point.dtype == torch.int32
        torch.testing.assert_close(scale, expected[1], rtol=1e-5, atol=0)
        assert (zero_point - expected[2]).abs().max() <= 1


# The three ways to a scale: known, affine or symmetric; and one per position.
SCALES = {"affine": {"scale": 0.02, "zero_point": -100}, "symmetric": {"scale": 0.03}, "dynamic": {}}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize(
    ("shape", "skip", "groups"),
    [((2, 32, 7, 9), 0, 8), ((2, 20, 5, 7), 12, 8), ((1, 6, 30, 31), 0, 3), ((1, 3, 1, 2), 5, 1)],
    ids=("plain", "groups_span_the_skip", "several_parts", "one_group"),
)
def test_group_norm(shape, skip, groups, kind):
    channels = shape[1] + skip
    args = ops.prepare_group_norm(
        draw(*shape), groups, draw(channels, seed=1), draw(channels, seed=2),
        skip=draw(shape[0], skip, *shape[2:], seed=3) * 3 + 1 if skip else None,
        film=draw(shape[0], 2 * channels, seed=4) * 0.3, channel_scale=draw(channels, seed=5).abs() + 0.5,
        **SCALES[kind],
    )  # fmt: skip
    check(kernels.group_norm(*args), reference.group_norm_quantize(*exact(args)))


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("shape", ((2, 7, 40), (3, 50), (2, 3, 2, 33), (2, 2, 4101)), ids=str)
def test_layer_norm(shape, kind):
    """The last shape has rows too long to hold."""
    channels = shape[-1]
    args = ops.prepare_layer_norm(
        draw(*shape), draw(channels, seed=1), draw(channels, seed=2), film=draw(shape[0], 2 * channels, seed=4) * 0.3,
        channel_scale=draw(channels, seed=5).abs() + 0.5, **SCALES[kind],
    )  # fmt: skip
    codes, *rest = kernels.layer_norm(*args)
    expected = reference.layer_norm_quantize(*exact(args))
    if len(shape) == 4:  # tokens whatever their number of dims: row-major
        assert codes.is_contiguous()
        codes = codes.contiguous(memory_format=torch.channels_last)
    check((codes, *rest), expected)


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_bare_group_norm(activation):
    """No weight, bias, FiLM or factors; half-precision input in NCHW and in channels_last memory."""
    x = draw(2, 24, 6, 7).half()
    for memory in (torch.contiguous_format, torch.channels_last):
        args = ops.prepare_group_norm(x.contiguous(memory_format=memory), 4, activation=activation, scale=0.02)
        check(kernels.group_norm(*args), reference.group_norm_quantize(*exact(args)))


def test_mean_far_from_zero():
    """Squares minus the squared mean would keep no digit here; the input itself has but few."""
    args = ops.prepare_group_norm(draw(2, 16, 20, 20) + 3000, 4, scale=0.02, zero_point=-100)
    check(kernels.group_norm(*args), reference.group_norm_quantize(*exact(args)), changed=0.05)
    args = ops.prepare_layer_norm(draw(4, 5000) + 3000, scale=0.02, zero_point=-10)
    check(kernels.layer_norm(*args), reference.layer_norm_quantize(*exact(args)), changed=0.05)


def test_nan_marks_its_group():
    """A NaN makes its group's codes those of 0, and the scales that see it NaN."""
    x = draw(2, 8, 4, 5)
    x[0, 1, 2, 3] = float("nan")
    args = ops.prepare_group_norm(x, 2)
    codes, scale, _ = (t.cpu() for t in kernels.group_norm(*args))
    expected = reference.group_norm_quantize(*exact(args))
    assert scale[0].isnan().all() and not scale[1].isnan().any()
    assert torch.equal(codes[0], expected[0][0])


def test_empty():
    args = ops.prepare_group_norm(torch.zeros(0, 4, 5, 6, device=DEVICE), 2)
    codes, scale, _ = kernels.group_norm(*args)
    assert codes.shape == (0, 4, 5, 6) and scale.shape == (0, 1, 5, 6)
    args = ops.prepare_layer_norm(torch.zeros(0, 4, device=DEVICE))
    assert kernels.layer_norm(*args)[1].shape == (0, 1)


VARIANTS = [variant for kernel in kernels.KERNELS for variant in kernel.variants]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant(variant):
    if variant.kernel == "layer_norm":
        args = ops.prepare_layer_norm(draw(2, 9, 40), draw(40, seed=1), film=draw(2, 80, seed=2))
        expected = reference.layer_norm_quantize(*exact(args))
        actual = tuple(torch.zeros_like(t, device=DEVICE) for t in expected)
        launches = [kernels.plan_layer_norm(*args[:6], *actual[1:], actual[0], True)]
    else:
        given = {"scale": 0.02, "zero_point": -100} if variant.kernel == "group_norm" else {}
        args = ops.prepare_group_norm(draw(2, 24, 3, 4), 4, draw(24, seed=1), **given)
        expected = reference.group_norm_quantize(*exact(args))
        codes = torch.zeros_like(expected[0], device=DEVICE).contiguous(memory_format=torch.channels_last)
        rest = args[9:] if given else tuple(torch.zeros_like(t, device=DEVICE) for t in expected[1:])
        actual = (codes, *((None, None) if given else rest))
        launches = kernels.plan_group_norm(*args[:9], *rest, codes, not given)
    assert variant.kernel in {launch.kernel.name for launch in launches}
    for launch in launches:
        launch.run(variant.config() if launch.kernel.name == variant.kernel else None)
    check(actual, expected)


def test_through_the_public_functions():
    x = draw(2, 8, 4, 5)
    actual = PF.group_norm_silu_quantize(x, 2, scale=0.02, backend="triton")
    expected = PF.group_norm_silu_quantize(x.cpu().double(), 2, scale=0.02, backend="reference")
    assert (actual.cpu().int() - expected.int()).abs().max() <= 1
    codes, scale, zero_point = PF.layer_norm_quantize(draw(3, 8), backend="triton")
    assert codes.shape == (3, 8) and scale.shape == zero_point.shape == (3, 1)


def test_reasons(monkeypatch):
    for op in ("group_norm_quantize", "layer_norm_quantize"):
        row = next(row for row in registry.rows(op) if row.name == "triton")
        assert row.unsupported(draw(2, 3)) is None
        assert "float64" in row.unsupported(draw(2, 3).double())
        if _tiles.interpreting():
            assert "bfloat16" in row.unsupported(draw(2, 3).bfloat16())
    if _tiles.interpreting():
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(pdn.BackendUnavailable, match="not on cuda"):
            PF.layer_norm_quantize(draw(2, 3), backend="triton")
