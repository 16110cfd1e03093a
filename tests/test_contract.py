"""The contract of every registry row: what an op promises, whoever runs it.

The tests loop over the registry, so a new row is tested the moment it exists. A new op needs an entry in CONTRACTS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from pydenoise import functional as PF
from pydenoise.ops import registry, weighted_conv
from pydenoise.reference import weighted_conv as reference
from pydenoise.testing import CONV_CASES, WINOGRAD_RELATIVE_ERROR, ConvCase, arrange, assert_accurate, relative_error
from pydenoise.testing.rows import Variant, device_of, poisoned_memory, skip_unless, variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FUNCTIONS = {1: PF.weighted_conv1d, 2: PF.weighted_conv2d, 3: PF.weighted_conv3d}
TENSORS = ("input", "weight", "density", "bias", "residual")
CASES = {case.name: case for case in CONV_CASES}


# ---------------------------------------------------------------------------------------------- weighted convolution


def forward_args(case: ConvCase, dtype: torch.dtype, device: str, algorithm: str = "direct") -> tuple:
    """The positional arguments of a forward row."""
    tensors = case.tensors(dtype, device)
    args = weighted_conv.prepare(case.dims, *(tensors[name] for name in TENSORS), **case.options())
    return (*args[:-1], algorithm)


def backward_args(case: ConvCase, dtype: torch.dtype, device: str, mask=(True, True, True)) -> tuple:
    """The positional arguments of a backward row; the incoming gradient is random."""
    input, weight, density, _, _, stride, padding, dilation, groups, _, algorithm = forward_args(case, dtype, device)
    size = weighted_conv.output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(input.shape[0], weight.shape[0], *size, generator=generator, dtype=torch.float64)
    grad = arrange(grad.to(dtype).to(device), case.strides)
    return grad, input, weight, density, stride, padding, dilation, groups, algorithm, list(mask)


def in_dtype(args: tuple, dtype: torch.dtype) -> tuple:
    """The same arguments on the CPU in another dtype."""
    return tuple(a.cpu().to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


def oracle_backward(args: tuple, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    """Gradients by torch's autograd through the plain convolution: independent of the formulas under test."""
    grad, input, weight, density, *geometry, _, mask = in_dtype(args, dtype)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (input, weight, density)]
    with torch.enable_grad():
        y = reference.weighted_conv(*leaves, None, None, *geometry)
    wanted = [leaf for leaf, want in zip(leaves, mask, strict=True) if want and leaf is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad))
    return [next(grads) if want and leaf is not None else None for leaf, want in zip(leaves, mask, strict=True)]


def density_gradient_scale(args: tuple) -> float:
    """What the rounding of a density gradient is relative to: the magnitudes of its terms, which cancel."""
    grad, input, weight, _, *geometry = in_dtype(args, torch.float64)
    plain = oracle_backward((grad, input, weight, None, *geometry[:-1], (False, True, False)))[1]
    return (weight * plain).abs().sum((0, 1)).max().item()


_expected: dict[tuple, tuple] = {}


def expected(key: tuple, compute: Callable[[], tuple]) -> tuple:
    """The oracle's and torch's own results, computed once for all rows and ISA levels."""
    if key not in _expected:
        _expected[key] = compute()
    return _expected[key]


def check_forward(variant: Variant, case: ConvCase, dtype: torch.dtype) -> None:
    args = forward_args(case, dtype, device_of(variant.row))
    skip_unless(variant.row, args)
    before = [t if t is None else t.clone() for t in args[:5]]
    with variant.active(), poisoned_memory(), torch.no_grad():
        actual = variant.row.run(*args)
    oracle, baseline = expected(
        ("forward", case.name, dtype),
        lambda: tuple(reference.weighted_conv(*in_dtype(args, t)[:-1]) for t in (torch.float64, dtype)),
    )
    assert_accurate(actual, oracle, baseline, what=f"{case.name}, {case.why}")
    for name, old, new in zip(TENSORS, before, args, strict=False):
        assert old is None or torch.equal(old, new), f"{name} was overwritten"


def check_backward(variant: Variant, case: ConvCase, dtype: torch.dtype) -> None:
    args = backward_args(case, dtype, device_of(variant.row))
    skip_unless(variant.row, args)
    with variant.active(), poisoned_memory(), torch.no_grad():
        actual = variant.row.run(*args)
    oracle, baseline, scale = expected(
        ("backward", case.name, dtype),
        lambda: (oracle_backward(args), oracle_backward(args, dtype), density_gradient_scale(args)),
    )
    for name, got, exact, own in zip(("input", "weight", "density"), actual, oracle, baseline, strict=True):
        assert (got is None) == (exact is None), name
        if got is not None:
            what = f"gradient of {name}: {case.name}, {case.why}"
            assert_accurate(got, exact, own, what=what, scale=scale if name == "density" else None)


def opcheck_forward(row: registry.Backend, case: ConvCase, dtype: torch.dtype) -> None:
    args = forward_args(case, dtype, device_of(row))
    skip_unless(row, args)
    if args[9] == "none":  # with an activation the raw op is for inference only
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(torch.ops.pydenoise.weighted_conv.default, (*args, row.name))


def opcheck_backward(row: registry.Backend, case: ConvCase, dtype: torch.dtype) -> None:
    args = backward_args(case, dtype, device_of(row))
    skip_unless(row, args)
    torch.library.opcheck(torch.ops.pydenoise.weighted_conv_backward.default, (*args, row.name))


@dataclass(frozen=True)
class Contract:
    """How to test an op: its leading tensor arguments, its argument lists, its checks against the float64 reference."""

    names: tuple[str, ...]
    cases: tuple
    args: Callable
    check: Callable
    opcheck: Callable
    opcheck_cases: tuple[str, ...]


OPCHECK_CASES = (
    "kernel3x5",
    "conv1d_stride",
    "conv3d_odd",
    "depthwise_multiplier",
    "no_bias_no_density",
    "empty_batch",
)
INT8_OPS = {  # tests/test_contract_int8.py
    "quantize", "quantize_dynamic", "dequantize", "group_norm_quantize", "layer_norm_quantize", "int8_conv2d",
    "int8_linear",
}  # fmt: skip
ATTENTION_OPS = {  # tests/test_contract_attention.py, tests/test_contract_sparse.py
    "attention", "block_sparse_attention", "block_sparse_attention_backward", "block_importance",
}  # fmt: skip
SAMPLING_OPS = {"sampler_step", "token_confidence"}  # tests/test_contract_sampler_step.py, _token_confidence.py
BLOCK_OPS = {  # tests/test_contract_<op>.py, _dcls.py
    "adaptive_bilateral_filter", "adaptive_bilateral_filter_backward", "dcls_kernel", "dcls_kernel_backward",
    "ode_stage", "ode_stage_backward", "routed_norm", "routed_norm_backward", "softmax_aggregate",
    "softmax_aggregate_backward", "wavelet_gate", "wavelet_gate_backward", "wavelet_gate_pool",
}  # fmt: skip
CONTRACTS = {
    "weighted_conv": Contract(
        TENSORS, CONV_CASES, forward_args, check_forward, opcheck_forward, (*OPCHECK_CASES, "relu_residual")
    ),
    "weighted_conv_backward": Contract(
        ("grad", *TENSORS[:3]), CONV_CASES, backward_args, check_backward, opcheck_backward, OPCHECK_CASES
    ),
}


def test_every_op_has_a_contract_and_a_reference():
    assert set(registry.ops()) == set(CONTRACTS) | INT8_OPS | ATTENTION_OPS | SAMPLING_OPS | BLOCK_OPS, (
        "a new op needs an entry in a contract test"
    )
    for op in registry.ops():
        rows = registry.rows(op)
        assert rows[-1].name == registry.REFERENCE, f"{op}: the reference is the last resort"
        assert all(row.measured for row in rows), f"{op}: every priority says where it comes from"


ROWS = [(op, variant) for op in CONTRACTS for variant in variants(op)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("op", "variant"), ROWS, ids=str)
def test_accuracy(op, variant, dtype):
    """Every case, dtype, row and ISA level: within the tolerance policy of the float64 oracle."""
    failures, reasons = [], []
    for case in CONTRACTS[op].cases:
        try:
            CONTRACTS[op].check(variant, case, dtype)
        except pytest.skip.Exception as skipped:
            reasons.append(skipped.msg)
        except (AssertionError, RuntimeError) as failure:
            failures.append(f"{case.name}: {failure}")
    assert not failures, "\n".join(failures)
    if len(reasons) == len(CONTRACTS[op].cases):
        pytest.skip(reasons[0])


@pytest.mark.parametrize("variant", variants("weighted_conv"), ids=str)
def test_auto_algorithm_keeps_its_bound(variant):
    """What ``algorithm="auto"`` adds to the direct kernels may cost accuracy, up to a bound of its own."""
    for case in CONV_CASES:
        args = forward_args(case, torch.float32, device_of(variant.row), "auto")
        skip_unless(variant.row, args)
        with variant.active(), poisoned_memory():
            actual = variant.row.run(*args).cpu()
        oracle = reference.weighted_conv(*in_dtype(args, torch.float64)[:-1])
        assert actual.shape == oracle.shape, case.name
        if oracle.numel():
            assert relative_error(actual, oracle) <= WINOGRAD_RELATIVE_ERROR, f"{case.name}, {case.why}"


@pytest.mark.parametrize("variant", variants("weighted_conv_backward"), ids=str)
def test_auto_algorithm_keeps_its_bound_backward(variant):
    for case in CONV_CASES:
        args = list(backward_args(case, torch.float32, device_of(variant.row), (True, False, False)))
        args[8] = "auto"
        skip_unless(variant.row, args)
        with variant.active(), poisoned_memory():
            actual = variant.row.run(*args)[0].cpu()
        oracle = oracle_backward(tuple(args))[0]
        if oracle.numel():
            assert relative_error(actual, oracle) <= WINOGRAD_RELATIVE_ERROR, f"{case.name}, {case.why}"


@pytest.mark.parametrize("variant", variants("weighted_conv_backward"), ids=str)
def test_gradient_masks(variant):
    """A backward row returns exactly the gradients asked for."""
    everything = None
    for mask in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        args = backward_args(CASES["odd_channels"], torch.float32, device_of(variant.row), mask)
        skip_unless(variant.row, args)
        with variant.active():
            grads = variant.row.run(*args)
        everything = everything or grads
        for got, want, full in zip(grads, mask, everything, strict=True):
            assert (got is not None) == want
            torch.testing.assert_close(got, full if want else None, rtol=1e-5, atol=1e-5)


# Arrangements that callers produce without noticing: model.to(memory_format=channels_last), slices of a larger weight,
# the stride-0 gradient of sum(), a residual that is an expanded bias.
REARRANGEMENTS = {
    "weight in channels_last": ("weight", lambda t: t.contiguous(memory_format=torch.channels_last)),
    "weight sliced": ("weight", lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]),
    "weight transposed": ("weight", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "density transposed": ("density", lambda t: t.t().contiguous().t()),
    "bias strided": ("bias", lambda t: torch.stack([t, t], 1)[:, 0]),
    "residual expanded": ("residual", lambda t: t[:, :, :1, :1].expand_as(t)),
    "input expanded": ("input", lambda t: t[:, :1].expand_as(t)),
    "input reversed axes": ("input", lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)),
    "grad expanded": ("grad", lambda t: t[:1, :1, :1, :1].expand_as(t)),
}


@pytest.mark.parametrize(
    ("op", "variant", "arrangement"),
    [(*row, name) for row in ROWS for name, (tensor, _) in REARRANGEMENTS.items() if tensor in CONTRACTS[row[0]].names],
    ids=str,
)
def test_memory_arrangements(op, variant, arrangement):
    """The result depends on the values alone, not on how the tensors lie in memory."""
    name, rearrange = REARRANGEMENTS[arrangement]
    position = CONTRACTS[op].names.index(name)
    args = list(CONTRACTS[op].args(CASES["relu_residual"], torch.float32, device_of(variant.row)))
    skip_unless(variant.row, args)
    rearranged = rearrange(args[position])
    with variant.active(), poisoned_memory():
        actual = variant.row.run(*args[:position], rearranged, *args[position + 1 :])
        plain = rearranged.clone(memory_format=torch.contiguous_format)
        expected = variant.row.run(*args[:position], plain, *args[position + 1 :])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("variant", variants("weighted_conv", "cpu"), ids=str)
def test_packed_weights(variant, dtype):
    """The inference path of the modules: the weight packed once, then every case as through the row."""
    for case in CONV_CASES:
        args = forward_args(case, dtype, "cpu")
        skip_unless(variant.row, args)
        input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm = args
        with variant.active(), poisoned_memory(), torch.no_grad():
            packed = weighted_conv.pack(weight, density, stride, dilation, groups, algorithm)
            if packed is None:
                continue
            actual = weighted_conv.weighted_conv_packed(input, packed, bias, residual, padding, activation)
        oracle, baseline = (reference.weighted_conv(*in_dtype(args, t)[:-1]) for t in (torch.float64, dtype))
        assert_accurate(actual, oracle, baseline, what=f"{case.name}, {case.why}")


CPU_ROWS = [(op, variant) for op, variant in ROWS if variant.row.name == "cpu"]


@pytest.mark.parametrize(("op", "variant"), CPU_ROWS, ids=str)
def test_threads_do_not_change_a_bit(op, variant):
    for name, dtype in product(("odd_channels", "depthwise7", "stride2", "first_rgb", "last_rgb", "deep"), DTYPES[:2]):
        args = CONTRACTS[op].args(CASES[name], dtype, "cpu")
        skip_unless(variant.row, args)
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with variant.active():
                result = variant.row.run(*args)
            results.append(result if isinstance(result, tuple) else (result,))
        for other in results[1:]:
            for one, many in zip(results[0], other, strict=True):
                assert (one is None and many is None) or torch.equal(one, many), f"{name}, {dtype}"


@pytest.mark.parametrize(
    ("op", "row"), [(op, row) for op in CONTRACTS for row in registry.rows(op)], ids=lambda v: getattr(v, "name", v)
)
def test_opcheck(op, row):
    """Schema, autograd registration, fake kernel and ahead-of-time dispatch of the torch op."""
    for name in CONTRACTS[op].opcheck_cases:
        CONTRACTS[op].opcheck(row, CASES[name], torch.float32)


@pytest.mark.parametrize("row", registry.rows("weighted_conv"), ids=lambda row: row.name)
@pytest.mark.parametrize(
    "name", ["relu_residual", "silu_residual", "gelu", "gelu_tanh", "conv1d_stride", "empty_batch"]
)
def test_gradients_of_every_argument(row, name):
    """Through the functional with its epilogue: input, weight, density, bias and residual."""
    case = CASES[name]
    skip_unless(row, forward_args(case, torch.float32, device_of(row)))

    def gradients(dtype, device, backend):
        tensors = case.tensors(torch.float32, device)
        leaves = {k: t.to(dtype).requires_grad_() for k, t in tensors.items() if t is not None}
        y = FUNCTIONS[case.dims](**leaves, **case.options(), backend=backend)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(y.shape, generator=generator).to(device, dtype)
        return leaves, torch.autograd.grad(y, list(leaves.values()), grad)

    leaves, actual = gradients(torch.float32, device_of(row), row.name)
    _, oracle = gradients(torch.float64, "cpu", "reference")
    _, baseline = gradients(torch.float32, "cpu", "reference")
    magnitude = max(g.abs().max().item() if g.numel() else 0.0 for g in oracle)
    for key, got, exact, own in zip(leaves, actual, oracle, baseline, strict=True):
        assert_accurate(got, exact, own, what=f"gradient of {key}", scale=magnitude)


def available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants("weighted_conv", "cpu")[-1:], ids=str)
def test_more_elements_than_32_bits_count(variant):
    """Input and output of more than 2^31 elements, in bf16; values at both ends, where a 32-bit index would wrap."""
    channels, height, width = 4, 16400, 32800
    assert channels * height * width > 2**31
    if available_bytes() < 14 * 2**30:
        pytest.skip("needs 14 GiB of free memory")
    # zeros() maps pages without touching them, so the input costs little
    input = torch.zeros(1, height, width, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = torch.randn(channels, 1, 3, 3).bfloat16()
    args = weighted_conv.prepare(
        2, input, weight, torch.full((3, 3), 0.5).bfloat16(), None, None, 1, 1, 1, channels, "none"
    )
    skip_unless(variant.row, args)
    corners = {"first": (slice(0, 4), slice(0, 5)), "last": (slice(height - 4, height), slice(width - 5, width))}
    for rows, columns in corners.values():
        input[:, :, rows, columns] = torch.randn(1, channels, 4, 5).bfloat16()
    with variant.active(), torch.no_grad():
        y = variant.row.run(*args)
    for name, (rows, columns) in corners.items():
        corner = tuple(
            t.double() if isinstance(t, torch.Tensor) else t for t in (input[:, :, rows, columns], *args[1:-1])
        )
        expected = reference.weighted_conv(*corner)
        torch.testing.assert_close(y[:, :, rows, columns].double(), expected, rtol=1e-2, atol=1e-2, msg=name)
    middle = y[:, :, height // 2 : height // 2 + 50]
    assert not middle.any()


# ------------------------------------------------------------------------------------- what a fixed density really is


def test_fixed_density_under_adam_is_a_plain_convolution_with_a_learning_rate_per_tap():
    """Adam on W with density D moves W * D as Adam moves V = W * D with lr * |D| and eps / |D| per tap.

    The gradient of W is D times that of V, so Adam's step in W is lr * sign(D) * m / (sqrt(v) + eps / |D|) with
    the moments m and v of V, and W * D moves by lr * |D| * m / (sqrt(v) + eps / |D|).
    """
    lr, eps, steps, dtype = 1e-2, 1e-8, 8, torch.float64
    x = torch.randn(2, 3, 9, 10, dtype=dtype)
    target = torch.randn(2, 5, 9, 10, dtype=dtype)
    density = torch.tensor([[0.3, 0.7, 1.5], [0.2, 1.0, -0.6], [0.05, 1.2, 0.4]], dtype=dtype)
    weight = torch.randn(5, 3, 3, 3, dtype=dtype).requires_grad_()
    taps = [(weight * density)[:, :, i, j].detach().clone().requires_grad_() for i, j in product(range(3), range(3))]
    scales = density.abs().flatten().tolist()
    groups = [{"params": [tap], "lr": lr * d, "eps": eps / d} for tap, d in zip(taps, scales, strict=True)]
    weighted, plain = torch.optim.Adam([weight], lr=lr, eps=eps), torch.optim.Adam(groups)
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(
            PF.weighted_conv2d(x, weight, density, padding=1, backend="reference"), target
        )
        weighted.zero_grad()
        loss.backward()
        weighted.step()
        kernel = torch.stack(taps, -1).reshape(5, 3, 3, 3)
        plain_loss = torch.nn.functional.mse_loss(torch.nn.functional.conv2d(x, kernel, padding=1), target)
        plain.zero_grad()
        plain_loss.backward()
        plain.step()
    kernel = torch.stack(taps, -1).reshape(5, 3, 3, 3)
    torch.testing.assert_close((weight * density).detach(), kernel.detach(), rtol=1e-10, atol=1e-12)
