"""One call of a sampler's denoiser outside of its loop: for samplers that choose between states, or walk among them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pydenoise.samplers.runtime import Sampler


def evaluate(
    sampler: Sampler, x: Tensor, times: Tensor, conditions: Mapping[str, object], input_scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """(output, unconditional output or None) for x [B, ...] at ``times`` [B]; raises what ``Sampler`` raises.

    ``conditions`` are the keyword arguments, with guidance of both halves.
    """
    setting = sampler._setting
    given = x if input_scale == 1 else x * input_scale
    given = given.to(setting.model_dtype or x.dtype)
    guided = sampler.guidance is not None
    if guided:
        given, times = torch.cat([given, given]), torch.cat([times, times])
    output = sampler.denoiser(given, times, **conditions)
    if not isinstance(output, Tensor):
        raise TypeError(f"denoiser: expected a tensor, got {type(output).__name__}")
    expected = list(given.shape)
    if setting.learned_variance:
        expected[1] *= 2
    if list(output.shape) != expected:
        raise ValueError(f"denoiser: expected shape {tuple(expected)}, got {tuple(output.shape)}")
    if not output.is_floating_point() or (output.dtype == torch.float64 and x.dtype != torch.float64):
        raise TypeError(f"denoiser: expected a floating-point tensor for a sample of {x.dtype}, got {output.dtype}")
    if setting.learned_variance and not setting.plan.learned_variance:
        output = output[:, : x.shape[1]]
    return (output[x.shape[0] :], output[: x.shape[0]]) if guided else (output, None)


def repeated(given: Mapping[str, object] | None, batch: int, copies: int) -> dict[str, object] | None:
    """Keyword arguments for ``copies`` of a batch, one after the other."""
    if given is None:
        return None

    def more(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: more(inner) for key, inner in value.items()}
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
            return torch.cat([value] * copies)
        return value

    return {name: more(value) for name, value in given.items()}
