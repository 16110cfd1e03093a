"""Thresholds: soft shrinkage, and the threshold that Stein's unbiased risk estimate prefers."""

import torch
from torch import Tensor


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(x) max(|x| - threshold, 0)."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def sure_threshold(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The best soft threshold of each row of ``coefficients`` [K, n], whose noise has standard deviation 1.

    Stein's estimate of the squared error of soft thresholding at t is n - 2 #{|x| <= t} + sum min(x^2, t^2) (Donoho and
    Johnstone, 1995). Between two neighbouring magnitudes it grows with t, so its minimum is at 0 or at one of them: all
    are tried.

    Returns thresholds [K] and risks [K].
    """
    count = coefficients.shape[1]
    ordered = coefficients.abs().sort(1).values
    squares = ordered.double().square()
    below = torch.arange(1, count + 1, device=ordered.device)
    risks = count - 2 * below + squares.cumsum(1) + squares * (count - below)
    risk, index = risks.min(1)
    threshold = ordered.gather(1, index[:, None])[:, 0]
    nothing = risk >= count  # what no threshold at all costs
    return torch.where(nothing, 0.0, threshold), torch.where(nothing, float(count), risk)
