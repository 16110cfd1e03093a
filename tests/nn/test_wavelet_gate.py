"""The gated wavelets as functionals and modules: golden data, identities, gradients through everything, bad input."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pydenoise as pdn
from pydenoise import functional as PF
from pydenoise.nn import WaveletGateDown, WaveletGateUp
from pydenoise.reference import wavelet_gate as reference

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "blocks_wavelet.npz")
ONES = torch.ones(2, 4)


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"sd_wg_{name}"])


# ----------------------------------------------------------------------------------------------------- golden data


def test_golden():
    x, gate = golden("x"), golden("gate")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        backend = "auto" if dtype == torch.float32 else "reference"
        down = PF.wavelet_gate_down(x.to(dtype), gate.to(dtype), backend=backend)
        torch.testing.assert_close(down.double(), golden("down"), rtol=tolerance, atol=tolerance)
        up = PF.wavelet_gate_up(x.to(dtype), gate.to(dtype), backend=backend)
        torch.testing.assert_close(up.double(), golden("up"), rtol=tolerance, atol=tolerance)


def test_golden_gates():
    module = WaveletGateDown(8).double()
    values = {"hidden.weight": golden("W1"), "hidden.bias": torch.zeros(4), "output.bias": torch.zeros(4)}
    module.gates.load_state_dict(values | {"output.weight": golden("W2")})
    gate = module.gates(PF.wavelet_gate_pool(golden("x"), backend="reference"))
    torch.testing.assert_close(gate, golden("gate"), rtol=1e-12, atol=0)
    torch.testing.assert_close(module.float()(golden("x").float()).double(), golden("down"), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_identities(size, channels_last, backend):
    x = torch.randn(2, 6, *size)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def down(*gate: float) -> torch.Tensor:
        return PF.wavelet_gate_down(x, torch.tensor([gate, gate], dtype=torch.float32), backend=backend)

    even = F.pad(x, (0, size[1] % 2, 0, size[0] % 2), mode="replicate")
    torch.testing.assert_close(down(0.5, 0, 0, 0), F.avg_pool2d(even, 2))
    torch.testing.assert_close(down(1, 1, 1, 1), 2 * x[..., ::2, ::2])
    bands = torch.cat([down(*row) for row in torch.eye(4).tolist()], 1)
    for own, band in zip(bands.chunk(4, 1), reference.bands(x), strict=True):
        torch.testing.assert_close(own, band)
    torch.testing.assert_close(PF.wavelet_gate_up(bands, ONES, size=size, backend=backend), x)
    if size == (8, 12):
        assert bands.square().sum().item() == pytest.approx(x.square().sum().item(), rel=1e-5)  # Parseval


def test_bands_have_their_names():
    """B1 is the difference of columns, B2 that of rows."""
    columns, rows = torch.tensor([[1.0, -1.0]]).expand(2, 2), torch.tensor([[1.0], [-1.0]]).expand(2, 2)
    for image, band in ((columns, 1), (rows, 2), (columns * rows, 3), (torch.ones(2, 2), 0)):
        gates = torch.eye(4)[:, :, None]
        values = PF.wavelet_gate_down(image.expand(4, 1, 2, 2), gates).flatten()
        assert values.tolist() == [2.0 if i == band else 0.0 for i in range(4)]


def test_gates_are_per_sample_and_per_channel():
    x, gate = torch.randn(3, 5, 6, 8), torch.rand(3, 4, 5)
    together = PF.wavelet_gate_down(x, gate)
    for n in range(3):
        for c in range(5):
            own = PF.wavelet_gate_down(x[n : n + 1, c : c + 1], gate[n : n + 1, :, c])
            torch.testing.assert_close(together[n : n + 1, c : c + 1], own)
    shared = PF.wavelet_gate_down(x, gate[:, :, :1].expand(3, 4, 5))
    torch.testing.assert_close(shared, PF.wavelet_gate_down(x, gate[:, :, 0]))


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_gradcheck(size, up, per_channel):
    """First and second derivatives of the reference, which the compiled rows are compared with."""
    coarse = reference.coarse_size(size)
    x = torch.randn(2, 8 if up else 2, *(coarse if up else size), dtype=torch.float64, requires_grad=True)
    gate = torch.rand(2, 4, *((2,) if per_channel else ()), dtype=torch.float64, requires_grad=True)
    options = {"size": size} if up else {}
    function = PF.wavelet_gate_up if up else PF.wavelet_gate_down

    def call(x, gate):
        return function(x, gate, backend="reference", **options)

    torch.autograd.gradcheck(call, (x, gate))
    torch.autograd.gradgradcheck(call, (x, gate))
    torch.autograd.gradcheck(lambda x: PF.wavelet_gate_pool(x, backend="reference"), (x,))


@pytest.mark.parametrize("up", [False, True])
def test_gradients_of_the_formula(up):
    """Through the functional, in float32, against autograd through the plain formula."""
    x, gate = torch.randn(2, 12, 6, 10), torch.rand(2, 4, 3 if up else 12)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, gate)]
        y = function(*leaves)
        return torch.autograd.grad(y.square().sum(), leaves)

    size = (12, 20) if up else (6, 10)
    own = gradients(PF.wavelet_gate_up if up else PF.wavelet_gate_down, torch.float32)
    exact = gradients(lambda x, g: reference.wavelet_gate(x, g, up, size), torch.float64)
    for a, b in zip(own, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


MODULES = {
    "down": lambda **o: WaveletGateDown(8, **o),
    "up": lambda **o: WaveletGateUp(8, **o),
}


def started(module: torch.nn.Module) -> torch.nn.Module:
    """Gates that depend on the input, in place of the start at 0.5."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def composed(module, x, temb):
    """The block from plain torch operations."""
    up = isinstance(module, WaveletGateUp)
    gate = module.gates(x.mean((2, 3)), temb)
    size = tuple(2 * s for s in x.shape[2:]) if up else tuple(x.shape[2:])
    return reference.wavelet_gate(x, gate, up, size)


@pytest.mark.parametrize("temb_dim", [None, 5])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_joined_gradients(channels_last, kind, per_channel, temb_dim):
    """One node for mean, gates and wavelets has the gradients of the three."""
    module = started(MODULES[kind](per_channel=per_channel, temb_dim=temb_dim))
    x = torch.randn(3, 8, 7, 6)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    temb = None if temb_dim is None else torch.randn(3, temb_dim, requires_grad=True)
    leaves = [t for t in (x, temb, *module.parameters()) if t is not None]
    y, expected = module(x, temb), composed(module, x, temb)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert type(y.grad_fn).__name__ == "_JoinedBackward"
    weights = torch.randn_like(y)
    own, exact = (torch.autograd.grad((t * weights).sum(), leaves) for t in (y, expected))
    for a, b in zip(own, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_joined_gradients_twice():
    """With create_graph=True: a gradient penalty has the gradients of the plain formula."""
    module = started(WaveletGateDown(6, temb_dim=3)).double()
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64, requires_grad=True)
    temb = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, temb, *module.parameters()]

    def penalty(y):
        (of_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(of_x.square().sum(), leaves)

    with pytest.warns(pdn.FallbackWarning):
        own = penalty(module(x, temb))
    for a, b in zip(own, penalty(composed(module, x, temb)), strict=True):
        torch.testing.assert_close(a, b)


def test_parameters_that_stand_in_and_frozen_ones():
    module = started(WaveletGateDown(6))
    x = torch.randn(2, 6, 4, 6, requires_grad=True)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, others, (x,))
    found = torch.autograd.grad(y.sum(), list(others.values()))
    twin = copy.deepcopy(module)
    twin.load_state_dict({name: p.detach() for name, p in others.items()})
    expected = torch.autograd.grad(twin(x).sum(), list(twin.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    module.requires_grad_(False)
    module(x).sum().backward()
    (of_x,) = torch.autograd.grad(composed(module, x, None).sum(), x)
    torch.testing.assert_close(x.grad, of_x)
    assert all(p.grad is None for p in module.parameters())


def test_backward_twice_and_without_input_gradients():
    module, x = started(WaveletGateUp(8)), torch.randn(2, 8, 4, 5, requires_grad=True)
    y = module(x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    module.zero_grad()
    module(x.detach()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# --------------------------------------------------------------------------------------------------------- modules


def test_start():
    """All gates at 0.5: the upper left pixels; and back, a pixel in the upper left corner of each block."""
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(WaveletGateDown(8)(x), x[..., ::2, ::2])
    assert WaveletGateDown(8).gates(torch.randn(2, 8)).unique().tolist() == [0.5]
    assert WaveletGateUp(8, per_channel=True, temb_dim=3).gates(torch.randn(2, 8), torch.randn(2, 3)).shape == (2, 4, 2)
    assert WaveletGateUp(8)(x).shape == (2, 2, 12, 12)
    assert WaveletGateUp(8)(x, size=(11, 12)).shape == (2, 2, 11, 12)
    module = WaveletGateDown(10)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    weights = {"gates.hidden.weight": (5, 10), "gates.output.weight": (4, 5)}
    assert shapes == weights | {"gates.hidden.bias": (5,), "gates.output.bias": (4,)}
    assert "10, a gate per band" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    module, x = started(WaveletGateDown(8)), torch.randn(2, 8, 6, 6, requires_grad=True)
    expected = module(x)
    half = copy.deepcopy(module).to(dtype)
    torch.testing.assert_close(half(x.to(dtype)).float(), expected, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", dtype):
        y = module(x)
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_compiles_and_exports():
    module = started(torch.nn.Sequential(WaveletGateDown(4), torch.nn.Conv2d(4, 8, 1), WaveletGateUp(8)))
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    a, b = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (compiled, module))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    program = torch.export.export(module.eval(), (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), module(x).detach())


def test_explain(capsys):
    for name, args in (("down", (torch.randn(1, 4, 4, 4), ONES[:1])), ("up", (torch.randn(1, 4, 4, 4), ONES[:1]))):
        assert pdn.explain(f"wavelet_gate_{name}", *args).op == f"wavelet_gate_{name}"
    assert pdn.explain("wavelet_gate_pool", torch.randn(1, 4, 4, 4)).chosen
    assert "reference" in capsys.readouterr().out


X, G = torch.zeros(2, 8, 6, 6), torch.ones(2, 4)
BAD = {
    "input: expected a torch.Tensor": lambda: PF.wavelet_gate_down([1.0], G),
    "input: expected a floating-point": lambda: PF.wavelet_gate_down(X.int(), G),
    r"input: expected \[B, C, H, W\]": lambda: PF.wavelet_gate_down(X[0], G),
    r"H and W at least 1, got shape \(2, 8, 0, 6\)": lambda: PF.wavelet_gate_pool(X[:, :, :0]),
    "input: expected even height and width, got 5 x 6": lambda: PF.wavelet_gate_down(X[:, :, 1:], G, odd="refuse"),
    "odd: expected one of 'replicate', 'refuse'": lambda: PF.wavelet_gate_down(X, G, odd="crop"),
    "gate: expected a torch.Tensor": lambda: PF.wavelet_gate_down(X, 1.0),
    "gate: expected a floating-point": lambda: PF.wavelet_gate_down(X, G.int()),
    r"gate: expected shape \(2, 4\) or \(2, 4, 8\), got \(1, 4\)": lambda: PF.wavelet_gate_down(X, G[:1]),
    r"or \(2, 4, 2\), got \(2, 4, 8\)": lambda: PF.wavelet_gate_up(X, torch.ones(2, 4, 8)),
    "gate: expected device": lambda: PF.wavelet_gate_down(X, G.to("meta")),
    "channels divisible by 4": lambda: PF.wavelet_gate_up(X[:, :6], G),
    "size: expected 11 or 12 rows and 11 or 12 columns": lambda: PF.wavelet_gate_up(X, G, size=(12, 10)),
    "size: expected one int or 2 ints": lambda: PF.wavelet_gate_up(X, G, size=(12, 12, 12)),
    "size: expected ints": lambda: PF.wavelet_gate_up(X, G, size=(12.0, 12)),
    "backend: expected": lambda: PF.wavelet_gate_up(X, G, backend="gpu"),
    "channels: expected ints >= 1": lambda: WaveletGateDown(0),
    "channels: expected a multiple of 4": lambda: WaveletGateUp(6),
    "hidden: expected ints >= 1": lambda: WaveletGateDown(8, hidden=0),
    "temb_dim: expected ints": lambda: WaveletGateDown(8, temb_dim=2.5),
    "odd: expected one of": lambda: WaveletGateDown(8, odd="zero"),
    r"input: expected \[B, 4, H, W\]": lambda: WaveletGateDown(4)(X),
    r"temb: expected shape \(2, 3\), got None": lambda: WaveletGateDown(8, temb_dim=3)(X),
    r"temb: expected None, got \(2, 3\)": lambda: WaveletGateDown(8)(X, torch.ones(2, 3)),
    r"temb: expected shape \(2, 3\), got \(1, 3\)": lambda: WaveletGateDown(8, temb_dim=3)(X, torch.ones(1, 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
