"""A stage of a Runge-Kutta step over images, in plain torch: the oracle, exact in float64, and its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor


def combination(
    state: Tensor,
    slopes: Sequence[Tensor],
    weights: Sequence[float],
    position_weights: Sequence[float],
    drift: float,
    second: bool,
) -> Tensor:
    """``state + sum(weights * slopes)``; of ``second`` order, the halves [z; v] become

    ``z + drift v + sum(position_weights * slopes)`` and ``v + sum(weights * slopes)``.
    """
    if not second:
        for weight, slope in zip(weights, slopes, strict=True):
            state = state + weight * slope
        return state
    z, v = state.chunk(2, dim=1)
    position, velocity = z + drift * v if drift else z, v
    for by, weight, slope in zip(position_weights, weights, slopes, strict=True):
        position, velocity = position + by * slope, velocity + weight * slope
    return torch.cat((position, velocity), dim=1)


def _moments(point: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation [N, C, 1, 1] in the accuracy of sums: float32 at least."""
    wide = point if point.dtype == torch.float64 else point.float()
    mean = wide.mean((2, 3), keepdim=True)
    variance = (wide - mean).square().mean((2, 3), keepdim=True)
    return mean, (variance + eps).rsqrt()


def _film(film: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [N, C, 1, 1]."""
    return None if film is None else film[:, :, None, None].chunk(2, dim=1)


def ode_stage(
    state: Tensor,
    slopes: Sequence[Tensor],
    weights: Sequence[float],
    position_weights: Sequence[float],
    drift: float,
    second: bool,
    film: Tensor | None,
    plane: float | None,
    eps: float,
    normalise: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised point, point, moments [N, 2, C]); empty tensors in place of what is not wanted."""
    point = combination(state, slopes, weights, position_weights, drift, second)
    nothing = state.new_empty(0)
    if not normalise:
        return nothing, point, _wide_empty(state)
    mean, inverse = _moments(point, eps)
    y = (point - mean) * inverse
    if film is not None:
        scale, shift = _film(film)
        y = y * (1 + scale) + shift
    y = y.to(state.dtype)
    if plane is not None:
        y = torch.cat((y, torch.full_like(y[:, :1], plane)), dim=1)
    moments = torch.stack((mean[:, :, 0, 0], inverse[:, :, 0, 0]), dim=1)
    return y, point if keep else nothing, moments


def _wide_empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def ode_stage_backward(
    grad: Tensor, point: Tensor, film: Tensor | None, beside: Tensor | None, eps: float, need_film: bool
) -> tuple[Tensor, Tensor | None]:
    """(gradient of the point, of film [N, 2 C] or ``None``), differentiable: the moments are computed from ``point``.

    ``grad``: of the normalised point, perhaps with the plane's channel, which has no gradient. ``beside``: what the
    gradient of the point starts from.
    """
    mean, inverse = _moments(point, eps)
    x = (point - mean) * inverse
    grad = grad[:, : point.shape[1]]
    g = grad if film is None else grad * (1 + _film(film)[0])
    axes = (2, 3)
    dpoint = inverse * (g - g.mean(axes, keepdim=True) - x * (g * x).mean(axes, keepdim=True))
    dpoint = dpoint.to(point.dtype)
    if beside is not None:
        dpoint = dpoint + beside
    dfilm = torch.cat(((grad * x).sum(axes), grad.sum(axes)), dim=1) if need_film else None
    return dpoint, dfilm


def combination_backward(
    grad: Tensor,
    weights: Sequence[float],
    position_weights: Sequence[float],
    drift: float,
    second: bool,
    need_state: bool,
    need_slopes: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the state and of the slopes from that of the point; ``None`` where they are not needed."""
    if not second:
        slopes = [grad * weight if need else None for weight, need in zip(weights, need_slopes, strict=True)]
        return grad if need_state else None, slopes
    of_z, of_v = grad.chunk(2, dim=1)
    slopes = [
        of_z * by + of_v * weight if need else None
        for by, weight, need in zip(position_weights, weights, need_slopes, strict=True)
    ]
    state = grad
    if need_state and drift:
        state = torch.cat((of_z, of_v + drift * of_z), dim=1)
    return state if need_state else None, slopes
