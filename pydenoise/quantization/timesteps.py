"""Timesteps: which ones to calibrate on, and the ranges of them (buckets) that share a scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class NormalTimesteps:
    """Normally distributed timesteps, as PTQ4DM draws them (NDTC): ``trunc(N(mean, std) * T)``, clamped to [0, T - 1].

    The paper writes N(mu, T / 2) with mu <= T / 2; the authors' code releases mean 0.4 and std 0.4 (in units of T),
    which are the defaults here. Clamping gathers about a sixth of the draws at timestep 0.

    Attributes:
        mean, std: in units of T; std is not negative. num_train_timesteps: T.

    Source: Shang et al., "Post-training Quantization on Diffusion Models", CVPR 2023, section 3.3.
    """

    mean: float = 0.4
    std: float = 0.4
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS

    def __post_init__(self):
        _check_count("num_train_timesteps", self.num_train_timesteps)
        if not self.std >= 0:
            raise ValueError(f"std: expected a number that is not negative, got {self.std}")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` timesteps, int64 [n] on the CPU."""
        _check_count("n", n)
        drawn = torch.randn(n, generator=generator, dtype=torch.float64) * self.std + self.mean
        return (drawn * self.num_train_timesteps).trunc().clamp(0, self.num_train_timesteps - 1).long()


@dataclass(frozen=True)
class UniformTimesteps:
    """Timesteps at equal distances over [0, T - 1], in random order: every part of the trajectory counts alike.

    Attributes:
        num_train_timesteps: T.

    Source: Li et al., "Q-Diffusion", ICCV 2023, which samples its calibration set uniformly over the timesteps.
    """

    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS

    def __post_init__(self):
        _check_count("num_train_timesteps", self.num_train_timesteps)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` timesteps, int64 [n] on the CPU: one drawn from each of ``n`` equal parts, shuffled."""
        _check_count("n", n)
        parts = (torch.arange(n, dtype=torch.float64) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
        order = torch.randperm(n, generator=generator)
        return (parts * self.num_train_timesteps).floor().clamp(max=self.num_train_timesteps - 1).long()[order]


@dataclass(frozen=True)
class TimestepBuckets:
    """Ranges of timesteps that share a scale: bucket ``i`` holds ``edges[i - 1] <= t < edges[i]``.

    Attributes:
        edges: ascending; one fewer than there are buckets. Any number a model takes as its timestep will do (noise
            levels, logarithms of them).
    """

    edges: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "edges", tuple(float(edge) for edge in self.edges))
        if any(not a < b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges: expected ascending numbers, got {self.edges}")

    @classmethod
    def uniform(cls, buckets: int, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> "TimestepBuckets":
        """``buckets`` equal ranges of 0 .. T."""
        _check_count("buckets", buckets)
        _check_count("num_train_timesteps", num_train_timesteps)
        return cls(tuple(index * num_train_timesteps / buckets for index in range(1, buckets)))

    @classmethod
    def from_values(cls, values: Tensor | Sequence[float], buckets: int) -> "TimestepBuckets":
        """At most ``buckets`` ranges that share out ``values`` (timesteps or noise levels of a sampler's steps) evenly.

        Edges lie halfway between neighbouring values.
        """
        _check_count("buckets", buckets)
        steps = torch.as_tensor(values, dtype=torch.float64).flatten().unique()
        if steps.numel() == 0 or not torch.isfinite(steps).all():
            raise ValueError("values: expected at least one finite number")
        count = min(buckets, steps.numel())
        starts = [(index * steps.numel()) // count for index in range(1, count)]
        return cls(tuple(((steps[i - 1] + steps[i]) / 2).item() for i in starts))

    def __len__(self) -> int:
        return len(self.edges) + 1

    def __call__(self, timesteps: Tensor | float) -> Tensor:
        """The bucket of each timestep: int64 of its shape, on its device. Raises ``ValueError`` for NaN."""
        values = torch.as_tensor(timesteps).double()
        if torch.isnan(values).any():
            raise ValueError("timesteps: holds NaN")
        edges = torch.tensor(self.edges, dtype=torch.float64, device=values.device)
        return torch.bucketize(values, edges, right=True)


def bucket_of(timesteps: Tensor | float, buckets: int, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Tensor:
    """The bucket, 0 .. ``buckets`` - 1, of each timestep in 0 .. T - 1: ``floor(t * buckets / T)``, int64."""
    return TimestepBuckets.uniform(buckets, num_train_timesteps)(timesteps)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
