"""Operators of inverse problems: adjoints, pseudo-inverses, sizes, bad input."""

import pytest
import torch

from pydenoise.samplers.operators import MRI, Blur, DownSampling, FunctionOperator, Inpainting, LinearOperator

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(*shape, seed=0, share=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def coils(count=3, height=8, width=6):
    return random(count, height, width, seed=5, dtype=torch.complex128)


MATRIX = random(7, 12, seed=3)
CASES = {
    "inpainting": (Inpainting(mask(8, 6)), (2, 3, 8, 6)),
    "inpainting, a mask for each channel": (Inpainting(mask(3, 8, 6).float()), (2, 3, 8, 6)),
    "inpainting, any shape": (Inpainting(mask(5)), (4, 5)),
    "down-sampling": (DownSampling(2), (2, 3, 8, 6)),
    "down-sampling by 3": (DownSampling(3), (1, 1, 6, 9)),
    "blur": (Blur(random(3, 3, seed=1)), (2, 3, 8, 6)),
    "blur, even and uneven": (Blur(random(4, 2, seed=1)), (1, 2, 7, 5)),
    "blur, of the image's size": (Blur(random(8, 6, seed=1)), (1, 1, 8, 6)),
    "MRI": (MRI(mask(8, 6)), (2, 2, 8, 6)),
    "MRI, columns": (MRI(mask(6, share=0.5)), (2, 2, 8, 6)),
    "MRI, centered": (MRI(mask(7, 5), centered=True), (2, 2, 7, 5)),
    "MRI, real": (MRI(mask(8, 6), channels=1), (2, 1, 8, 6)),
    "MRI, real, centered, odd": (MRI(mask(7, 5), channels=1, centered=True), (2, 1, 7, 5)),
    "MRI, coils": (MRI(mask(8, 6), sensitivities=coils()), (2, 2, 8, 6)),
    "MRI, coils, real, centered": (MRI(mask(8, 6), sensitivities=coils(), channels=1, centered=True), (2, 1, 8, 6)),
    "functions": (FunctionOperator(lambda x: x @ MATRIX.T.to(x), lambda y: y @ MATRIX.to(y)), (3, 12)),
}  # fmt: skip


def dense(operator, shape):
    """H as a real matrix [measurements, pixels], imaginary parts below."""
    size = int(torch.tensor(shape[1:]).prod())
    each = operator(torch.eye(size, dtype=torch.float64).reshape(size, *shape[1:])).flatten(1)
    return (torch.cat([each.real, each.imag], 1) if each.is_complex() else each).T


@pytest.mark.parametrize("name", CASES)
def test_adjoint(name):
    operator, shape = CASES[name]
    operator.check_adjoint(shape, dtype=torch.float64)
    operator.check_adjoint(shape)
    x, y = random(*shape), operator(random(*shape, seed=1))
    left, right = (operator(x).conj() * y).real.sum(), (x * operator.adjoint(y)).sum()
    torch.testing.assert_close(left, right, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_pseudo_inverse_is_the_matrix_one(name):
    operator, shape = CASES[name]
    matrix = dense(operator, shape)
    y = operator(random(*shape, seed=1))
    y = y + 0.1 * random(*y.shape, seed=2, dtype=y.dtype)  # outside of H's range too
    flat = y.flatten(1)
    flat = torch.cat([flat.real, flat.imag], 1) if flat.is_complex() else flat
    wanted = (flat @ torch.linalg.pinv(matrix, rtol=1e-4).T).reshape(shape)
    by_iterations = name.startswith(("functions", "MRI, coils"))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if by_iterations else EXACT
    torch.testing.assert_close(operator.pinv(y), wanted, **tolerance)
    if not by_iterations and "blur" not in name:
        torch.testing.assert_close(LinearOperator.pinv(operator, y), wanted, rtol=1e-4, atol=1e-4)


def test_pseudo_inverse_of_each_sample_by_itself():
    operator, shape = CASES["MRI, coils"]
    y = operator(random(*shape))
    y[1] = 0
    both = operator.pinv(y)
    torch.testing.assert_close(both[:1], operator.pinv(y[:1]), **EXACT)
    assert not both[1].any()


def test_fully_sampled_mri_is_undone():
    x = random(1, 2, 8, 6)
    for centered in (False, True):
        operator = MRI(torch.ones(8, 6), centered=centered)
        torch.testing.assert_close(operator.adjoint(operator(x)), x, **EXACT)
        torch.testing.assert_close(operator(x).abs().square().sum(), x.square().sum(), **EXACT)
    centre = MRI(torch.ones(8, 6), channels=1, centered=True)(torch.ones(1, 1, 8, 6))
    assert centre[0, 0, 4, 3].real == pytest.approx(48**0.5) and centre.abs().sum() == pytest.approx(48**0.5, rel=1e-5)


def test_blur_is_a_convolution():
    x, kernel = random(1, 1, 9, 7), random(3, 3, seed=1)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    wanted = torch.nn.functional.conv2d(padded, kernel.flip(0, 1)[None, None])
    torch.testing.assert_close(Blur(kernel)(x), wanted, **EXACT)


@pytest.mark.parametrize("name", ["inpainting", "down-sampling", "blur", "MRI"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(name, dtype):
    operator, shape = CASES[name]
    x = random(*shape)
    got, wanted = operator(x.to(dtype)), operator(x)
    assert got.dtype == (torch.complex64 if got.is_complex() else dtype)
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=2e-2, atol=3e-2)


def test_numbers_of_measurements():
    known = mask(8, 6)
    count = int(known.sum())
    assert Inpainting(known).measurements(torch.zeros(2, 3, 8, 6)) == 3 * count
    assert MRI(known).measurements(torch.zeros(2, 1, 8, 6)) == count
    assert MRI(torch.ones(6)).measurements(torch.zeros(2, 4, 8, 6)) == 4 * 48
    assert DownSampling(2).measurements(torch.zeros(2, 3, 4, 3)) == 36


def test_a_false_adjoint_is_found():
    operator = FunctionOperator(lambda x: x.roll(1, -1), lambda y: y.roll(1, -1))
    with pytest.raises(ValueError, match="adjoint: <H x, y> = .* differ"):
        operator.check_adjoint((2, 8))
    with pytest.raises(ValueError, match="adjoint: expected shape"):
        FunctionOperator(lambda x: x[:, :4], lambda y: y).check_adjoint((2, 8))
    FunctionOperator(lambda x: x.roll(1, -1), lambda y: y.roll(-1, -1)).check_adjoint((2, 8))


def test_given_pinv():
    operator = FunctionOperator(lambda x: 2 * x, lambda y: 2 * y, lambda y: y / 2)
    assert torch.equal(operator.pinv(torch.ones(2, 3)), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("make, error, message", [
    (lambda: Inpainting([1, 0]), TypeError, "mask"),
    (lambda: Inpainting(torch.tensor([0.5, 1])), ValueError, "mask: expected bool"),
    (lambda: Inpainting(torch.zeros(3)), ValueError, "mask: nothing"),
    (lambda: Inpainting(torch.ones(3))(torch.zeros(2, 4)), ValueError, "mask: .* does not broadcast"),
    (lambda: Inpainting(torch.ones(2, 3, 4))(torch.zeros(2, 3, 4)), ValueError, "mask: .* does not broadcast"),
    (lambda: DownSampling(0), ValueError, "factor"),
    (lambda: DownSampling(2.0), TypeError, "factor"),
    (lambda: DownSampling(2)(torch.zeros(1, 1, 5, 4)), ValueError, "x: expected .* multiples of 2"),
    (lambda: DownSampling(2).adjoint(torch.zeros(1, 5, 4)), ValueError, "x: expected"),
    (lambda: Blur("box"), TypeError, "kernel"),
    (lambda: Blur(torch.ones(3)), ValueError, "kernel"),
    (lambda: Blur(torch.full((3, 3), torch.nan)), ValueError, "kernel: expected finite"),
    (lambda: Blur(torch.ones(3, 3), rcond=2), ValueError, "rcond"),
    (lambda: Blur(torch.ones(9, 9))(torch.zeros(1, 1, 8, 8)), ValueError, "kernel: expected at most"),
    (lambda: MRI(torch.ones(2, 3, 4)), ValueError, "mask"),
    (lambda: MRI(torch.ones(4), channels=3), ValueError, "channels"),
    (lambda: MRI(torch.ones(4), sensitivities=torch.ones(2, 4, 4)), TypeError, "sensitivities"),
    (lambda: MRI(torch.ones(4), sensitivities=torch.ones(4, 4) + 0j), ValueError, "sensitivities"),
    (lambda: MRI(torch.ones(6), sensitivities=coils())(torch.zeros(1, 2, 9, 6)), ValueError, "x: expected the size"),
    (lambda: MRI(torch.ones(4))(torch.zeros(1, 1, 4, 4)), ValueError, "x: expected images"),
    (lambda: MRI(torch.ones(5))(torch.zeros(1, 2, 4, 4)), ValueError, "mask: .* does not broadcast"),
    (lambda: MRI(torch.ones(4)).adjoint(torch.zeros(1, 1, 4, 4)), ValueError, "y: expected complex"),
    (lambda: FunctionOperator(1, lambda y: y), TypeError, "forward"),
    (lambda: FunctionOperator(lambda x: x, None), TypeError, "adjoint"),
    (lambda: FunctionOperator(lambda x: x, lambda y: y, 3), TypeError, "pinv"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
