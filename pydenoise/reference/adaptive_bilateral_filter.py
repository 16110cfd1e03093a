"""Bilateral filter with a width of its own at every pixel, in plain torch: the oracle, and the gradients' formulas."""

import torch
from torch import Tensor

BATCH, PER_IMAGE = -1, -2  # radii that are read from sigma
LARGEST_RADIUS = 127
EPSILON = 1e-8  # added to the sum of weights, which is at least 1


def radii(sigma: Tensor, radius: int) -> Tensor:
    """int64 [B], the radius of each image: ``radius`` itself, or the largest spatial sigma, rounded up.

    ``BATCH``: the largest in the batch; ``PER_IMAGE``: in each image. Nothing waits for the device. At most
    ``LARGEST_RADIUS``.
    """
    if radius >= 0 or sigma.numel() == 0:
        return torch.full((sigma.shape[0],), max(radius, 0), dtype=torch.int64, device=sigma.device)
    largest = sigma.detach()[..., :2].amax((1, 2, 3))
    if radius == BATCH:
        largest = largest.amax().expand_as(largest)
    return largest.ceil().nan_to_num(0).clamp(0, LARGEST_RADIUS).to(torch.int64)


def reflected(start: int, stop: int, size: int, device: torch.device | None = None) -> Tensor:
    """Indices ``start`` .. ``stop - 1`` of an axis, mirrored at its ends (which are not repeated) into 0 .. size - 1.

    As numpy.pad's "reflect": what lies further out than the axis is long is mirrored again.
    """
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, stop, device=device).abs() % period
    return torch.minimum(index, 2 * (size - 1) - index)


def _pixels(sigma: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] of maps that are constant on tiles."""
    height, width = size
    maps = sigma.movedim(-1, 1)
    maps = maps.repeat_interleave(height // sigma.shape[1], 2) if height else maps.new_empty(*maps.shape[:2], 0, width)
    return maps.repeat_interleave(width // sigma.shape[2], 3) if width else maps.new_empty(*maps.shape[:3], 0)


def _taps(input: Tensor, sigma: Tensor, radius: int):
    """(dy, dx, x_D, weight [B, 1, H, W]) of every offset D of the largest window; 0 outside an image's own window."""
    height, width = input.shape[2:]
    each = radii(sigma, radius)
    most = int(each.max()) if each.numel() else 0
    rows, columns = (reflected(-most, n + most, n, input.device) for n in (height, width))
    padded = input[:, :, rows][:, :, :, columns]
    sigma_x, sigma_y, sigma_r = _pixels(sigma, (height, width)).split(1, 1)
    for dy in range(-most, most + 1):
        for dx in range(-most, most + 1):
            x = padded[:, :, most + dy : most + dy + height, most + dx : most + dx + width]
            distance = ((input - x) / sigma_r).square().sum(1, keepdim=True)
            weight = (-0.5 * ((dx / sigma_x).square() + (dy / sigma_y).square() + distance)).exp()
            inside = (each >= max(abs(dy), abs(dx)))[:, None, None, None]
            yield dy, dx, x, weight * inside


def adaptive_bilateral_filter(input: Tensor, sigma: Tensor, radius: int, save_norm: bool) -> tuple[Tensor, Tensor]:
    """(output [B, C, H, W], sum of weights [B, H, W], or empty unless ``save_norm``); differentiable by autograd.

    ``y(p) = sum_D w_D x(p + D) / (sum_D w_D + 1e-8)`` with
    ``w_D = exp(-dx^2 / 2 sx^2 - dy^2 / 2 sy^2 - |x(p) - x(p + D)|^2 / 2 sr^2)``; the border is mirrored.
    """
    if input.numel() == 0:
        return torch.zeros_like(input), input.new_zeros((input.shape[0], *input.shape[2:]) if save_norm else 0)
    total, norm = torch.zeros_like(input), input.new_zeros(input.shape[0], 1, *input.shape[2:])
    for _, _, x, weight in _taps(input, sigma, radius):
        total, norm = total + weight * x, norm + weight
    norm = norm + EPSILON
    return total / norm, (norm[:, 0] if save_norm else input.new_empty(0))


def adaptive_bilateral_filter_backward(
    grad: Tensor, input: Tensor, sigma: Tensor, radius: int, output: Tensor, norm: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in ``input`` and ``sigma`` (``None`` where ``mask`` is false), with memory linear in the image.

    With ``A_D = w_D / N * sum_c g_c (x_D - y)``: ``dsx = sum_D A_D dx^2 / sx^3`` (likewise y and r); to ``x(p)`` goes
    ``-sum_D A_D (x(p) - x_D) / sr^2``, and to ``x(p + D)`` ``w_D g / N + A_D (x(p) - x_D) / sr^2``.
    """
    if input.numel() == 0:
        return (torch.zeros_like(input) if mask[0] else None), (torch.zeros_like(sigma) if mask[1] else None)
    height, width = input.shape[2:]
    each = radii(sigma, radius)
    most = int(each.max())
    maps = _pixels(sigma, (height, width))
    precision = maps[:, 2:].square().reciprocal()
    scaled = grad / norm[:, None]
    padded = input.new_zeros(*input.shape[:2], height + 2 * most, width + 2 * most)
    own, sums = torch.zeros_like(input), torch.zeros_like(maps)
    for dy, dx, x, weight in _taps(input, sigma, radius):
        a = weight * (scaled * (x - output)).sum(1, keepdim=True)
        difference = input - x
        pull = a * difference * precision
        own -= pull
        padded[:, :, most + dy : most + dy + height, most + dx : most + dx + width] += weight * scaled + pull
        sums[:, :1] += a * dx**2
        sums[:, 1:2] += a * dy**2
        sums[:, 2:] += a * difference.square().sum(1, keepdim=True)
    dinput = dsigma = None
    if mask[0]:
        rows, columns = (reflected(-most, n + most, n, input.device) for n in (height, width))
        folded = input.new_zeros(*input.shape[:3], width + 2 * most).index_add(2, rows, padded)
        dinput = own.index_add(3, columns, folded)
    if mask[1]:
        dsigma = sums / maps / maps / maps
        tiles = (sigma.shape[1], height // sigma.shape[1], sigma.shape[2], width // sigma.shape[2])
        dsigma = dsigma.view(*dsigma.shape[:2], *tiles).sum((3, 5)).movedim(1, -1).contiguous()
    return dinput, dsigma
