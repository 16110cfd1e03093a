"""The CUDA rows of the attention ops. tests/test_contract_sparse.py runs the whole table on a GPU; without one, the
kernels run on the host, lane by lane, and what the rows hand to them is checked by putting the references in their
place."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pydenoise.functional as PF
from pydenoise import _native
from pydenoise.block_mask import BlockMask
from pydenoise.ops import block_sparse_attention, registry
from pydenoise.ops._rows import _cuda
from pydenoise.ops.registry import BackendUnavailable
from pydenoise.reference import block_importance as reference_importance
from pydenoise.reference import block_sparse_attention as reference
from pydenoise.testing.sparse import SPARSE_CASES

ROOT = Path(__file__).resolve().parents[2]
OPS = ("block_sparse_attention", "block_sparse_attention_backward", "block_importance")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECK = ROOT / "tests" / "native" / "cuda_attention_check.cpp"
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]

built = pytest.mark.skipif(
    _native.cuda_extension().state == _native.NOT_BUILT, reason="pydenoise._cuda is not built here (no nvcc)"
)
on_gpu = pytest.mark.skipif(
    not (_native.cuda_extension().loaded and torch.cuda.is_available()), reason="needs pydenoise._cuda and a GPU"
)


def row_of(op: str) -> registry.Backend:
    return next(row for row in registry.rows(op) if row.name == "cuda")


# ------------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("flags", [[], pytest.param(SANITIZERS, marks=pytest.mark.slow)], ids=["plain", "sanitizers"])
def test_kernels_on_the_host(flags, tmp_path):
    """Every kernel as it is written, its threads as fibers (tests/native/cuda_emulator.h), against plain loops."""
    program = tmp_path / "check"
    command = ["g++", "-std=c++20", "-O1", *flags, str(CHECK), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@built
def test_library_has_the_ops():
    assert _native.cuda_extension().loaded, _native.cuda_extension().reason
    for op in OPS:
        assert hasattr(torch.ops.pydenoise, f"{op}_cuda")


def test_cpu_tensors_are_refused_by_name():
    x = torch.zeros(1, 1, 32, 16)
    reason = _native.cuda_extension().reason or "tensors are on cpu, not on a CUDA device"
    for call in (
        lambda: PF.block_sparse_attention(x, x, x, BlockMask.full(16, 32, 32), backend="cuda"),
        lambda: PF.block_importance(x, x, 16, backend="cuda"),
    ):
        with pytest.raises(BackendUnavailable) as caught:
            call()
        assert reason in str(caught.value)


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    for size, refused in ((8, False), (11, True), (256, False), (264, True)):
        x = torch.empty(1, 1, 32, size, device="meta")
        for op, args in ((OPS[0], (x, x)), (OPS[1], (x, x, x)), (OPS[2], (x, x))):
            reason = row_of(op).unsupported(*args)
            assert (reason is not None) == refused, (op, size)
            assert reason is None or f"heads of {size} numbers" in reason


# What the kernels take, written down once more: adjacent last dims, rows at multiples of 16 bytes, the rest dense.


def _check(tokens, dense):
    for t in tokens:
        assert t.stride(-1) == 1 and t.data_ptr() % 16 == 0
        assert all(n == 1 or s * t.element_size() % 16 == 0 for n, s in zip(t.shape[:3], t.stride(), strict=False))
    assert all(t is None or t.is_contiguous() for t in dense)


def _forward(query, key, value, counts, indices, size, scale, lengths, int8_qk, output, lse):
    _check((query, key, value, output), (counts, indices, lengths, lse))
    results = reference.block_sparse_attention(query, key, value, counts, indices, size, scale, lengths, int8_qk)
    output.copy_(results[0]), lse.copy_(results[1])


def _backward(grad, query, key, value, lse, delta, counts, indices, q_counts, q_indices, size, scale, lengths, *out):
    _check((grad, query, key, value, *out), (lse, delta, counts, indices, q_counts, q_indices, lengths))
    assert q_counts.shape[-1] == -(-key.shape[2] // size)
    args = (grad, query, key, value, lse, delta, counts, indices, size, scale, lengths)
    for to, result in zip(out, reference.block_sparse_attention_backward(*args), strict=True):
        to.copy_(result)


def _importance(query, key, size, first, scale, lse, lengths, over_all, over_generated):
    _check((query, key), (lse, lengths, over_all, over_generated))
    results = reference_importance.block_importance(query, key, size, first, scale, lse, lengths)
    over_all.copy_(results[0]), over_generated.copy_(results[1])


@pytest.fixture
def references_instead(monkeypatch):
    """The CUDA library's ops, on CPU tensors, computed by the references."""
    library = torch.library.Library("pydenoise", "IMPL", "CPU")
    for op, function in zip(OPS, (_forward, _backward, _importance), strict=True):
        library.impl(f"{op}_cuda", function)
    monkeypatch.setattr(_cuda, "unsupported", lambda tensor, allowed: None)
    yield
    library._destroy()


def check_row(op: str, args: tuple, what: str) -> None:
    """The row gives what the reference row gives: values, dtypes, shapes and memory order."""
    row = row_of(op)
    if row.unsupported(*args) is not None:
        return
    expected = next(r for r in registry.rows(op) if r.name == "reference").run(*args)
    for a, e in zip(row.run(*args), expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
        strides = [(x, y) for n, x, y in zip(a.shape, a.stride(), e.stride(), strict=True) if n > 1]
        assert not a.numel() or all(x == y for x, y in strides), what


MEMORY_CASES = ("tail", "gqa", "fused", "sliced", "block16", "odd_size", "shared", "lengths", "no_batch", "no_queries")


@built
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_the_kernels_get(references_instead, dtype):
    for case in SPARSE_CASES:
        if case.name not in MEMORY_CASES:
            continue
        args = case.args(dtype)
        check_row(OPS[0], args, case.name)
        check_row(OPS[2], case.importance_args(dtype), case.name)
        if args[0].numel():
            output, lse = reference.block_sparse_attention(*args)
            grad = torch.ones_like(output)
            check_row(OPS[1], block_sparse_attention.prepare_backward(grad, output, lse, None, args), case.name)


@built
def test_rows_at_odd_addresses_are_copied(references_instead):
    storage = torch.randn(3 * 70 * 16 + 1, dtype=torch.float32).to(torch.bfloat16)
    query, key, value = storage[1:].view(3, 1, 1, 70, 16)
    args = block_sparse_attention.prepare(query, key, value, BlockMask.full(32, 70, 70))
    check_row(OPS[0], args, "a start at an odd address")
    check_row(OPS[0], (query[..., :8], key[..., :8], value[..., :8], *args[3:]), "rows of 32 bytes, 16 used")


# ---------------------------------------------------------------------------------------------------------- with a GPU

SHAPES = (  # heads, kv heads, queries, keys, size, block, density: the tuned kernels, over several waves of a device
    (8, 8, 4096, 4096, 128, 128, 0.3),
    (8, 2, 4000, 4100, 64, 128, 0.3),
    (4, 4, 2048, 2048, 128, 64, 0.3),
    (4, 1, 2048, 2048, 64, 32, 0.2),
    (2, 2, 1500, 1500, 256, 128, 0.5),
)


def gpu_inputs(shape, dtype):
    heads, kv_heads, queries, keys, size, block, density = shape
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda h, n: torch.randn(1, h, n, size, generator=generator, device="cuda").to(dtype)  # noqa: E731
    rows, columns = -(-queries // block), -(-keys // block)
    kept = torch.rand(1, heads, rows, columns, generator=generator, device="cuda") < density
    return (
        draw(heads, queries),
        draw(kv_heads, keys),
        draw(kv_heads, keys),
        BlockMask.from_dense(kept, block, queries, keys),
    )


def near(actual, expected, dtype):
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (actual.double() - expected.double()).abs().max() <= bound * expected.abs().max().double()


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_long(shape, dtype):
    *tensors, mask = gpu_inputs(shape, dtype)
    tensors = [t.requires_grad_() for t in tensors]
    results = {}
    for backend in ("cuda", "reference"):
        output, lse = PF.block_sparse_attention(*tensors, mask, return_lse=True, backend=backend)
        grads = torch.autograd.grad(output.float().square().sum() + lse[lse > -torch.inf].sum(), tensors)
        results[backend] = (output, *grads)
        torch.testing.assert_close(lse, results.setdefault("lse", lse), rtol=1e-4, atol=1e-4)
    for actual, expected in zip(results["cuda"], results["reference"], strict=True):
        near(actual, expected, dtype)


@on_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_schedule(shape):
    *tensors, mask = gpu_inputs(shape, torch.bfloat16)
    tensors = [t.requires_grad_() for t in tensors]

    def run():
        output, lse = PF.block_sparse_attention(*tensors, mask, return_lse=True, backend="cuda")
        return output, lse, *torch.autograd.grad(output.float().sum(), tensors)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@on_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_long_int8(shape):
    query, key, value, mask = gpu_inputs(shape, torch.bfloat16)
    key = key + 3 * torch.randn_like(key[:, :, :1])  # a common part, which smoothing takes out
    run = lambda backend: PF.block_sparse_attention(query, key, value, mask, qk_dtype="int8", backend=backend)  # noqa: E731
    near(run("cuda"), run("reference"), torch.bfloat16)


@on_gpu
@pytest.mark.parametrize("new_tokens", [0, 600, 1500])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_long_importance(shape, new_tokens):
    query, key, _, mask = gpu_inputs(shape, torch.bfloat16)
    run = lambda backend: PF.block_importance(  # noqa: E731
        query, key, mask.block_size, new_tokens=new_tokens, backend=backend
    )
    for actual, expected in zip(run("cuda"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-7)


@on_gpu
def test_a_captured_graph_reads_new_lists():
    query, key, value, mask = gpu_inputs(SHAPES[2], torch.bfloat16)
    call = lambda backend: PF.block_sparse_attention(query, key, value, mask, backend=backend)  # noqa: E731
    call("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call("cuda")
    mask.kv_counts.clamp_(max=3)
    query.normal_()
    graph.replay()
    near(output, call("reference"), torch.bfloat16)
