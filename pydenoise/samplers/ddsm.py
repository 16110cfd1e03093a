"""DDSM: a network's width for every timestep, small where the step is easy.

Source: Yang et al., "Denoising Diffusion Step-aware Models", ICLR 2024. The network is trained at all widths with the
sandwich rule; an evolutionary search (``ddsm_search``) then finds a width for each timestep.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.samplers.slimmable import Slimmable


@dataclass(frozen=True)
class Strategy:
    """A width for each of the T timesteps that the network was trained on; ``widths[t]`` belongs to timestep t."""

    widths: tuple[float, ...]

    def __post_init__(self):
        widths = tuple(float(w) for w in self.widths)
        if not widths:
            raise ValueError("widths: expected one for every timestep, got none")
        wrong = [t for t, w in enumerate(widths) if not 0 < w <= 1]
        if wrong:
            raise ValueError(f"widths: expected numbers in (0, 1], got {widths[wrong[0]]} at timestep {wrong[0]}")
        object.__setattr__(self, "widths", widths)

    @classmethod
    def constant(cls, width: float, num_timesteps: int = 1000) -> "Strategy":
        """One width at every timestep."""
        return cls((width,) * num_timesteps)

    @classmethod
    def bands(cls, bands: Mapping[int, float], num_timesteps: int = 1000) -> "Strategy":
        """From the timestep where each band begins: ``{0: 1.0, 270: 0.75, 500: 0.5}`` is full width below 270.

        Searches of DDSM come out in such bands: full width at the last, least noisy timesteps.
        """
        begins = sorted(bands)
        if not begins or begins[0] != 0 or begins[-1] >= num_timesteps:
            raise ValueError(f"bands: expected timesteps from 0 to below {num_timesteps}, the first 0, got {begins}")
        ends = [*begins[1:], num_timesteps]
        return cls(tuple(bands[b] for b, e in zip(begins, ends, strict=True) for _ in range(b, e)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Strategy":
        """From a file of ``save``: JSON, the list of widths."""
        with open(path) as file:
            widths = json.load(file)
        if not isinstance(widths, list) or not all(isinstance(w, (int, float)) for w in widths):
            raise ValueError(f"path: {os.fspath(path)} is no JSON list of widths")
        return cls(tuple(widths))

    def save(self, path: str | os.PathLike) -> None:
        """As JSON."""
        with open(path, "w") as file:
            json.dump(list(self.widths), file)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.widths)

    def at(self, time: float) -> float:
        """The width at the timestep nearest to ``time``."""
        nearest = round(time)
        if not 0 <= nearest < len(self.widths):
            raise ValueError(f"time: the strategy is for timesteps from 0 to {len(self.widths) - 1}, got {time}")
        return self.widths[nearest]

    def mean_cost(self, costs: Mapping[float, float], times: Sequence[float] | None = None) -> float:
        """Mean of ``costs[width]`` (of a call, say in MACs) over ``times``; ``None``: over all timesteps."""
        used = self.widths if times is None else [self.at(t) for t in times]
        missing = sorted(set(used) - set(costs))
        if missing:
            raise ValueError(f"costs: no cost for width {missing[0]}")
        return sum(costs[w] for w in used) / len(used)


class DDSM:
    """Sets a network's width before every call of a sampler: ``Sampler(model, ..., observers=[DDSM(...)])``.

    The width is known on the host, so nothing waits for a device; on CUDA every width has a graph of its own.

    Args:
        model: the network whose width is set, the sampler's denoiser or a part of it.
        strategy: with widths that ``model`` has.
    """

    def __init__(self, model: Slimmable, strategy: Strategy):
        if not isinstance(model, Slimmable):
            raise TypeError(f"model: expected a Slimmable, got {type(model).__name__}")
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy: expected a Strategy, got {type(strategy).__name__}")
        missing = sorted(set(strategy.widths) - set(model.widths))
        if missing:
            raise ValueError(f"strategy: width {missing[0]} is none of the model's {model.widths}")
        self.model, self.strategy = model, strategy
        self._widths: tuple[float, ...] | None = None

    def begin_run(self, times: Sequence[float]) -> None:
        """A sampler begins, and its calls will be at ``times``."""
        self._widths = tuple(self.strategy.at(t) for t in times)

    def begin_step(self, step: int, num_steps: int) -> None:
        """Call ``step`` comes next."""
        self.model.width = self.graph_key(step)

    def graph_key(self, step: int) -> float:
        """The width at call ``step``: calls of the same width can share a CUDA graph."""
        if self._widths is None:
            raise RuntimeError("DDSM: begin_run(times) comes first; a Sampler calls it")
        return self._widths[step]


def sandwich_backward(
    model: Slimmable, loss: Callable[[], Tensor], *, generator: torch.Generator | None = None
) -> dict[float, float]:
    """The sandwich rule of a training step: gradients at the widest, the narrowest and one random width, added up.

    Args:
        model: the network; its width is restored.
        loss: calls the network on the step's batch and returns a scalar to differentiate; called once for each width.
        generator: draws the random width.

    Returns: the loss at each of the widths.
    """
    if not isinstance(model, Slimmable):
        raise TypeError(f"model: expected a Slimmable, got {type(model).__name__}")
    between = model.widths[1:-1]
    chosen = [model.widths[0], *({model.widths[-1]} - {model.widths[0]})]
    if between:
        chosen.append(between[int(torch.randint(len(between), (), generator=generator))])
    losses = {}
    for width in chosen:
        with model.at(width):
            value = loss()
            value.backward()
        losses[width] = float(value.detach())
    return losses
