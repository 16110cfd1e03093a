"""The Triton kernels of ode_stage against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
import pydenoise.nn as pnn
from pydenoise.ops import registry
from pydenoise.reference import ode_stage as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.ode_stage import ODE_STAGE_CASES

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import ode_stage as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)
NORMS = [case for case in ODE_STAGE_CASES if case.normalise]


def changed(args: tuple, to) -> tuple:
    """The same call with every tensor through ``to``."""
    return tuple(
        tuple(map(to, a)) if isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor)
        else to(a) if isinstance(a, torch.Tensor) else a for a in args
    )  # fmt: skip


def exact(args: tuple) -> tuple:
    return changed(args, lambda t: t.cpu().double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODE_STAGE_CASES, ids=lambda case: case.name)
def test_stage(case, dtype):
    args = case.args(dtype, DEVICE)
    actual = kernels.ode_stage(*args)
    oracle, own = reference.ode_stage(*exact(args)), reference.ode_stage(*changed(args, torch.Tensor.cpu))
    point = reference.combination(*exact(args)[:6])
    largest = point.abs().max().item() if len(point) else 0.0  # a mean is a sum whose terms cancel
    for one, right, baseline, what in zip(actual, oracle, own, ("norm", "point", "moments"), strict=True):
        scale = largest if what == "moments" else None
        assert_accurate(one.cpu(), right, baseline, what=f"{case.name}, {what}", scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_gradient(case, dtype):
    args = case.args(dtype, DEVICE)
    *_, film, plane, eps, _, _ = args
    y, point, moments = reference.ode_stage(*args[:-1], True)
    generator = torch.Generator().manual_seed(1)
    grad, beside = (torch.randn(t.shape, generator=generator).to(t) for t in (y, point))
    given = (grad, point, moments, film, beside if case.keep else None, eps, film is not None)
    dpoint, dfilm = kernels.ode_stage_backward(*given)

    def plain(values):
        grad, point, _, film, beside, eps, need = values
        return reference.ode_stage_backward(grad, point, film, beside, eps, need)

    oracle, own = plain(exact(given)), plain(changed(given, torch.Tensor.cpu))
    scale = 300 * grad.abs().max().item() if case.name == "pixel" else None
    assert_accurate(dpoint.cpu(), oracle[0], own[0], what="point", scale=scale)
    if film is not None and len(film):
        assert_accurate(dfilm.cpu().to(dtype), oracle[1], own[1].to(dtype), what="film")


@pytest.mark.parametrize("case", [c for c in NORMS if c.name in ("chunks", "second_odd", "film")], ids=lambda c: c.name)
def test_parts_and_tiles(case, monkeypatch):
    """Every tile, and images split into more parts than they need."""
    monkeypatch.setattr(kernels, "_PART", 16)
    args = case.args(torch.float32, DEVICE)
    expected = reference.ode_stage(*exact(args))[0]
    state, slopes, weights, position, drift, second, film, plane, eps, _, _ = args
    n, channels, height, width = state.shape
    for variant in kernels.COMBINE.variants:
        y = torch.empty((n, height, width, channels + (plane is not None)), device=DEVICE)
        moments = torch.empty((n, 2, channels), device=DEVICE)
        rows = tuple(map(kernels._rows, slopes))
        launches = kernels.plan_stage(
            kernels._rows(state), rows, weights, position, drift, second, film, plane, eps, y, None, moments
        )
        for launch in launches:
            launch.run(variant.config())
        torch.testing.assert_close(y.permute(0, 3, 1, 2).cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_block_and_reasons():
    torch.manual_seed(0)
    block = pnn.DynamicBlock(6, order="second", residual=True, time_dependent=True).to(DEVICE)
    x = torch.randn(1, 6, 5, 7, device=DEVICE)
    stage = PF.ode_stage(x, [x], [0.5], plane=1.0, backend="triton")
    torch.testing.assert_close(stage, PF.ode_stage(x, [x], [0.5], plane=1.0, backend="reference"))
    if DEVICE == "cuda":
        leaf = x.clone().requires_grad_()
        block(leaf).square().sum().backward()
        other = x.cpu().requires_grad_()
        block.cpu()(other).square().sum().backward()
        torch.testing.assert_close(leaf.grad.cpu(), other.grad, rtol=1e-3, atol=1e-3)
    row = next(row for row in registry.rows("ode_stage") if row.name == "triton")
    assert "float64" in row.unsupported(x.double()) and "meta" in row.unsupported(x.to("meta"))


def test_softplus_of_a_convolution():
    """The epilogue keeps the digits of small values: e^-12, not 0."""
    x = torch.linspace(-30, 30, 61, device=DEVICE).reshape(1, 1, 1, 61)
    y = PF.weighted_conv2d(x, torch.ones(1, 1, 1, 1, device=DEVICE), None, activation="softplus", backend="triton")
    torch.testing.assert_close(y.cpu().double(), torch.nn.functional.softplus(x.cpu().double()), rtol=2e-6, atol=0)
