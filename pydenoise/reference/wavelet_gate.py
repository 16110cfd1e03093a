"""Gated Haar wavelets that halve or double an image, in plain torch: the oracle, differentiable as often as wanted.

One level, orthonormal. With a, b the upper and c, d the lower pixels of a block of 2 x 2, the bands are LL = (a + b + c
+ d) / 2, B1 = (a - b + c - d) / 2, B2 = (a + b - c - d) / 2 and HH = (a - b - c + d) / 2: B1 is the difference of
columns, B2 that of rows.
"""

import torch
from torch import Tensor

SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # [band][pixel a, b, c, d]; its own transpose


def coarse_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the bands of an image; a last row or column without partner has a band pixel of its own."""
    height, width = size
    return (height + 1) // 2, (width + 1) // 2


def _butterfly(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half the matrix of signs times (a, b, c, d): pixels to bands and bands to pixels alike."""
    above, below, left, right = a + b, c + d, a - b, c - d
    return (above + below) / 2, (left + right) / 2, (above - below) / 2, (left - right) / 2


def _even(image: Tensor, repeat: bool) -> Tensor:
    """The image with an even number of rows and columns: the last one again, or zeros."""
    for dim in (2, 3):
        if image.shape[dim] % 2:
            last = image.narrow(dim, image.shape[dim] - 1, 1)
            image = torch.cat([image, last if repeat else torch.zeros_like(last)], dim)
    return image


def bands(image: Tensor, repeat: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LL, B1, B2 and HH [B, C, h, w] of images [B, C, H, W].

    A last row or column without partner is taken twice, or with ``repeat=False`` beside zeros.
    """
    x = _even(image, repeat)
    return _butterfly(x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2])


def image_of(bands: tuple[Tensor, ...]) -> Tensor:
    """The image [B, C, 2 h, 2 w] of its four bands."""
    upper_left, upper_right, lower_left, lower_right = _butterfly(*bands)
    upper, lower = torch.stack([upper_left, upper_right], -1), torch.stack([lower_left, lower_right], -1)
    return torch.stack([upper.flatten(3), lower.flatten(3)], -2).flatten(2, 3)


def _folded(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of an image from that of one in which its last row and column were taken twice."""
    height, width = size
    if height < image.shape[2]:
        image = torch.cat([image[:, :, : height - 1], image[:, :, height - 1 :].sum(2, keepdim=True)], 2)
    if width < image.shape[3]:
        image = torch.cat([image[..., : width - 1], image[..., width - 1 :].sum(3, keepdim=True)], 3)
    return image


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _gates(gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Four of [B, 1 or C, 1, 1] from [B, 4] or [B, 4, C]."""
    gate = gate.to(dtype)
    gate = gate[:, :, None] if gate.dim() == 2 else gate
    return gate[..., None, None].unbind(1)


def wavelet_gate(input: Tensor, gate: Tensor, up: bool, size: tuple[int, int]) -> Tensor:
    """Bands of ``input`` times their gates and added up, or where ``up`` the image of gated bands.

    Args:
        input: [B, C, H, W]; ``up``: [B, 4 C, h, w], the bands LL, B1, B2, HH one after the other.
        gate: [B, 4] or [B, 4, C].
        size: (H, W), of the image.

    Returns:
        [B, C, h, w]; ``up``: [B, C, H, W].
    """
    gates = _gates(gate, _wide(input).dtype)
    if not up:
        parts = [g * band for g, band in zip(gates, bands(_wide(input)), strict=True)]
        return (parts[0] + parts[1] + parts[2] + parts[3]).to(input.dtype)
    chunks = _wide(input).chunk(4, 1)
    image = image_of(tuple(g * chunk for g, chunk in zip(gates, chunks, strict=True)))
    return image[..., : size[0], : size[1]].to(input.dtype)


def wavelet_gate_backward(
    grad: Tensor, input: Tensor, gate: Tensor, pool_grad: Tensor | None, up: bool, size: tuple[int, int],
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input and gate, ``None`` for what ``mask`` does not want.

    ``pool_grad`` [B, channels of the input]: the gradient of the input's mean over its pixels, to be added to that of
    the input.
    """
    wide, gates = _wide(grad), _gates(gate, _wide(grad).dtype)
    of_input = of_gate = None
    parts = bands(wide, repeat=False) if up else (wide,) * 4
    if mask[0]:
        scaled = tuple(g * part for g, part in zip(gates, parts, strict=True))
        of_input = torch.cat(scaled, 1) if up else _folded(image_of(scaled), size)
        if pool_grad is not None:
            of_input = of_input + (_wide(pool_grad) / (input.shape[2] * input.shape[3]))[..., None, None]
        of_input = of_input.to(input.dtype)
    if mask[1]:
        others = _wide(input).chunk(4, 1) if up else bands(_wide(input))
        over = (2, 3) if gate.dim() == 3 else (1, 2, 3)
        products = [(part * other).sum(over) for part, other in zip(parts, others, strict=True)]
        of_gate = torch.stack(products, 1).to(gate.dtype)
    return of_input, of_gate


def wavelet_gate_pool(input: Tensor) -> Tensor:
    """The mean over the pixels: [B, C] of [B, C, H, W]."""
    return _wide(input).mean((2, 3)).to(input.dtype)
