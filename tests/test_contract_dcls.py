"""The contract of every registry row of dcls_kernel: published kernels and gradients, torch's accuracy, identities."""

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import pydenoise as pdn
from pydenoise import functional as PF
from pydenoise.ops import dcls_kernel as op
from pydenoise.ops import registry
from pydenoise.reference import dcls_kernel as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.dcls_kernel import DCLS_KERNEL_CASES, DclsKernelCase, rounding_scale
from pydenoise.testing.rows import device_of, poisoned_memory, skip_unless, variants

CASES = {case.name: case for case in DCLS_KERNEL_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, BACKWARD = variants(op.OP), variants(op.OP_BACKWARD)
CPU = variants(op.OP, "cpu")
# Kernels, layers and gradients of the published package in float64, with random parameters.
GOLDEN = np.load(Path(__file__).parent / "data" / "blocks_dcls.npz")
SIZES = {"1d_7": (7,), "2d_7x7": (7, 7), "2d_5x9": (5, 9), "3d_5x5x5": (5, 5, 5)}
PUBLISHED = [(name, version) for name, version in product(SIZES, op.VERSIONS) if f"dcls{name}_{version}_W" in GOLDEN]


def wide(args: tuple, dtype: torch.dtype = torch.float64) -> tuple:
    """The same arguments on the CPU in another dtype."""
    return tuple(a.cpu().to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


# ---------------------------------------------------------------------------------------------------- the reference


def golden(name: str, version: str) -> dict[str, torch.Tensor | None]:
    keys = ("W", "P", "SIG", "K", "gK", "dW", "dP", "dSIG")
    found = {key: f"dcls{name}_{version}_{key}" for key in keys}
    return {k: torch.from_numpy(GOLDEN[key]).double() if key in GOLDEN else None for k, key in found.items()}


@pytest.mark.parametrize(("name", "version"), PUBLISHED)
def test_reference_is_the_published_package(name, version):
    data = golden(name, version)
    assert (data["SIG"] is not None) == op.has_widths(version)
    args = op.prepare(data["W"], data["P"], data["SIG"], SIZES[name], version=version, compat="reference")
    torch.testing.assert_close(reference.dcls_kernel(*args), data["K"], rtol=0, atol=1e-14)
    grads = reference.dcls_kernel_backward(data["gK"], *args)
    for key, grad in zip(("dW", "dP", "dSIG"), grads, strict=True):
        if data[key] is None:
            assert grad is None
        else:
            torch.testing.assert_close(grad, data[key], rtol=1e-11, atol=1e-12)


def tap_by_tap(weight, P, SIG, size, axes, centres, gauss, normalized, spread):
    """The definition: each component's value at each tap of the whole kernel, nothing separated."""
    kernel = 0
    for c in range(weight.shape[2]):
        value = torch.ones(*weight.shape[:2], *size, dtype=weight.dtype)
        for axis, (m, centre) in enumerate(zip(axes, centres, strict=True)):
            tap = torch.arange(size[axis], dtype=weight.dtype).reshape(-1, *[1] * (len(size) - 1 - axis))
            position, width = (
                (spread if t is None else t[m, :, :, c].reshape(*weight.shape[:2], *[1] * len(size)))
                for t in (P + centre, SIG)
            )
            width = width if SIG is None else width.abs() + spread
            d = tap - position
            value = value * (torch.exp(-0.5 * (d / width) ** 2) if gauss else (width - d.abs()).clamp_min(0))
        if normalized:
            value = value / (value.flatten(2).sum(2) + 1e-7).reshape(*weight.shape[:2], *[1] * len(size))
        kernel = kernel + weight[:, :, c].reshape(*weight.shape[:2], *[1] * len(size)) * value
    return kernel


@pytest.mark.parametrize("case", DCLS_KERNEL_CASES, ids=lambda case: case.name)
def test_reference_is_the_definition(case):
    args = case.args(torch.float64)
    torch.testing.assert_close(reference.dcls_kernel(*args), tap_by_tap(*args), rtol=1e-12, atol=1e-13)


def by_autograd(grad: torch.Tensor, args: tuple) -> list[torch.Tensor | None]:
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in args[:3]]
    with torch.enable_grad():
        kernel = reference.dcls_kernel(*leaves, *args[3:])
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(kernel, wanted, grad))
    return [None if leaf is None else next(grads) for leaf in leaves]


@pytest.mark.parametrize("case", DCLS_KERNEL_CASES, ids=lambda case: case.name)
def test_reference_gradients_are_autograds(case):
    args, grad = case.args(torch.float64), case.grad(torch.float64)
    for got, exact in zip(reference.dcls_kernel_backward(grad, *args), by_autograd(grad, args), strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            scale = exact.abs().max().clamp_min(1).item()
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11 * scale)


# ------------------------------------------------------------------------------------------------------- every row


@cache
def expected(name: str, dtype: torch.dtype) -> tuple:
    """The exact kernel and gradients, and torch's own in ``dtype``, once for all rows and ISA levels."""
    case = CASES[name]
    args, grad = case.args(dtype), case.grad(dtype)
    exact, own = reference.dcls_kernel(*wide(args)), reference.dcls_kernel(*args)
    return exact, own, by_autograd(grad.double(), wide(args)), by_autograd(grad, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", FORWARD, ids=str)
@pytest.mark.parametrize("case", DCLS_KERNEL_CASES, ids=lambda case: case.name)
def test_kernels(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    skip_unless(variant.row, args)
    before = [None if t is None else t.clone() for t in args[:3]]
    with variant.active(), poisoned_memory(), torch.no_grad():
        kernel = variant.row.run(*args)
    exact, own, _, _ = expected(case.name, dtype)
    assert kernel.is_contiguous()
    assert_accurate(kernel, exact, own, what=f"{case.name}, {case.why}")
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, args[:3], strict=True)), "overwritten"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("case", DCLS_KERNEL_CASES, ids=lambda case: case.name)
def test_gradients(case, variant, dtype):
    device = device_of(variant.row)
    args = (case.grad(dtype, device), *case.args(dtype, device))
    skip_unless(variant.row, args)
    with variant.active(), poisoned_memory(), torch.no_grad():
        grads = variant.row.run(*args)
    _, _, exact, own = expected(case.name, dtype)
    for name, got, true, torchs in zip(("weight", "P", "SIG"), grads, exact, own, strict=True):
        assert (got is None) == (true is None), name
        if got is not None:
            assert got.is_contiguous()
            scale = None if name == "weight" else rounding_scale(true, *args[:1], args[1:])
            assert_accurate(got, true, torchs, what=f"gradient of {name}: {case.name}, {case.why}", scale=scale)


@pytest.mark.parametrize("variant", CPU, ids=str)
@pytest.mark.parametrize("name", ["depthwise17", "volume_max", "line", "one_component"])
def test_threads_do_not_change_a_bit(name, variant):
    case = CASES[name]
    args, grad = case.args(torch.float32), case.grad(torch.float32)
    backward = next(row for row in registry.rows(op.OP_BACKWARD) if row.name == "cpu")
    skip_unless(variant.row, args)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with variant.active(), torch.no_grad():
            results.append((variant.row.run(*args), *backward.run(grad, *args)))
    for other in results[1:]:
        assert all(a is None or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", BACKWARD, ids=str)
def test_expanded_gradient(variant):
    """The gradient of a sum has strides of 0."""
    device = device_of(variant.row)
    args = CASES["oblong"].args(torch.float32, device)
    grad = torch.ones((), device=device).expand(33, 1, 5, 9)
    skip_unless(variant.row, (grad, *args))
    with variant.active():
        one, other = variant.row.run(grad, *args), variant.row.run(grad.contiguous(), *args)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("variant", FORWARD, ids=str)
@pytest.mark.parametrize("version", op.VERSIONS)
def test_extreme_positions(version, variant):
    """A component far outside adds nothing; one that is not a number spoils its own pair only."""
    case = DclsKernelCase("", "", (5, 7), (3, 20, 4), version)
    weight, P, SIG = case.tensors(torch.float32, device_of(variant.row))
    P[0, 0, 0, 1], P[1, 0, 2, 2], P[0, 1, 1, 0] = 1e6, -torch.inf, torch.nan
    args = op.prepare(weight, P, SIG, case.size, version=version)
    skip_unless(variant.row, args)
    with variant.active():
        kernel = variant.row.run(*args).cpu()
    exact = reference.dcls_kernel(*wide(args))
    assert kernel[1, 1].isnan().all() and kernel.isnan().any((2, 3)).sum() == 1
    torch.testing.assert_close(kernel.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in (op.OP, op.OP_BACKWARD) for row in registry.rows(name)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("case", ["oblong", "volume_v0", "line"])
def test_opcheck(name, row, case):
    case, device = CASES[case], device_of(row)
    args = case.args(torch.float32, device)
    if name == op.OP_BACKWARD:
        args = (case.grad(torch.float32, device), *args)
    else:
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    skip_unless(row, args)
    torch.library.opcheck(getattr(torch.ops.pydenoise, name).default, (*args, row.name))


# ----------------------------------------------------------------------------------------------------- differentiable


def smooth_case(version: str, dims: int) -> tuple:
    """Parameters in float64 away from the kinks of hats."""
    generator = torch.Generator().manual_seed(dims)
    shape = (2, 2, 3)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    P = torch.randint(-1, 2, (dims, *shape), generator=generator).double()
    P += 0.3 + 0.1 * torch.rand(P.shape, generator=generator, dtype=torch.float64)
    SIG = 0.2 + 0.05 * torch.rand(P.shape, generator=generator, dtype=torch.float64)
    return weight, P, SIG if op.has_widths(version) else None


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("version", op.VERSIONS)
def test_gradcheck(version, dims):
    tensors = smooth_case(version, dims)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def kernel(*given):
        return PF.dcls_kernel(*given, *[None] * (3 - len(given)), (4, 5, 3)[:dims], version=version,
                              backend="reference")  # fmt: skip

    assert torch.autograd.gradcheck(kernel, leaves)
    if dims == 2:
        assert torch.autograd.gradgradcheck(kernel, leaves)


def test_gradients_through_auto():
    """The functional under autograd, with frozen parameters, and a second derivative."""
    weight, P, SIG = CASES["oblong"].tensors(torch.float32)
    P.requires_grad_()
    kernel = PF.dcls_kernel(weight, P, SIG, (5, 9))
    assert torch.equal(kernel, PF.dcls_kernel(weight, P.detach(), SIG, (5, 9)))
    (grad,) = torch.autograd.grad(kernel.square().sum(), P, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), P)
    wide_P = P.detach().double().requires_grad_()
    exact = reference.dcls_kernel(*op.prepare(weight.double(), wide_P, SIG.double(), (5, 9)))
    (exact_grad,) = torch.autograd.grad(exact.square().sum(), wide_P, create_graph=True)
    (exact_second,) = torch.autograd.grad(exact_grad.square().sum(), wide_P)
    for got, true in ((grad, exact_grad), (second, exact_second)):
        torch.testing.assert_close(got.double(), true, rtol=1e-3, atol=1e-4 * true.abs().max().item())


def test_compiles():
    weight, P, SIG = (t.requires_grad_() for t in CASES["oblong"].tensors(torch.float32))
    function = torch.compile(
        lambda *t: PF.dcls_kernel(*t, (5, 9)).square().sum(), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    function(weight, P, SIG).backward()
    found = [t.grad.clone() for t in (weight, P, SIG)]
    plain = torch.autograd.grad(PF.dcls_kernel(weight, P, SIG, (5, 9)).square().sum(), (weight, P, SIG))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, plain, strict=True))


# ---------------------------------------------------------------------------------------------------------- identities


def kernel_of(weight, P, SIG, size, version, **options):
    return PF.dcls_kernel(weight, P, SIG, size, version=version, backend="reference", **options)


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_lattice_is_a_dilated_convolution(version):
    """Whole positions: exactly the weights at those taps."""
    taps = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(-3.0, 4, 3), torch.arange(-3.0, 4, 3), indexing="ij")
    P = torch.stack([rows.flatten(), columns.flatten()]).double()[:, None, None].expand(2, 4, 3, 9)
    kernel = kernel_of(taps.flatten(2), P, None, 7, version)
    x = torch.randn(2, 3, 12, 11, dtype=torch.float64)
    dilated = torch.nn.functional.conv2d(x, taps, dilation=3)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, kernel), dilated, rtol=1e-6, atol=1e-6)
    positions = kernel[:, :, ::3, ::3]
    torch.testing.assert_close(positions, taps, rtol=2e-7, atol=0)
    assert torch.count_nonzero(kernel) == torch.count_nonzero(taps)


@pytest.mark.parametrize("size", [(7,), (8, 5), (5, 4, 3)], ids=str)
@pytest.mark.parametrize("version", ["gauss", "max", "v1"])
def test_normalised_kernels_keep_the_sum_of_the_weights(version, size):
    case = DclsKernelCase("", "", size, (4, 2, 5), version, reach=0.7)
    weight, P, SIG = case.tensors(torch.float64)
    kernel = kernel_of(weight, P, SIG, size, version)
    torch.testing.assert_close(kernel.flatten(2).sum(2), weight.sum(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", op.VERSIONS)
def test_positions_shift_the_kernel(version):
    """P + 1 along an axis: the kernel one tap further, away from the border."""
    case = DclsKernelCase("", "", (15, 17), (4, 2, 5), version, reach=0.2, widths=0.1)
    weight, P, SIG = case.tensors(torch.float64)
    kernel = kernel_of(weight, P, SIG, case.size, version)
    for axis in (0, 1):
        moved = P.clone()
        moved[axis] += 1
        shifted = kernel_of(weight, moved, SIG, case.size, version)
        torch.testing.assert_close(shifted, kernel.roll(1, 2 + axis), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("version", op.VERSIONS)
def test_linear_and_without_order(version):
    case = DclsKernelCase("", "", (7, 9), (4, 2, 6), version)
    weight, P, SIG = case.tensors(torch.float64)
    kernel = kernel_of(weight, P, SIG, case.size, version)
    other = torch.randn_like(weight)
    both = kernel_of(2 * weight - other, P, SIG, case.size, version)
    torch.testing.assert_close(both, 2 * kernel - kernel_of(other, P, SIG, case.size, version))
    order = torch.randperm(6)
    turned = kernel_of(weight[..., order], P[..., order], None if SIG is None else SIG[..., order], case.size, version)
    torch.testing.assert_close(turned, kernel)


def test_narrow_gaussians_are_one_tap():
    case = DclsKernelCase("", "", (7, 7), (4, 2, 3), whole=True, widths=0.0, reach=0.8)
    weight, P, SIG = case.tensors(torch.float64)
    args = op.prepare(weight, P, SIG, case.size, spread=0.05)
    torch.testing.assert_close(
        reference.dcls_kernel(*args), kernel_of(weight, P, None, case.size, "v0"), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("size", [(7, 7), (5, 9)], ids=str)
def test_reference_axes(size):
    """With its axes, the published package's v0 is the transpose of its v1; ours agree with each other."""
    case = DclsKernelCase("", "", size, (4, 2, 6), "v1", reach=0.6)
    weight, P, _ = case.tensors(torch.float64)
    ours = kernel_of(weight, P, None, size, "v1")
    torch.testing.assert_close(ours, kernel_of(weight, P, None, size, "v0"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kernel_of(weight, P, None, size, "v0", compat="reference"), ours, rtol=1e-6, atol=1e-6)
    theirs = kernel_of(weight, P, None, size, "v1", compat="reference")
    if size[0] == size[1]:
        torch.testing.assert_close(theirs, kernel_of(weight, P.flip(0), None, size, "v1"))
    else:  # each axis is centred by the other's size
        moved = P.flip(0) + torch.tensor([2.0, -2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        torch.testing.assert_close(theirs, kernel_of(weight, moved, None, size, "v1"))


# --------------------------------------------------------------------------------------------------------- arguments

W, P2, S2 = torch.zeros(3, 2, 4), torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4)
BAD = {
    "weight: expected a torch.Tensor": lambda: PF.dcls_kernel([1.0], P2, S2, 7),
    "weight: expected a floating-point": lambda: PF.dcls_kernel(W.int(), P2, S2, 7),
    r"weight: expected a non-empty \[O, I, C\]": lambda: PF.dcls_kernel(W[0], P2, S2, 7),
    r"weight: expected a non-empty .* got shape \(3, 2, 0\)": lambda: PF.dcls_kernel(W[..., :0], P2, S2, 7),
    "P: expected a torch.Tensor, got NoneType": lambda: PF.dcls_kernel(W, None, S2, 7),
    r"P: expected \[D, O, I, C\] with D from 1 to 3": lambda: PF.dcls_kernel(W, P2[0], S2, 7),
    r"with D from 1 to 3, got shape \(4,": lambda: PF.dcls_kernel(W, P2.repeat(2, 1, 1, 1), S2, 7),
    r"P: expected shape \(2, 3, 2, 4\)": lambda: PF.dcls_kernel(W, P2[..., :2], S2, 7),
    "P: expected dtype": lambda: PF.dcls_kernel(W, P2.double(), S2, 7),
    "P: expected device": lambda: PF.dcls_kernel(W, P2.to("meta"), S2, 7),
    "SIG: expected a tensor for version 'gauss'": lambda: PF.dcls_kernel(W, P2, None, 7),
    "SIG: expected None for version 'v1'": lambda: PF.dcls_kernel(W, P2, S2, 7, version="v1"),
    "SIG: expected shape": lambda: PF.dcls_kernel(W, P2, S2[:1], 7),
    "dilated_kernel_size: expected ints >= 1": lambda: PF.dcls_kernel(W, P2, S2, 0),
    "dilated_kernel_size: expected one int or 2": lambda: PF.dcls_kernel(W, P2, S2, (3, 3, 3)),
    "dilated_kernel_size: expected ints, got float": lambda: PF.dcls_kernel(W, P2, S2, 3.5),
    "version: expected one of 'gauss'": lambda: PF.dcls_kernel(W, P2, S2, 7, version="v2"),
    "compat: expected None or 'reference'": lambda: PF.dcls_kernel(W, P2, S2, 7, compat="old"),
    "backend: expected": lambda: PF.dcls_kernel(W, P2, S2, 7, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_explain():
    verdicts = dict(pdn.explain("dcls_kernel", W, P2, S2, 7).verdicts)
    assert list(verdicts) == ["triton", "cpu", "reference"] and verdicts["reference"] is None
    assert "float64" in dict(pdn.explain("dcls_kernel", W.double(), P2.double(), S2.double(), 7).verdicts)["cpu"]


def test_every_combination_has_a_case():
    """All interpolations in one, two and three dimensions have a golden kernel or a case."""
    assert len(PUBLISHED) == 14
    seen = {(case.version, len(case.size)) for case in DCLS_KERNEL_CASES}
    seen |= {(version, len(SIZES[name])) for name, version in PUBLISHED}
    assert seen >= set(product(op.VERSIONS, (1, 2, 3)))
