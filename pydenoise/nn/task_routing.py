"""Denoising task routing: which channels of a network a timestep may use.

Source: Park, Woo, Go, Kim and Kim, "Denoising Task Routing for Diffusion Models", ICLR 2024,
https://arxiv.org/abs/2310.07138.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise.ops._arguments import check_choice

METHODS = ("window", "random")


@dataclass(frozen=True)
class Route:
    """The channels of one call: a window that all samples share, or a window or set for each.

    ``start``: an int, or integers [B] (with ``width``). ``mask``: bool [C] or [B, C] instead of a window.
    """

    width: int
    start: int | Tensor | None = None
    mask: Tensor | None = None

    def options(self) -> dict:
        """As :func:`pydenoise.functional.routed_norm` takes it."""
        if self.mask is not None:
            return {"mask": self.mask}
        return {"start": self.start, "width": self.width}

    def channels(self, batch: int, device: torch.device) -> Tensor:
        """int64 [B, width]: the channels of every sample, ascending."""
        if self.mask is not None:
            mask = self.mask.reshape(-1, self.mask.shape[-1]).expand(batch, -1)
            return mask.nonzero()[:, 1].view(batch, self.width)
        start = torch.as_tensor(self.start, device=device).reshape(-1, 1)
        return (start + torch.arange(self.width, device=device)).expand(batch, -1)


class TaskRouting(nn.Module):
    """The table of channels: each timestep of ``tasks`` uses ``int(sharing * channels)`` of them.

    "window": channels ``s_t`` to ``s_t + width - 1`` with ``s_t = round((t / (tasks - 1)) ** alpha * (C - width))``, so
    that near timesteps share many channels, and the windows move most where the noise is strong. "random": a set for
    each timestep, drawn once; the sets are kept in the state dict.

    Args:
        channels: C. tasks: timesteps of the training schedule. sharing: the paper's beta. alpha: see above.
        method: "window" or "random". seed: of the random sets.
        timestep_map: the timesteps of the training schedule that a respaced sampler's own numbers stand for, as
            :meth:`respaced` sets them.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: Park et al. (2024), eq. 4 and 5; defaults are theirs.
    """

    def __init__(
        self,
        channels: int,
        tasks: int = 1000,
        *,
        sharing: float = 0.8,
        alpha: float = 4.0,
        method: str = "window",
        seed: int = 0,
        timestep_map: Sequence[int] | None = None,
    ):
        super().__init__()
        for name, value in (("channels", channels), ("tasks", tasks)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < sharing <= 1:
            raise ValueError(f"sharing: expected a share above 0 and at most 1, got {sharing}")
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        check_choice("method", method, METHODS)
        self.channels, self.tasks, self.sharing, self.alpha, self.method = channels, tasks, sharing, alpha, method
        self.width = max(1, int(sharing * channels))
        if method == "window":
            # torch rounds halves to even numbers, as Python does
            share = (torch.arange(tasks, dtype=torch.float64) / max(1, tasks - 1)) ** alpha
            starts = torch.round(share * (channels - self.width)).int()
            self.register_buffer("starts", starts, persistent=False)
            self._known = starts.tolist()
        else:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.rand(tasks, channels, generator=generator).argsort(1)[:, : self.width]
            sets = torch.zeros(tasks, channels, dtype=torch.bool).scatter_(1, chosen, True)
            self.register_buffer("sets", sets)
        self.respaced(timestep_map)

    def respaced(self, timestep_map: Sequence[int] | None) -> "TaskRouting":
        """Timesteps given from now on are numbers of a respaced schedule: ``timestep_map[t]`` is what t stands for.

        ``None``: they are those of the training schedule. Routing by the respaced number would use channels of other
        timesteps. Returns itself.
        """
        if timestep_map is None:
            self._map = None
        else:
            steps = torch.as_tensor(timestep_map)
            if steps.dim() != 1 or not steps.numel() or steps.is_floating_point() or steps.dtype == torch.bool:
                raise ValueError("timestep_map: expected a sequence of whole timesteps")
            if steps.min() < 0 or steps.max() >= self.tasks:
                raise ValueError(f"timestep_map: expected timesteps from 0 to {self.tasks - 1}")
            self._map = steps.long()
        return self

    @property
    def count(self) -> int:
        """Of the timesteps that may be given."""
        return self.tasks if self._map is None else self._map.numel()

    def route(self, timesteps: int | Tensor) -> Route:
        """The channels of ``timesteps``: a number for all samples, or [B].

        Tensors on the CPU whose timesteps are all equal give one route for all, as a number does.

        Raises:
            TypeError: timesteps that are not whole. ValueError: out of range (of tensors on the CPU).
        """
        if isinstance(timesteps, Tensor):
            if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
                raise TypeError(f"timesteps: expected whole numbers, got {timesteps.dtype}")
            if timesteps.dim() > 1:
                raise ValueError(f"timesteps: expected a number or [B], got shape {tuple(timesteps.shape)}")
            if timesteps.is_cpu and timesteps.numel():
                low, high = (v.item() for v in torch.aminmax(timesteps))
                if low == high:
                    return self._one(low)
                self._check(low)
                self._check(high)
            return self._many(timesteps.reshape(-1).long())
        if isinstance(timesteps, bool) or not hasattr(timesteps, "__index__"):
            raise TypeError(f"timesteps: expected a whole number or a tensor, got {type(timesteps).__name__}")
        return self._one(int(timesteps))

    def _check(self, timestep: int) -> None:
        if not 0 <= timestep < self.count:
            raise ValueError(f"timesteps: expected 0 to {self.count - 1}, got {timestep}")

    def _one(self, timestep: int) -> Route:
        self._check(timestep)
        task = timestep if self._map is None else int(self._map[timestep])
        if self.method == "window":
            return Route(self.width, self._known[task])
        return Route(self.width, mask=self.sets[task])

    def _many(self, timesteps: Tensor) -> Route:
        table = self.starts if self.method == "window" else self.sets
        tasks = timesteps if self._map is None else self._map.to(timesteps.device)[timesteps]
        tasks = tasks.to(table.device)
        if self.method == "window":
            return Route(self.width, start=table[tasks])
        return Route(self.width, mask=table[tasks])

    def mask(self, timesteps: int | Tensor) -> Tensor:
        """bool [B, C], or [1, C] for a number: the channels that are used."""
        route = self.route(timesteps)
        if route.mask is not None:
            return route.mask.reshape(-1, self.channels)
        device = self.starts.device
        start = torch.as_tensor(route.start, device=device).reshape(-1, 1)
        column = torch.arange(self.channels, device=device)
        return (column >= start) & (column < start + self.width)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, width={self.width}, tasks={self.tasks}, method={self.method!r}"
