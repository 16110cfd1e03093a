"""Triton kernels of weighted convolution against the float64 reference.

On a machine without a GPU they run in Triton's interpreter, in a pytest process of their own (the variable is read when
the kernels are imported, so it cannot be set here): ``TRITON_INTERPRET=1 pytest tests/kernels``.
"""

import itertools
import os
from collections import Counter

import pytest
import torch
from torch import Tensor

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.ops import registry
from pydenoise.ops.weighted_conv import prepare
from pydenoise.reference import weighted_conv as reference
from pydenoise.testing import CONV_CASES, ConvCase, assert_accurate

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

import triton  # noqa: E402
from pydenoise.kernels import weighted_conv as wc  # noqa: E402

DEVICE = "cpu" if wc.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if wc.interpreting() else wc.DTYPES  # bfloat16 is wrong in the interpreter
CASES = {case.name: case for case in CONV_CASES}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel fails to write, or reads before it is written, shows up as NaN."""

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned_allocate

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def arguments(case: ConvCase, dtype: torch.dtype) -> tuple:
    """(input, weight, density, bias, residual, stride, padding, dilation, groups, activation) of ``case``."""
    tensors = case.tensors(dtype, DEVICE)
    options = case.options()
    names = ("stride", "padding", "dilation", "groups", "activation")
    return prepare(case.dims, *tensors.values(), *(options[name] for name in names))[:-1]


def double(values: tuple) -> tuple:
    return tuple(v.cpu().double() if isinstance(v, Tensor) else v for v in values)


def on_cpu(values: tuple) -> tuple:
    return tuple(v.cpu() if isinstance(v, Tensor) else v for v in values)


def check_forward(actual: Tensor, args: tuple) -> None:
    assert_accurate(actual, reference.weighted_conv(*double(args)), reference.weighted_conv(*on_cpu(args)), what="y")


def gradient_arguments(args: tuple, dtype: torch.dtype) -> tuple:
    shape = reference.weighted_conv(*on_cpu(args)).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(DEVICE)
    return grad, args[0], args[1], args[2], *args[5:9]


def check_gradients(actual: tuple, args: tuple) -> None:
    oracle = reference.weighted_conv_backward(*double(args))
    baseline = reference.weighted_conv_backward(*on_cpu(args))
    for what, a, o, b in zip(("dx", "dweight", "ddensity"), actual, oracle, baseline, strict=True):
        if o is None:
            assert a is None
        elif a is not None:
            assert_accurate(a, o, b, what=what, scale=density_scale(args) if what == "ddensity" else None)


def density_scale(args: tuple) -> float:
    """Sum of the magnitudes of the terms of a density gradient, which cancel."""
    grad, x, weight, _, *geometry = double(args)
    plain = reference.weighted_conv_backward(grad, x, weight, None, *geometry, (False, True, False))[1]
    return (weight * plain).abs().sum((0, 1)).max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_matches_reference(case, dtype):
    args = arguments(case, dtype)
    check_forward(wc.forward(*args), args)
    args = gradient_arguments(args, dtype)
    check_gradients(wc.backward(*args), args)


# Tiles smaller than the problem in every direction: borders of tiles, several splits, both orders of the product.
SMALL = {
    "conv": [{"BLOCK_M": 64, "BLOCK_O": 16, "BLOCK_K": 16, "WEIGHT_LEFT": left} for left in (False, True)],
    "weight_gradient": [{"BLOCK_O": 16, "BLOCK_N": 64, "BLOCK_P": 64}],
    "depthwise": [{"BLOCK_M": 64, "BLOCK_C": 16}],
    "depthwise_weight_gradient": [{"BLOCK_P": 64, "BLOCK_C": 16}],
    "reduce": [{"BLOCK_R": wc._REDUCE_ROWS, "BLOCK_T": 4}],
}
SMALL["conv_unfold"] = SMALL["conv"]


SMALL_CASES = (
    ConvCase("odd", "every axis one block and a little", (7, 10), (3, 2), 19, 18, padding=1, activation="silu"),
    ConvCase("strided", "one problem per residue, strides differ", (9, 10), (3, 3), 17, 16, stride=(2, 1), padding=1),
    ConvCase("unfolded", "several blocks of unfolded (tap, channel)", (8, 9), (3, 3), 5, 18, padding=1, residual=True),
    ConvCase("groups", "tiles of several groups", (7, 10), (1, 2), 34, 36, groups=2),
    ConvCase("volume", "3-D, axes all different", (3, 5, 6), (1, 3, 2), 16, 17, stride=(1, 2, 1), padding=(0, 1, 1)),
    ConvCase("depthwise", "channel multiplier, two blocks", (7, 10), (3, 3), 12, 24, padding=1, groups=12, stride=2),
)


def run_small(launches: list[wc.Launch], which: int) -> None:
    for launch in launches:
        metas = SMALL[launch.kernel]
        launch.run(triton.Config(metas[which % len(metas)]))


@pytest.mark.parametrize("which", (0, 1), ids=("weight_right", "weight_left"))
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_small_tiles(case, which):
    args = arguments(case, torch.float32)
    y = torch.empty(reference.weighted_conv(*on_cpu(args)).shape, device=DEVICE)
    run_small(wc.plan_forward(*args[:5], y, *args[5:]), which)
    check_forward(y, args)
    args = gradient_arguments(args, torch.float32)
    grad, x, weight, density, *geometry = args
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    parts = torch.empty(wc.density_parts(weight), density.numel(), dtype=torch.float64, device=DEVICE)
    run_small(wc.plan_input_gradient(grad, weight, density, dx, *geometry), which)
    run_small(wc.plan_weight_gradient(grad, x, weight, density, dweight, parts, *geometry, splits=3), which)
    check_gradients((dx, dweight, parts.sum(0).to(density.dtype).view(density.shape)), args)


@pytest.mark.parametrize("variant", wc.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant(variant, monkeypatch):
    """Every tile that can be launched computes the right thing."""
    channels = 5 if variant.kernel == "conv_unfold" else 20
    groups = 20 if "depthwise" in variant.kernel else 1
    case = ConvCase("variant", "", (9, 11), (2, 3), channels, 20, padding=1, groups=groups, stride=(1, 2))
    dtype = variant.dtypes[0]
    if variant.precision == "tf32" and DEVICE == "cuda":
        pytest.skip("tf32 is less accurate than the float32 policy allows; the interpreter computes it in float32")
    precision = "high" if variant.precision == "tf32" else "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    args = arguments(case, dtype)
    grads = gradient_arguments(args, dtype)
    y = torch.empty_like(grads[0])
    dweight = torch.empty_like(args[1])
    parts = torch.empty(wc.density_parts(args[1]), args[2].numel(), dtype=torch.float64, device=DEVICE)
    launches = wc.plan_forward(*args[:5], y, *args[5:]) + wc.plan_weight_gradient(
        *grads[:4], dweight, parts, *grads[4:], splits=1
    )
    assert variant.kernel in {launch.kernel for launch in launches}
    for launch in launches:
        launch.run(variant.config() if launch.kernel == variant.kernel else None)
    check_forward(y, args)
    check_gradients((None, dweight, parts.sum(0).to(dtype).view(args[2].shape)), grads)


@pytest.mark.parametrize("mask", [m for m in itertools.product((False, True), repeat=3) if sum(m) == 1])
def test_single_gradients(mask):
    args = gradient_arguments(arguments(CASES["kernel3x5"], torch.float32), torch.float32)
    actual = wc.backward(*args, mask)
    assert tuple(a is not None for a in actual) == mask
    check_gradients(actual, args)


def test_through_autograd():
    """The public function on this backend, forward and backward; the incoming gradient is one expanded number."""
    x, weight, density, bias, _ = CASES["stride2"].tensors(torch.float32, DEVICE).values()
    for tensor in (x, weight, density, bias):
        tensor.requires_grad_()
    y = PF.weighted_conv2d(x, weight, density, bias, 2, 1, activation="silu", backend="triton")
    y.mean().backward()
    actual = [t.grad for t in (x, weight, density, bias)]
    copies = [t.detach().cpu().clone().requires_grad_() for t in (x, weight, density, bias)]
    doubles = [t.detach().double().requires_grad_() for t in copies]
    for tensors in (copies, doubles):
        z = torch.nn.functional.conv2d(tensors[0], tensors[1] * tensors[2], tensors[3], 2, 1)
        torch.nn.functional.silu(z).mean().backward()
    for a, o, b in zip(actual, doubles, copies, strict=True):
        assert_accurate(a, o.grad, b.grad, what="gradient")


def test_repeated_calls_give_the_same_bits():
    args = gradient_arguments(arguments(CASES["plain"], torch.float32), torch.float32)
    for first, second in zip(wc.backward(*args), wc.backward(*args), strict=True):
        assert torch.equal(first, second)


def test_nan_passes_through_relu():
    x = torch.full((1, 4, 3, 3), float("nan"), device=DEVICE)
    weight = torch.ones(4, 4, 1, 1, device=DEVICE)
    y = wc.forward(x, weight, None, None, None, (1, 1), (0,) * 4, (1, 1), 1, "relu")
    assert torch.isnan(y).all()


@pytest.mark.parametrize("channels", (16, 3))
def test_offsets_beyond_32_bits(channels):
    """Image rows 2^31 elements apart, in address space that is mostly never touched."""
    row = 2**31 + 64
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    storage = torch.ones(1, dtype=torch.float16, device=DEVICE).new_zeros(0).resize_(row + 256)
    x = storage.as_strided((1, channels, 2, 8), (row, 1, row, 16))
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    weight = torch.randn(16, channels, 2, 3, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    args = (x, weight, None, None, None, (1, 1), (0, 0, 1, 1), (1, 1), 1, "none")
    check_forward(wc.forward(*args), (x.contiguous(), *args[1:]))
    grads = gradient_arguments((x.contiguous(), *args[1:]), torch.float16)
    actual = wc.backward(grads[0], x, *grads[2:], (False, True, False))
    check_gradients(actual, grads)


@pytest.mark.parametrize("kernel", (1, 2, 3, 5))
@pytest.mark.parametrize("dilation", (1, 2, 3, 4))
@pytest.mark.parametrize("stride", (1, 2, 3, 4, 6))
def test_phases_visit_every_pair_once(stride, dilation, kernel):
    """The input-gradient problems of an axis: each (input position, tap, output position) of the forward pass, once."""
    padding, size = 2, 13
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if count < 1:
        pytest.skip("the kernel does not fit")
    forward = Counter(
        (o * stride - padding + t * dilation, t, o)
        for o in range(count)
        for t in range(kernel)
        if 0 <= o * stride - padding + t * dilation < size
    )
    backward, written = Counter(), Counter()
    for where, axis in wc._phases(wc.Axis(size, count, stride, -padding, dilation, kernel), kernel):
        positions = range(size)[where]
        assert len(positions) == axis.count
        written.update(positions)
        for q, position in enumerate(positions):
            for j in range(axis.taps):
                o = q * axis.step + axis.offset + j * axis.hop
                if 0 <= o < axis.size:
                    backward[position, axis.tap + j * axis.tap_step, o] += 1
    assert written == Counter(range(size))
    assert backward == forward


def test_precision_follows_torch():
    args = arguments(CASES["plain"], torch.float32)
    y = torch.empty_like(wc.forward(*args))
    before = torch.get_float32_matmul_precision()
    try:
        found = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = wc.plan_forward(*args[:5], y, *args[5:])[0].arguments["PRECISION"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == {"highest": "ieee", "high": "tf32"}


def test_every_kernel_has_candidates_for_every_case():
    """The choice of tiles, as on a GPU: never empty, and no tile that is mostly padding while a smaller one exists."""
    for case in CONV_CASES:
        args = arguments(case, torch.float16)
        y = reference.weighted_conv(*on_cpu(args)).to(DEVICE)
        for launch in wc.plan_forward(*args[:5], y, *args[5:]):
            assert 1 <= len(wc.candidates(launch.kernel, launch.arguments)) <= wc._MOST_CANDIDATES


@pytest.mark.skipif(not wc.interpreting(), reason="on a GPU every other test goes through the autotuner")
@pytest.mark.parametrize("name", ("plain", "first_rgb", "depthwise"))
def test_autotuner_plumbing(name, monkeypatch):
    """Keys, candidates and arguments reach the autotuner, which times nothing here and takes the first candidate."""
    tried = []

    def no_timing(call, quantiles):
        call()
        tried.append(call)
        return [0.0, 0.0, 0.0]

    args = arguments(CASES[name], torch.float32)
    y = torch.empty(reference.weighted_conv(*on_cpu(args)).shape)
    (launch,) = wc.plan_forward(*args[:5], y, *args[5:])
    tuner = wc._tuned(launch.kernel)
    monkeypatch.setattr(tuner, "_do_bench", no_timing)
    tuner[launch.grid](**launch.arguments)
    check_forward(y, args)
    expected = wc.candidates(launch.kernel, launch.arguments)
    assert len(tried) == (len(expected) if len(expected) > 1 else 0)
    assert tuner.best_config in [variant.config() for variant in expected]


def reason(*args, **kwargs) -> str | None:
    row = next(row for row in registry.rows("weighted_conv") if row.name == "triton")
    return row.unsupported(*args, **kwargs)


def test_reasons(monkeypatch):
    x = torch.zeros(1, 3, 4, 4)
    assert "float64" in reason(x.double())
    assert "meta" in reason(x.to("meta"))
    if wc.interpreting():
        assert reason(x) is None
        assert "bfloat16" in reason(x.bfloat16())
        monkeypatch.delenv("TRITON_INTERPRET")
    assert "not on cuda" in reason(x)
    with pytest.raises(pdn.BackendUnavailable, match="float64"):
        PF.weighted_conv2d(x.double(), torch.zeros(1, 3, 1, 1).double(), None, backend="triton")
