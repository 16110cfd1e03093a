"""Filter2Noise's denoiser: stages of a small attention network that predicts sigmas, and a bilateral filter of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.ops._quantized import check_floats
from pydenoise.ops.adaptive_bilateral_filter import RADII, adaptive_bilateral_filter
from pydenoise.reference.adaptive_bilateral_filter import LARGEST_RADIUS, reflected

SMALLEST_SIGMA = 1e-6
NAMES = ("sigma_x", "sigma_y", "sigma_r")


@dataclass(frozen=True)
class SigmaRegion:
    """A user's sigmas for a rectangle of the picture; what is ``None`` stays as it was predicted.

    ``rows`` and ``columns`` are (begin, end) in pixels, ``sigma_x`` and ``sigma_y`` in pixels too, ``sigma_r`` in units
    of the picture's values. ``stage``: the number of the stage it is for; ``None``: all of them.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    sigma_x: float | None = None
    sigma_y: float | None = None
    sigma_r: float | None = None
    stage: int | None = None

    def __post_init__(self):
        for name in ("rows", "columns"):
            span = getattr(self, name)
            if not (isinstance(span, tuple) and len(span) == 2 and all(type(i) is int for i in span)):
                raise TypeError(f"{name}: expected (begin, end) of ints, got {span!r}")
            if not 0 <= span[0] < span[1]:
                raise ValueError(f"{name}: expected 0 <= begin < end, got {span}")
        for name, most in zip(NAMES, (LARGEST_RADIUS, LARGEST_RADIUS, math.inf), strict=True):
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, (int, float)) and 0 < value <= most and value < math.inf):
                limit = "" if most == math.inf else f", at most {most},"
                raise ValueError(f"{name}: expected a positive finite number{limit} or None, got {value!r}")
        if self.sigma_x is self.sigma_y is self.sigma_r is None:
            raise ValueError("sigma_x, sigma_y, sigma_r: expected one of them at least, got None for all")
        if self.stage is not None and (type(self.stage) is not int or self.stage < 0):
            raise ValueError(f"stage: expected the number of a stage or None, got {self.stage!r}")


class SigmaPredictor(nn.Module):
    """(sigma_x, sigma_y, sigma_r) of every patch, from two self-attentions over all patches of a picture.

    Args:
        channels: C of the picture. patch_size: p, the side of a patch in pixels.
        features: the length of queries, keys and values. largest: no sigma is larger (but for 1e-6).

    Takes [B, C, H, W] with H and W multiples of p; returns [B, H / p, W / p, 3], positive. Attention runs through
    ``scaled_dot_product_attention``, so no matrix of patches by patches is stored.
    """

    def __init__(self, channels: int = 1, patch_size: int = 8, features: int = 8, largest: float = 6.0,
                 *, device=None, dtype=None):  # fmt: skip
        super().__init__()
        self.patch_size, self.largest = patch_size, largest
        token, kind = channels * patch_size**2, {"device": device, "dtype": dtype}
        self.query, self.key, self.value = (nn.Linear(token, features, **kind) for _ in range(3))
        self.sigma_query, self.sigma_key, self.sigma_value = (nn.Linear(features, features, **kind) for _ in range(3))
        self.norm = nn.LayerNorm(features, **kind)
        self.sigma_proj = nn.Linear(features, 3, **kind)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (size // self.patch_size for size in x.shape[2:])
        tokens = F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)
        features = _attention(self.query(tokens), self.key(tokens), self.value(tokens))
        features = _attention(self.sigma_query(features), self.sigma_key(features), self.sigma_value(features))
        sigma = F.softplus(self.sigma_proj(self.norm(features))).clamp(max=self.largest) + SMALLEST_SIGMA
        return sigma.reshape(x.shape[0], rows, columns, 3)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head over [B, N, features]."""
    return F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (query, key, value))).squeeze(1)


class AttentionGuidedBilateral(nn.Module):
    """Filter2Noise's denoiser: in each stage, attention over patches predicts sigmas and a bilateral filter uses them.

    With one channel, patches of 8 and 2 stages it has 3638 parameters, few enough to be trained on a single noisy
    picture: :func:`pydenoise.self_supervised.denoise_single_image`.

    Args:
        channels: C of the pictures; the channels share their weights.
        stages: how many, each with parameters of its own.
        patch_size: sigmas are constant on squares of so many pixels.
        features, largest: see :class:`SigmaPredictor`.
        radius: "per_image" (a picture's result does not depend on the others of its batch), "batch" (as published), or
            an int: see :func:`pydenoise.functional.adaptive_bilateral_filter`.
        backend: of the filter.

    Shapes: [B, C, H, W] to the same, any H and W: what is no multiple of ``patch_size`` is mirrored to one on the right
    and at the bottom, and cut off again. The state dict has ``predictors.<stage>.<layer>.weight`` and ``.bias``.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: Sun et al., Filter2Noise: interpretable self-supervised single-image denoising for low-dose CT with
    attention-guided bilateral filtering (2025).
    """

    def __init__(
        self, channels: int = 1, stages: int = 2, patch_size: int = 8, features: int = 8, largest: float = 6.0,
        radius: str | int = "per_image", backend: str = "auto", *, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        for name, value in {
            "channels": channels,
            "stages": stages,
            "patch_size": patch_size,
            "features": features,
        }.items():
            if type(value) is not int:
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value}")
        if not (isinstance(largest, (int, float)) and 0 < largest <= 120):
            raise ValueError(f"largest: expected a number above 0, at most 120, got {largest!r}")
        if radius not in RADII and not (type(radius) is int and 0 <= radius <= LARGEST_RADIUS):
            most = LARGEST_RADIUS
            raise ValueError(f"radius: expected 'batch', 'per_image' or an int from 0 to {most}, got {radius!r}")
        self.channels, self.patch_size, self.radius, self.backend = channels, patch_size, radius, backend
        kind = {"device": device, "dtype": dtype}
        self.predictors = nn.ModuleList(
            SigmaPredictor(channels, patch_size, features, largest, **kind) for _ in range(stages)
        )

    def forward(
        self, x: Tensor, regions: Sequence[SigmaRegion] = (), *, tile: int = 0, return_sigma: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The denoised picture; with ``return_sigma`` also the sigmas that each stage used.

        Args:
            x: [B, C, H, W].
            regions: the user's sigmas, later ones over earlier ones. In a region the window is at least as wide as
                elsewhere; elsewhere nothing changes, but that later stages see what the earlier ones made.
            tile: patches attend to those of the same square of so many pixels, a multiple of ``patch_size``; 0: to all.
                Attention costs the square of their number. The filter itself has no seams.
            return_sigma: adds a list of [B, rows, columns, 3], one map for each stage: of patches (one beyond the
                picture's edge, where it is no multiple of them), or of pixels where there are regions.

        Raises:
            TypeError, ValueError: ``x`` has another shape or no floating-point dtype, or a region lies outside it or
                names no stage.
        """
        check_floats("x", x)
        if x.dim() != 4 or x.shape[1] != self.channels or 0 in x.shape[2:]:
            raise ValueError(f"x: expected [B, {self.channels}, H, W], got shape {tuple(x.shape)}")
        if type(tile) is not int or tile < 0 or tile % self.patch_size:
            raise ValueError(f"tile: expected a multiple of {self.patch_size}, zero or more, got {tile!r}")
        height, width = x.shape[2:]
        for region in regions:
            self._check_region(region, height, width)
        y = extend(x, self.patch_size)
        maps = []
        for stage, predictor in enumerate(self.predictors):
            sigma = _in_tiles(predictor, y, tile)
            filtered = adaptive_bilateral_filter(y, sigma, radius=self.radius, backend=self.backend)
            if regions:
                own = [region for region in regions if region.stage in (None, stage)]
                filtered, sigma = self._overridden(y, filtered, sigma, own)
            y = filtered
            maps.append(sigma[:, :height, :width] if regions else sigma)
        y = y[:, :, :height, :width]
        return (y, maps) if return_sigma else y

    def _check_region(self, region: object, height: int, width: int) -> None:
        if not isinstance(region, SigmaRegion):
            raise TypeError(f"regions: expected SigmaRegion, got {type(region).__name__}")
        if region.rows[1] > height or region.columns[1] > width:
            raise ValueError(f"regions: rows {region.rows} and columns {region.columns} end outside {height} x {width}")
        if region.stage is not None and region.stage >= len(self.predictors):
            raise ValueError(f"regions: no stage {region.stage}; they are 0 to {len(self.predictors) - 1}")

    def _overridden(
        self, x: Tensor, filtered: Tensor, sigma: Tensor, regions: Sequence[SigmaRegion]
    ) -> tuple[Tensor, Tensor]:
        """``filtered`` with the regions filtered anew, and sigma for every pixel with the user's numbers in it."""
        widest = sigma[..., :2].detach().amax().item()
        sigma = sigma.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
        for region in regions:
            for place, name in enumerate(NAMES):
                if (value := getattr(region, name)) is not None:
                    sigma[:, slice(*region.rows), slice(*region.columns), place] = value
        filtered = filtered.clone() if regions else filtered
        for region in regions:
            radius = self.radius
            if isinstance(radius, str):
                radius = math.ceil(max(widest, region.sigma_x or 0, region.sigma_y or 0))
            spans = (region.rows, region.columns)
            around = [slice(max(begin - radius, 0), end + radius) for begin, end in spans]
            inside = [
                slice(span[0] - part.start, span[1] - part.start) for span, part in zip(spans, around, strict=True)
            ]
            own = (x[:, :, around[0], around[1]], sigma[:, around[0], around[1]])
            part = adaptive_bilateral_filter(*own, radius=radius, backend=self.backend)
            filtered[:, :, slice(*region.rows), slice(*region.columns)] = part[:, :, inside[0], inside[1]]
        return filtered, sigma

    def extra_repr(self) -> str:
        return f"channels={self.channels}, patch_size={self.patch_size}, radius={self.radius!r}"


def _in_tiles(predictor: SigmaPredictor, x: Tensor, tile: int) -> Tensor:
    """The predictor's map of ``x``, whose sides are multiples of its patches, square by square."""
    if not tile:
        return predictor(x)
    rows = [torch.cat([predictor(part) for part in row.split(tile, 3)], 2) for row in x.split(tile, 2)]
    return torch.cat(rows, 1)


def extend(x: Tensor, multiple: int) -> Tensor:
    """``x`` [B, C, H, W], mirrored on the right and at the bottom to sides that are multiples of ``multiple``."""
    for axis in (2, 3):
        size = x.shape[axis]
        if size % multiple:
            x = x.index_select(axis, reflected(0, size + -size % multiple, size, x.device))
    return x
