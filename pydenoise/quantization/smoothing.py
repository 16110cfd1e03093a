"""Equalisation of channels: large input channels are divided down, and the weights that read them multiplied up.

The product is unchanged; one scale then fits all channels better. Sources: Xiao et al., "SmoothQuant", ICML 2023,
eq. 4; Nagel et al., "Data-Free Quantization", ICCV 2019, eq. 11 (cross-layer).
"""

import torch
from torch import Tensor

from pydenoise.reference import activations

HOMOGENEOUS = (*activations.HOMOGENEOUS, "leaky_relu")  # the last: of any slope
_LEAST, _MOST = 1e-3, 1e3  # factors beyond these would move numbers out of half precision's range


def input_channel_amax(weight: Tensor, groups: int = 1) -> Tensor:
    """[C_in]: the largest magnitude of the weights that read each input channel. ``weight``: [C_out, C_in / groups,
    ...]."""
    parts = weight.detach().float().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.abs().amax((1, 3)).reshape(-1)


def smoothing_factors(input_amax: Tensor, weight_amax: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's factors ``s = input_amax ** alpha / weight_amax ** (1 - alpha)``: x / s meets weight * s.

    Args:
        input_amax, weight_amax: [C], not negative: the largest magnitudes of each channel of the input and of the
            weights that read it (:func:`input_channel_amax`).
        alpha: 0 leaves all of the difficulty to the inputs, 1 moves it into the weights; 0.5 to 0.8 is usual.

    Returns:
        float32 [C], geometric mean 1, within 1e-3 .. 1e3; 1 where either magnitude is 0.

    Raises:
        ValueError: shapes that differ, a magnitude that is negative or not finite, or ``alpha`` outside 0 .. 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    _check_pair("input_amax", input_amax, "weight_amax", weight_amax)
    x, w = input_amax.double(), weight_amax.double()
    used = (x > 0) & (w > 0)
    one = torch.ones_like(x)
    return _centred(torch.where(used, x, one).pow(alpha) / torch.where(used, w, one).pow(1.0 - alpha), used)


def cross_layer_factors(producer_weight: Tensor, consumer_weight: Tensor, *, groups: int = 1) -> Tensor:
    """Factors that equalise two layers by their weights alone: ``r = sqrt(r1 * r2) / r2``, from no data.

    Args:
        producer_weight: [C, ...]; r1 = each output channel's largest magnitude.
        consumer_weight: [C_out, C / groups, ...]; r2 = the largest magnitude that reads each channel.

    Returns:
        float32 [C], as :func:`smoothing_factors` returns them, for :func:`equalize`.
    """
    r1 = producer_weight.detach().float().flatten(1).abs().amax(1)
    r2 = input_channel_amax(consumer_weight, groups)
    _check_pair("producer_weight", r1, "consumer_weight", r2)
    used = (r1 > 0) & (r2 > 0)
    one = torch.ones_like(r1)
    return _centred((torch.where(used, r1, one).double() / torch.where(used, r2, one).double()).sqrt(), used)


def equalize(
    producer_weight: Tensor,
    producer_bias: Tensor | None,
    consumer_weight: Tensor,
    factors: Tensor,
    *,
    groups: int = 1,
    activation: str = "relu",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fold ``factors`` into two layers with a positively homogeneous activation between them: exactly the same net.

    What passes between the layers is divided by ``factors``. The producer's codes do not change (each output channel
    has a scale of its own); the consumer's input fits one scale better.

    Args:
        producer_weight: [C, ...]. producer_bias: [C] or ``None``. consumer_weight: [C_out, C / groups, ...].
        factors: [C], positive: of :func:`smoothing_factors` or :func:`cross_layer_factors`.
        groups: of the consumer. activation: "none", "relu", "leaky_relu" (of any slope), or a leaky ReLU as the ops
            name it.

    Returns:
        (producer_weight / r, producer_bias / r, consumer_weight * r), new tensors of the given dtypes.

    Raises:
        ValueError: another activation; factors that are not positive or of a wrong length.
    """
    if activation not in HOMOGENEOUS:
        raise ValueError(
            f"activation: expected one of {', '.join(map(repr, HOMOGENEOUS))}, which let a factor pass; "
            f"got {activation!r}"
        )
    channels = producer_weight.shape[0]
    if tuple(factors.shape) != (channels,) or consumer_weight.shape[1] * groups != channels:
        raise ValueError(
            f"factors: expected [{channels}], with a consumer of as many input channels; got {list(factors.shape)} and "
            f"{consumer_weight.shape[1] * groups}"
        )
    if not (torch.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError("factors: expected positive, finite numbers")
    r = factors.double()
    first = (producer_weight.double() / r.reshape(-1, *[1] * (producer_weight.dim() - 1))).to(producer_weight.dtype)
    bias = None if producer_bias is None else (producer_bias.double() / r).to(producer_bias.dtype)
    return first, bias, scale_input_channels(consumer_weight, factors, groups)


def scale_input_channels(weight: Tensor, factors: Tensor, groups: int = 1) -> Tensor:
    """``weight`` [C_out, C / groups, ...] times ``factors`` [C] of the input channels that it reads, in its dtype."""
    parts = weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scaled = parts * factors.double().to(weight.device).reshape(groups, 1, weight.shape[1], 1)
    return scaled.reshape(weight.shape).to(weight.dtype)


def _centred(factors: Tensor, used: Tensor) -> Tensor:
    """``factors`` with geometric mean 1 over the channels in use, bounded, and 1 elsewhere."""
    if used.any():
        factors = factors / factors[used].log().mean().exp()
    return torch.where(used, factors.clamp(_LEAST, _MOST), torch.ones_like(factors)).float()


def _check_pair(name: str, values: Tensor, other_name: str, other: Tensor) -> None:
    if values.dim() != 1 or values.shape != other.shape:
        raise ValueError(f"{name}: expected as many channels as {other_name}, got {list(values.shape)} and "
                         f"{list(other.shape)}")  # fmt: skip
    for which, numbers in ((name, values), (other_name, other)):
        if not (torch.isfinite(numbers).all() and (numbers >= 0).all()):
            raise ValueError(f"{which}: expected finite magnitudes")
