"""The contract of every registry row of the gated wavelets: torch's accuracy, at every ISA level, in every layout."""

from functools import cache

import pytest
import torch

from pydenoise.ops import registry, wavelet_gate
from pydenoise.reference import wavelet_gate as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.rows import Variant, device_of, poisoned_memory, variants
from pydenoise.testing.wavelet_gate import WAVELET_GATE_CASES, WaveletGateCase

CASES = {case.name: case for case in WAVELET_GATE_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORWARD, BACKWARD, POOL = (variants(op) for op in (wavelet_gate.OP, wavelet_gate.OP_BACKWARD, wavelet_gate.OP_POOL))
WHOLE = ("down_plain", "down_odd_last", "up_rows", "down_pool", "up_parts_last", "up_empty")


def run(variant: Variant, args: tuple):
    """The row's result on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with variant.active(), poisoned_memory(), torch.no_grad():
        result = variant.row.run(*args)
    after = [a for a in args if isinstance(a, torch.Tensor)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num()), "overwritten"
    return result


@cache
def expected(name: str, dtype: torch.dtype, backward: bool) -> tuple:
    """The exact result and torch's own, once for all rows and ISA levels."""
    case = CASES[name]
    args = case.backward_args(dtype) if backward else case.args(dtype)
    function = reference.wavelet_gate_backward if backward else reference.wavelet_gate
    position = 2 if backward else 1

    def computed(dtype: torch.dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args]
        moved[position] = args[position].to(wide)
        return function(*moved)

    return computed(torch.float64), computed(dtype)


def check_layout(result: torch.Tensor, input: torch.Tensor) -> None:
    like = wavelet_gate.empty_like_input(input, result.shape)
    assert result.stride() == like.stride(), "the memory format that the fake kernel promises"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", FORWARD, ids=str)
@pytest.mark.parametrize("case", WAVELET_GATE_CASES, ids=lambda case: case.name)
def test_forward(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    result = run(variant, args)
    assert_accurate(result.cpu(), *expected(case.name, dtype, False), what=f"{case.name}, {case.why}")
    check_layout(result, args[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("case", WAVELET_GATE_CASES, ids=lambda case: case.name)
def test_backward(case, variant, dtype):
    """Both gradients, and each alone with the same bits."""
    args = case.backward_args(dtype, device_of(variant.row))
    results = run(variant, args)
    for name, result, exact, own in zip(("input", "gate"), results, *expected(case.name, dtype, True), strict=True):
        assert_accurate(result.cpu(), exact, own, what=f"gradient of {name}: {case.name}, {case.why}")
    check_layout(results[0], args[1])
    assert results[1].is_contiguous()
    for place, mask in enumerate(([True, False], [False, True])):
        alone = run(variant, (*args[:-1], mask))
        assert alone[1 - place] is None
        assert torch.equal(alone[place], results[place])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", POOL, ids=str)
@pytest.mark.parametrize("case", WAVELET_GATE_CASES, ids=lambda case: case.name)
def test_pool(case, variant, dtype):
    input = case.args(dtype, device_of(variant.row))[0]
    exact, own = (input.cpu().to(d).mean((2, 3)) for d in (torch.float64, dtype))
    assert_accurate(run(variant, (input,)).cpu(), exact, own, what=f"{case.name}, {case.why}")


@pytest.mark.parametrize("variant", variants(wavelet_gate.OP, "cpu"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_do_not_change_a_bit(variant, dtype):
    by_name = {op: Variant(next(r for r in registry.rows(op) if r.name == "cpu"), variant.isa)
               for op in (wavelet_gate.OP, wavelet_gate.OP_BACKWARD, wavelet_gate.OP_POOL)}  # fmt: skip
    for name in ("down_parts", "up_parts", "down_parts_last", "up_parts_last", "down_pool_odd", "up_pool_last"):
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            args = CASES[name].backward_args(dtype)
            forward = run(by_name[wavelet_gate.OP], CASES[name].args(dtype))
            pooled = run(by_name[wavelet_gate.OP_POOL], (args[1],))
            results.append((forward, pooled, *run(by_name[wavelet_gate.OP_BACKWARD], args)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), name


@pytest.mark.parametrize("variant", FORWARD, ids=str)
def test_samples_do_not_know_of_each_other(variant):
    """Every sample has its own gates; alone it gives the same bits."""
    for name in ("down_per_channel", "up_plain", "down_last", "up_odd_last"):
        input, gate, up, size = CASES[name].args(torch.float32, device_of(variant.row))
        together = run(variant, (input, gate, up, size))
        for n in range(input.shape[0]):
            alone = run(variant, (input[n : n + 1], gate[n : n + 1], up, size))
            assert torch.equal(alone, together[n : n + 1])


ARRANGEMENTS = {
    "expanded": lambda t: t[:1, :1, :1, :1].expand(t.shape),
    "reversed axes": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "other layout": lambda t: t.contiguous(memory_format=torch.channels_last) if t.stride(3) == 1 else t.contiguous(),
    "sliced channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "sliced pixels": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
}


@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("position", [0, 1], ids=["grad", "input"])
def test_memory_arrangements(position, arrangement, variant):
    """The result depends on the values alone, not on how the tensors lie in memory."""
    forward = Variant(next(r for r in registry.rows(wavelet_gate.OP) if r.name == variant.row.name), variant.isa)
    for name in ("down_odd", "up_odd", "down_last", "up_last"):
        args = list(CASES[name].backward_args(torch.float32, device_of(variant.row)))
        args[position] = ARRANGEMENTS[arrangement](args[position])
        plain = [a.contiguous() if place == position else a for place, a in enumerate(args)]
        for got, want in zip(run(variant, tuple(args)), run(variant, tuple(plain)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        if position == 1:
            got, want = (run(forward, (a[1], a[2], *a[4:6])) for a in (args, plain))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", FORWARD, ids=str)
def test_values_that_are_not_finite_stay_where_they_are(variant):
    case = CASES["down_plain"]
    input, gate, up, size = case.args(torch.float32, device_of(variant.row))
    input[0, 3, 5, 9], input[1, 0, 0, 63] = torch.nan, torch.inf
    result = run(variant, (input, gate, up, size)).isfinite()
    assert not result[0, 3, 2, 4] and not result[1, 0, 0, 31] and (~result).sum() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
def test_gates_of_other_dtypes(variant, dtype):
    """They are used as float32, and their gradients are in their dtype."""
    for name in ("down_plain", "up_per_channel"):
        grad, input, gate, *rest = CASES[name].backward_args(torch.float32, device_of(variant.row))
        gate = gate.to(dtype)
        got = run(variant, (grad, input, gate, *rest))
        want = run(variant, (grad, input, gate.float(), *rest))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1].to(dtype))


def tensors(case: WaveletGateCase) -> tuple:
    return tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in case.args(torch.float32))


@pytest.mark.parametrize("row", registry.rows(wavelet_gate.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", WHOLE)
def test_opcheck(name, row):
    case = CASES[name]
    if (reason := row.unsupported(*case.args(torch.float32))) is not None:
        pytest.skip(reason)
    torch.library.opcheck(torch.ops.pydenoise.wavelet_gate.default, (*tensors(case), row.name))
    torch.library.opcheck(
        torch.ops.pydenoise.wavelet_gate_backward.default, (*case.backward_args(torch.float32), row.name)
    )
    torch.library.opcheck(torch.ops.pydenoise.wavelet_gate_pool.default, (tensors(case)[0], row.name))
