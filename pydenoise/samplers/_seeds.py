"""Where the random numbers of a generation come from: seeds and generators become the keys of counter-based noise."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

Seed = int | Sequence[int] | None
Generator = torch.Generator | Sequence[torch.Generator] | None


def noise_keys(seed: Seed, generator: Generator, batch: int, positions: int, device: torch.device) -> Tensor:
    """int64 [batch, positions, 2]: seed and number of every position's noise.

    One seed or generator serves the batch, and positions are numbered by sample and place. With one for each sample the
    number is the place alone: a sample then gets the noise that it gets by itself.
    """
    places = torch.arange(positions, device=device)
    if isinstance(seed, Sequence) or isinstance(generator, Sequence):
        seeds = _each(seed, generator, batch)
        numbers = places.expand(batch, -1)
    else:
        seeds = [_seed_of(seed, generator)] * batch
        numbers = places + (torch.arange(batch, device=device) << 32)[:, None]
    owners = torch.tensor(seeds, dtype=torch.int64).to(device)[:, None].expand(-1, positions)
    return torch.stack([owners, numbers], -1)


def sample_keys(seed: Seed, generator: Generator, batch: int, device: torch.device) -> Tensor:
    """int64 [batch, 2]: ``noise_keys`` of samples with one position each, as one tensor made of Python's numbers."""
    if isinstance(seed, Sequence) or isinstance(generator, Sequence):
        pairs = [(owner, 0) for owner in _each(seed, generator, batch)]
    else:
        owner = _seed_of(seed, generator)
        pairs = [(owner, number << 32) for number in range(batch)]
    return torch.tensor(pairs, dtype=torch.int64).reshape(batch, 2).to(device)


def _each(seed: Seed, generator: Generator, batch: int) -> list[int]:
    name, given = ("seed", seed) if isinstance(seed, Sequence) else ("generator", generator)
    if seed is not None and generator is not None:
        raise ValueError("seed: expected either seed or generator, got both")
    if isinstance(given, str) or len(given) != batch:
        raise ValueError(f"{name}: expected one for each of {batch} samples, got {len(given)}")
    return [_seed_of(item, None) if name == "seed" else _seed_of(None, item) for item in given]


def _seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """64 bits, as an int64; without either, from torch's default generator."""
    if seed is not None and generator is not None:
        raise ValueError("seed: expected either seed or generator, got both")
    if seed is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device).item())
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    return int(seed) - 2**64 if int(seed) >= 2**63 else int(seed)


class SeedStream:
    """Seeds for the parts of a longer generation, each with its own noise: made of one seed, or of one per sample."""

    def __init__(self, seed: Seed, generator: Generator, batch: int):
        self._each = isinstance(seed, Sequence) or isinstance(generator, Sequence)
        self._owners = _each(seed, generator, batch) if self._each else [_seed_of(seed, generator)]

    def of(self, part: int) -> Seed:
        """The seed, or seeds, of a part; the same for the same number."""
        seeds = [random.Random(f"{owner}:{part}").getrandbits(63) for owner in self._owners]
        return seeds if self._each else seeds[0]
