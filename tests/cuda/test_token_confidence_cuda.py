"""The CUDA row of token_confidence. tests/test_contract_token_confidence.py runs the table on a GPU; without one, the
kernels' arithmetic is checked on the host, and what the row hands to them by putting the reference in their place."""

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
from pydenoise.reference import token_confidence as reference
from pydenoise.testing.token_confidence import TOKEN_CONFIDENCE_CASES

ROOT = Path(__file__).resolve().parents[2]
ROW = next(row for row in registry.rows("token_confidence") if row.name == "cuda")

built = pytest.mark.skipif(
    _native.cuda_extension().state == _native.NOT_BUILT, reason="pydenoise._cuda is not built here (no nvcc)"
)
on_gpu = pytest.mark.skipif(
    not (_native.cuda_extension().loaded and torch.cuda.is_available()), reason="needs pydenoise._cuda and a GPU"
)


@built
def test_library_has_the_op():
    assert _native.cuda_extension().loaded, _native.cuda_extension().reason
    assert hasattr(torch.ops.pydenoise, "token_confidence_cuda")


def test_cpu_tensors_are_refused_by_name(monkeypatch):
    reason = _native.cuda_extension().reason or "tensors are on cpu, not on a CUDA device"
    with pytest.raises(BackendUnavailable) as caught:
        PF.token_confidence(torch.zeros(2, 3), backend="cuda")
    assert reason in str(caught.value)
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    assert ROW.unsupported(torch.empty(2, 3, device="meta")) is None
    assert "tokens are more than 2^30" in ROW.unsupported(torch.empty(1, 2**30, device="meta"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_kernel_arithmetic_on_the_host(tmp_path):
    """The lanes' columns, noise, joins and results, against plain loops."""
    program = tmp_path / "check"
    command = ["nvcc", "-std=c++20", "-O1", "-Xcicc", "-O1", "-Xptxas", "-O0", "-gencode=arch=compute_80,code=sm_80"]
    source = ROOT / "tests/native/cuda_token_confidence_check.cu"
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@built
def test_what_the_kernels_get(monkeypatch):
    def kernels(*args):
        *args, token, confidence, probability = args
        assert all(t.is_contiguous() for t in args[2:4] if t is not None)
        assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in args[:2] if t is not None)
        for out, result in zip((token, confidence, probability), reference.token_confidence(*args), strict=True):
            assert out.dtype == result.dtype and out.shape == result.shape
            out.copy_(result)

    library = torch.library.Library("pydenoise", "IMPL", "CPU")
    library.impl("token_confidence_cuda", kernels)
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    for case in TOKEN_CONFIDENCE_CASES:
        args = case.args(torch.float32)
        for actual, expected in zip(ROW.run(*args), reference.token_confidence(*args), strict=True):
            assert torch.equal(actual, expected), case.name
    library._destroy()


@on_gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_triton_and_cuda_agree(temperature):
    x = (torch.randn(300, 126464, device="cuda") * 3).bfloat16()
    options = {"temperature": temperature, "seed": 5, "eos_token_id": 9}
    first, second = (PF.token_confidence(x, **options, backend=backend) for backend in ("cuda", "triton"))
    assert (first[0] == second[0]).float().mean() > 0.99
    same = first[0] == second[0]
    torch.testing.assert_close(first[1][same], second[1][same], rtol=1e-5, atol=0)
    torch.testing.assert_close(first[2], second[2], rtol=1e-5, atol=0)


@on_gpu
def test_a_captured_graph_reads_new_logits():
    x, rows = torch.randn(20, 5000, device="cuda"), torch.arange(10, device="cuda")
    PF.token_confidence(x, rows=rows, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, confidence = PF.token_confidence(x, rows=rows, backend="cuda")
    x.copy_(torch.randn(20, 5000)), rows.add_(10)
    graph.replay()
    expected = x[10:].softmax(1).max(1)
    assert torch.equal(token, expected.indices)
    torch.testing.assert_close(confidence, expected.values)
