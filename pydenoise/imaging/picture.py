"""A picture in memory: integer samples as they were stored, and what travels beside them."""

from dataclasses import dataclass, field

import numpy as np

# Samples are held as integers and turned into floats tile by tile: 2^30 pixels are 3 GiB in 8-bit RGB.
MAX_PIXELS = 2**30


class ImageError(ValueError):
    """A picture that cannot be read, or cannot be written as asked; the message names the file and the reason."""


@dataclass
class Picture:
    """``pixels`` [H, W, C], uint8 or uint16, C = 1 (gray) or 3 (RGB); ``alpha`` [H, W] of that dtype, or ``None``."""

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        pixels, alpha = self.pixels, self.alpha
        if pixels.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"pixels: expected uint8 or uint16, got {pixels.dtype}")
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
            raise ValueError(f"pixels: expected [H, W, 1 or 3] and at least one pixel, got {list(pixels.shape)}")
        if alpha is not None and (alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype):
            raise ValueError(
                f"alpha: expected {list(pixels.shape[:2])} {pixels.dtype}, got {list(alpha.shape)} {alpha.dtype}"
            )

    @property
    def bits(self) -> int:
        """Bits per sample: 8 or 16."""
        return self.pixels.dtype.itemsize * 8

    @property
    def gray(self) -> bool:
        return self.pixels.shape[2] == 1

    def describe(self) -> str:
        """For example ``451 x 300 RGB, 8 bit``."""
        height, width, _ = self.pixels.shape
        kind = ("gray" if self.gray else "RGB") + (" + alpha" if self.alpha is not None else "")
        return f"{width} x {height} {kind}, {self.bits} bit"


def check_size(path: str, width: int, height: int) -> None:
    """Refuse absurd sizes before memory is asked for."""
    if width < 1 or height < 1:
        raise ImageError(f"{path}: the picture is empty ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{path}: {width} x {height} pixels are more than the {MAX_PIXELS} that are supported")


def from_samples(samples: np.ndarray, **others) -> Picture:
    """A :class:`Picture` of samples [H, W] or [H, W, 1..4]: the second or fourth channel is alpha."""
    samples = samples[:, :, None] if samples.ndim == 2 else samples
    if samples.shape[2] in (2, 4):
        return Picture(samples[:, :, :-1], np.ascontiguousarray(samples[:, :, -1]), **others)
    return Picture(samples, **others)


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """A view of samples [H, W, ...] turned as the EXIF/TIFF ``orientation`` 1..8 says; other values leave it."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return samples[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
