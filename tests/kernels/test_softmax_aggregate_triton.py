"""The Triton kernels of softmax_aggregate against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
from pydenoise.ops import registry, softmax_aggregate
from pydenoise.reference import softmax_aggregate as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.softmax_aggregate import AGGREGATE_CASES, AggregateCase

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import softmax_aggregate as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)


def row(op: str):
    return next(row for row in registry.rows(op) if row.name == "triton")


def wide(*tensors):
    return [t if t is None or isinstance(t, bool) else t.cpu().double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AGGREGATE_CASES, ids=lambda case: case.name)
def test_forward(case, dtype):
    args = case.args(dtype, DEVICE)
    out, shares = row(softmax_aggregate.OP).run(*args)
    own = reference.softmax_aggregate(*(a if a is None else a.cpu() for a in args))
    exact = reference.softmax_aggregate(*wide(*args))
    assert_accurate(out.cpu(), exact[0], own[0], what=case.why)
    assert_accurate(shares.cpu(), exact[1], own[1], what="shares", scale=max(1.0, case.spread))
    assert out.stride() == torch.ops.pydenoise.softmax_aggregate(*args, "reference")[0].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AGGREGATE_CASES, ids=lambda case: case.name)
def test_backward(case, dtype):
    features, hidden, weight = case.args(dtype, DEVICE)
    grad, grad_shares = case.grads(dtype, DEVICE)
    shares = reference.logits_of(hidden, weight).softmax(1)
    magnitude = float((grad.double().abs()[:, None] * features.double().abs()).sum(2).amax()) if case.batch else 0.0
    for given, wants in ((grad_shares, True), (None, False)):
        args = (grad, given, features, shares, wants)
        got = row(softmax_aggregate.OP_BACKWARD).run(*args)
        exact = reference.softmax_aggregate_backward(*wide(*args))
        own = reference.softmax_aggregate_backward(*(a if a is None or isinstance(a, bool) else a.cpu() for a in args))
        assert (got[0] is not None) == wants
        if wants:
            assert_accurate(got[0].cpu(), exact[0], own[0], what=case.why)
        assert_accurate(got[1].cpu(), exact[1], own[1], what=f"logits: {case.why}", scale=0.25 * magnitude)


def test_channels_are_split_over_programs():
    """Where there are few pixels: every split writes its own channels, one of them the shares."""
    case = AggregateCase("split", "", 3, 200, (3, 3), 40)
    features, hidden, weight = case.args(torch.float32, DEVICE)
    launch = kernels.plan(
        features.flatten(-2), hidden.flatten(-2), weight, features[:, 0].flatten(-2), features[:, :, 0].flatten(-2)
    )
    assert launch.arguments["per_split"] == 64
    out, shares = row(softmax_aggregate.OP).run(features, hidden, weight)
    expected = reference.softmax_aggregate(features, hidden, weight)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shares, expected[1], rtol=1e-5, atol=1e-6)


def test_functional_and_reasons():
    case = AGGREGATE_CASES[0]
    leaves = [t.requires_grad_() for t in case.tensors(torch.float32, DEVICE)]
    grads = torch.autograd.grad(PF.softmax_aggregate(*leaves, backend="triton").square().sum(), leaves)
    expected = torch.autograd.grad(PF.softmax_aggregate(*leaves, backend="reference").square().sum(), leaves)
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3)
    unsupported = row(softmax_aggregate.OP).unsupported
    assert "float64" in unsupported(leaves[0].double())
    assert "9 maps" in unsupported(torch.zeros(1, 9, 2, 2, 2))
