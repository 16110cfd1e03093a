"""The contract of every registry row of softmax_aggregate: torch's accuracy at every ISA level, both ways."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pydenoise import functional as PF
from pydenoise.ops import registry, softmax_aggregate
from pydenoise.reference import softmax_aggregate as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.rows import device_of, in_dtype, poisoned_memory, skip_unless, variants
from pydenoise.testing.softmax_aggregate import AGGREGATE_CASES

GOLDEN = np.load(Path(__file__).parent / "data" / "blocks_afa.npz")
CASES = {case.name: case for case in AGGREGATE_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VARIANTS = variants(softmax_aggregate.OP)
BACKWARD = variants(softmax_aggregate.OP_BACKWARD)


def backward_args(case, dtype: torch.dtype, device: str, with_shares: bool = True) -> tuple:
    features, hidden, weight = case.args(dtype, device)
    grad, grad_shares = case.grads(dtype, device)
    shares = reference.logits_of(hidden, weight).softmax(1)
    return grad, grad_shares if with_shares else None, features, shares, True


@cache
def expected(name: str, dtype: torch.dtype) -> tuple:
    args = CASES[name].args(dtype)
    return reference.softmax_aggregate(*in_dtype(args, torch.float64)), reference.softmax_aggregate(*args)


@cache
def expected_backward(name: str, dtype: torch.dtype, with_shares: bool) -> tuple:
    args = backward_args(CASES[name], dtype, "cpu", with_shares)
    return (
        reference.softmax_aggregate_backward(*in_dtype(args, torch.float64)),
        reference.softmax_aggregate_backward(*args),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", AGGREGATE_CASES, ids=lambda case: case.name)
def test_forward(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    skip_unless(variant.row, args)
    before = [None if a is None else a.clone() for a in args]
    with variant.active(), poisoned_memory(), torch.no_grad():
        out, shares = variant.row.run(*args)
    (exact, exact_shares), (own, own_shares) = expected(case.name, dtype)
    assert_accurate(out.cpu(), exact, own, what=f"{case.name}, {case.why}")
    # a logit's rounding is relative to the logits, and all of it reaches its share
    assert_accurate(shares.cpu(), exact_shares, own_shares, what="shares", scale=max(1.0, case.spread))
    for old, new in zip(before, args, strict=True):
        assert old is None or torch.equal(old, new), "overwritten"
    assert out.is_contiguous(
        memory_format=torch.channels_last
        if case.layout in ("channels_last", "grouped", "cropped")
        else torch.contiguous_format
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("case", AGGREGATE_CASES, ids=lambda case: case.name)
def test_backward(case, variant, dtype):
    for with_shares in (True, False):
        args = backward_args(case, dtype, device_of(variant.row), with_shares)
        skip_unless(variant.row, args)
        with variant.active(), poisoned_memory(), torch.no_grad():
            got = variant.row.run(*args)
            none, logits = variant.row.run(*args[:-1], False)
        assert none is None and torch.equal(logits, got[1])
        exact, own = expected_backward(case.name, dtype, with_shares)
        # a logit's gradient is a difference of sums: its rounding is relative to what they are made of
        magnitude = (args[0].double().abs()[:, None] * args[2].double().abs()).sum(2).amax() if case.batch else 0.0
        for name, a, b, c in zip(("features", "logits"), got, exact, own, strict=True):
            scale = None if name == "features" else 0.25 * float(magnitude)
            assert_accurate(a.cpu(), b, c, what=f"gradient of {name}: {case.name}, {case.why}", scale=scale)


@pytest.mark.parametrize("variant", variants(softmax_aggregate.OP, "cpu"), ids=str)
@pytest.mark.parametrize("name", ["usual", "large", "rows", "grouped", "deep"])
def test_threads_do_not_change_a_bit(name, variant):
    args = CASES[name].args(torch.float32)
    row = next(row for row in registry.rows(softmax_aggregate.OP_BACKWARD) if row.name == "cpu")
    back = backward_args(CASES[name], torch.float32, "cpu")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with variant.active():
            results.append((*variant.row.run(*args), *row.run(*back)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_extreme_values(variant):
    """Huge logits, -inf, and what torch makes of NaN."""
    features = torch.randn(1, 3, 4, 2, 20)
    logits = torch.zeros(1, 3, 2, 20)
    logits[0, :, 0, 0] = torch.tensor([3e38, -3e38, 0])
    logits[0, 1, 0, 1] = -torch.inf
    logits[0, :, 0, 2] = -torch.inf
    logits[0, 2, 0, 3] = torch.nan
    logits[0, 2, 0, 4] = torch.inf
    args = softmax_aggregate.prepare(features.to(device_of(variant.row)), logits.to(device_of(variant.row)))
    skip_unless(variant.row, args)
    with variant.active():
        out, shares = variant.row.run(*args)
    torch.testing.assert_close(shares.cpu(), logits.softmax(1), equal_nan=True)
    torch.testing.assert_close(out.cpu(), reference.softmax_aggregate(features, logits, None)[0], equal_nan=True)


@pytest.mark.parametrize("row", registry.rows(softmax_aggregate.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["two", "logits", "grouped", "empty"])
def test_opcheck(row, name):
    args = CASES[name].args(torch.float32, device_of(row))
    if row.unsupported(*args) is not None:
        pytest.skip(row.unsupported(*args))
    args = tuple(a if a is None else a.detach().requires_grad_() for a in args)
    torch.library.opcheck(torch.ops.pydenoise.softmax_aggregate.default, (*args, row.name))
    args = backward_args(CASES[name], torch.float32, device_of(row))
    torch.library.opcheck(torch.ops.pydenoise.softmax_aggregate_backward.default, (*args, row.name))


@pytest.mark.parametrize("row", registry.rows(softmax_aggregate.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["usual", "logits", "rows", "many"])
def test_gradients_of_every_argument(row, name):
    tensors = CASES[name].tensors(torch.float32, device_of(row))
    if row.unsupported(*tensors) is not None:
        pytest.skip(row.unsupported(*tensors))

    def gradients(dtype, device, backend):
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors if t is not None]
        out, shares = PF.softmax_aggregate(*leaves, return_shares=True, backend=backend)
        weights = torch.linspace(-1, 1, out[0].numel(), dtype=dtype, device=device).view_as(out[0])
        return torch.autograd.grad((out * weights).sum() + (shares.to(dtype) ** 2).sum(), leaves)

    found = gradients(torch.float32, device_of(row), row.name)
    for got, exact, own in zip(
        found, gradients(torch.float64, "cpu", "reference"), gradients(torch.float32, "cpu", "reference"), strict=True
    ):
        assert_accurate(got.cpu(), exact, own, scale=exact.abs().max().item() * 4)


def test_formulas():
    """First and second derivatives by finite differences."""
    case = CASES["four"]
    tensors = [t[..., :2, :2].clone() if t.dim() > 2 else t for t in case.tensors(torch.float64)]
    leaves = [t.requires_grad_() for t in tensors]
    options = {"return_shares": True, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda *a: PF.softmax_aggregate(*a, **options), leaves)
    small = [t.detach()[:1, :2, :2, :2, :2].requires_grad_() for t in leaves[:1]]
    logits = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda f, x: PF.softmax_aggregate(f, x, **options), (*small, logits))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_golden(variant):
    features, logits, out = (torch.from_numpy(GOLDEN[f"afa_{name}"]) for name in ("feat", "logits", "out"))
    torch.testing.assert_close(PF.softmax_aggregate(features, logits), out, rtol=0, atol=1e-14)
    args = softmax_aggregate.prepare(*(t.float().to(device_of(variant.row)) for t in (features, logits)))
    skip_unless(variant.row, args)
    with variant.active():
        torch.testing.assert_close(variant.row.run(*args)[0].cpu().double(), out, rtol=0, atol=1e-6)


def test_functional():
    features, hidden, weight = CASES["usual"].tensors(torch.float32)
    out, shares = PF.softmax_aggregate(features, hidden, weight, return_shares=True)
    assert torch.equal(PF.softmax_aggregate(features, hidden, weight[:, :, None, None]), out)
    torch.testing.assert_close(shares.sum(1), torch.ones(shares[:, 0].shape))
    average = PF.softmax_aggregate(features, hidden, torch.zeros_like(weight))
    torch.testing.assert_close(average, features.mean(1))
    mixed = features.half()
    assert PF.softmax_aggregate(mixed, hidden.half(), weight.half()).dtype == torch.half


def test_compiles():
    features, hidden, weight = CASES["rows"].tensors(torch.float32)
    weight = weight.requires_grad_()

    def loss(*args):
        return (PF.softmax_aggregate(*args) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(features, hidden, weight), weight)
    (actual,) = torch.autograd.grad(compiled(features, hidden, weight), weight)
    torch.testing.assert_close(actual, expected)


F, H, W = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 7, 5, 6), torch.zeros(3, 7)
BAD = {
    "features: expected a torch.Tensor": lambda: PF.softmax_aggregate([F], H, W),
    "features: expected a floating-point": lambda: PF.softmax_aggregate(F.int(), H, W),
    r"features: expected \[B, N, C, h, w\]": lambda: PF.softmax_aggregate(F[0], H, W),
    "with N >= 1": lambda: PF.softmax_aggregate(F[:, :0], H, W[:0]),
    "hidden: expected dtype": lambda: PF.softmax_aggregate(F, H.half(), W),
    "hidden: expected a torch.Tensor": lambda: PF.softmax_aggregate(F, None, W),
    r"hidden: expected \[2, K, 5, 6\]": lambda: PF.softmax_aggregate(F, H[..., :5], W),
    "hidden: without weight they are the logits of 3 maps, got 7": lambda: PF.softmax_aggregate(F, H),
    r"weight: expected \[3, 7\]": lambda: PF.softmax_aggregate(F, H, W.t()),
    "weight: expected dtype": lambda: PF.softmax_aggregate(F, H, W.double()),
    r"weight: expected \[3, 0\]": lambda: PF.softmax_aggregate(F, H[:, :0], W[:, :0]),
    "backend: expected": lambda: PF.softmax_aggregate(F, H, W, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
