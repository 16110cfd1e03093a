"""Interleaved timing in one process, and the statistics of it: medians, minima, paired ratios and their range.

Contenders take turns, one sample each per round, in an order that is drawn anew for each round, so that drift of the
machine (clock, neighbours) and what the predecessor leaves behind hit all of them alike; ratios are formed within a
round, then summarised.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MIN_SAMPLE_SECONDS = 2e-3  # a sample of a fast call is a loop at least this long: clock and loop cost nothing then
MAX_INNER = 2000
MIN_ROUNDS = 5
SETTLE_SECONDS = 5e-3  # thread pools spin for a while after work; the next contender starts when they are asleep
WARM_UP_BELOW_SECONDS = 0.05  # an untimed call before a sample refills the caches; it is not worth it for long calls
CONFIDENCE = 0.95


@dataclass
class Timing:
    """Samples of one contender: seconds per call, one sample a round, each the mean of ``inner`` calls."""

    inner: int = 1
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def statistics(self) -> dict:
        """Everything that the JSON keeps about the samples, in seconds per call."""
        ordered = sorted(self.seconds)
        return {
            "rounds": len(ordered),
            "calls_per_sample": self.inner,
            "median_s": self.median,
            "min_s": ordered[0],
            "max_s": ordered[-1],
            "quartile1_s": quantile(ordered, 0.25),
            "quartile3_s": quantile(ordered, 0.75),
            "cpu_median_s": statistics.median(self.cpu_seconds) if self.cpu_seconds else None,
            "cpu_min_s": min(self.cpu_seconds, default=None),
            "samples_s": list(self.seconds),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender is than another: the median of the per-round ratios and its range.

    ``low`` and ``high`` enclose the median with 95 % confidence where there are at least six rounds, else they are the
    extremes. ``of_minima`` is the ratio of the two best samples.
    """

    median: float
    low: float
    high: float
    of_minima: float


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    budget_seconds: float = math.inf,
    samplers: Mapping[str, Callable[[], float]] | None = None,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    settle_seconds: float = SETTLE_SECONDS,
) -> dict[str, Timing]:
    """Time ``calls`` in turns for up to ``rounds`` rounds, or until the budget is spent (but ``MIN_ROUNDS`` at least).

    ``samplers`` holds, for some of the names, a function that takes a sample itself and returns its seconds (a child
    process that times an import). ``synchronize`` waits for a device that runs asynchronously. The garbage collector is
    off while samples are taken.
    """
    samplers = samplers or {}
    inner = {name: 1 if name in samplers else _inner_loops(call, synchronize, clock) for name, call in calls.items()}
    timings = {name: Timing(count) for name, count in inner.items()}
    names, shuffle = list(calls), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for number in range(rounds):
            if number >= min(rounds, MIN_ROUNDS) and clock() - start > budget_seconds:
                break
            shuffle(names)
            for name in names:
                if settle_seconds:
                    time.sleep(settle_seconds)
                if name in samplers:
                    timings[name].seconds.append(samplers[name]())
                else:
                    _sample(calls[name], timings[name], synchronize, clock)
    finally:
        if collecting:
            gc.enable()
    return timings


def _inner_loops(call, synchronize, clock) -> int:
    """Calls per sample, from the faster of two timed calls (after one that warms up)."""
    call()
    best = math.inf
    for _ in range(2):
        start = clock()
        call()
        if synchronize:
            synchronize()
        best = min(best, clock() - start)
    return max(1, min(MAX_INNER, math.ceil(MIN_SAMPLE_SECONDS / max(best, 1e-9))))


def _sample(call, timing: Timing, synchronize, clock) -> None:
    if not timing.seconds or timing.seconds[-1] < WARM_UP_BELOW_SECONDS:
        call()
    if synchronize:
        synchronize()
    cpu = time.process_time()
    start = clock()
    for _ in range(timing.inner):
        call()
    if synchronize:
        synchronize()
    timing.seconds.append((clock() - start) / timing.inner)
    timing.cpu_seconds.append((time.process_time() - cpu) / timing.inner)


def paired_ratio(ours: Timing, other: Timing) -> Ratio:
    """How many times faster ``ours`` is than ``other``: time of ``other`` over time of ``ours``, round by round."""
    if len(ours.seconds) != len(other.seconds) or not ours.seconds:
        raise ValueError(f"timings: expected equally many rounds, got {len(ours.seconds)} and {len(other.seconds)}")
    ratios = sorted(b / a for a, b in zip(ours.seconds, other.seconds, strict=True))
    low, high = median_range(ratios)
    return Ratio(statistics.median(ratios), low, high, other.minimum / ours.minimum)


def paired_difference(ours: Timing, other: Timing) -> tuple[float, float, float]:
    """Seconds per call that ``ours`` takes more than ``other``: median of the per-round differences, low, high."""
    differences = sorted(a - b for a, b in zip(ours.seconds, other.seconds, strict=True))
    return (statistics.median(differences), *median_range(differences))


def median_range(ordered: Sequence[float]) -> tuple[float, float]:
    """Confidence interval of the median from order statistics; it assumes nothing about the distribution."""
    count = len(ordered)
    cumulative, rank = 0.0, 0
    for k in range(count // 2):
        cumulative += math.comb(count, k) / 2**count
        if cumulative > (1 - CONFIDENCE) / 2:
            break
        rank = k
    return ordered[rank], ordered[count - 1 - rank]


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the order statistics."""
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
