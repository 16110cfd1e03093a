"""The Triton kernels of routed_norm against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
from pydenoise.ops import registry, routed_norm
from pydenoise.reference import routed_norm as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.routed_norm import ROUTED_NORM_CASES

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)


def row(op: str):
    return next(row for row in registry.rows(op) if row.name == "triton")


def moved(args: tuple, dtype: torch.dtype | None = None) -> list:
    return [a.cpu().to(dtype or a.dtype) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROUTED_NORM_CASES, ids=lambda case: case.name)
def test_forward(case, dtype):
    args = case.args(dtype, DEVICE)
    got = row(routed_norm.OP).run(*args)
    exact, own = reference.routed_norm(*moved(args, torch.float64)), reference.routed_norm(*moved(args))
    for name, a, b, c in zip(("output", "carried", "stats"), got, exact, own, strict=True):
        assert_accurate(a.cpu(), b, c, what=f"{name}: {case.why}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROUTED_NORM_CASES, ids=lambda case: case.name)
def test_backward(case, dtype):
    for full in (True, False):
        args = case.backward_args(dtype, DEVICE, full)
        got = row(routed_norm.OP_BACKWARD).run(*args)
        exact = reference.routed_norm_backward(*moved(args, torch.float64))
        own = reference.routed_norm_backward(*moved(args))
        size = float((args[0].double().abs() * (1 + args[7].double().abs())[:, None]).amax()) if exact[0].numel() else 0
        largest = float(args[8][..., 1].amax()) if args[8].numel() else 0.0
        for name, a, b, c in zip(("input", "update", "coefficients"), got, exact, own, strict=True):
            scale = None if name != "input" or not b.numel() else max(size * largest, float(b.abs().max()))
            assert_accurate(a.cpu(), b, c, what=f"{name}: {case.why}", scale=scale)


def test_functional_and_reasons():
    input, shift, scale, options = ROUTED_NORM_CASES[3].tensors(torch.float32, DEVICE)
    leaves = [t.requires_grad_() for t in (input, shift, scale)]

    def gradients(backend: str):
        result = PF.routed_norm(*leaves, **options, backend=backend)
        return torch.autograd.grad(result.output.square().sum() + result.carried.sum(), leaves)

    for got, exact in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3)
    unsupported = row(routed_norm.OP).unsupported
    assert "float64" in unsupported(input.double())
    assert "9000 channels" in unsupported(torch.zeros(1, 1, 9000))
