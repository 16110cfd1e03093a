"""The frequency-weighted distillation loss: golden data, Parseval, every option as in the plain formula, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydenoise.nn import SpectralDistillationLoss
from pydenoise.nn.spectral_loss import frequency_distance, frequency_weights

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "blocks_wavelet.npz")
SIZES = [(8, 8), (7, 9), (6, 5), (1, 4), (5, 1)]


def plain(student, teacher, image, *, alpha=-1.0, eps=1e-8, norm="backward", reduction="mean"):
    """The formula with whole complex spectra."""
    weights = torch.fft.fft2(image, norm=norm).abs().clamp_min(eps) ** alpha
    if weights.shape[1] != student.shape[1]:
        weights = weights.mean(1, keepdim=True)
    energy = torch.fft.fft2(teacher - student, norm=norm).abs().square() * weights
    return energy.mean() if reduction == "mean" else energy.flatten(1).sum(1).mean()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm", ["backward", "ortho"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5])
def test_half_spectrum_is_the_whole(size, channels, norm, reduction, alpha):
    """Value and gradients, whatever the parity of the sizes."""
    student, teacher = (torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    image = torch.randn(2, channels, *size, dtype=torch.float64)
    weights = frequency_weights(image, size, alpha, norm=norm)
    assert weights.shape == (2, channels, size[0], size[1] // 2 + 1)
    own = frequency_distance(student, teacher, weights, reduction=reduction, norm=norm)
    exact = plain(student, teacher, image, alpha=alpha, norm=norm, reduction=reduction)
    torch.testing.assert_close(own, exact)
    for a, b in zip(*(torch.autograd.grad(t, (student, teacher)) for t in (own, exact)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    weights = frequency_weights(torch.randn(2, 1, 4, 5, dtype=torch.float64), (4, 5))
    x, y = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda a, b: frequency_distance(a, b, weights), (x, y))
    (of_x,) = torch.autograd.grad(frequency_distance(x, y, weights), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        of_x.sum().backward()


@pytest.mark.parametrize("size", SIZES)
def test_parseval(size):
    """Without weights the energy of the spectrum is that of the pixels, times their number."""
    x, y = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 3, *size, dtype=torch.float64)
    flat = frequency_weights(torch.randn(2, 1, *size, dtype=torch.float64), size, 0.0)
    mean = (x - y).square().mean()
    torch.testing.assert_close(frequency_distance(x, y, flat), mean * size[0] * size[1])
    torch.testing.assert_close(frequency_distance(x, y, flat, norm="ortho"), mean)
    total = (x - y).square().sum() / 2
    torch.testing.assert_close(frequency_distance(x, y, flat, norm="ortho", reduction="sum"), total)


def test_weights_of_an_image_without_details():
    """Where the image has nothing, eps keeps the weights finite."""
    weights = frequency_weights(torch.ones(1, 1, 4, 4), (4, 4), -1.0, eps=1e-3)
    assert weights[0, 0, 0, 0].item() == pytest.approx(1 / 16) and weights.flatten()[1:].tolist() == pytest.approx(
        [1000] * 11
    )
    coarse = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(frequency_weights(coarse, (2, 2), 1.0)[0, 0, 0, 0], F.avg_pool2d(coarse, 2).sum())
    assert frequency_weights(coarse, (2, 2), resize="bilinear").shape == (1, 1, 2, 2)
    assert frequency_weights(coarse.half(), (4, 4)).dtype == torch.float32


def scales(batch=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    student = [draw(batch, 4, 8, 8), draw(batch, 6, 4, 5)]
    teacher = [draw(batch, 7, 8, 8), draw(batch, 6, 4, 5)]
    return student, teacher, draw(batch, 3, 16, 16)


def test_module_is_the_formula():
    student, teacher, image = scales()
    loss = SpectralDistillationLoss([4, 6], [7, 6], spatial=0.3, frequency=0.2, alpha=-0.5, eps=1e-4)
    total = loss(student, teacher, image, base=torch.tensor(2.0))
    expected = torch.tensor(2.0)
    for s, t, align in zip(student, teacher, loss.align, strict=True):
        s = align(s)
        small = F.interpolate(image, t.shape[2:], mode="area")
        expected = expected + 0.3 * (s - t).square().mean() + 0.2 * plain(s, t, small, alpha=-0.5, eps=1e-4)
    torch.testing.assert_close(total, expected)
    for option in ({"frequency": 0.0}, {"spatial": 0.0}, {"frequency": 0.0, "spatial": 0.0}):
        part = SpectralDistillationLoss([4, 6], [7, 6], **option)
        part.load_state_dict(loss.state_dict())
        spatial, frequency = part.terms(student, teacher, image)
        torch.testing.assert_close(
            part(student, teacher, image), part.spatial * sum(spatial) + part.frequency * sum(frequency)
        )


def test_gradients_reach_student_and_alignment_only():
    student, teacher, image = scales()
    for tensor in (*student, *teacher, image):
        tensor.requires_grad_()
    loss = SpectralDistillationLoss([4, 6], [7, 6])
    loss(student, teacher, image).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (*student, *loss.parameters()))
    assert all(t.grad is None for t in (*teacher, image))


def test_alignment():
    loss = SpectralDistillationLoss([4, 6], [7, 6])
    x = torch.randn(1, 6, 3, 3)
    torch.testing.assert_close(loss.align[1](x), x)  # as many channels: starts as the identity
    assert loss.align[0].weight.shape == (7, 4, 1, 1)
    loss = SpectralDistillationLoss([4, 6], [7, 6], align="where_needed")
    assert [len(list(a.parameters())) for a in loss.align] == [2, 0]


def test_half_features():
    """The sums are in float32."""
    student, teacher, image = scales()
    loss = SpectralDistillationLoss([4, 6], [4, 6], align="where_needed")
    teacher[0] = teacher[0][:, :4]
    expected = loss(student, teacher, image)
    half = loss([s.bfloat16() for s in student], [t.bfloat16() for t in teacher], image)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=2e-2, atol=0)


def test_golden():
    """Alpha -1, the mean, clamped at 1e-8."""
    student, teacher, image, expected = (torch.from_numpy(GOLDEN[f"sd_freq_{n}"]) for n in ("XS", "XT", "X0", "loss"))
    weights = frequency_weights(image, tuple(student.shape[2:]))
    torch.testing.assert_close(frequency_distance(student, teacher, weights), expected, rtol=1e-10, atol=0)


STUDENT, TEACHER, IMAGE = scales()
LOSS = SpectralDistillationLoss([4, 6], [7, 6])
BAD = {
    "teacher_channels: expected as many scales": lambda: SpectralDistillationLoss([4, 6], [7]),
    "at least one, got 0 and 0": lambda: SpectralDistillationLoss([], []),
    "student_channels: expected a sequence": lambda: SpectralDistillationLoss(4, 7),
    "student_channels: expected ints": lambda: SpectralDistillationLoss([4.0], [7]),
    "spatial: expected a finite number >= 0, got -1": lambda: SpectralDistillationLoss([4], [7], spatial=-1),
    "frequency: expected a number, got str": lambda: SpectralDistillationLoss([4], [7], frequency="1"),
    "alpha: expected a finite number, got nan": lambda: SpectralDistillationLoss([4], [7], alpha=float("nan")),
    "eps: expected a positive number": lambda: SpectralDistillationLoss([4], [7], eps=0),
    "reduction: expected one of": lambda: SpectralDistillationLoss([4], [7], reduction="none"),
    "norm: expected one of": lambda: SpectralDistillationLoss([4], [7], norm="forward"),
    "resize: expected one of": lambda: SpectralDistillationLoss([4], [7], resize="nearest"),
    "align: expected one of": lambda: SpectralDistillationLoss([4], [7], align="never"),
    "student: expected a sequence of 2": lambda: LOSS(STUDENT[:1], TEACHER, IMAGE),
    "teacher: expected a sequence of 2": lambda: LOSS(STUDENT, TEACHER[0], IMAGE),
    r"student\[1\]: expected shape \(2, 6, 4, 5\)": lambda: LOSS([STUDENT[0], STUDENT[0]], TEACHER, IMAGE),
    r"teacher\[0\]: expected shape \(2, 7, 8, 8\)": lambda: LOSS(STUDENT, [TEACHER[0][:, :6], TEACHER[1]], IMAGE),
    r"student\[0\]: expected a torch.Tensor": lambda: LOSS([1, 2], TEACHER, IMAGE),
    "image: expected floating-point": lambda: LOSS(STUDENT, TEACHER, IMAGE[0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
