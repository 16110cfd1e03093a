"""The Triton kernels of the gated wavelets against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

from pydenoise import functional as PF
from pydenoise.ops import registry
from pydenoise.reference import wavelet_gate as reference
from pydenoise.testing.wavelet_gate import WAVELET_GATE_CASES

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import wavelet_gate as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


def wide(args: tuple) -> tuple:
    return tuple(a.cpu().double() if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WAVELET_GATE_CASES, ids=lambda case: case.name)
def test_cases(case, dtype):
    args = case.args(dtype, DEVICE)
    result = kernels.wavelet_gate(*args)
    assert result.dtype == dtype
    check(result, reference.wavelet_gate(*wide(args)), dtype)
    check(kernels.wavelet_gate_pool(args[0]), args[0].cpu().double().mean((2, 3)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WAVELET_GATE_CASES, ids=lambda case: case.name)
def test_backward_cases(case, dtype):
    args = case.backward_args(dtype, DEVICE)
    of_input, of_gate = kernels.wavelet_gate_backward(*args)
    exact = reference.wavelet_gate_backward(*wide(args))
    check(of_input, exact[0], dtype)
    check(of_gate, exact[1], torch.float32)
    assert torch.equal(kernels.wavelet_gate_backward(*args[:-1], [True, False])[0], of_input)
    assert torch.equal(kernels.wavelet_gate_backward(*args[:-1], [False, True])[1], of_gate)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("adjacent", ["columns", "channels"])
def test_every_tile(adjacent, up):
    """Each tile of each kernel gives the same sums, but for their rounding."""
    name = f"{'up' if up else 'down'}_{'parts_last' if adjacent == 'channels' else 'parts'}"
    case = next(case for case in WAVELET_GATE_CASES if case.name == name)
    args = case.args(torch.float32, DEVICE)
    exact = reference.wavelet_gate(*wide(args))
    for variant in kernels._BY_LAYOUT["wavelet_up" if up else "wavelet_down", adjacent].variants:
        output = torch.empty_strided(exact.shape, kernels._empty(args[0], tuple(exact.shape)).stride(), device=DEVICE)
        kernels.plan_forward(*args, output).run(variant.config())
        check(output, exact, torch.float32)
    grad, input, gate, _, up, size, _ = case.backward_args(torch.float32, DEVICE)
    exact = reference.wavelet_gate_backward(*wide((grad, input, gate, None, up, size, [True, True])))
    for variant in kernels._BY_LAYOUT["wavelet_up_backward" if up else "wavelet_down_backward", adjacent].variants:
        output, of_gate = kernels._empty(input, tuple(input.shape)), torch.empty(gate.shape, device=DEVICE)
        backward, join = kernels.plan_backward(grad, input, gate, None, up, size, output, of_gate)
        backward.run(variant.config())
        join.run()
        check(output, exact[0], torch.float32)
        check(of_gate, exact[1], torch.float32)


def test_functional_and_reasons():
    x, gate = torch.randn(2, 8, 6, 6).to(DEVICE).requires_grad_(), torch.rand(2, 4).to(DEVICE).requires_grad_()
    for function in (PF.wavelet_gate_down, PF.wavelet_gate_up):
        own = function(x, gate, backend="triton")
        expected = function(x, gate, backend="reference")
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, gate)) for y in (own, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    row = next(row for row in registry.rows("wavelet_gate") if row.name == "triton")
    assert "float64" in row.unsupported(x.double(), gate) and "meta" in row.unsupported(x.to("meta"), gate)
    large = torch.empty(1, 2**20, 2**6, 2**6, device="meta")
    assert "2^30" in row.unsupported(large, gate)
