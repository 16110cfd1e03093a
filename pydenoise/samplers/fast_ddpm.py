"""Fast-DDPM: ten timesteps, for training and for sampling alike.

Source: Jiang et al., "Fast-DDPM: Fast Denoising Diffusion Probabilistic Models for Medical Image-to-Image Generation",
2024. The network is trained at the timesteps that it will be sampled at, and at no others; for image-to-image it sees
the condition as more input channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydenoise.samplers.ddim import DDIM
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import Control, Conversion, Plan, Run, Solver

SCHEDULES = ("uniform", "nonuniform")
_NONUNIFORM_10 = (0, 199, 399, 599, 699, 799, 849, 899, 949, 999)


@dataclass(frozen=True)
class FastDDPM(Solver):
    """Another solver at Fast-DDPM's timesteps.

    Args:
        schedule: "uniform": 0 and every (T / n)-th timestep up to the last, which are n + 1 for n steps; "nonuniform":
            n timesteps, two fifths of them below 0.7 T and the rest above.
        solver: what steps between them; the paper's is DDIM().
    """

    schedule: str = "uniform"
    solver: Solver = field(default_factory=DDIM)
    name = "Fast-DDPM"

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {self.schedule!r}")
        if not isinstance(self.solver, Solver) or isinstance(self.solver, FastDDPM):
            raise TypeError(f"solver: expected a solver such as DDIM(), got {type(self.solver).__name__}")

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        """Descending. For T other than 1000 the non-uniform ones are scaled."""
        if schedule.kind != "vp":
            raise ValueError(f"schedule: Fast-DDPM has timesteps of a 'vp' schedule, got {schedule.kind!r}")
        total = schedule.num_timesteps
        if not 1 <= num_steps <= total // 2:
            raise ValueError(f"num_steps: expected 1 to {total // 2} for {total} timesteps, got {num_steps}")
        times = _uniform(total, num_steps) if self.schedule == "uniform" else _nonuniform(total, num_steps)
        return [float(t) for t in reversed(times)]

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        return self.solver.plan(schedule, timesteps, conversion)

    def control(self, run: Run) -> Control | None:
        return self.solver.control(run)

    def training_times(
        self,
        schedule: NoiseSchedule,
        num_steps: int,
        batch: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Times to train a batch at, int64 [batch]: of the sampling timesteps only, in antithetic pairs.

        The second half of the batch mirrors the first (the k-th timestep from the bottom, the k-th from the top), so
        that every batch has as much easy as hard.
        """
        if batch < 1:
            raise ValueError(f"batch: expected a positive number, got {batch}")
        times = torch.tensor(self.timesteps(schedule, num_steps)[::-1]).to(torch.int64)
        at = "cpu" if generator is None else generator.device
        first = torch.randint(len(times), (batch // 2 + 1,), generator=generator, device=at).cpu()
        return times[torch.cat([first, len(times) - 1 - first])[:batch]].to(device)


def _uniform(total: int, num_steps: int) -> list[int]:
    return [max(t, 0) for t in range(-1, total, total // num_steps)]


def _nonuniform(total: int, num_steps: int) -> list[int]:
    last = total - 1
    if num_steps == 10:
        times = list(_NONUNIFORM_10)
        return times if total == 1000 else [round(t * last / 999) for t in times]
    bend = 699 * last / 999
    few, many = int(0.4 * num_steps), int(0.6 * num_steps)
    low = [math.ceil(bend * k / few) for k in range(few)]
    high = [math.ceil(bend + (last - bend) * k / max(many - 1, 1)) for k in range(many)]
    times = sorted({*low, *high})
    if not times:
        raise ValueError(f"num_steps: the non-uniform schedule needs at least 2, got {num_steps}")
    return times


def fast_ddpm_loss(
    denoiser: Callable[..., Tensor],
    x0: Tensor,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    conditioning: Mapping[str, object] | None = None,
) -> Tensor:
    """The training loss of an epsilon-predicting network: squared errors summed over a sample, mean over the batch.

    Args:
        denoiser: ``denoiser(x, t, **conditioning)``, see ``ConcatCondition`` for image-to-image.
        x0: clean samples [B, ...].
        times: [B], of ``FastDDPM.training_times``.
        noise: like ``x0``; ``None``: drawn with ``generator``.
    """
    if times.shape != x0.shape[:1]:
        raise ValueError(f"times: expected shape {tuple(x0.shape[:1])}, got {tuple(times.shape)}")
    if noise is None:
        noise = torch.empty_like(x0).normal_(generator=generator)
    output = denoiser(schedule.add_noise(x0, noise, times), times, **(conditioning or {}))
    if output.shape != x0.shape:
        raise ValueError(f"denoiser: expected shape {tuple(x0.shape)}, got {tuple(output.shape)}")
    return (noise - output).square().flatten(1).sum(1).mean()


class ConcatCondition:
    """A network of image-to-image as a denoiser: ``model(cat([condition, x], 1), t)``.

    Call it as ``denoiser(x, t, condition=condition)``: in a sampler, ``conditioning={"condition": ...}``, [B, C', H, W]
    or [1, C', H, W].
    """

    def __init__(self, model: Callable[..., Tensor]):
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        self.model = model

    def __call__(self, x: Tensor, t: Tensor, *, condition: Tensor, **conditioning: object) -> Tensor:
        if not isinstance(condition, Tensor):
            raise TypeError(f"condition: expected a tensor, got {type(condition).__name__}")
        size = x.shape[2:]
        if condition.dim() != x.dim() or condition.shape[0] not in (1, x.shape[0]) or condition.shape[2:] != size:
            raise ValueError(
                f"condition: expected {x.shape[0]} or 1 images of size {tuple(size)}, got {tuple(condition.shape)}"
            )
        condition = condition.to(x.dtype).expand(x.shape[0], *condition.shape[1:])
        return self.model(torch.cat([condition, x], 1), t, **conditioning)
