"""The CUDA rows of the int8 ops. tests/test_contract_int8.py runs the whole table on a GPU; without one, the kernels'
arithmetic is checked on the host, and what the rows hand to the kernels by putting the references in their place."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pydenoise.functional as PF
from pydenoise import _native
from pydenoise.ops import registry
from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import BackendUnavailable
from pydenoise.reference import activations
from pydenoise.reference import int8_conv2d as reference_conv
from pydenoise.reference import int8_linear as reference_linear
from pydenoise.reference import norm_quantize as reference_norm
from pydenoise.reference import quantize as reference_quantize
from pydenoise.testing import int8 as table

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "int8_conv2d",
    "int8_linear",
    "quantize",
    "quantize_dynamic",
    "dequantize",
    "group_norm_quantize",
    "layer_norm_quantize",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = (*FLOATS, torch.int8, torch.int32)
NAMES = {number: name for name, number in activations.NUMBERS.items()}

built = pytest.mark.skipif(
    _native.cuda_extension().state == _native.NOT_BUILT, reason="pydenoise._cuda is not built here (no nvcc)"
)
on_gpu = pytest.mark.skipif(
    not (_native.cuda_extension().loaded and torch.cuda.is_available()), reason="needs pydenoise._cuda and a GPU"
)


def row_of(op: str) -> registry.Backend:
    return next(row for row in registry.rows(op) if row.name == "cuda")


# ------------------------------------------------------------------------------------------------------- without a GPU


@built
def test_library_has_the_ops():
    assert _native.cuda_extension().loaded, _native.cuda_extension().reason
    for op in OPS:
        assert hasattr(torch.ops.pydenoise, f"{op}_cuda")


def test_cpu_tensors_are_refused_by_name():
    x, w = torch.zeros(1, 16, 4, 4, dtype=torch.int8), torch.zeros(8, 16, 3, 3, dtype=torch.int8)
    reason = _native.cuda_extension().reason or "tensors are on cpu, not on a CUDA device"
    for call in (
        lambda: PF.int8_conv2d(x, w, 0.1, 0.1, backend="cuda"),
        lambda: PF.int8_linear(x[0, 0], w[0, 0, :1].repeat(1, 2)[:, :4], 0.1, 0.1, backend="cuda"),
        lambda: PF.quantize(torch.zeros(2, 3), 0.1, backend="cuda"),
        lambda: PF.group_norm_silu_quantize(torch.zeros(1, 4, 2, 2), 2, scale=0.1, backend="cuda"),
    ):
        with pytest.raises(BackendUnavailable) as caught:
            call()
        assert reason in str(caught.value)


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    wide = torch.empty(1, 8192, 2, 2, device="meta")
    args = (wide, None, 32, None, None, 1e-5, None, "silu", None, None, None)
    assert "8192 channels" in row_of("group_norm_quantize").unsupported(*args)
    image, scale = torch.empty(1, 4, 2, 2, device="meta"), torch.empty(1, 4, 2, 1, device="meta")
    assert row_of("quantize").unsupported(image, scale, None, "none", None) is None
    assert "dim 1" in row_of("quantize").unsupported(image, scale, None, "silu", torch.empty(4, device="meta"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("check", ["cuda_int8_host_check", "cuda_norm_quantize_check", "cuda_quantize_check"])
def test_kernel_arithmetic_on_the_host(check, tmp_path):
    """Index maps, swizzles, fragments, statistics and epilogues, against plain loops."""
    program = tmp_path / "check"
    command = ["nvcc", "-std=c++20", "-O1", "-Xcicc", "-O1", "-Xptxas", "-O0", "-gencode=arch=compute_80,code=sm_80"]
    subprocess.run([*command, str(ROOT / f"tests/native/{check}.cu"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What the kernels take, written down once more: dense tensors with the channels inside.


def _image(tensor):
    return None if tensor is None else tensor.permute(0, 3, 1, 2)


def _dense(*tensors):
    assert all(t is None or t.is_contiguous() for t in tensors)


def _conv(x, w, scale, w_scale, zero_point, bias, channel_bias, film, residual, out_scale, out_zero_point, output,
          geometry, activation):  # fmt: skip
    assert x.stride(3) == 1 or x.shape[3] == 1
    _dense(w, scale, w_scale, zero_point, bias, channel_bias, film, residual, output)
    y = reference_conv.int8_conv2d(
        _image(x), _image(w), scale, w_scale, zero_point, bias, geometry[:2], geometry[2:6], geometry[6:8], geometry[8],
        channel_bias, film, _image(residual), NAMES[activation], output.dtype, out_scale, out_zero_point, geometry[9],
    )  # fmt: skip
    output.copy_(y.permute(0, 2, 3, 1))


def _linear(x, w, scale, w_scale, zero_point, bias, residual, out_scale, out_zero_point, output, activation):
    assert x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1)
    _dense(w, scale, w_scale, zero_point, bias, residual, output)
    flat = [t if t is None or t.dim() == 0 else t.reshape(output.shape[0], -1) for t in (scale, zero_point, residual)]
    y = reference_linear.int8_linear(
        x, w, flat[0], w_scale, flat[1], bias, flat[2], NAMES[activation], output.dtype, out_scale, out_zero_point
    )
    output.copy_(y)


def _rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(0, tensor.shape[-1])


def _per_row(tensor):
    return tensor if tensor is None or tensor.dim() == 0 else tensor.reshape(-1, 1)


def _quantize(x, scale, zero_point, channel_scale, output, activation):
    _dense(x, scale, zero_point, channel_scale, output)
    q = reference_quantize.quantize(_rows(x), _per_row(scale), _per_row(zero_point), NAMES[activation], channel_scale)
    output.copy_(q.view(output.shape))


def _quantize_dynamic(x, channel_scale, output, scale, zero_point, activation, symmetric):
    _dense(x, channel_scale, output, scale, zero_point)
    results = reference_quantize.quantize_dynamic(_rows(x), "token", NAMES[activation], channel_scale, symmetric)
    for out, result in zip((output, scale, zero_point), results, strict=True):
        out.copy_(result.view(out.shape))


def _dequantize(x, scale, zero_point, output):
    _dense(x, scale, zero_point, output)
    y = reference_quantize.dequantize(_rows(x), _per_row(scale), _per_row(zero_point), output.dtype)
    output.copy_(y.view(output.shape))


def _give(results, output, scale, zero_point):
    output.copy_(results[0].view(output.shape))
    if scale is not None:
        scale.copy_(results[1].view(scale.shape)), zero_point.copy_(results[2].view(scale.shape))


def _group_norm(x, skip, groups, weight, bias, eps, film, activation, channel_scale, scale, zero_point, output,
                row_scale, row_zero_point):  # fmt: skip
    _dense(x, skip, weight, bias, film, channel_scale, output, row_scale, row_zero_point)
    as_image = lambda t: None if t is None else t.double().permute(0, 2, 1).unsqueeze(-1)  # noqa: E731
    codes, *rest = reference_norm.group_norm_quantize(
        as_image(x), as_image(skip), groups, weight, bias, eps, film, NAMES[activation], channel_scale, scale,
        zero_point,
    )  # fmt: skip
    _give((codes.squeeze(-1).permute(0, 2, 1).contiguous(), *rest), output, row_scale, row_zero_point)


def _layer_norm(x, weight, bias, eps, film, channel_scale, scale, zero_point, output, row_scale, row_zero_point):
    _dense(x, weight, bias, film, channel_scale, output, row_scale, row_zero_point)
    assert x.dim() == 3
    results = reference_norm.layer_norm_quantize(x.double(), weight, bias, eps, film, channel_scale, scale, zero_point)
    _give(results, output, row_scale, row_zero_point)


@pytest.fixture
def references_instead(monkeypatch):
    """The CUDA library's ops, on CPU tensors, computed by the references."""
    library = torch.library.Library("pydenoise", "IMPL", "CPU")
    functions = (_conv, _linear, _quantize, _quantize_dynamic, _dequantize, _group_norm, _layer_norm)
    for op, function in zip(OPS, functions, strict=True):
        library.impl(f"{op}_cuda", function)
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    yield
    library._destroy()


def check_rows(op: str, args: tuple, what: str) -> None:
    """The row gives what the reference row gives: values, dtypes, shapes and memory order."""
    row = row_of(op)
    if row.unsupported(*args) is not None:
        return
    reference = next(r for r in registry.rows(op) if r.name == "reference")
    wide = [a.double() if i < 2 and "norm" in op and isinstance(a, torch.Tensor) else a for i, a in enumerate(args)]
    actual, expected = row.run(*args), reference.run(*wide)
    for a, e in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert (a is None) == (e is None), what
        if a is None:
            continue
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1.0 if a.dtype == torch.int8 else 1e-4, equal_nan=True)
        order = torch.channels_last if a.dim() == 4 and a.shape[1] > 1 and op != "layer_norm_quantize" else None
        assert a.is_contiguous(memory_format=order or torch.contiguous_format) or not a.numel(), what


@built
@pytest.mark.parametrize("out_dtype", OUTPUTS, ids=str)
def test_what_products_get(references_instead, out_dtype):
    for case in table.INT8_CONV_CASES:
        check_rows("int8_conv2d", case.args(out_dtype), case.name)
    for case in table.INT8_LINEAR_CASES:
        check_rows("int8_linear", case.args(out_dtype), case.name)


@built
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_producers_get(references_instead, dtype):
    for case in table.QUANTIZE_CASES:
        check_rows("quantize", case.args(dtype), case.name)
        check_rows("dequantize", case.dequantize_args(dtype), case.name)
        if case.shape[0] or len(case.shape) > 1:
            check_rows("quantize_dynamic", case.dynamic_args(dtype), case.name)
    for case in table.GROUP_NORM_CASES:
        check_rows("group_norm_quantize", case.args(dtype), case.name)
    for case in table.LAYER_NORM_CASES:
        check_rows("layer_norm_quantize", case.args(dtype), case.name)


# ---------------------------------------------------------------------------------------------------------- with a GPU

LAYERS = (  # of Stable Diffusion's U-Net: large tiles, tiles that leave a rest, split depths
    (1, 320, 320, 64, 3),
    (2, 640, 640, 32, 3),
    (1, 1920, 1280, 16, 3),
    (1, 1280, 1280, 8, 3),
    (2, 320, 1280, 32, 1),
    (1, 64, 64, 256, 3),
)


@on_gpu
@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize(("batch", "c_in", "c_out", "size", "kernel"), LAYERS)
def test_layers_of_a_unet(batch, c_in, c_out, size, kernel, per_pixel):
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randint(-128, 128, shape, generator=generator, device="cuda").to(torch.int8)  # noqa: E731
    x = draw(batch, c_in, size, size).contiguous(memory_format=torch.channels_last)
    w = draw(c_out, c_in, kernel, kernel).contiguous(memory_format=torch.channels_last)
    scale = torch.rand(batch, 1, size, size, generator=generator, device="cuda") + 0.5 if per_pixel else 1.0
    zero_point = torch.full((batch, 1, size, size), -37, device="cuda") if per_pixel else -37
    run = lambda backend, dtype: PF.int8_conv2d(  # noqa: E731
        x, w, scale, 1e-4, input_zero_point=zero_point, padding=kernel // 2, out_dtype=dtype, backend=backend
    )
    if per_pixel:
        torch.testing.assert_close(run("cuda", torch.float32), run("reference", torch.float32), rtol=1e-5, atol=1e-3)
    else:
        assert torch.equal(run("cuda", torch.int32), run("reference", torch.int32))


@on_gpu
def test_a_captured_graph_reads_new_scales():
    x = torch.randint(-128, 128, (1, 64, 16, 16), device="cuda").to(torch.int8)
    w = torch.randint(-128, 128, (64, 64, 3, 3), device="cuda").to(torch.int8)
    scale, zero_point = torch.tensor(0.1, device="cuda"), torch.tensor(3, device="cuda", dtype=torch.int32)
    call = lambda backend: PF.int8_conv2d(  # noqa: E731
        x, w, scale, 0.01, input_zero_point=zero_point, padding=1, backend=backend
    )
    call("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call("cuda")
    scale.fill_(0.7), zero_point.fill_(-90)
    graph.replay()
    torch.testing.assert_close(y, call("reference"), rtol=1e-5, atol=1e-4)
