"""The tolerance policy, and the memory arrangements that cases come in.

Policy: a kernel's largest error against the float64 oracle may be at most twice the error that torch makes for the same
computation in the kernel's own dtype, plus a floor of a few roundings of the result's scale. A case that needs more
states its reason in ``Case.relaxed``.
"""

import torch
from torch import Tensor

# The floor, in units of the dtype's epsilon times the largest oracle value: torch's own error is exactly zero on some
# tiny cases, where a sum of two terms in another order already differs by one rounding.
FLOOR_ROUNDINGS = 4.0
FACTOR = 2.0
WINOGRAD_RELATIVE_ERROR = 2e-5


def error_bound(oracle: Tensor, baseline: Tensor, factor: float = FACTOR, scale: float | None = None) -> float:
    """Largest absolute error allowed: ``factor`` x torch's own error, plus the floor (see :func:`assert_accurate`)."""
    if oracle.numel() == 0:
        return 0.0
    own = (baseline.double() - oracle).abs().max().item()
    scale = oracle.abs().max().item() if scale is None else scale
    return factor * own + FLOOR_ROUNDINGS * torch.finfo(baseline.dtype).eps * scale


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    *,
    what: str = "result",
    factor: float = FACTOR,
    scale: float | None = None,
) -> None:
    """Check ``actual`` against the float64 ``oracle`` under the policy.

    ``baseline`` is torch's result in ``actual``'s dtype. ``scale`` is what the floor is relative to: the largest oracle
    value, unless the result is a handful of sums whose terms cancel (a density gradient: give the sum of the terms'
    magnitudes), where torch's own error can be zero by luck.
    """
    assert oracle.dtype == torch.float64, "the oracle is computed in float64"
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, expected {baseline.dtype}"
    if oracle.numel() == 0:
        return
    assert torch.isfinite(actual).all() or not torch.isfinite(oracle).all(), f"{what}: not finite"
    error = (actual.detach().cpu().double() - oracle.cpu()).abs().max().item()
    bound = error_bound(oracle.cpu(), baseline.cpu(), factor, scale)
    assert error <= bound, f"{what}: error {error:.3e} exceeds {bound:.3e} (torch's own x {factor:g}, plus the floor)"


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute error over the largest oracle value."""
    scale = oracle.abs().max().item()
    return (actual.double() - oracle).abs().max().item() / scale if scale else 0.0


def arrange(tensor: Tensor, strides: str) -> Tensor:
    """The values of ``tensor`` in another memory arrangement."""
    if strides == "contiguous":
        return tensor.contiguous()
    if strides == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if tensor.dim() in formats:
            return tensor.contiguous(memory_format=formats[tensor.dim()])
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        poison = float("nan") if tensor.is_floating_point() else 99
        big = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), poison)
        view = big[..., 1::2]
        view.copy_(tensor)
        return view
    raise ValueError(f"strides: expected contiguous, channels_last or sliced, got {strides!r}")
