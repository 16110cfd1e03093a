"""The Triton kernels of dcls_kernel against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
from pydenoise.ops import registry
from pydenoise.reference import dcls_kernel as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.dcls_kernel import DCLS_KERNEL_CASES, rounding_scale

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import dcls_kernel as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)
CASES = {case.name: case for case in DCLS_KERNEL_CASES}
MOST_PAIRS = 8 if _tiles.interpreting() else 2**20  # a program each


def wide(args: tuple, dtype: torch.dtype = torch.float64) -> tuple:
    return tuple(a.cpu().to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


def problem(case, dtype) -> tuple[torch.Tensor, tuple]:
    """The kernel's gradient and the arguments, of the first output channels."""
    count = max(1, MOST_PAIRS // case.shape[1])
    weight, P, SIG, *rest = case.args(dtype, DEVICE)
    return case.grad(dtype, DEVICE)[:count], (
        weight[:count],
        P[:, :count],
        None if SIG is None else SIG[:, :count],
        *rest,
    )


def check(case, dtype) -> None:
    grad, args = problem(case, dtype)
    kernel, grads = kernels.forward(*args), kernels.backward(grad, *args)
    exact, own = reference.dcls_kernel(*wide(args)), reference.dcls_kernel(*wide(args, dtype))
    assert_accurate(kernel, exact, own, what=f"{case.name}, {case.why}")
    exact = reference.dcls_kernel_backward(grad.cpu().double(), *wide(args))
    own = reference.dcls_kernel_backward(grad.cpu(), *wide(args, dtype))
    for name, got, true, torchs in zip(("weight", "P", "SIG"), grads, exact, own, strict=True):
        assert (got is None) == (true is None)
        if got is not None:
            scale = None if name == "weight" else rounding_scale(true, grad, args)
            assert_accurate(got, true, torchs, what=f"gradient of {name}: {case.name}", scale=scale)


@pytest.mark.parametrize("case", DCLS_KERNEL_CASES, ids=lambda case: case.name)
def test_cases(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["oblong", "volume_v0", "line", "whole", "sliced"])
def test_other_dtypes(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("place", range(len(kernels.CONSTRUCT.variants)))
@pytest.mark.parametrize("name", ["wide", "volume_max", "long_line", "many_components"])
def test_every_tile(name, place):
    """Not only the tile that the launcher takes: several blocks of rows, columns and components."""
    case = CASES[name]
    grad, args = problem(case, torch.float32)
    kernel = torch.empty(grad.shape).to(DEVICE)
    grads = [None if t is None else torch.empty(t.shape).to(DEVICE) for t in args[:3]]
    kernels.plan_forward(*args, kernel).run(kernels.CONSTRUCT.variants[place].config())
    gradient = kernels.GRADIENT.variants[place % len(kernels.GRADIENT.variants)]
    kernels.plan_backward(grad, *args, *grads).run(gradient.config())
    torch.testing.assert_close(kernel.cpu().double(), reference.dcls_kernel(*wide(args)), rtol=1e-4, atol=1e-5)
    exact = reference.dcls_kernel_backward(grad.cpu().double(), *wide(args))
    for got, true in zip(grads, exact, strict=True):
        assert got is None or (got.cpu().double() - true).abs().max() < 1e-4 * true.abs().max()


def test_nan_stays():
    weight, P, SIG = (t[..., :6, :, :] for t in CASES["oblong"].tensors(torch.float32))
    P[1, 4, 0, 2] = torch.nan
    for version, widths in (("gauss", SIG), ("v1", None)):
        widths = None if widths is None else widths.to(DEVICE)
        kernel = PF.dcls_kernel(weight.to(DEVICE), P.to(DEVICE), widths, (5, 9), version=version, backend="triton")
        assert kernel[4].isnan().all() and kernel.isnan().any((1, 2, 3)).sum() == 1


def test_functional_and_reasons():
    tensors = [t[..., :6, :, :].to(DEVICE).requires_grad_() for t in CASES["oblong"].tensors(torch.float32)]
    kernel = PF.dcls_kernel(*tensors, (5, 9), backend="triton")
    grads = torch.autograd.grad(kernel.square().sum(), tensors)
    others = [t.detach().cpu().requires_grad_() for t in tensors]
    expected = PF.dcls_kernel(*others, (5, 9), backend="reference")
    torch.testing.assert_close(kernel.cpu(), expected, rtol=1e-4, atol=1e-5)
    for got, own in zip(grads, torch.autograd.grad(expected.square().sum(), others), strict=True):
        torch.testing.assert_close(got.cpu(), own, rtol=1e-3, atol=1e-4)
    for name in ("dcls_kernel", "dcls_kernel_backward"):
        row = next(row for row in registry.rows(name) if row.name == "triton")
        assert "float64" in row.unsupported(tensors[0].double()) and "meta" in row.unsupported(tensors[0].to("meta"))
