"""The contract of every registry row of ode_stage and its gradient: torch's accuracy, at every ISA level."""

import pytest
import torch
import torch.nn.functional as F

from pydenoise import functional as PF
from pydenoise.ops import ode_stage, registry
from pydenoise.reference import ode_stage as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.ode_stage import ODE_STAGE_CASES
from pydenoise.testing.rows import device_of, poisoned_memory, variants

CASES = {case.name: case for case in ODE_STAGE_CASES}
NORMS = [case for case in ODE_STAGE_CASES if case.normalise]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = variants(ode_stage.OP)
BACKWARD = variants(ode_stage.OP_BACKWARD)
CPU = variants(ode_stage.OP, "cpu")


def run(variant, args: tuple) -> tuple:
    """The row's result on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    tensors = [t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    with variant.active(), poisoned_memory(), torch.no_grad():
        result = variant.row.run(*args)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num()), "overwritten"
    return result


def changed(args: tuple, to) -> tuple:
    """The same call with every tensor through ``to``."""
    one = lambda a: to(a) if isinstance(a, torch.Tensor) else a  # noqa: E731
    return tuple(tuple(map(one, a)) if isinstance(a, tuple) else one(a) for a in args)


def widened(args: tuple) -> tuple:
    return changed(args, lambda t: t.cpu().double())


@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_reference_is_the_instance_norm(case):
    args = case.args(torch.float64)
    state, slopes, weights, position, drift, second, film, plane, eps, _, _ = args
    y, point, _ = reference.ode_stage(*args[:-1], True)
    if second:
        z, v = state.chunk(2, 1)
        z = z + drift * v + sum(w * k for w, k in zip(position, slopes, strict=True))
        v = v + sum(w * k for w, k in zip(weights, slopes, strict=True))
        expected = torch.cat((z, v), 1)
    else:
        expected = state + sum(w * k for w, k in zip(weights, slopes, strict=True))
    torch.testing.assert_close(point, expected)
    if expected.shape[2] * expected.shape[3] > 1 and len(expected):
        norm = F.instance_norm(expected, eps=eps)
    else:
        norm = torch.zeros_like(expected)
    if film is not None:
        scale, shift = film[:, :, None, None].chunk(2, 1)
        norm = norm * (1 + scale) + shift
    torch.testing.assert_close(y[:, : state.shape[1]], norm, rtol=1e-10, atol=1e-10)
    assert plane is None or (y[:, -1] == plane).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", ODE_STAGE_CASES, ids=lambda case: case.name)
def test_results(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    results = run(variant, args)
    oracle, own = reference.ode_stage(*widened(args)), reference.ode_stage(*changed(args, torch.Tensor.cpu))
    scale = largest_point(case, args)
    for actual, exact, baseline, what in zip(results, oracle, own, ("norm", "point", "moments"), strict=True):
        # a mean is a sum whose terms cancel
        floor = scale if what == "moments" else None
        assert_accurate(actual, exact, baseline, what=f"{case.name}, {what}", scale=floor)
    n, c, height, width = case.shape
    if case.normalise:
        assert results[0].permute(0, 2, 3, 1).is_contiguous()
        channels = c + (case.plane is not None)
        assert results[0].shape == (n, channels, height, width)
        assert case.plane is None or (results[0][:, -1].double() == torch.tensor(case.plane).to(dtype).double()).all()


def largest_point(case, args: tuple) -> float:
    point = reference.combination(*widened(args)[:6])
    return point.abs().max().item() if len(point) else 0.0


def gradient_args(case, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """Arguments of the rows of the gradient, moments as the reference makes them."""
    args = case.args(dtype, device)
    *_, film, plane, eps, _, _ = args
    y, point, moments = reference.ode_stage(*args[:-1], True)
    generator = torch.Generator().manual_seed(1)
    draw = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)  # noqa: E731
    beside = draw(point) if case.keep else None
    return draw(y), point, moments, film, beside, eps, film is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_gradients(case, variant, dtype):
    args = gradient_args(case, dtype, device_of(variant.row))
    dpoint, dfilm = run(variant, args)

    def exact(args):
        grad, point, _, film, beside, eps, need = args
        return reference.ode_stage_backward(grad, point, film, beside, eps, need)

    oracle, own = exact(widened(args)), exact(changed(args, torch.Tensor.cpu))
    # a pixel that is its own mean has terms that cancel: what they cancel to is measured against them
    scale = None if case.name != "pixel" else 300 * args[0].abs().max().item()
    assert_accurate(dpoint, oracle[0], own[0], what=f"{case.name}, point", scale=scale)
    assert dpoint.permute(0, 2, 3, 1).is_contiguous()
    if args[-1] and len(dpoint):
        assert_accurate(dfilm.to(dtype), oracle[1], own[1].to(dtype), what=f"{case.name}, film")


@pytest.mark.parametrize("case", ODE_STAGE_CASES, ids=lambda case: case.name)
def test_autograd_is_the_derivative(case):
    """Against autograd through torch's own instance norm, in float64, and once more for the second derivative."""
    if case.shape[0] == 0 or case.name in ("many_chunks", "chunks", "pixel", "far"):
        pytest.skip("too large for differences, or torch's instance norm refuses it")
    args = case.args(torch.float64)
    state, slopes, weights, position, drift, second, film, plane, eps, normalise, keep = args
    leaves = [t.detach().clone().requires_grad_() for t in (state, *slopes, *(() if film is None else (film,)))]
    options = {"order": "second", "position_weights": position, "drift": drift} if second else {}

    def function(state, *rest):
        slopes, film = rest[: len(rest) - (case.film)], rest[-1] if case.film else None
        if not normalise:
            return PF.ode_combination(state, slopes, weights, backend="reference", **options)
        result = PF.ode_stage(
            state, slopes, weights, film=film, plane=plane, return_point=keep, backend="reference", **options
        )
        return result

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["wide", "film", "second_odd", "plane_kept", "end_second", "norm", "drift_only"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_through_the_op(variant, name):
    """Gradients of a compiled row against the reference in float64."""
    case = CASES[name]
    args = case.args(torch.float32, device_of(variant.row))
    if (reason := variant.row.unsupported(*args)) is not None:
        pytest.skip(reason)

    def gradients(args, backend):
        state, slopes, *rest = args
        leaves = [t.detach().clone().requires_grad_() for t in (state, *slopes)]
        film = rest[4]
        if film is not None:
            film = rest[4] = film.detach().clone().requires_grad_()
            leaves.append(film)
        rest[-1] = True if slopes or rest[2] else rest[-1]
        y, point, _ = torch.ops.pydenoise.ode_stage(leaves[0], leaves[1 : 1 + len(slopes)], *rest, backend)
        loss = 0
        for part in (y, point):
            if part.numel():
                loss = loss + (part * torch.linspace(-1, 1, part.numel()).to(part).view(part.shape)).sum()
        return torch.autograd.grad(loss, leaves)

    with variant.active():
        actual = gradients(args, variant.row.name)
    oracle, own = gradients(widened(args), "reference"), gradients(changed(args, torch.Tensor.cpu), "reference")
    for one, exact, baseline in zip(actual, oracle, own, strict=True):
        assert_accurate(one, exact, baseline)


@pytest.mark.parametrize("variant", CPU, ids=str)
@pytest.mark.parametrize("name", ["chunks", "many_chunks", "wide", "second", "film"])
def test_threads_do_not_change_a_bit(name, variant):
    args, gradient = CASES[name].args(torch.float32), gradient_args(CASES[name], torch.float32)
    backward = next(v for v in BACKWARD if v.isa == variant.isa and v.row.name == "cpu")
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append((*run(variant, args), *run(backward, gradient)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    alone = run(variant, changed(args, lambda t: t[:1]))  # an image does not depend on the others
    assert torch.equal(alone[0], results[0][0][:1])


@pytest.mark.parametrize("variant", CPU, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_extreme_values_stay_in_their_channel(value, variant):
    case = CASES["chunks"]
    args = case.args(torch.float32)
    plain = run(variant, args)[0]
    args[0][1, 3, 2, 2] = value
    y = run(variant, args)[0]
    touched = torch.zeros(y.shape[:2], dtype=torch.bool)
    touched[1, 3] = True
    assert torch.equal(y[~touched], plain[~touched])
    assert value == 1e38 or y[1, 3].isnan().any()


@pytest.mark.parametrize("row", registry.rows(ode_stage.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["film", "second_odd", "end", "norm", "empty"])
def test_opcheck(name, row):
    args = CASES[name].args(torch.float32, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    state, slopes, *rest = args
    torch.library.opcheck(torch.ops.pydenoise.ode_stage.default, (state, list(slopes), *rest, row.name))
    if CASES[name].normalise and name != "empty":
        gradient = gradient_args(CASES[name], torch.float32, device_of(row))
        torch.library.opcheck(torch.ops.pydenoise.ode_stage_backward.default, (*gradient, row.name))


def test_compiles():
    state, slopes, film = CASES["film"].tensors(torch.float32)

    def function(state, a, b, film):
        return PF.ode_stage(state, [a, b], [0.5, -1.0], film=film).square().sum()

    leaves = [t.requires_grad_() for t in (state, *slopes, film)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), function(*leaves))
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


X = torch.zeros(2, 4, 5, 6)
K = torch.zeros(2, 4, 5, 6)
BAD = {
    "state: expected a torch.Tensor": lambda: PF.ode_stage([1.0]),
    "state: expected a floating-point": lambda: PF.ode_stage(X.int()),
    r"state: expected \[N, C, H, W\]": lambda: PF.ode_stage(X[0]),
    "without an empty axis": lambda: PF.ode_stage(X[:, :, :0]),
    "even number of channels, got 3": lambda: PF.ode_stage(X[:, :3], order="second"),
    "order: expected one of": lambda: PF.ode_stage(X, order="third"),
    "slopes: expected a sequence": lambda: PF.ode_stage(X, K, [1.0]),
    "slopes: expected at most 4, got 5": lambda: PF.ode_stage(X, [K] * 5, [1.0] * 5),
    r"slopes: expected shape \(2, 4, 5, 6\)": lambda: PF.ode_stage(X, [K[:, :2]], [1.0]),
    r"slopes: expected shape \(2, 2, 5, 6\)": lambda: PF.ode_stage(X, [K], [1.0], order="second"),
    "slopes: expected dtype": lambda: PF.ode_stage(X, [K.double()], [1.0]),
    "slopes: expected at least one": lambda: PF.ode_combination(X, [], []),
    "weights: expected 1 numbers": lambda: PF.ode_stage(X, [K], []),
    "weights: expected a number, got str": lambda: PF.ode_stage(X, [K], ["one"]),
    "weights: expected a finite": lambda: PF.ode_stage(X, [K], [torch.nan]),
    "position_weights: order 'second' needs": lambda: PF.ode_stage(X, [K[:, :2]], [1.0], order="second"),
    "position_weights, drift: belong": lambda: PF.ode_stage(X, [K], [1.0], drift=1.0),
    "film: expected shape": lambda: PF.ode_stage(X, film=torch.zeros(2, 4)),
    "film: expected dtype": lambda: PF.ode_stage(X, film=torch.zeros(2, 8).half()),
    "plane: expected a number": lambda: PF.ode_stage(X, plane="late"),
    "eps: expected a positive": lambda: PF.ode_stage(X, eps=0.0),
    "backend: expected": lambda: PF.ode_stage(X, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
