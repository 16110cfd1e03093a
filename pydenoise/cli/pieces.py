"""Pieces of pictures for the calibration of FFDNet in int8."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIDE = 128  # of a piece: its margin, where the network sees zeros, is small beside it
COUNT = 8
# Numbers kept of each layer's inputs: a quarter of the default calibrates in a sixth of the time and is as accurate
# (coffee at sigma 25: 31.05 dB and 31.06).
SAMPLES = 1 << 17


def choose_pieces(pixels: "np.ndarray", count: int = COUNT, side: int = SIDE) -> list["np.ndarray"]:
    """At most ``count`` pieces of a picture [H, W, C], at even ranks of brightness: the darkest and the brightest too.

    A network calibrated on dark places alone clips the bright ones. Pieces are ``side`` pixels wide and high, or as
    much as the picture has.
    """
    height, width = pixels.shape[:2]
    corners = [(top, left) for top in _starts(height, side) for left in _starts(width, side)]
    pieces = [pixels[top : top + side, left : left + side] for top, left in corners]
    pieces.sort(key=lambda piece: piece[::4, ::4].mean())
    if len(pieces) <= count:
        return pieces
    if count == 1:
        return [pieces[len(pieces) // 2]]
    return [pieces[rank * (len(pieces) - 1) // (count - 1)] for rank in range(count)]


def int8_options(model, batches: Iterable[tuple]) -> dict:
    """Arguments of ``pydenoise.accelerate`` for FFDNet in int8, calibrated on ``batches`` of (x, sigma)."""
    from pydenoise.quantization import calibrate

    calibration = calibrate(model, batches, scheme="per_tensor", sample_elements=SAMPLES)
    return {"calibration": calibration, "scheme": "per_tensor"}


def _starts(length: int, side: int) -> list[int]:
    """Where pieces begin along one axis: side by side, the last one at the end."""
    last = max(length - side, 0)
    return sorted({*range(0, last, side), last})


def to_tensor(pixels: "np.ndarray") -> "Tensor":
    """Integer pixels [H, W, C] as [1, C, H, W], float32, 0 to 1."""
    import numpy as np
    import torch

    values = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return torch.from_numpy(values).permute(2, 0, 1).unsqueeze(0).contiguous()


def noisy_batches(pictures: Iterable["np.ndarray"], sigmas: Sequence[float], count: int) -> Iterator[tuple]:
    """FFDNet's inputs (x, sigma): ``count`` pieces of each clean picture, with noise of each sigma in turn."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for pixels in pictures:
        for index, piece in enumerate(choose_pieces(pixels, count)):
            level = torch.full((1, 1, 1, 1), sigmas[index % len(sigmas)] / 255)
            clean = to_tensor(piece)
            yield clean + torch.randn(clean.shape, generator=generator) * level, level
