"""The adaptive bilateral filter: golden data, what the formula implies, gradients of the functional, bad arguments."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydenoise import functional as PF
from pydenoise.ops import adaptive_bilateral_filter as op
from pydenoise.ops import registry
from pydenoise.reference import adaptive_bilateral_filter as reference

# Computed in float64 by the published module: images, sigma maps, incoming gradients, results and gradients.
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "blocks_bilateral.npz")
BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    x, s = torch.zeros(1, 1, 2, 2), torch.ones(1, 2, 2, 3)
    row = next(row for row in registry.rows(op.OP) if row.name == request.param)
    if (reason := row.unsupported(*op.prepare(x, s))) is not None:
        pytest.skip(reason)
    return request.param


def sigmas(x: float, y: float, r: float, size=(1, 1), batch=1) -> torch.Tensor:
    return torch.tensor([x, y, r], dtype=torch.float32).expand(batch, *size, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden(dtype, backend):
    x, s, g, out, gx, gs = (torch.from_numpy(GOLDEN[f"c1_{key}"]) for key in ("x", "s", "g", "out", "gx", "gs"))
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("float64 is the reference's")
    leaves = [t.to(dtype).requires_grad_() for t in (x, s)]
    y = PF.adaptive_bilateral_filter(*leaves, backend=backend)
    grads = torch.autograd.grad(y, leaves, g.to(dtype))
    bound = 2e-6 * max(1.0, gs.abs().max().item())
    torch.testing.assert_close(y.detach(), out.to(dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[0], gx.to(dtype), rtol=0, atol=1e-5)
    torch.testing.assert_close(grads[1], gs.to(dtype), rtol=1e-4, atol=bound)
    assert reference.radii(s, reference.BATCH).tolist() == [int(GOLDEN["c1_k"]) // 2] * x.shape[0]


def test_a_constant_stays(backend):
    x = torch.full((2, 3, 9, 14), 0.7)
    y = PF.adaptive_bilateral_filter(x, sigmas(2, 3, 0.1, batch=2), backend=backend)
    torch.testing.assert_close(y, x, rtol=2e-7, atol=0)


def test_small_sigmas_change_nothing(backend):
    x = torch.rand(1, 1, 12, 13)
    for s in (sigmas(1e-3, 1e-3, 1.0), sigmas(2, 2, 1e-7), sigmas(1e-20, 1e-30, 1e-20)):
        torch.testing.assert_close(PF.adaptive_bilateral_filter(x, s, backend=backend), x, rtol=3e-7, atol=0)


def test_a_wide_range_is_a_gaussian_blur(backend):
    x = torch.rand(1, 2, 20, 23)
    taps = [torch.exp(-torch.arange(-4.0, 5).square() / (2 * width**2)) for width in (3.5, 1.5)]
    kernel = (taps[1][:, None] * taps[0] / (taps[1].sum() * taps[0].sum())).expand(2, 1, 9, 9)
    expected = F.conv2d(F.pad(x, (4, 4, 4, 4), mode="reflect"), kernel, groups=2)
    y = PF.adaptive_bilateral_filter(x, sigmas(3.5, 1.5, 1e4), backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_rows_and_columns_may_be_exchanged(backend):
    x, s = torch.rand(1, 3, 12, 20), torch.rand(1, 6, 5, 3) * 2 + 0.1
    y = PF.adaptive_bilateral_filter(x, s, backend=backend)
    swapped = PF.adaptive_bilateral_filter(x.mT, s.transpose(1, 2)[..., [1, 0, 2]], backend=backend)
    torch.testing.assert_close(swapped.mT, y)


def test_results_lie_between_their_neighbours(backend):
    x, s = torch.randn(1, 1, 30, 30), torch.rand(1, 30, 30, 3) * 2 + 0.05
    y = PF.adaptive_bilateral_filter(x, s, backend=backend)
    padded = F.pad(x, (3, 3, 3, 3), mode="reflect")
    assert (y <= F.max_pool2d(padded, 7, 1) + 1e-6).all() and (y >= -F.max_pool2d(-padded, 7, 1) - 1e-6).all()


def test_tiles_are_pixels_of_one_sigma(backend):
    x, s = torch.rand(2, 3, 12, 20), torch.rand(2, 3, 5, 3) + 0.3
    every = s.repeat_interleave(4, 1).repeat_interleave(4, 2)
    y = PF.adaptive_bilateral_filter(x, s, backend=backend)
    assert torch.equal(PF.adaptive_bilateral_filter(x, every, backend=backend), y)


def test_radius_of_a_batch(backend):
    x = torch.rand(2, 1, 16, 16)
    s = torch.stack([sigmas(0.9, 0.5, 0.4)[0], sigmas(1.0, 3.2, 0.4)[0]])
    both = PF.adaptive_bilateral_filter(x, s, backend=backend)
    each = PF.adaptive_bilateral_filter(x, s, radius="per_image", backend=backend)
    assert torch.equal(both[1], each[1]) and not torch.equal(both[0], each[0]), "the second widens the first's window"
    for radius, result in ((4, both[0]), (1, each[0])):
        given = PF.adaptive_bilateral_filter(x[:1], s[:1], radius=radius, backend=backend)[0]
        assert torch.equal(given, result)
    assert reference.radii(sigmas(6.000001, 1, 1), reference.BATCH).tolist() == [7]


@pytest.mark.parametrize("shape", [(1, 1, 5, 6), (1, 3, 4, 3), (2, 1, 1, 5)])
@pytest.mark.parametrize("tile", [True, False])
def test_gradients_of_gradients(shape, tile):
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    size = (1, 1) if tile else shape[2:]
    s = (torch.rand(shape[0], *size, 3, dtype=torch.float64) + 0.4).requires_grad_()
    call = lambda a, b: PF.adaptive_bilateral_filter(a, b, radius=2, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, s))
    assert torch.autograd.gradgradcheck(call, (x, s))


def test_formulas_of_the_gradients_agree_with_autograd():
    x = torch.rand(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    s = (torch.rand(2, 7, 1, 3, dtype=torch.float64) * 3 + 0.2).requires_grad_()
    g = torch.randn_like(x)
    y, norm = reference.adaptive_bilateral_filter(x, s, reference.PER_IMAGE, True)
    expected = torch.autograd.grad(y, (x, s), g)
    with torch.no_grad():
        found = reference.adaptive_bilateral_filter_backward(g, x, s, reference.PER_IMAGE, y, norm, [True, True])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_gradients_through_the_functional(backend):
    """Leaves of other dtypes and layouts, one or the other wanted, twice through the same result."""
    x, s = torch.rand(1, 3, 16, 16), torch.rand(1, 2, 2, 3) + 0.5
    wide = [t.double().requires_grad_() for t in (x, s)]
    y = PF.adaptive_bilateral_filter(*wide, backend="reference")
    expected = torch.autograd.grad(y.square().sum(), wide)
    leaves = [x.contiguous(memory_format=torch.channels_last).requires_grad_(), s.double().requires_grad_()]
    y = PF.adaptive_bilateral_filter(*leaves, backend=backend)
    for wanted in ((0, 1), (0,), (1,)):
        loss = y.square().sum()
        grads = torch.autograd.grad(loss, [leaves[i] for i in wanted], retain_graph=True)
        for i, grad in zip(wanted, grads, strict=True):
            assert grad.dtype == leaves[i].dtype
            torch.testing.assert_close(grad.double(), expected[i], rtol=1e-4, atol=1e-5)
    second = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    assert torch.autograd.grad(second[0].sum() + second[1].sum(), leaves)[1].isfinite().all()
    only = PF.adaptive_bilateral_filter(leaves[0].detach(), leaves[1], backend=backend)
    assert torch.autograd.grad(only.sum(), leaves[1])[0].shape == s.shape


def test_nothing_is_kept_without_gradients(backend):
    x, s = torch.rand(1, 1, 8, 8, requires_grad=True), sigmas(1, 1, 1)
    with torch.no_grad():
        y = PF.adaptive_bilateral_filter(x, s, backend=backend)
    assert y.grad_fn is None
    assert op.prepare(x, s)[-1] and not op.prepare(x.detach(), s)[-1]


def test_not_a_number_stays_near(backend):
    x = torch.rand(1, 1, 12, 40)
    x[0, 0, 5, 20] = math.nan
    y = PF.adaptive_bilateral_filter(x, sigmas(2, 2, 0.3), backend=backend)[0, 0]
    assert y[3:8, 18:23].isnan().all() and y.isnan().sum() == 25


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 1, 0, 8), (2, 3, 8, 0)])
def test_empty(shape, backend):
    x = torch.rand(shape, requires_grad=True)
    s = torch.ones(*(shape[0], *(1 if n else 0 for n in shape[2:])), 3, requires_grad=True)
    y = PF.adaptive_bilateral_filter(x, s, backend=backend)
    assert y.shape == shape
    dx, ds = torch.autograd.grad(y.sum(), (x, s))
    assert dx.shape == shape and ds.shape == s.shape and not ds.any()


def test_compiles():
    x, s = torch.rand(1, 3, 16, 16, requires_grad=True), (torch.rand(1, 2, 2, 3) + 0.5).requires_grad_()
    function = torch.compile(
        lambda a, b: PF.adaptive_bilateral_filter(a, b * 1.5, radius="per_image") + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    plain = PF.adaptive_bilateral_filter(x, s * 1.5, radius="per_image") + 1
    y = function(x, s)
    torch.testing.assert_close(y, plain)
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), (x, s)), torch.autograd.grad(plain.square().sum(), (x, s)), strict=True
    ):
        torch.testing.assert_close(one, other)


X, S = torch.rand(2, 1, 16, 24), torch.ones(2, 2, 3, 3)
BAD = {
    "input: expected a torch.Tensor": lambda: PF.adaptive_bilateral_filter([1.0], S),
    "input: expected a floating-point": lambda: PF.adaptive_bilateral_filter(X.int(), S),
    r"input: expected \[B, C, H, W\]": lambda: PF.adaptive_bilateral_filter(X[0], S),
    "with C >= 1": lambda: PF.adaptive_bilateral_filter(X[:, :0], S),
    "sigma: expected a torch.Tensor": lambda: PF.adaptive_bilateral_filter(X, 2.0),
    "sigma: expected a floating-point": lambda: PF.adaptive_bilateral_filter(X, S.int()),
    r"sigma: expected \[B, H, W, 3\]": lambda: PF.adaptive_bilateral_filter(X, S[..., :2]),
    r"got shape \(1, 2, 3, 3\)": lambda: PF.adaptive_bilateral_filter(X, S[:1]),
    "sigma: expected a number of rows of tiles that divides 16, got 3": lambda: PF.adaptive_bilateral_filter(
        X, torch.ones(2, 3, 3, 3)
    ),
    "a number of columns of tiles that divides 24, got 0": lambda: PF.adaptive_bilateral_filter(X, S[:, :, :0]),
    "sigma: expected positive finite values, got 0.0": lambda: PF.adaptive_bilateral_filter(X, S * 0),
    "sigma: expected positive finite values, got nan": lambda: PF.adaptive_bilateral_filter(X, S * math.nan),
    "sigma: expected positive finite values, got inf": lambda: PF.adaptive_bilateral_filter(X, S * math.inf),
    "sigma: expected spatial sigmas of at most 127": lambda: PF.adaptive_bilateral_filter(X, S * 128),
    "radius: expected 'batch', 'per_image' or an int, got 'image'": lambda: PF.adaptive_bilateral_filter(
        X, S, radius="image"
    ),
    "radius: expected 'batch', 'per_image' or an int, got float": lambda: PF.adaptive_bilateral_filter(
        X, S, radius=2.0
    ),
    "radius: expected an int from 0 to 127, got -1": lambda: PF.adaptive_bilateral_filter(X, S, radius=-1),
    "radius: expected an int from 0 to 127, got 128": lambda: PF.adaptive_bilateral_filter(X, S, radius=128),
    "backend: expected": lambda: PF.adaptive_bilateral_filter(X, S, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
