"""The contract of every registry row of the int8 ops: exact integers, floats within 1e-6, whoever runs it."""

import numpy as np
import pytest
import torch

from pydenoise import functional as PF
from pydenoise.ops import int8_conv2d, int8_linear, registry
from pydenoise.reference import int8_conv2d as reference_conv
from pydenoise.reference import int8_linear as reference_linear
from pydenoise.reference import norm_quantize as reference_norm
from pydenoise.reference import quantize as reference_quantize
from pydenoise.testing import int8 as table
from pydenoise.testing.rows import Variant, device_of, poisoned_memory, variants

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = (*FLOATS, torch.int8, torch.int32)
GOLDEN = "tests/data/int8.npz"


def to_cpu(args: tuple, floats: torch.dtype | None = None) -> list:
    """The same arguments on the CPU; the first one, if floating, as ``floats``."""
    moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    if floats is not None:
        moved[0] = moved[0].to(floats)
    return moved


def run(variant: Variant, args: tuple):
    """The row's result on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with variant.active(), poisoned_memory(), torch.no_grad():
        result = variant.row.run(*args)
    for old, new in zip(before, args, strict=True):
        assert not isinstance(old, torch.Tensor) or torch.equal(old.nan_to_num(), new.nan_to_num()), "overwritten"
    return result


def each(cases, check) -> None:
    """Run ``check`` on every case; report all failures, and skip where every case does."""
    failures, reasons = [], []
    for case in cases:
        try:
            check(case)
        except pytest.skip.Exception as skipped:
            reasons.append(skipped.msg)
        except (AssertionError, RuntimeError) as failure:
            failures.append(f"{case.name} ({case.why}): {failure}")
    assert not failures, "\n".join(failures)
    if len(reasons) == len(cases):
        pytest.skip(reasons[0])


def in_layout(tensor: torch.Tensor) -> None:
    """Images come out in channels_last memory."""
    if tensor.dim() == 4 and tensor.numel():
        assert tensor.is_contiguous(memory_format=torch.channels_last), tensor.stride()


def exact_float(args: list, run) -> torch.Tensor:
    """The oracle's float result before the cast to the output's dtype, which the tolerance knows of."""
    position = next(i for i, a in enumerate(args) if isinstance(a, torch.dtype))
    if args[position].is_floating_point:
        args[position] = torch.float64
    return run(*args)


_oracles: dict = {}


def oracle(key: tuple, compute):
    """Computed once for all rows and ISA levels."""
    if key not in _oracles:
        _oracles[key] = compute()
    return _oracles[key]


# --------------------------------------------------------------------------------------------- products and sums


@pytest.mark.parametrize("out_dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("variant", variants("int8_conv2d"), ids=str)
def test_int8_conv2d(variant, out_dtype):
    def check(case):
        args = case.args(out_dtype, device_of(variant.row))
        actual = run(variant, args)
        expected = oracle(("conv", case.name, out_dtype), lambda: exact_float(to_cpu(args), reference_conv.int8_conv2d))
        assert actual.dtype == out_dtype
        in_layout(actual)
        error = table.PER_PIXEL_ERROR if case.per_pixel else table.FLOAT_ERROR
        table.assert_output(actual, expected, error=error, what="output")

    each(table.INT8_CONV_CASES, check)


@pytest.mark.parametrize("out_dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize("variant", variants("int8_linear"), ids=str)
def test_int8_linear(variant, out_dtype):
    def check(case):
        args = case.args(out_dtype, device_of(variant.row))
        actual = run(variant, args)
        expected = exact_float(to_cpu(args), reference_linear.int8_linear)
        assert actual.dtype == out_dtype and actual.is_contiguous()
        table.assert_output(actual, expected, error=table.FLOAT_ERROR, what="output")

    each(table.INT8_LINEAR_CASES, check)


# ----------------------------------------------------------------------------------------------------- producers


def check_dynamic(actual: tuple, x: torch.Tensor, expected: tuple, exact: bool) -> None:
    """Codes, scales and zero points of a dynamic quantization of the float64 values ``x``."""
    codes, scale, zero_point = (t.cpu() for t in actual)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert scale.shape == expected[1].shape and zero_point.shape == expected[2].shape
    torch.testing.assert_close(scale, expected[1], rtol=1e-5, atol=0, equal_nan=True)
    fine = ~scale.isnan()
    if exact:
        assert torch.equal(zero_point[fine], expected[2][fine])
        return table.assert_codes(codes * fine, expected[0] * fine, exact=True, what="codes")
    assert (zero_point - expected[2])[fine].abs().max().item() <= 1 if fine.any() else True
    back = (codes.double() - zero_point) * scale.double()
    excess = ((back - x).abs() - 0.502 * scale.double() - 1e-5 * scale.double() * 255)[fine.expand_as(back)]
    assert excess.numel() == 0 or excess.max() <= 0, f"a code is off by {excess.max():.3e} more than half a step"
    return None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", variants("quantize"), ids=str)
def test_quantize(variant, dtype):
    def check(case):
        args = case.args(dtype, device_of(variant.row))
        actual = run(variant, args)
        in_layout(actual)
        plain = case.activation in ("none", "relu")
        expected = reference_quantize.quantize(*to_cpu(args, None if plain else torch.float64))
        table.assert_codes(actual, expected, exact=plain, what="codes")

    each(table.QUANTIZE_CASES, check)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", variants("quantize_dynamic"), ids=str)
def test_quantize_dynamic(variant, dtype):
    def check(case):
        args = case.dynamic_args(dtype, device_of(variant.row))
        actual = run(variant, args)
        in_layout(actual[0])
        plain = case.activation in ("none", "relu") and not case.channel_scale
        cpu = to_cpu(args, None if plain else torch.float64)
        x = reference_quantize.transform(cpu[0].double(), cpu[2], cpu[3])
        check_dynamic(actual, x, reference_quantize.quantize_dynamic(*cpu), plain)

    each([case for case in table.QUANTIZE_CASES if case.shape[0] or len(case.shape) > 1], check)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", variants("dequantize"), ids=str)
def test_dequantize(variant, dtype):
    def check(case):
        args = case.dequantize_args(dtype, device_of(variant.row))
        actual = run(variant, args)
        in_layout(actual)
        assert torch.equal(actual.cpu(), reference_quantize.dequantize(*to_cpu(args)))

    each(table.QUANTIZE_CASES, check)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", ["group_norm_quantize", "layer_norm_quantize"])
@pytest.mark.parametrize("variant", variants("group_norm_quantize"), ids=str)
def test_norm_quantize(variant, op, dtype):
    cases = table.GROUP_NORM_CASES if op.startswith("group") else table.LAYER_NORM_CASES
    rows = {str(v): v for v in variants(op)}
    variant = rows.get(str(variant)) or pytest.skip(f"{op} has no such row")

    def check(case):
        args = case.args(dtype, device_of(variant.row))
        codes, scale, zero_point = run(variant, args)
        in_layout(codes)
        cpu = to_cpu(args, torch.float64)
        if op.startswith("group") and cpu[1] is not None:
            cpu[1] = cpu[1].double()
        expected = getattr(reference_norm, op)(*cpu)
        if not case.dynamic:
            assert scale is None and zero_point is None
            # one rounding of the mean moves every code where the mean is large: what float32 itself would do
            if case.offset:
                own = getattr(reference_norm, op)(*to_cpu(args))[0]
                wrong, allowed = ((c.cpu().int() - expected[0].int()).abs() for c in (codes, own))
                assert wrong.max() <= max(1, 2 * allowed.max()), f"codes differ by {wrong.max()}"
            else:
                table.assert_codes(codes, expected[0], exact=False, what="codes")
            return
        x = (expected[0].double() - expected[2]) * expected[1].double()
        off = (codes.cpu().int() - expected[0].int()).abs()
        assert (zero_point.cpu() - expected[2]).abs().max() <= 1
        torch.testing.assert_close(scale.cpu(), expected[1], rtol=1e-5, atol=0)
        assert off.max() <= 1 and (off > 0).float().mean() <= 0.02, f"{off.max()}, {(off > 0).float().mean():.4f}"
        assert x.shape == codes.shape

    each(cases, check)


# ------------------------------------------------------------------------------------------------ what rows share


def first_args(op: str, device: str = "cpu") -> tuple:
    return {
        "int8_conv2d": lambda: table.INT8_CONV_CASES[0].args(torch.float32, device),
        "int8_linear": lambda: table.INT8_LINEAR_CASES[1].args(torch.float32, device),
        "quantize": lambda: table.QUANTIZE_CASES[0].args(torch.float32, device),
        "quantize_dynamic": lambda: table.QUANTIZE_CASES[0].dynamic_args(torch.float32, device),
        "dequantize": lambda: table.QUANTIZE_CASES[0].dequantize_args(torch.float32, device),
        "group_norm_quantize": lambda: table.GROUP_NORM_CASES[6].args(torch.float32, device),
        "layer_norm_quantize": lambda: table.LAYER_NORM_CASES[1].args(torch.float32, device),
    }[op]()


OPS = (
    "int8_conv2d",
    "int8_linear",
    "quantize",
    "quantize_dynamic",
    "dequantize",
    "group_norm_quantize",
    "layer_norm_quantize",
)


@pytest.mark.parametrize(
    ("op", "row"),
    [(op, row) for op in OPS for row in registry.rows(op)],
    ids=lambda value: getattr(value, "name", value),
)
def test_opcheck(op, row):
    args = first_args(op, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    torch.library.opcheck(getattr(torch.ops.pydenoise, op).default, (*args, row.name))


@pytest.mark.parametrize(
    ("op", "variant"), [(op, v) for op in OPS for v in variants(op) if v.row.name == "cpu"], ids=str
)
def test_threads_do_not_change_a_bit(op, variant):
    cases = {
        "int8_conv2d": [c.args(torch.float32) for c in table.INT8_CONV_CASES if c.batch],
        "int8_linear": [c.args(torch.float32) for c in table.INT8_LINEAR_CASES],
        "group_norm_quantize": [c.args(torch.float32) for c in table.GROUP_NORM_CASES if c.shape[0]],
        "layer_norm_quantize": [c.args(torch.float32) for c in table.LAYER_NORM_CASES],
    }.get(op, [first_args(op)])
    for args in cases:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with variant.active():
                result = variant.row.run(*args)
            results.append(result if isinstance(result, tuple) else (result,))
        for other in results[1:]:
            for one, many in zip(results[0], other, strict=True):
                assert (one is None and many is None) or torch.equal(one, many)


@pytest.mark.parametrize("variant", variants("int8_conv2d", "cpu"), ids=str)
def test_packed_weights(variant):
    """The inference path of the modules: the weight packed once, then every case as through the row."""

    def check(case):
        args = case.args(torch.float32)
        expected = run(variant, args)
        (x, weight, scale, weight_scale, zero_point, bias, stride, padding, dilation, groups, channel_bias, film,
         residual, activation, out_dtype, out_scale, out_zero_point, upsample) = args  # fmt: skip
        with variant.active(), poisoned_memory():
            packed = int8_conv2d.pack(weight, stride, dilation, groups)
            actual = int8_conv2d.int8_conv2d_packed(
                x, packed, scale, weight_scale, zero_point, bias, padding, channel_bias, film, residual, activation,
                out_dtype, out_scale, out_zero_point, upsample,
            )  # fmt: skip
        assert torch.equal(actual, expected)

    each(table.INT8_CONV_CASES, check)


@pytest.mark.parametrize("variant", variants("int8_linear", "cpu"), ids=str)
def test_packed_linear(variant):
    def check(case):
        args = case.args(torch.float32)
        expected = run(variant, args)
        x, weight, *rest = args
        with variant.active(), poisoned_memory():
            packed = int8_linear.pack(weight)
            actual = int8_linear.int8_linear_packed(x, packed, *rest)
        assert torch.equal(actual, expected)

    each(table.INT8_LINEAR_CASES, check)


# ----------------------------------------------------------------------------------------------------- golden data


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as data:
        return {key: data[key] for key in data.files if key != "meta_json"}


CONVOLUTIONS = ("c0_basic", "c1_stride2_odd", "c2_1x1", "c5_depthwise", "c7_resblock_silu", "c9_positive",
                "c10_negative", "c11_zero")  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_golden_convolutions(golden, name, kind, backend):
    """Codes and accumulators made outside this package, in float64: equal."""
    get = lambda key: torch.from_numpy(np.array(golden[f"{name}/{key}"]))  # noqa: E731
    config = golden[f"{name}/cfg"].tolist()
    geometry = {"stride": config[:2], "padding": config[2:4], "dilation": config[4:6], "groups": config[6]}
    scale, zero_point = get(f"{kind}_scale"), 0 if kind == "sym" else get("asym_zp")
    codes = PF.quantize(get("x"), scale, zero_point, backend=backend)
    assert torch.equal(codes, get(f"{kind}_xq"))
    call = lambda **options: PF.int8_conv2d(  # noqa: E731
        codes, get("wq"), scale, get("w_scale"), input_zero_point=zero_point, backend=backend, **geometry, **options
    )
    assert torch.equal(call(out_dtype=torch.int32), get(f"{kind}_acc"))
    table.assert_output(call(bias=get("b")), get(f"{kind}_y"), error=table.FLOAT_ERROR, what="y")
    if kind == "sym":  # SiLU after the residual, as its own step: this op's activation comes before it
        y = call(bias=get("b"), channel_bias=get("temb"), residual=get("res"))
        requantized = PF.quantize(y, get("req_scale"), activation="silu", backend=backend)
        assert (requantized.int() - get("req_q").int()).abs().max() <= 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["l0", "l1_odd", "l2_m1"])
def test_golden_linears(golden, name, backend):
    get = lambda key: torch.from_numpy(np.array(golden[f"{name}/{key}"]))  # noqa: E731
    for kind in ("sym", "asym", "tok"):
        scale, zero_point = get(f"{kind}_scale"), get("asym_zp") if kind == "asym" else 0
        codes = PF.quantize(get("x"), scale, zero_point, backend=backend)
        assert torch.equal(codes, get(f"{kind}_xq"))
        options = {"input_zero_point": zero_point, "backend": backend}
        arguments = (codes, get("wq"), scale, get("w_scale"))
        if kind != "tok":
            assert torch.equal(PF.int8_linear(*arguments, out_dtype=torch.int32, **options), get(f"{kind}_acc"))
        y = PF.int8_linear(*arguments, bias=get("b"), **options)
        table.assert_output(y, get(f"{kind}_y"), error=table.FLOAT_ERROR, what=kind)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_golden_split_concat_and_extremes(golden, backend):
    """Two inputs with a scale each: the second convolution adds to the first one's result."""
    get = lambda key: torch.from_numpy(np.array(golden[key]))  # noqa: E731
    for kind in ("shared", "split"):
        part = lambda i, **options: PF.int8_conv2d(  # noqa: E731
            get(f"split_concat/xq{i}"), get(f"split_concat/{kind}_wq{i}"), get(f"split_concat/s{i}"),  # noqa: B023
            get(f"split_concat/{kind}_w_scale{i}"), padding=1, backend=backend, **options,  # noqa: B023
        )  # fmt: skip
        first = part(0, bias=get("split_concat/b"))
        assert torch.equal(part(1, out_dtype=torch.int32), get(f"split_concat/{kind}_acc1"))
        y = part(1, residual=first)
        table.assert_output(y, get(f"split_concat/{kind}_y"), error=2 * table.FLOAT_ERROR, what=kind)
    codes, weight = get("extreme/xq"), get("extreme/wq")
    acc = PF.int8_conv2d(codes, weight, 1.0, 1.0, padding=1, out_dtype=torch.int32, backend=backend)
    assert torch.equal(acc, get("extreme/acc_pad1"))
