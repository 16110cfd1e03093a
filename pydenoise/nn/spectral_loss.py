"""Distillation that looks at frequencies: what a small model misses where images have little energy counts too.

Source: Yang, Zhou, Feng, Wang, "Diffusion Probabilistic Model Made Slim" (CVPR 2023), its distillation loss.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pydenoise.ops._arguments import check_choice, check_tensor, int_tuple

REDUCTIONS = ("mean", "sum")
NORMS = ("backward", "ortho")
RESIZES = ("area", "bilinear")
ALIGNMENTS = ("always", "where_needed")


def frequency_weights(
    image: Tensor, size: tuple[int, int], alpha: float = -1.0, *, eps: float = 1e-8, norm: str = "backward",
    resize: str = "area",
) -> Tensor:  # fmt: skip
    """``max(|F image|, eps) ** alpha`` for every frequency of the image at ``size``: the weights of the loss.

    Args:
        image: clean images [B, C, H, W].
        size: (h, w) that they are resized to, with ``resize``: "area" (means of pixels) or "bilinear".
        alpha: -1 counts frequencies the more the less of them the image has; 0 counts all alike.
        eps: least magnitude.
        norm: that of the transform, as in ``torch.fft``: "backward" (a plain sum) or "ortho".

    Returns:
        [B, C, h, w // 2 + 1], float32 (float64 for float64): the half of the spectrum that ``torch.fft.rfft2`` gives.
    """
    image = _wide(image.detach())
    if tuple(image.shape[2:]) != tuple(size):
        options = {"mode": "area"} if resize == "area" else {"mode": "bilinear", "antialias": True}
        image = F.interpolate(image, tuple(size), **options)
    return torch.fft.rfft2(image, norm=norm).abs().clamp_min(eps).pow(alpha)


def frequency_distance(
    student: Tensor, teacher: Tensor, weights: Tensor, *, reduction: str = "mean", norm: str = "backward"
) -> Tensor:
    """``sum(weights * |F teacher - F student|^2)`` over all frequencies, by one real transform of the difference.

    Args:
        student, teacher: [B, C, h, w].
        weights: as :func:`frequency_weights` makes them, [B, C or any other number, h, w // 2 + 1]; the mean over the
            channels where their number is another one.
        reduction: "mean" over everything (of the whole spectrum), or "sum", a sum for each sample and the mean of them.
        norm: that of the transform.

    Returns:
        0-d; differentiable once in student and teacher.
    """
    if weights.shape[1] != student.shape[1]:
        weights = weights.mean(1, keepdim=True)
    count = student.numel() if reduction == "mean" else student.shape[0]
    energy = _Energy.apply(_wide(teacher - student), weights)
    return energy / (max(count, 1) * (math.prod(student.shape[2:]) if norm == "ortho" else 1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Energy(torch.autograd.Function):
    """``sum(weights * |F x|^2)`` over the whole spectrum, of which only half is computed, forth and back.

    The other half mirrors the inner columns. The gradient is 2 h w times the inverse transform of weights * F x, real
    because the weights are those of a real image, which mirror each other like the spectrum.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        weighted = spectrum * weights
        ctx.save_for_backward(weighted)
        ctx.size = tuple(x.shape[2:])
        columns = (torch.view_as_real(spectrum) * torch.view_as_real(weighted)).sum((0, 1, 2, 4))
        inner = (x.shape[3] - 1) // 2
        return columns.sum() + columns[1 : 1 + inner].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weighted,) = ctx.saved_tensors
        # norm="forward" leaves the inverse undivided
        return torch.fft.irfft2(weighted, ctx.size, norm="forward") * (2 * grad), None


class SpectralDistillationLoss(nn.Module):
    """``base + spatial * sum_i |T_i - A_i S_i|^2 + frequency * sum_i |w_i^(1/2) (F T_i - F A_i S_i)|^2``.

    T_i and S_i are features of teacher and student at several scales, A_i are 1x1 convolutions to the teacher's width,
    trained along with the student, and w_i = max(|F image|, eps) ** alpha of the clean image at that scale.

    Args:
        student_channels, teacher_channels: channels of the features, one number for each scale.
        spatial, frequency: weights of the two sums.
        alpha, eps: of the weights of frequencies, see :func:`frequency_weights`.
        reduction: "mean" over everything in a feature map, or "sum", a sum for each sample and the mean of them.
        norm: of the transforms: "backward" as in ``torch.fft``, where energies grow with the number of pixels, or
            "ortho", which makes the loss at ``alpha=0`` the same for both sums.
        resize: how the clean image is brought to a scale: "area" or "bilinear".
        align: "always" a convolution, which starts as the identity where both have as many channels; or only
            "where_needed".

    Raises ``TypeError`` or ``ValueError`` for bad arguments, naming them.

    Source: Yang et al., Diffusion Probabilistic Model Made Slim (CVPR 2023): alpha -1, both weights 0.1.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        spatial: float = 0.1,
        frequency: float = 0.1,
        alpha: float = -1.0,
        eps: float = 1e-8,
        reduction: str = "mean",
        norm: str = "backward",
        resize: str = "area",
        align: str = "always",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = [
            _channels_of(name, values)
            for name, values in (("student_channels", student_channels), ("teacher_channels", teacher_channels))
        ]
        if not channels[0] or len(channels[0]) != len(channels[1]):
            raise ValueError(
                "teacher_channels: expected as many scales as student_channels, at least one, got "
                f"{len(channels[1])} and {len(channels[0])}"
            )
        for name, value, least in (("spatial", spatial, 0.0), ("frequency", frequency, 0.0), ("eps", eps, None)):
            _check_number(name, value, least)
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        _check_number("alpha", alpha, None)
        options = (("reduction", reduction, REDUCTIONS), ("norm", norm, NORMS), ("resize", resize, RESIZES))
        for name, value, choices in (*options, ("align", align, ALIGNMENTS)):
            check_choice(name, value, choices)
        self.student_channels, self.teacher_channels = channels
        self.spatial, self.frequency, self.alpha, self.eps = float(spatial), float(frequency), float(alpha), float(eps)
        self.reduction, self.norm, self.resize = reduction, norm, resize
        self.align = nn.ModuleList(
            nn.Identity() if align == "where_needed" and s == t else _alignment(s, t, device, dtype)
            for s, t in zip(*channels, strict=True)
        )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], image: Tensor, base: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d.

        Args:
            student, teacher: features of each scale, [B, channels, h, w] with the same h and w for both. No gradients
                reach the teacher.
            image: the clean images [B, C, H, W].
            base: the loss of the diffusion model itself, 0-d; ``None``: none.
        """
        parts = self._terms(student, teacher, image, (self.spatial > 0, self.frequency > 0))
        loss = self.spatial * sum(parts[0], _wide(image).new_zeros(())) + self.frequency * sum(parts[1])
        return loss if base is None else base + loss

    def terms(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], image: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The distances of each scale, without their weights: in space, and in frequencies."""
        return self._terms(student, teacher, image, (True, True))

    def _terms(self, student, teacher, image, wanted: tuple[bool, bool]) -> tuple[list[Tensor], list[Tensor]]:
        self._check(student, teacher, image)
        spatial, frequency, known = [], [], {}
        for s, t, align in zip(student, teacher, self.align, strict=True):
            s, t, size = align(s), t.detach(), tuple(t.shape[2:])
            if wanted[0]:
                count = s.numel() if self.reduction == "mean" else s.shape[0]
                spatial.append(_wide(t - s).square().sum() / max(count, 1))
            if not wanted[1]:
                continue
            if size not in known:
                known[size] = frequency_weights(
                    image, size, self.alpha, eps=self.eps, norm=self.norm, resize=self.resize
                )
            frequency.append(frequency_distance(s, t, known[size], reduction=self.reduction, norm=self.norm))
        return spatial, frequency

    def _check(self, student: Sequence[Tensor], teacher: Sequence[Tensor], image: Tensor) -> None:
        check_tensor("image", image)
        if image.dim() != 4 or not image.is_floating_point():
            raise ValueError(f"image: expected floating-point [B, C, H, W], got {image.dtype} {tuple(image.shape)}")
        both = (("student", student, self.student_channels), ("teacher", teacher, self.teacher_channels))
        for name, features, channels in both:
            if isinstance(features, Tensor) or len(features) != len(channels):
                raise ValueError(f"{name}: expected a sequence of {len(channels)} feature maps")
            for place, feature in enumerate(features):
                check_tensor(f"{name}[{place}]", feature)
        for name, features, channels in both:
            for place, (feature, own, other) in enumerate(zip(features, channels, teacher, strict=True)):
                wanted = (image.shape[0], own, *other.shape[2:])
                if tuple(feature.shape) != wanted:
                    raise ValueError(f"{name}[{place}]: expected shape {wanted}, got {tuple(feature.shape)}")

    def extra_repr(self) -> str:
        return (
            f"spatial={self.spatial:g}, frequency={self.frequency:g}, alpha={self.alpha:g}, "
            f"reduction={self.reduction!r}, norm={self.norm!r}"
        )


def _channels_of(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of ints, got {type(values).__name__}")
    return int_tuple(name, list(values), len(values), minimum=1)


def _check_number(name: str, value: object, least: float | None) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or (least is not None and value < least):
        raise ValueError(f"{name}: expected a finite number{'' if least is None else f' >= {least:g}'}, got {value}")


def _alignment(student: int, teacher: int, device, dtype) -> nn.Conv2d:
    convolution = nn.Conv2d(student, teacher, 1, device=device, dtype=dtype)
    if student == teacher:
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return convolution
