"""Triton kernels of int8 convolution against the exact reference; run as test_weighted_conv_triton.py says."""

import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.ops import registry
from pydenoise.ops.int8_conv2d import prepare
from pydenoise.reference import int8_conv2d as reference

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

import triton  # noqa: E402
from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import int8_conv2d as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
EPILOGUE_ERROR = 1e-6  # relative to the largest output


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    channels: int = 40
    outputs: int = 36
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (7, 9)
    zero_point: int | None = None  # "pixel": scales and zero points per pixel
    per_pixel: bool = False
    options: dict = field(default_factory=dict)

    def arguments(self, out_dtype: torch.dtype = torch.float32, fused: bool = True) -> tuple:
        """Row arguments, drawn afresh from one seed."""
        generator = torch.Generator().manual_seed(0)

        def codes(*shape):
            return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE)

        x = codes(2, self.channels, *self.size)
        w = codes(self.outputs, self.channels // self.options.get("groups", 1), *self.kernel)
        scale, zero_point = 0.013, 0 if self.zero_point is None else self.zero_point
        if self.per_pixel:
            scale = normal(2, 1, *self.size).abs() * 0.01 + 0.001
            if self.zero_point is not None:
                zero_point = codes(2, 1, *self.size).int()
        options = dict(self.options)
        if out_dtype == torch.int8:
            options |= {"out_scale": 0.4, "out_zero_point": -9}
        if fused:
            options |= {
                "bias": normal(self.outputs), "channel_bias": normal(2, self.outputs),
                "film": normal(2, 2 * self.outputs), "activation": "silu",
            }  # fmt: skip
        weight_scale = normal(self.outputs).abs() * 0.01 + 0.001
        args = prepare(
            x, w, scale, weight_scale, input_zero_point=zero_point, out_dtype=out_dtype, **options
        )  # fmt: skip
        if fused:
            shape = reference.int8_conv2d(*on_cpu(args)).shape
            args = (*args[:12], normal(*shape).half().to(DEVICE), *args[13:])
        return args


CASES = (
    Case("symmetric", "no zero point: nothing is subtracted"),
    Case("border", "zero point and padding: the share of the taps inside", zero_point=-128, options={"padding": 1}),
    Case("inside", "zero point without padding: one sum per channel", zero_point=77),
    Case(
        "asymmetric", "four paddings, strides differ", zero_point=5,
        options={"padding": ((0, 2), (1, 3)), "stride": (2, 1)},
    ),
    Case("dilated", "taps far outside", zero_point=9, options={"padding": 4, "dilation": (4, 2)}),
    Case("pointwise", "one tap, and padding of it", kernel=(1, 1), zero_point=3, options={"padding": 1}),
    Case("many_taps", "more taps than one block of the share", 33, 17, (6, 7), (7, 8), 3, options={"padding": 3}),
    Case("upsampled", "the gather halves coordinates", zero_point=3, options={"padding": 1, "upsample": 2}),
    Case("grouped", "tiles of several groups", 80, 36, zero_point=3, options={"padding": 1, "groups": 2}),
    Case("first", "few channels are unfolded", 3, zero_point=9, options={"padding": 1}),
    Case("first_up", "unfolded and upsampled", 4, zero_point=9, options={"padding": 1, "upsample": 2}),
    Case("depthwise", "channel multiplier", 12, 24, zero_point=4, options={"groups": 12, "padding": 2, "dilation": 2}),
    Case("multiplier", "a multiplier too large for it", 2, 34, zero_point=4, options={"groups": 2, "padding": 1}),
    Case("pixel", "scales per pixel", per_pixel=True, options={"padding": 1}),
    Case("pixel_affine", "zero points per pixel", per_pixel=True, zero_point=1, options={"padding": 1, "stride": 2}),
    Case(
        "pixel_up", "scales per pixel, upsampled", per_pixel=True, zero_point=1, options={"padding": 1, "upsample": 2}
    ),
    Case(
        "pixel_depthwise", "scales per pixel, depthwise, upsampled", 12, 12, per_pixel=True, zero_point=1,
        options={"groups": 12, "padding": 1, "upsample": 2},
    ),
    Case("pixel_first", "scales per pixel, few channels", 3, per_pixel=True, zero_point=1, options={"padding": 1}),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def on_cpu(args: tuple) -> tuple:
    return tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)


def output_of(args: tuple) -> Tensor:
    expected = reference.int8_conv2d(*on_cpu(args))
    return torch.empty(expected.shape, dtype=expected.dtype, device=DEVICE).contiguous(
        memory_format=torch.channels_last
    )


def check(actual: Tensor, args: tuple) -> None:
    expected = reference.int8_conv2d(*on_cpu(args))
    actual = actual.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    difference = (actual.double() - expected.double()).abs()
    if actual.dtype == torch.int32:
        assert torch.equal(actual, expected)
    elif actual.dtype == torch.int8:
        assert difference.max() <= 1 and difference.mean() < 0.01
    else:
        bound = max(EPILOGUE_ERROR, torch.finfo(actual.dtype).eps)
        assert difference.max() <= bound * expected.double().abs().max()


@pytest.mark.parametrize("case", [case for case in CASES if not case.per_pixel], ids=lambda case: case.name)
def test_accumulators_are_exact(case):
    args = case.arguments(torch.int32, fused=False)
    check(kernels.forward(*args), args)


@pytest.mark.parametrize("dtype", (torch.float32, torch.int8), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, dtype):
    args = case.arguments(dtype)
    check(kernels.forward(*args), args)


@pytest.mark.parametrize("activation", ("none", "relu", "gelu", "gelu_tanh", "leaky_relu_0.1"))
def test_half_outputs_and_activations(activation):
    args = BY_NAME["border"].arguments(torch.float16)
    args = (*args[:13], activation, *args[14:])
    check(kernels.forward(*args), args)


def test_symmetric_requantization_leaves_out_minus_128():
    args = BY_NAME["border"].arguments(torch.int8, fused=False)
    args = (*args[:15], args[15] / 1e3, None, *args[17:])
    actual = kernels.forward(*args)
    check(actual, args)
    assert actual.min() == -127 and actual.max() == 127


@pytest.mark.parametrize("name", ("border", "grouped", "first_up", "depthwise", "pixel_up"))
def test_small_tiles(name):
    """Tiles smaller than the problem in every direction."""
    args = replace(BY_NAME[name], size=(6, 7)).arguments()
    blocks = {"BLOCK_M": 64, "BLOCK_O": 16, "BLOCK_K": 32, "BLOCK_C": 16, "BLOCK_R": 128}
    output = output_of(args)
    for launch in kernels.plan(*args[:14], *args[15:], output):
        names = dict(launch.kernel.variants[0].meta)
        launch.run(triton.Config({key: blocks[key] for key in names}))
    check(output, args)


VARIANTS = [variant for kernel in kernels.KERNELS for variant in kernel.variants]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant(variant):
    """Every tile that can be launched computes the right thing."""
    case = {"int8_conv_gather": "first", "int8_conv_pixel": "pixel_affine", "int8_depthwise": "depthwise"}
    args = BY_NAME[case.get(variant.kernel, "asymmetric")].arguments()
    output = output_of(args)
    launches = kernels.plan(*args[:14], *args[15:], output)
    assert variant.kernel in {launch.kernel.name for launch in launches}
    for launch in launches:
        launch.run(variant.config() if launch.kernel.name == variant.kernel else None)
    check(output, args)


@pytest.mark.parametrize("padding", (0, 1))
def test_sums_beyond_what_a_saturating_product_may_hold(padding):
    """Longest sums, largest codes: the products alone and the zero point's share each reach nearly 2^31."""
    channels = 65793
    x = torch.full((1, channels, 1, 2), -128, dtype=torch.int8, device=DEVICE)
    w = torch.full((16, channels, 1, 1), -128, dtype=torch.int8, device=DEVICE)
    args = prepare(x, w, 1.0, 1.0, input_zero_point=-128, padding=padding, out_dtype=torch.int32)
    output = output_of(args)
    for launch in kernels.plan(*args[:14], *args[15:], output):
        blocks = {"BLOCK_M": 64, "BLOCK_O": 16, "BLOCK_K": 16384, "BLOCK_R": 16, "BLOCK_C": 16384}
        names = dict(launch.kernel.variants[0].meta)
        launch.run(triton.Config({key: blocks[key] for key in names}) if DEVICE == "cpu" else None)
    check(output, args)


def test_nan_scale_of_a_pixel_reaches_what_reads_it():
    args = BY_NAME["pixel_affine"].arguments(fused=False)
    args[2][0, 0, 3, 4] = float("nan")
    actual, expected = kernels.forward(*args).cpu(), reference.int8_conv2d(*on_cpu(args))
    assert torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().any()


def test_any_strides():
    """NCHW memory, a slice of channels, and a residual in NCHW memory give the same."""
    args = BY_NAME["border"].arguments()
    x, residual = args[0].contiguous(), args[12].contiguous()
    wide = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)
    expected = kernels.forward(*args)
    for arranged in (x, wide[:, : x.shape[1]]):
        assert torch.equal(kernels.forward(arranged, *args[1:12], residual, *args[13:]), expected)


def test_weight_in_channels_last_memory_is_read_where_it_lies():
    args = list(BY_NAME["symmetric"].arguments())
    args[1] = args[1].contiguous(memory_format=torch.channels_last)
    (launch,) = kernels.plan(*args[:14], *args[15:], output_of(args))
    assert launch.arguments["weight"].data_ptr() == args[1].data_ptr()


def test_empty_batch():
    args = list(BY_NAME["border"].arguments(fused=False))
    args[0] = args[0][:0]
    assert kernels.forward(*args).shape == (0, 36, 7, 9)


@pytest.mark.parametrize("channels", (32, 3))
def test_offsets_beyond_32_bits(channels):
    """Image rows 2^31 elements apart, in address space that is mostly never touched."""
    row = 2**31 + 64
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    storage = torch.ones(1, dtype=torch.int8, device=DEVICE).new_zeros(0).resize_(row + 256)
    x = storage.as_strided((1, channels, 2, 8), (row, 1, row, 32))
    generator = torch.Generator().manual_seed(0)
    x.copy_(torch.randint(-128, 128, x.shape, generator=generator))
    w = torch.randint(-128, 128, (16, channels, 2, 3), generator=generator, dtype=torch.int8).to(DEVICE)
    args = prepare(x, w, 1.0, 1.0, input_zero_point=5, padding=1, out_dtype=torch.int32)
    check(kernels.forward(*args), (x.contiguous(), *args[1:]))


def test_wide_indices_are_taken_where_needed():
    args = BY_NAME["border"].arguments()
    x = args[0].as_strided((1, 40, 40000, 40000), (0, 1, 0, 0))
    y = torch.empty(36, dtype=torch.int8).as_strided((1, 36, 40000, 40000), (0, 1, 0, 0))
    launches = kernels.plan(x, *args[1:10], None, None, None, "none", None, None, 1, y)
    assert launches[-1].arguments["WIDE"]


@pytest.mark.skipif(not _tiles.interpreting(), reason="on a GPU every other test goes through the autotuner")
@pytest.mark.parametrize("name", ("first", "depthwise"))
def test_autotuner_plumbing(name, monkeypatch):
    """Keys, candidates and arguments reach the autotuner, which times nothing here and takes the first candidate."""
    tried = []

    def no_timing(call, quantiles):
        call()
        tried.append(call)
        return [0.0, 0.0, 0.0]

    args = BY_NAME[name].arguments()
    output = output_of(args)
    *before, launch = kernels.plan(*args[:14], *args[15:], output)
    for earlier in before:
        earlier.run()
    tuner = launch.kernel.tuned()
    monkeypatch.setattr(tuner, "_do_bench", no_timing)
    tuner[launch.grid](**launch.arguments)
    check(output, args)
    expected = launch.kernel.candidates(launch.arguments)
    assert 1 <= len(expected) <= _tiles.MOST_CANDIDATES
    assert len(tried) == (len(expected) if len(expected) > 1 else 0)


def test_through_the_public_function():
    x, w, scale, weight_scale, zero_point, bias, *_ = args = BY_NAME["border"].arguments(fused=False)
    actual = PF.int8_conv2d(x, w, scale, weight_scale, input_zero_point=zero_point, padding=1, backend="triton")
    check(actual, args)


def reason(*args) -> str | None:
    row = next(row for row in registry.rows("int8_conv2d") if row.name == "triton")
    return row.unsupported(*args)


def test_reasons(monkeypatch):
    args = BY_NAME["border"].arguments()
    assert reason(*args) is None
    assert "meta" in reason(args[0].to("meta"), *args[1:])
    if _tiles.interpreting():
        assert "bfloat16" in reason(*args[:14], torch.bfloat16, *args[15:])
        assert "bfloat16" in reason(*args[:12], args[12].bfloat16(), *args[13:])
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "not on cuda" in reason(*args)
        with pytest.raises(pdn.BackendUnavailable, match="not on cuda"):
            PF.int8_conv2d(args[0], args[1], 1.0, 1.0, backend="triton")
