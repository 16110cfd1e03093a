"""The dynamic block: golden data, the plain form in torch, orders of convergence, gradients, bad input."""

import copy
import io
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pydenoise.nn as pnn
from pydenoise.benchmarks.blocks_continuous import PlainDynamicBlock
from pydenoise.nn import _tableaus
from pydenoise.testing import assert_accurate

# A block of 6 channels with conv2 1 x 1, integrated with torchdiffeq 0.2.5 in float64: "rk4" in one step (the 3/8 rule)
# and "dopri5" at rtol = atol = 1e-3; "rk4classic" by a program of a few lines. Made elsewhere.
GOLDEN = Path(__file__).parents[1] / "data" / "blocks_cunet.npz"

METHODS = pnn.DynamicBlock.METHODS

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def golden_block(data, **options) -> tuple[pnn.DynamicBlock, torch.Tensor]:
    block = pnn.DynamicBlock(6, kernel_size=1, dtype=torch.float64, **options)
    state = {f"conv{i}.{name}": torch.from_numpy(data[f"cunet_block_{name[0]}{i}"])
             for i in (1, 2) for name in ("weight", "bias")}  # fmt: skip
    block.load_state_dict(state)
    return block, torch.from_numpy(data["cunet_block_h0"])


@pytest.mark.parametrize(("method", "key"), [("rk4_38", "rk38"), ("rk4", "rk4classic")])
def test_golden_data(method, key):
    with np.load(GOLDEN) as data:
        block, h = golden_block(data, method=method)
        expected = torch.from_numpy(data[f"cunet_block_out_{key}"])
    torch.testing.assert_close(block(h), expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(block(h), expected, rtol=1e-12, atol=1e-13)
    own = pnn.DynamicBlock(6, kernel_size=1, method=method)
    own.load_state_dict(block.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(own(h.float()).double(), expected, rtol=2e-5, atol=2e-5)


def test_many_steps_end_where_the_adaptive_solver_does():
    with np.load(GOLDEN) as data:
        block, h = golden_block(data, method="rk4_38", n_steps=20)
        expected = torch.from_numpy(data["cunet_block_out_dopri5"])
    with torch.no_grad():
        assert (block(h) - expected).abs().max() < 5e-3


# ------------------------------------------------------------------------------------------------------- the methods


@pytest.mark.parametrize("method", METHODS)
def test_tableaus_satisfy_the_order_conditions(method):
    t = _tableaus.TABLEAUS[method]
    n = len(t.b)
    a = np.zeros((n, n))
    for i, row in enumerate(t.a):
        a[i, : len(row)] = row
    b, c = np.array(t.b), np.array(t.c)
    conditions = {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [(b @ c**3, 1 / 4), ((b * c) @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
    }
    for order in range(1, t.order + 1):
        for value, wanted in conditions[order]:
            assert math.isclose(value, wanted, abs_tol=1e-15), (method, order)
    assert not all(math.isclose(v, w) for v, w in conditions.get(t.order + 1, [(0, 1)])), "the order is no higher"
    np.testing.assert_allclose(np.array([(*row, *[0] * (n - len(row))) for row in t.position_a]), a @ a)
    np.testing.assert_allclose(t.position_b, b @ a)


def test_nystroem_form_of_the_classic_method():
    t = _tableaus.TABLEAUS["rk4"]
    assert t.position_a == ((), (0.0,), (0.25, 0.0), (0.0, 0.5, 0.0))
    np.testing.assert_allclose(t.position_b, (1 / 6, 1 / 6, 1 / 6, 0))


class Smooth(pnn.DynamicBlock):
    """The block with a smooth right side, whose flow is known to many digits."""

    def _slope(self, x, point, time, film):
        half = self.channels // 2
        z, v = point[:, :half], point[:, half:]
        if self.order == "second":
            return torch.tanh(v) - z + (0.5 * time if self.time_dependent else 0)
        return torch.cat((torch.tanh(v), -torch.sin(z) + (0.5 * time if self.time_dependent else 0)), 1)


@pytest.mark.parametrize("time_dependent", [False, True])
@pytest.mark.parametrize("order", ["augmented", "second"])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method, order, time_dependent):
    torch.manual_seed(0)
    h = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    options = {"order": order, "time_dependent": time_dependent, "residual": True, "dtype": torch.float64}
    with torch.no_grad():
        exact = Smooth(4, method="rk4", n_steps=256, **options)(h)
        errors = [(Smooth(4, method=method, n_steps=n, **options)(h) - exact).abs().max() for n in (4, 8, 16)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert abs(slopes[-1] - _tableaus.TABLEAUS[method].order) < 0.25, slopes


@pytest.mark.parametrize("order", ["augmented", "second"])
@pytest.mark.parametrize("method", METHODS)
def test_no_motion_is_the_identity(method, order):
    """f = 0: softplus of a bias of -inf. Of order second a velocity remains, and with it z = z + v."""
    block = pnn.DynamicBlock(6, order=order, method=method, n_steps=2)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.conv2.bias.fill_(-torch.inf)
        h = torch.randn(2, 6, 5, 7)
        expected = h if order == "augmented" else torch.cat((h[:, :3] + h[:, 3:], h[:, 3:]), 1)
        torch.testing.assert_close(block(h), expected, rtol=1e-6, atol=1e-6)


class Linear(pnn.DynamicBlock):
    """dh / dt = sign * A h, each pixel by itself."""

    def _slope(self, x, point, time, film):
        return torch.einsum("ij,njhw->nihw", self.matrix, point)


def test_time_reversal_on_a_linear_field():
    torch.manual_seed(1)
    matrix, h = torch.randn(4, 4, dtype=torch.float64), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    there = Linear(4, residual=True, n_steps=64, dtype=torch.float64)
    back = copy.deepcopy(there)
    there.matrix, back.matrix = matrix, -matrix
    with torch.no_grad():
        end = there(h)
        torch.testing.assert_close(
            end, torch.einsum("ij,njhw->nihw", torch.matrix_exp(matrix), h), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(back(end), h, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- against torch, and gradients

VERSIONS = {
    "plain": {"kernel_size": 1},
    "later": {"kernel_size": 3, "residual": True},
    "time": {"time_dependent": True, "n_steps": 2, "method": "midpoint"},
    "second": {"order": "second"},
    "second_later": {"order": "second", "residual": True, "time_dependent": True, "method": "rk4", "n_steps": 2},
    "euler": {"method": "euler", "n_steps": 3},
    "heun": {"method": "heun"},
}


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("channels", [10, 32])
def test_is_the_plain_form(name, channels):
    """Values, and gradients of the input and of all weights, under the tolerance policy."""
    torch.manual_seed(2)
    block = pnn.DynamicBlock(channels, **VERSIONS[name])
    x = torch.randn(2, channels, 9, 11)

    def results(module, dtype):
        module, leaf = copy.deepcopy(module).to(dtype), x.to(dtype).requires_grad_()
        y = module(leaf)
        (y * torch.linspace(-1, 1, y.numel()).to(y).view(y.shape)).sum().backward()
        with torch.no_grad():
            again = module(leaf)
        return [y.detach(), again, leaf.grad, *(p.grad for p in module.parameters())]

    plain = PlainDynamicBlock(block)
    oracle, own = results(plain, torch.float64), results(plain, torch.float32)
    for actual, exact, baseline in zip(results(block, torch.float32), oracle, own, strict=True):
        assert_accurate(actual, exact, baseline, factor=3, what=name)


@pytest.mark.parametrize("name", VERSIONS)
def test_recomputation_changes_no_gradient(name):
    torch.manual_seed(3)
    block = pnn.DynamicBlock(12, film_features=7, **VERSIONS[name])
    x, embedding = torch.randn(2, 12, 6, 5), torch.randn(2, 7)
    found = []
    for recompute in (True, False):
        block.recompute = recompute
        block.zero_grad()
        leaf, told = x.clone().requires_grad_(), embedding.clone().requires_grad_()
        y = block(leaf, told)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, told.grad, *(p.grad for p in block.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_recomputation_keeps_one_state_a_step():
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    images = {}
    for recompute in (True, False):
        kept.clear()
        block = pnn.DynamicBlock(16, n_steps=2, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            block(x)
        images[recompute] = sum(n >= x.numel() for n in kept)
    assert images[True] <= 2 < 20 < images[False]


def test_gradcheck_with_film():
    torch.manual_seed(4)
    block = pnn.DynamicBlock(4, film_features=3, method="heun", residual=True, dtype=torch.float64)
    leaves = [torch.randn(1, 4, 3, 4).double().requires_grad_(), torch.randn(1, 3).double().requires_grad_()]
    assert torch.autograd.gradcheck(block, leaves, fast_mode=True)


def test_film_scales_and_shifts():
    """FiLM that gives nothing leaves the block as it is; FiLM that gives something does not."""
    torch.manual_seed(5)
    block, x = pnn.DynamicBlock(8, film_features=4), torch.randn(2, 8, 6, 6)
    plain = pnn.DynamicBlock(8)
    plain.load_state_dict(block.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(block(x, torch.randn(2, 4)), plain(x))
        for parameter in block.film.parameters():
            parameter.zero_()
        torch.testing.assert_close(block(x, torch.randn(2, 4)), plain(x))


def test_derivative_is_what_is_integrated():
    block, x = pnn.DynamicBlock(8, method="euler", order="second"), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(x), x + block.derivative(x))


def test_weights_that_change_are_seen():
    block, x = pnn.DynamicBlock(16).eval(), torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        first = block(x)
        block.conv1.weight.mul_(2)
        second = block(x)
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, PlainDynamicBlock(block)(x), rtol=1e-4, atol=1e-4)
        torch.set_float32_matmul_precision("high")
        try:
            torch.testing.assert_close(block(x), second, rtol=1e-3, atol=1e-3)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert torch.equal(block(x), second)


def test_copies_and_files():
    block, x = pnn.DynamicBlock(8), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(copy.deepcopy(block)(x), expected)
        file = io.BytesIO()
        torch.save(block.state_dict(), file)
        file.seek(0)
        other = pnn.DynamicBlock(8)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x), expected)
    assert set(block.state_dict()) == {f"conv{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize("recompute", [True, False])
def test_compiles(recompute):
    torch.manual_seed(6)
    block, x = pnn.DynamicBlock(8, recompute=recompute), torch.randn(2, 8, 6, 6, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager")
    expected = torch.autograd.grad(block(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


def test_autocast():
    block, x = pnn.DynamicBlock(16), torch.randn(1, 16, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(y.detach(), block(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    block, x = pnn.DynamicBlock(16), torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = block(x)
        y = block.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


def test_no_images():
    assert pnn.DynamicBlock(8)(torch.zeros(0, 8, 4, 4)).shape == (0, 8, 4, 4)


X = torch.zeros(1, 8, 4, 4)
BAD = {
    "method: expected one of 'euler', 'midpoint', 'heun', 'rk4', 'rk4_38', got 'dopri5'":
        lambda: pnn.DynamicBlock(8, method="dopri5"),
    "order: expected one of 'augmented', 'second', got 'third'": lambda: pnn.DynamicBlock(8, order="third"),
    "channels: expected an int": lambda: pnn.DynamicBlock(8.0),
    "channels: expected a positive int": lambda: pnn.DynamicBlock(0),
    "channels: order 'second' needs an even number, got 7": lambda: pnn.DynamicBlock(7, order="second"),
    "kernel_size: expected 1 or 3, got 5": lambda: pnn.DynamicBlock(8, kernel_size=5),
    "n_steps: expected a positive int, got 0": lambda: pnn.DynamicBlock(8, n_steps=0),
    "n_steps: expected an int, got float": lambda: pnn.DynamicBlock(8, n_steps=1.5),
    "eps: expected a positive number": lambda: pnn.DynamicBlock(8, eps=-1e-5),
    "film_features: expected a positive int": lambda: pnn.DynamicBlock(8, film_features=0),
    r"input: expected \[N, 8, H, W\]": lambda: pnn.DynamicBlock(8)(X[:, :4]),
    "input: expected .* at least two pixels": lambda: pnn.DynamicBlock(8)(X[:, :, :1, :1]),
    "embedding: the block has no FiLM": lambda: pnn.DynamicBlock(8)(X, torch.zeros(1, 4)),
    r"embedding: expected \[1, 4\], got None": lambda: pnn.DynamicBlock(8, film_features=4)(X),
    r"embedding: expected \[1, 4\], got shape": lambda: pnn.DynamicBlock(8, film_features=4)(X, torch.zeros(2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_parameters_are_trained():
    assert all(p.requires_grad for p in pnn.DynamicBlock(8).parameters())
    assert isinstance(pnn.DynamicBlock(8, film_features=4).film[1], nn.Linear)
