"""The contract of every registry row of adaptive_bilateral_filter and its backward pass, at every ISA level."""

from functools import cache

import pytest
import torch

from pydenoise.ops import adaptive_bilateral_filter as op
from pydenoise.ops import registry
from pydenoise.reference import adaptive_bilateral_filter as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.adaptive_bilateral_filter import BILATERAL_CASES
from pydenoise.testing.rows import device_of, poisoned_memory, variants

CASES = {case.name: case for case in BILATERAL_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORWARD, BACKWARD = variants(op.OP), variants(op.OP_BACKWARD)

by_name = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}


def run(variant, args: tuple) -> tuple:
    """The row's result on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with variant.active(), poisoned_memory(), torch.no_grad():
        result = variant.row.run(*args)
    for old, new in zip(before, args, strict=True):
        assert not isinstance(old, torch.Tensor) or torch.equal(old, new), "overwritten"
    return result


def in_dtype(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(a.cpu().to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def expected(name: str, dtype: torch.dtype) -> tuple:
    """(exact, torch's own) output and sum of weights; torch's own in the arithmetic of the kernels, then rounded."""
    args = CASES[name].args(dtype, save_norm=True)
    exact = reference.adaptive_bilateral_filter(*in_dtype(args, torch.float64))
    output, norm = reference.adaptive_bilateral_filter(*in_dtype(args, arithmetic(dtype)))
    return exact, (output.to(dtype), norm)


@cache
def expected_backward(name: str, dtype: torch.dtype) -> tuple:
    """(exact by autograd, torch's own from what the forward pass keeps, the magnitude of sigma's terms)."""
    args = CASES[name].backward_args(dtype)
    grad, input, sigma, radius, output, norm, mask = in_dtype(args, torch.float64)
    leaves = [input.requires_grad_(), sigma.requires_grad_()]
    with torch.enable_grad():
        y = reference.adaptive_bilateral_filter(*leaves, radius, False)[0]
        exact = torch.autograd.grad(y, leaves, grad) if y.numel() else [torch.zeros_like(t) for t in leaves]
    own = reference.adaptive_bilateral_filter_backward(*in_dtype(args, arithmetic(dtype)))
    return exact, (own[0].to(dtype), own[1]), _magnitudes(*in_dtype(args, torch.float64))


@torch.no_grad()
def _magnitudes(grad, input, sigma, radius, output, norm, mask) -> float:
    """The largest sum of the magnitudes of the terms of sigma's gradient, which cancel."""
    if not input.numel():
        return 0.0
    maps = reference._pixels(sigma, input.shape[2:])
    total = torch.zeros_like(maps)
    for dy, dx, x, weight in reference._taps(input, sigma, radius):
        a = weight / norm[:, None] * (grad * (x - output)).sum(1, keepdim=True).abs()
        distance = (x - input).square().sum(1, keepdim=True)
        total += a * torch.cat([torch.full_like(a, dx**2), torch.full_like(a, dy**2), distance], 1)
    tiles = (sigma.shape[1], maps.shape[2] // sigma.shape[1], sigma.shape[2], maps.shape[3] // sigma.shape[2])
    return (total / maps**3).view(*maps.shape[:2], *tiles).sum((3, 5)).amax().item()


@pytest.mark.parametrize("dtype", DTYPES, **by_name)
@pytest.mark.parametrize("variant", FORWARD, ids=str)
@pytest.mark.parametrize("case", BILATERAL_CASES, **by_name)
def test_results(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row), save_norm=True)
    output, norm = run(variant, args)
    exact, own = expected(case.name, dtype)
    assert_accurate(output, exact[0], own[0], what=f"{case.name}, {case.why}")
    assert_accurate(norm, exact[1], own[1], what="sum of weights")
    assert output.is_contiguous()
    alone, nothing = run(variant, (*args[:-1], False))
    assert torch.equal(alone, output) and nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, **by_name)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("case", BILATERAL_CASES, **by_name)
def test_gradients(case, variant, dtype):
    args = case.backward_args(dtype, device_of(variant.row))
    dinput, dsigma = run(variant, args)
    exact, own, magnitude = expected_backward(case.name, dtype)
    assert_accurate(dinput, exact[0], own[0], what=f"gradient of input: {case.name}, {case.why}")
    assert_accurate(dsigma, exact[1], own[1], what=f"gradient of sigma: {case.name}, {case.why}", scale=magnitude)
    assert dinput.is_contiguous() and dsigma.is_contiguous()


@pytest.mark.parametrize("variant", BACKWARD, ids=str)
def test_gradient_masks(variant):
    everything = run(variant, CASES["rgb"].backward_args(torch.float32, device_of(variant.row)))
    for mask in ((True, False), (False, True), (False, False)):
        grads = run(variant, CASES["rgb"].backward_args(torch.float32, device_of(variant.row), mask))
        for got, want, full in zip(grads, mask, everything, strict=True):
            assert (got is not None) == want
            torch.testing.assert_close(got, full if want else None, rtol=0, atol=0)


ARRANGEMENTS = {
    "input expanded": (1, lambda t: t[:, :1].expand_as(t)),
    "input reversed axes": (1, lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)),
    "grad expanded": (0, lambda t: t[:1, :1, :1, :1].expand_as(t)),
    "grad in channels_last": (0, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "output in channels_last": (4, lambda t: t.contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_memory_arrangements(variant, name):
    """The result depends on the values alone, not on how the tensors lie in memory."""
    position, rearrange = ARRANGEMENTS[name]
    args = list(CASES["rgb_per_image"].backward_args(torch.float32, device_of(variant.row)))
    args[position] = rearrange(args[position])
    plain = list(args)
    plain[position] = args[position].clone(memory_format=torch.contiguous_format)
    for one, other in zip(run(variant, tuple(args)), run(variant, tuple(plain)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES[:2], **by_name)
@pytest.mark.parametrize("name", ["tiles", "rgb", "many_channels", "large_tiles", "blocks", "per_image", "one_sigma"])
def test_threads_do_not_change_a_bit(name, dtype):
    forward, backward = variants(op.OP, "cpu")[-1], variants(op.OP_BACKWARD, "cpu")[-1]
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(
            (*run(forward, CASES[name].args(dtype, save_norm=True)), *run(backward, CASES[name].backward_args(dtype)))
        )
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", FORWARD, ids=str)
def test_an_image_does_not_depend_on_its_batch(variant):
    args = CASES["per_image"].args(torch.float32, device_of(variant.row))
    together = run(variant, args)[0]
    for i in range(together.shape[0]):
        alone = run(variant, (args[0][i : i + 1], args[1][i : i + 1], *args[2:]))[0]
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("row", registry.rows(op.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["rgb", "uneven_tiles", "per_image", "empty"])
def test_opcheck(name, row):
    args = CASES[name].args(torch.float32, device_of(row), save_norm=True)
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    leaves = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    # no gradient goes through the sum of weights, so the check of autograd is left to the functional's tests
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pydenoise.adaptive_bilateral_filter.default, (*leaves, row.name), test_utils=checks)


@pytest.mark.parametrize("row", registry.rows(op.OP_BACKWARD), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["rgb", "uneven_tiles", "empty"])
def test_opcheck_backward(name, row):
    args = CASES[name].backward_args(torch.float32, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    torch.library.opcheck(torch.ops.pydenoise.adaptive_bilateral_filter_backward.default, (*args, row.name))
