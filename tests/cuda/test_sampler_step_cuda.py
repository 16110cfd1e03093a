"""The CUDA row of sampler_step. tests/test_contract_sampler_step.py runs the table on a GPU; without one, the kernels
run on the host, and what the row hands to them is checked by putting the reference in their place."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pydenoise.functional as PF
from pydenoise import _native, step_row
from pydenoise.ops import registry, sampler_step
from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import BackendUnavailable
from pydenoise.reference import sampler_step as reference
from pydenoise.testing.sampler_step import SAMPLER_STEP_CASES, WRITTEN

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tests" / "native" / "cuda_sampler_step_check.cpp"
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
CASES = {case.name: case for case in SAMPLER_STEP_CASES}
ROW = next(row for row in registry.rows(sampler_step.OP) if row.name == "cuda")

built = pytest.mark.skipif(
    _native.cuda_extension().state == _native.NOT_BUILT, reason="pydenoise._cuda is not built here (no nvcc)"
)
on_gpu = pytest.mark.skipif(
    not (_native.cuda_extension().loaded and torch.cuda.is_available()), reason="needs pydenoise._cuda and a GPU"
)


# ------------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("flags", [[], SANITIZERS], ids=["plain", "sanitizers"])
def test_kernels_on_the_host(flags, tmp_path):
    """Every kernel as it is written, its threads as fibers (tests/native/cuda_emulator.h), against plain loops."""
    program = tmp_path / "check"
    command = ["g++", "-std=c++20", "-O1", *flags, str(CHECK), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@built
def test_library_has_the_op():
    assert _native.cuda_extension().loaded, _native.cuda_extension().reason
    assert hasattr(torch.ops.pydenoise, "sampler_step_cuda")


def test_cpu_tensors_are_refused_by_name(monkeypatch):
    reason = _native.cuda_extension().reason or "tensors are on cpu, not on a CUDA device"
    table = torch.zeros(1, step_row.WIDTH)
    with pytest.raises(BackendUnavailable) as caught:
        PF.sampler_step(torch.zeros(2, 3), torch.zeros(2, 3), table, backend="cuda")
    assert reason in str(caught.value)
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    args = list(CASES["ddim"].args(torch.float32))
    assert ROW.unsupported(*args) is None
    args[0] = torch.empty(2, 2**30, device="meta")
    assert "elements of a sample are more than 2^30" in ROW.unsupported(*args)
    args[0] = torch.empty(2**31, 1, device="meta")
    assert "groups are too many" in ROW.unsupported(*args)


def _kernels(*args):
    """What the kernels take, written down once more, and the reference in their place."""
    *args, sums = args
    sample, output, other, *_, out, kept, preview, model_input, faults = args
    dense = [t for i, t in enumerate(args) if isinstance(t, torch.Tensor) and i not in (1, 2)]
    assert all(t.is_contiguous() for t in dense)
    for t in (output, other):
        assert t is None or (t[0].is_contiguous() and t.stride(0) >= 0)
    assert args[7].dtype == torch.float32 and args[7].shape[1] == step_row.WIDTH
    groups = args[8].numel()
    assert groups == 1 or (groups % sample.shape[0] == 0 and sample.numel() % groups == 0)
    result = reference.sampler_step(*args)
    assert sums.dtype == torch.float64 and sums.shape == result.shape
    sums.copy_(result)


@built
def test_what_the_kernels_get(monkeypatch):
    library = torch.library.Library("pydenoise", "IMPL", "CPU")
    library.impl("sampler_step_cuda", _kernels)
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    for case in SAMPLER_STEP_CASES:
        args, own = case.args(torch.float32), case.args(torch.float32)
        sums, expected = ROW.run(*args), reference.sampler_step(*own)
        assert torch.equal(sums, expected), case.name
        for place in WRITTEN:
            if own[place] is not None:
                assert torch.equal(args[place].nan_to_num(), own[place].nan_to_num()), (case.name, WRITTEN[place])
    library._destroy()


# ------------------------------------------------------------------------------------------------------------ on a GPU


@on_gpu
@pytest.mark.parametrize("name", [case.name for case in SAMPLER_STEP_CASES])
def test_triton_and_cuda_agree(name):
    found = {}
    for backend in ("cuda", "triton"):
        args = CASES[name].args(torch.float32, "cuda")
        row = next(row for row in registry.rows(sampler_step.OP) if row.name == backend)
        sums = row.run(*args)
        found[backend] = [sums, *(args[place] for place in WRITTEN if args[place] is not None)]
    for first, second in zip(found["cuda"], found["triton"], strict=True):
        tolerance = 1e-5 if first.dtype in (torch.float32, torch.float64) else 1e-2
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)


@on_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_reads_row_and_step_on_the_device(backend):
    """One recording serves all steps: new numbers in the same tensors, nothing read back by the host."""
    case = CASES["everything_in_place"]
    args, own = case.args(torch.float32, "cuda"), case.args(torch.float32)
    row = next(row for row in registry.rows(sampler_step.OP) if row.name == backend)
    start = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]

    def restore():
        for place, tensor in enumerate(start):
            if isinstance(tensor, torch.Tensor):
                args[place].copy_(tensor)

    row.run(*args)  # compiled, or loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = row.run(*args)
    restore()
    args[8].fill_(2), args[10].fill_(77)
    graph.replay()
    own[8].fill_(2), own[10].fill_(77)
    expected = reference.sampler_step(*own)
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=1e-2)
    for place, name in WRITTEN.items():
        torch.testing.assert_close(args[place].cpu(), own[place], rtol=1e-5, atol=2e-5, msg=name)


@on_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_host_synchronisation(backend):
    args = CASES["everything"].args(torch.float32, "cuda")
    row = next(row for row in registry.rows(sampler_step.OP) if row.name == backend)
    row.run(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row.run(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_sums_are_the_same_every_time(backend):
    x = torch.randn(3, 4, 256, 256, device="cuda")
    table = torch.zeros(1, step_row.WIDTH, device="cuda")
    table[0, step_row.SAMPLE], table[0, step_row.SLOT] = 1, -1
    options = {"statistics": "moments", "backend": backend}
    first = PF.sampler_step(x, None, table, **options)[1]
    assert all(torch.equal(PF.sampler_step(x, None, table, **options)[1], first) for _ in range(5))
    torch.testing.assert_close(first[:, 1], x.double().square().flatten(1).sum(1), rtol=1e-6, atol=0)


@on_gpu
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_tensors_at_odd_addresses(offset):
    """Slices of larger tensors take the accesses of one element."""
    case = CASES["guided"]
    args, own = list(case.args(torch.float32, "cuda")), case.args(torch.float32)
    for place in (0, 1, 2, 13):
        wide = torch.empty(args[place].numel() + offset, device="cuda")
        args[place] = wide[offset:].view(args[place].shape).copy_(args[place])
    ROW.run(*args)
    reference.sampler_step(*own)
    torch.testing.assert_close(args[13].cpu(), own[13], rtol=1e-5, atol=1e-5)
