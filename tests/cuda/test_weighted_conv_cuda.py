"""The CUDA rows of weighted convolution. Numbers need a GPU; registration, refusals and the arithmetic do not."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pydenoise.functional as PF
from pydenoise import _native
from pydenoise.ops import registry
from pydenoise.ops._rows import weighted_conv_cuda as rows
from pydenoise.ops.registry import BackendUnavailable
from pydenoise.ops.weighted_conv import OP, OP_BACKWARD, prepare
from pydenoise.reference import weighted_conv as reference
from pydenoise.testing import CONV_CASES, assert_accurate

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = (
    "weighted_conv_cuda",
    "weighted_conv_cuda_depthwise_grad_input",
    "weighted_conv_cuda_depthwise_grad_weight",
)

built = pytest.mark.skipif(
    _native.cuda_extension().state == _native.NOT_BUILT, reason="pydenoise._cuda is not built here (no nvcc)"
)
on_gpu = pytest.mark.skipif(
    not (_native.cuda_extension().loaded and torch.cuda.is_available()),
    reason="needs pydenoise._cuda and an NVIDIA GPU; bench/gpu.py --only check runs the whole table there",
)


def arguments(case, tensors):
    o = case.options()
    names = ("input", "weight", "density", "bias", "residual")
    return prepare(
        case.dims, *(tensors[n] for n in names), o["stride"], o["padding"], o["dilation"], o["groups"], o["activation"]
    )


# ------------------------------------------------------------------------------------------------------- without a GPU


@built
def test_library_loads_without_a_gpu():
    library = _native.cuda_extension()
    assert library.loaded, library.reason
    for name in OPS:
        assert hasattr(torch.ops.pydenoise, name)


@built
def test_cpu_tensors_are_refused_by_the_op():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.pydenoise.weighted_conv_cuda.default(
            x, torch.zeros(8, 3, 3, 3), None, None, None, x, [1, 1, 1, 1, 1, 1, 1, 1, 3, 3], 0, 0
        )


def test_cpu_tensors_are_refused_by_name():
    x, w = torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 3, 3)
    reason = _native.cuda_extension().reason or "tensors are on cpu, not on a CUDA device"
    with pytest.raises(BackendUnavailable) as caught:
        PF.weighted_conv2d(x, w, None, backend="cuda")
    assert reason in str(caught.value)


def test_missing_library_is_the_first_reason(monkeypatch):
    missing = _native.Library("_cuda", _native.NOT_BUILT, "reinstall")
    monkeypatch.setattr(_native, "cuda_extension", lambda: missing)
    case = next(c for c in CONV_CASES if c.name == "first_rgb")
    reason = rows._unsupported(*arguments(case, case.tensors(torch.float32)))
    assert reason == "pydenoise._cuda is not built (reinstall)"


def layer(in_channels, out_channels, groups=1, kernel=3):
    x = torch.empty(1, in_channels, 32, 32, device="meta")
    w = torch.empty(out_channels, in_channels // groups, kernel, kernel, device="meta")
    return prepare(2, x, w, None, None, None, 1, kernel // 2, 1, groups, "none")


@pytest.mark.parametrize(
    ("channels", "why"),
    [
        ((3, 64, 1, 3), None),
        ((64, 4, 1, 3), None),
        ((32, 64, 32, 3), None),
        ((64, 64, 1, 3), "neither skinny"),
        ((64, 64, 2, 3), "neither skinny"),
        ((5, 64, 1, 3), "neither skinny"),
        ((4, 64, 1, 15), "at most 192"),
        ((64, 1, 1, 15), "at most 192"),
        ((8, 8, 8, 29), "at most 768"),
    ],
)
def test_which_layers_are_taken(monkeypatch, channels, why):
    monkeypatch.setattr(rows, "_unsupported_tensors", lambda tensor: None)
    reason = rows._unsupported(*layer(*channels))
    assert reason is None if why is None else why in reason


def test_gradients_are_for_depthwise_layers(monkeypatch):
    monkeypatch.setattr(rows, "_unsupported_tensors", lambda tensor: None)
    for channels, taken in (((16, 16, 16), True), ((16, 32, 16), False), ((3, 64, 1), False)):
        x, w, *_, stride, padding, dilation, groups, _, algorithm = layer(*channels)
        reason = rows._unsupported_backward(x, x, w, None, stride, padding, dilation, groups, algorithm, [True] * 3)
        assert (reason is None) == taken


def test_gpu_script_says_so_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_script().main(["--only", "check"]) == 2
    assert "nothing to do here" in capsys.readouterr().out


def test_gpu_script_finds_right_and_wrong_results(monkeypatch):
    """Its checker, run on the CPU rows: the reference passes, a spoilt result does not."""
    script = gpu_script()
    monkeypatch.setattr(script, "DEVICE", "cpu")
    case = next(c for c in CONV_CASES if c.name == "depthwise")
    verdicts = list(script.check_case(case, torch.float32, "reference"))
    assert [v.what for v in verdicts] == ["output", "d input", "d weight", "d density"]
    assert all(v.passed for v in verdicts)
    row = next(r for r in registry.rows(OP) if r.name == "reference")
    spoilt = registry.Backend(OP, "reference", 0, row.unsupported, lambda *a: row.run(*a) + 1e-3, "")
    monkeypatch.setattr(registry, "rows", lambda op: [spoilt] if op == OP else [])
    assert not next(iter(script.check_case(case, torch.float32, "reference"))).passed


def gpu_script():
    spec = importlib.util.spec_from_file_location("pydenoise_bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_kernel_arithmetic_on_the_host(tmp_path):
    """Every phase of every kernel, run on the host against a naive convolution (tests/native/cuda_host_check.cu)."""
    program = tmp_path / "check"
    command = ["nvcc", "-std=c++20", "-O1", "-Xcicc", "-O1", "-Xptxas", "-O0", "-gencode=arch=compute_80,code=sm_80"]
    subprocess.run([*command, str(ROOT / "tests/native/cuda_host_check.cu"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------------------- with a GPU


def taken(case) -> bool:
    return rows._kind(case.in_channels, case.out_channels, case.groups) is not None


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CONV_CASES if taken(c)], ids=lambda c: c.name)
def test_forward(case, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    host, device = case.tensors(dtype), case.tensors(dtype, "cuda")
    wide = {n: None if t is None else t.double() for n, t in host.items()}
    oracle = reference.weighted_conv(*arguments(case, wide)[:-1])
    args = arguments(case, device)
    empty = rows._empty
    monkeypatch.setattr(rows, "_empty", lambda *a: empty(*a).fill_(float("nan")))
    actual = registry.select(OP, "cuda", args).run(*args)
    assert_accurate(actual, oracle, reference.weighted_conv(*args[:-1]))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["depthwise", "depthwise7", "depthwise_stride", "conv3d_depthwise"])
def test_gradients(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = next(c for c in CONV_CASES if c.name == name)
    host, device = case.tensors(dtype), case.tensors(dtype, "cuda")
    wide = arguments(case, {n: None if t is None else t.double() for n, t in host.items()})
    args = arguments(case, device)
    grad = torch.randn(reference.weighted_conv(*wide[:-1]).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    oracles = reference.weighted_conv_backward(grad.double(), *wide[:3], *wide[5:9])
    baselines = reference.weighted_conv_backward(grad.cuda(), *args[:3], *args[5:9])
    call = (grad.cuda(), *args[:3], *args[5:9], "direct", [True, True, True])
    actual = registry.select(OP_BACKWARD, "cuda", call).run(*call)
    for what, a, o, b in zip(("input", "weight", "density"), actual, oracles, baselines, strict=True):
        if o is not None:
            assert_accurate(a, o, b, what=what)
