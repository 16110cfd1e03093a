"""A bounded, uniformly drawn sample of a stream, per bucket of timesteps (Vitter's algorithm R)."""

from collections.abc import Callable

import torch
from torch import Tensor


class Reservoir:
    """At most ``capacity`` items per bucket; each of the items offered so far is kept with equal probability.

    Args:
        buckets: number of buckets. capacity: items kept in each. seed: of the draws.
    """

    def __init__(self, buckets: int, capacity: int, seed: int = 0):
        self.capacity = capacity
        self.items: list[list[Tensor]] = [[] for _ in range(buckets)]
        self.seen = [0] * buckets
        self._generator = torch.Generator().manual_seed(seed)

    def offer(self, bucket: int, make: Callable[[], Tensor]) -> None:
        """Count one more item of ``bucket``; ``make`` is called only if it is kept."""
        place = self.draw(self.seen[bucket] + 1)
        self.seen[bucket] += 1
        items = self.items[bucket]
        if len(items) < self.capacity:
            items.append(make())
        elif place < self.capacity:
            items[place] = make()

    def draw(self, limit: int) -> int:
        """A number from 0 to ``limit`` - 1."""
        return int(torch.randint(limit, (), generator=self._generator)) if limit > 1 else 0

    def merged(self, other: "Reservoir", seed: int = 0) -> "Reservoir":
        """A sample of both streams: each slot is filled from either side in proportion to what that side has seen."""
        result = Reservoir(len(self.items), max(self.capacity, other.capacity), seed)
        for bucket, sides in enumerate(zip(self.items, other.items, strict=True)):
            left = [self.seen[bucket], other.seen[bucket]]
            result.seen[bucket] = sum(left)
            rest = [[side[i] for i in torch.randperm(len(side), generator=result._generator)] for side in sides]
            while len(result.items[bucket]) < result.capacity and any(rest):
                which = 0 if result.draw(max(1, sum(left))) < left[0] else 1
                which = which if rest[which] else 1 - which
                result.items[bucket].append(rest[which].pop())
                left[which] = max(0, left[which] - 1)
        return result
