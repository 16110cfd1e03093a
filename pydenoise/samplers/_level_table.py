"""Levels of a schedule for times that are tensors: on their device, without reading them on the host."""

import torch
from torch import Tensor

from pydenoise.samplers.levels import NoiseSchedule


class LevelTable:
    """alpha and sigma of a schedule at times given as a tensor; ``NoiseSchedule.level`` for whole batches.

    Its tables are copied to each device that it is asked on, once.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.schedule, self._kept = schedule, {}

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the whole times, float64 [T]."""
        if device not in self._kept:
            self._kept[device] = (self.schedule.alphas.to(device), self.schedule.sigmas.to(device))
        return self._kept[device]

    def __call__(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), float64, shaped as ``times``."""
        if self.schedule.kind == "ve":
            sigma = times.to(torch.float64)
            return torch.ones_like(sigma), sigma
        if self.schedule.kind == "flow":
            sigma = times.to(torch.float64) / self.schedule.num_timesteps
            return 1 - sigma, sigma
        alpha, sigma = self._tables(times.device)
        if not times.is_floating_point():
            return alpha[times], sigma[times]
        below = times.floor().clamp(0, len(alpha) - 1).long()
        above = (below + 1).clamp(max=len(alpha) - 1)
        part = (times - below).to(torch.float64)
        first, last = (alpha[i].log() - sigma[i].log() for i in (below, above))
        log_snr = first + part * (last - first)
        # Next to a level of pure noise the logarithm has no end; the angle has.
        angles = torch.lerp(torch.atan2(sigma[below], alpha[below]), torch.atan2(sigma[above], alpha[above]), part)
        finite = first.isfinite() & last.isfinite()
        between = [torch.where(finite, (sign * 2 * log_snr).sigmoid().sqrt(), turn)
                   for sign, turn in ((1, angles.cos()), (-1, angles.sin()))]  # fmt: skip
        return tuple(
            torch.where(part == 0, table[below], value) for table, value in zip((alpha, sigma), between, strict=True)
        )

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The times, float64, at which a "vp" schedule has these log(alpha / sigma); the ends where it has not."""
        alpha, sigma = self._tables(log_snr.device)
        wanted, rising = log_snr.to(torch.float64).contiguous(), (alpha.log() - sigma.log()).flip(0).contiguous()
        right = torch.searchsorted(rising, wanted).clamp(1, len(rising) - 1)
        low, high = rising[right - 1], rising[right]
        return len(rising) - 1 - (right - 1 + ((wanted - low) / (high - low)).clamp(0, 1))


def over_samples(value: Tensor, x: Tensor) -> Tensor:
    """A value for each sample ([B], one, or a number) in ``x``'s dtype, shaped to be multiplied with x [B, ...]."""
    return value.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
