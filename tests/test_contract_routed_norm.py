"""The contract of every registry row of routed_norm: torch's accuracy, at every ISA level, forward and backward."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pydenoise import functional as PF
from pydenoise.ops import registry, routed_norm
from pydenoise.reference import routed_norm as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.routed_norm import ROUTED_NORM_CASES
from pydenoise.testing.rows import device_of, in_dtype, poisoned_memory, skip_unless, variants

GOLDEN = np.load(Path(__file__).parent / "data" / "blocks_afa.npz")
CASES = {case.name: case for case in ROUTED_NORM_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VARIANTS = variants(routed_norm.OP)
BACKWARD = variants(routed_norm.OP_BACKWARD)


@cache
def expected(name: str, dtype: torch.dtype) -> tuple:
    args = CASES[name].args(dtype)
    return reference.routed_norm(*in_dtype(args, torch.float64)), reference.routed_norm(*args)


@cache
def expected_backward(name: str, dtype: torch.dtype, full: bool) -> tuple:
    args = CASES[name].backward_args(dtype, full=full)
    wide = in_dtype(args, torch.float64)
    return reference.routed_norm_backward(*wide), reference.routed_norm_backward(*args)


def check(names: tuple[str, ...], got, exact, own, case, scales=None) -> None:
    for name, a, b, c in zip(names, got, exact, own, strict=True):
        scale = None if scales is None else scales.get(name)
        assert_accurate(a.cpu(), b, c, what=f"{name}: {case.name}, {case.why}", scale=scale)
        assert a.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", ROUTED_NORM_CASES, ids=lambda case: case.name)
def test_forward(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    skip_unless(variant.row, args)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with variant.active(), poisoned_memory(), torch.no_grad():
        got = variant.row.run(*args)
    check(("output", "carried", "stats"), got, *expected(case.name, dtype), case)
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True)), "overwritten"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("case", ROUTED_NORM_CASES, ids=lambda case: case.name)
def test_backward(case, variant, dtype):
    for full in (True, False):
        args = case.backward_args(dtype, device_of(variant.row), full)
        skip_unless(variant.row, args)
        with variant.active(), poisoned_memory(), torch.no_grad():
            got = variant.row.run(*args)
        exact, own = expected_backward(case.name, dtype, full)
        # differences of sums: their rounding is relative to what they are made of
        size = float((args[0].double().abs() * (1 + args[7].double().abs())[:, None]).amax()) if exact[0].numel() else 0
        largest = float(args[8][..., 1].amax()) if args[8].numel() else 0.0
        scales = {"input": max(size * largest, float(exact[0].abs().max()) if exact[0].numel() else 0.0)}
        check(("input", "update", "coefficients"), got, exact, own, case, scales)


@pytest.mark.parametrize("variant", variants(routed_norm.OP, "cpu"), ids=str)
@pytest.mark.parametrize("name", ["window", "updated", "updated_plain", "wide"])
def test_threads_do_not_change_a_bit(name, variant):
    row = next(row for row in registry.rows(routed_norm.OP_BACKWARD) if row.name == "cpu")
    args, back = CASES[name].args(torch.float32), CASES[name].backward_args(torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with variant.active():
            results.append((*variant.row.run(*args), *row.run(*back)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_left_out_counts_for_nothing(variant):
    """NaN and infinities in masked channels do not spread; in others they do."""
    x = torch.randn(2, 4, 24)
    spoiled = x.clone()
    spoiled[..., 20:] = torch.nan
    spoiled[0, :, 22] = torch.inf
    coefficients = torch.randn(2, 24), torch.randn(2, 24)
    device = device_of(variant.row)
    results = []
    for tokens in (x, spoiled):
        args = routed_norm.prepare(tokens.to(device), *(c.to(device) for c in coefficients), start=2, width=18)
        skip_unless(variant.row, args)
        with variant.active():
            results.append(variant.row.run(*args))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][2], results[1][2])
    spoiled[1, 2, 5] = torch.nan
    args = routed_norm.prepare(spoiled.to(device), *(c.to(device) for c in coefficients), start=2, width=18)
    with variant.active():
        output = variant.row.run(*args)[0]
    assert output[1, 2].isnan().all() and not output[1, 1].isnan().any()


@pytest.mark.parametrize("row", registry.rows(routed_norm.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["plain", "updated", "compact", "empty"])
def test_opcheck(row, name):
    args = CASES[name].args(torch.float32, device_of(row))
    if row.unsupported(*args) is not None:
        pytest.skip(row.unsupported(*args))
    args = tuple(a.detach().requires_grad_(i != 1) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args))
    torch.library.opcheck(torch.ops.pydenoise.routed_norm.default, (*args, row.name))
    args = CASES[name].backward_args(torch.float32, device_of(row))
    torch.library.opcheck(torch.ops.pydenoise.routed_norm_backward.default, (*args, row.name))


@pytest.mark.parametrize("row", registry.rows(routed_norm.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["windows", "updated", "compact", "random"])
def test_gradients_of_every_argument(row, name):
    input, shift, scale, options = CASES[name].tensors(torch.float32, device_of(row))
    if row.unsupported(input) is not None:
        pytest.skip(row.unsupported(input))

    def gradients(dtype, device, backend):
        move = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        leaves = [t.to(device, dtype).requires_grad_() for t in (input, shift, scale)]
        for key in ("update", "gate"):
            if key in move:
                move[key] = move[key].to(dtype).requires_grad_()
                leaves.append(move[key])
        result = PF.routed_norm(*leaves[:3], **move, backend=backend)
        loss = result.output.square().sum() + result.constant.to(dtype).sin().sum() * 3
        loss = loss if result.carried is None else loss + result.carried.cos().sum()
        return torch.autograd.grad(loss, leaves)

    found = gradients(torch.float32, device_of(row), row.name)
    for got, exact, own in zip(
        found, gradients(torch.float64, "cpu", "reference"), gradients(torch.float32, "cpu", "reference"), strict=True
    ):
        assert_accurate(got.cpu(), exact, own, scale=exact.abs().max().item() * 4)


@pytest.mark.parametrize("name", ["windows", "updated_windows", "compact"])
def test_formulas(name):
    """First derivatives by finite differences, second ones too."""
    input, shift, scale, options = CASES[name].tensors(torch.float64)
    input, shift, scale = input[:2, :2], shift[:2], scale[:2]
    names = [key for key in ("update", "gate") if key in options]
    options = {k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if names:
        options["update"] = options["update"][:, :2]
    leaves = [t.clone().requires_grad_() for t in (input, shift, scale, *(options[key] for key in names))]

    def call(*values):
        result = PF.routed_norm(
            *values[:3], **{**options, **dict(zip(names, values[3:], strict=True))}, backend="reference"
        )
        return tuple(t for t in result if t is not None)

    assert torch.autograd.gradcheck(call, leaves)
    small = [t[:1, :1] if t.dim() == 3 else t[:1] for t in leaves]
    options = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert torch.autograd.gradgradcheck(call, [t.detach().requires_grad_() for t in small])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_golden(variant):
    """A linear layer behind the norm of masked channels: the whole product, and the window's with a rank-one rest."""
    keys = ("x", "scale", "shift", "W", "b", "start", "out")
    x, scale, shift, weight, bias, start, out = (torch.from_numpy(GOLDEN[f"dtr_lnlin_{key}"]) for key in keys)
    width = int(GOLDEN["dtr_lnlin_n"])
    output = PF.routed_norm(x, shift, scale, start=start, width=width).output
    torch.testing.assert_close(output @ weight.t() + bias, out, rtol=0, atol=1e-13)
    for b in range(len(x)):
        first = int(start[b])
        part = PF.routed_norm(x[b : b + 1], shift[b : b + 1], scale[b : b + 1], start=first, width=width, compact=True)
        outside = torch.ones(x.shape[-1], dtype=torch.bool)
        outside[first : first + width] = False
        v1 = weight[:, outside] @ (1 + scale[b, outside])
        v0 = bias + weight[:, outside] @ shift[b, outside]
        got = part.output @ weight[:, ~outside].t() + part.constant[..., None] * v1 + v0
        torch.testing.assert_close(got[0], out[b], rtol=0, atol=1e-13)
    args = routed_norm.prepare(
        x.float().to(device_of(variant.row)), *(t.float().to(device_of(variant.row)) for t in (shift, scale)),
        start=start.to(device_of(variant.row)), width=width,
    )  # fmt: skip
    skip_unless(variant.row, args)
    with variant.active():
        got = variant.row.run(*args)[0].cpu().double()
    torch.testing.assert_close(got @ weight.t() + bias, out, rtol=0, atol=2e-5)


def test_functional():
    case = CASES["updated"]
    input, shift, scale, options = case.tensors(torch.float32)
    result = PF.routed_norm(input, shift, scale, **options)
    mask = torch.zeros(48, dtype=torch.bool)
    mask[4:44] = True
    same = PF.routed_norm(input, shift, scale, mask=mask, update=options["update"], gate=options["gate"])
    assert torch.equal(result.output, same.output) and torch.equal(result.carried, same.carried)
    plain = PF.routed_norm(input, shift, scale)
    assert plain.carried is None
    whole = torch.nn.functional.layer_norm(input, (48,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(plain.output, whole, rtol=1e-5, atol=1e-5)
    compact = PF.routed_norm(input, shift, scale, start=4, width=40, compact=True)
    masked = PF.routed_norm(input, shift, scale, start=4, width=40)
    torch.testing.assert_close(compact.output, masked.output[..., 4:44], rtol=1e-5, atol=1e-5)
    left = compact.constant[..., None] * (1 + scale[:, None, :4]) + shift[:, None, :4]
    torch.testing.assert_close(left, masked.output[..., :4], rtol=1e-5, atol=1e-5)


def test_compiles():
    input, shift, scale, options = CASES["updated_windows"].tensors(torch.float32)
    input = input.requires_grad_()

    def loss(x):
        result = PF.routed_norm(x, shift, scale, **options)
        return result.output.square().sum() + result.carried.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(input), input)
    (actual,) = torch.autograd.grad(compiled(input), input)
    torch.testing.assert_close(actual, expected)


X, S = torch.zeros(2, 3, 8), torch.zeros(2, 8)
BAD = {
    "input: expected a torch.Tensor": lambda: PF.routed_norm([1.0], S, S),
    "input: expected a floating-point": lambda: PF.routed_norm(X.int(), S, S),
    r"input: expected \[B, T, C\]": lambda: PF.routed_norm(X[0], S, S),
    "shift: expected shape": lambda: PF.routed_norm(X, S[:1], S),
    "scale: expected a floating-point": lambda: PF.routed_norm(X, S, S.long()),
    "update: update and gate go together": lambda: PF.routed_norm(X, S, S, gate=S),
    "gate: update and gate go together": lambda: PF.routed_norm(X, S, S, update=X),
    "update: expected shape": lambda: PF.routed_norm(X, S, S, update=X[:, :1], gate=S),
    "update: expected dtype": lambda: PF.routed_norm(X, S, S, update=X.half(), gate=S),
    "eps: expected a finite number": lambda: PF.routed_norm(X, S, S, eps=-1.0),
    "eps: expected a number": lambda: PF.routed_norm(X, S, S, eps="small"),
    "mask: expected either": lambda: PF.routed_norm(X, S, S, mask=S > 0, width=3),
    "mask: expected dtype torch.bool": lambda: PF.routed_norm(X, S, S, mask=S),
    r"mask: expected \[8\] or \[2, 8\]": lambda: PF.routed_norm(X, S, S, mask=torch.ones(3, 8).bool()),
    "width: expected an int beside start": lambda: PF.routed_norm(X, S, S, start=1),
    "width: expected 1 to 8": lambda: PF.routed_norm(X, S, S, start=0, width=9),
    "start: expected an int or a tensor": lambda: PF.routed_norm(X, S, S, width=3),
    "start: expected 0 to 5, got 6": lambda: PF.routed_norm(X, S, S, start=6, width=3),
    "start: expected 0 to 5, got -1": lambda: PF.routed_norm(X, S, S, start=torch.tensor([0, -1]), width=3),
    "start: expected integers": lambda: PF.routed_norm(X, S, S, start=torch.zeros(2), width=3),
    "start: expected an int or shape": lambda: PF.routed_norm(X, S, S, start=torch.zeros(3).long(), width=3),
    "compact: expected a window": lambda: PF.routed_norm(X, S, S, compact=True),
    "compact: expected a window with one": lambda: PF.routed_norm(
        X, S, S, start=torch.tensor([0, 1]), width=3, compact=True
    ),
    "backend: expected": lambda: PF.routed_norm(X, S, S, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
