"""The Triton kernels of adaptive_bilateral_filter against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
from pydenoise.ops import registry
from pydenoise.reference import adaptive_bilateral_filter as reference
from pydenoise.testing.adaptive_bilateral_filter import BilateralCase

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import adaptive_bilateral_filter as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
# Small ones: the interpreter takes every tap of every rectangle in Python. The contract test has all cases on a GPU.
CASES = [
    BilateralCase("tiles", "sums of tiles in the kernel, several rectangles", size=(16, 40), spatial=(0.6, 1.0)),
    BilateralCase("pixels", "a sigma for every pixel", size=(5, 7), tile=(1, 1), spatial=(0.6, 1.0)),
    BilateralCase("uneven", "sums of tiles that do not fit a rectangle", size=(9, 10), tile=(3, 5), spatial=(0.6, 1.0)),
    BilateralCase("rgb", "three channels in a block of four", 2, 3, (6, 5), (3, 5), (0.6, 1.0), radius="per_image"),
    BilateralCase("nine", "more channels than a program takes", 1, 9, (4, 5), (4, 5), (0.6, 1.0)),
    BilateralCase("mirrored_twice", "the window is larger than the image", size=(2, 3), tile=(2, 3), radius=3),
    BilateralCase("one_row", "nothing to mirror along an axis", size=(1, 9), tile=(1, 3), radius=2),
    BilateralCase("batch", "one window for all", 2, size=(8, 8), spatial=(0.6, 1.9)),
    BilateralCase("strided", "columns are not adjacent", 1, 2, (4, 6), (2, 3), (0.6, 1.0), strides="channels_last"),
]
by_name = {"ids": lambda value: getattr(value, "name", None) or str(value)}


def exact(args: tuple) -> tuple:
    return tuple(a.cpu().double() if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("case", CASES, **by_name)
def test_forward(case):
    args = case.args(torch.float32, DEVICE, save_norm=True)
    for got, expected in zip(kernels.forward(*args), reference.adaptive_bilateral_filter(*exact(args)), strict=True):
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-6, atol=2e-6)
    alone, norm = kernels.forward(*args[:-1], False)
    assert norm.numel() == 0 and torch.equal(alone, kernels.forward(*args)[0])


@pytest.mark.parametrize("case", CASES, **by_name)
def test_backward(case):
    args = case.backward_args(torch.float32, DEVICE)
    expected = reference.adaptive_bilateral_filter_backward(*exact(args))
    for got, wanted in zip(kernels.backward(*args), expected, strict=True):
        bound = 1e-5 * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-5, atol=bound)


def test_half_precision():
    for args in (CASES[0].args(torch.float16, DEVICE), CASES[3].args(torch.float16, DEVICE)):
        expected = reference.adaptive_bilateral_filter(*exact(args))[0]
        torch.testing.assert_close(kernels.forward(*args)[0].cpu().double(), expected, rtol=1e-3, atol=1e-3)
    grads = kernels.backward(*CASES[3].backward_args(torch.float16, DEVICE))
    assert grads[0].dtype == torch.float16 and grads[1].dtype == torch.float32


@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_masks(mask):
    everything = kernels.backward(*CASES[3].backward_args(torch.float32, DEVICE))
    grads = kernels.backward(*CASES[3].backward_args(torch.float32, DEVICE, mask))
    for got, want, full in zip(grads, mask, everything, strict=True):
        assert (got is None) != want and (got is None or torch.equal(got, full))


def test_functional_with_gradients():
    x, s = torch.rand(1, 1, 8, 9), torch.rand(1, 1, 3, 3) * 0.5 + 0.5
    results = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        leaves = [t.to(device).requires_grad_() for t in (x, s)]
        y = PF.adaptive_bilateral_filter(*leaves, radius="per_image", backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


def test_empty_and_reasons():
    out, norm = kernels.forward(torch.zeros(0, 1, 4, 4, device=DEVICE), torch.ones(0, 1, 1, 3, device=DEVICE), -1, True)
    assert out.shape == (0, 1, 4, 4) and norm.shape == (0, 4, 4)
    row = next(row for row in registry.rows("adaptive_bilateral_filter") if row.name == "triton")
    x = torch.zeros(1, 1, 4, 4)
    assert "float64" in row.unsupported(x.double()) and "meta" in row.unsupported(x.to("meta"))
    assert "32 bits" in row.unsupported(torch.empty(1, 3, 30000, 30000, device="meta"))
