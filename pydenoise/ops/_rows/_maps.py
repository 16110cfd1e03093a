"""Feature maps as the kernels of softmax_aggregate read them: pixels as one axis, in planes or in rows of channels."""

from torch import Tensor


def has_adjacent_channels(features: Tensor) -> bool:
    """Whether [..., C, h, w] lies in memory pixel by pixel: results are then laid out likewise."""
    channels, height, width = features.shape[-3:]
    pixel = features.stride(-1) if width > 1 else features.stride(-2)
    return channels > 1 and height * width > 1 and features.stride(-3) == 1 and pixel != 1


def flat(maps: Tensor, adjacent_channels: bool) -> Tensor:
    """[..., C, h, w] as [..., C, h * w], adjacent pixels or else channels; a copy where memory is neither."""
    if adjacent_channels:
        rows = maps.movedim(-3, -1).flatten(-3, -2)
        return (rows if rows.stride(-1) == 1 else rows.contiguous()).transpose(-1, -2)
    planes = maps.flatten(-2)
    return planes if planes.shape[-1] == 1 or planes.stride(-1) == 1 else planes.contiguous()


def flat_either(maps: Tensor) -> Tensor:
    """As it lies if that is possible."""
    return flat(maps, maps.shape[-3] > 1 and maps.stride(-3) == 1 and maps.stride(-1) != 1)
