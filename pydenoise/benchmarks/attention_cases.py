"""The cases of the ``attention`` suite: block-sparse attention, its pattern, and what is built on both."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.block_mask import blocks_of
from pydenoise.reference.sparsed_block_mask import sparsed_block_mask

LENGTHS, LONG_LENGTHS = (1024, 2048, 4096), (8192, 16384, 32768, 65536)
DENSITIES = (1.0, 0.5, 0.3)
DENSE = ("sdpa", "sdpa-projection")
SPEEDUPS = {"fp32": {1.0: 1.3, 0.5: 2.6, 0.3: 5.0}, "bf16": {1.0: 2.0, 0.5: 4.0, 0.3: 8.0}}
OVER_FLEX = 2.0
MEMORY_FACTOR, MEMORY_EXTRA = 1.2, 64 << 20  # what a call may take beyond its inputs and outputs
SLOW_LENGTH = 16384  # from here on a case gets few rounds
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def named(names: tuple[str, ...], precision: str) -> tuple[str, ...]:
    """Providers' names in ``precision``: float32 goes without saying."""
    return names if precision == "fp32" else tuple(f"{name}-{precision}" for name in names)


def _arithmetic(peaks: Peaks, precision: str) -> float | None:
    """FLOP/s; processors differ in whether they have float16 arithmetic at all, so it has no floor."""
    return None if precision == "fp16" else peaks.flops(precision)


@dataclass(frozen=True)
class AttentionBench(Case):
    """Attention of one sequence to itself over the blocks of a pattern, in one dtype; forward, or forward and backward.

    ``pattern``: "random" (each row its own random blocks) or "sparsed" (see :func:`kept_blocks`).
    """

    length: int = 1024
    precision: str = "fp32"
    density: float = 1.0
    pattern: str = "random"
    training: bool = False
    heads: int = 8
    head_size: int = 64
    block_size: int = field(default=128, kw_only=True)

    def pairs(self) -> float:
        """(query, key) pairs of the kept blocks, all heads."""
        kept = self.kept_blocks()
        sizes = torch.full(kept.shape[-1:], self.block_size, dtype=torch.float64)
        sizes[-1] = self.length - self.block_size * (len(sizes) - 1)
        return (kept.double() @ sizes @ sizes).sum().item()

    def kept_blocks(self) -> Tensor:
        """Boolean [1, H, n, n]."""
        return kept_blocks(self.pattern, self.density, self.heads, blocks_of(self.length, self.block_size))

    def flops(self) -> float:
        """Of the matrix products over the kept blocks: two forward, five backward (the scores once more among them)."""
        return 2.0 * self.pairs() * self.head_size * (7 if self.training else 2)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """Arithmetic at the dtype's peak. With int8 scores that product is at the int8 peak, the other in bfloat16."""
        if precision == "int8":
            half = self.flops() / 2
            return half / peaks.flops("int8") + half / peaks.flops("bf16")
        rate = _arithmetic(peaks, precision)
        return None if rate is None else self.flops() / rate

    def describe(self) -> dict:
        kept = self.kept_blocks()
        return super().describe() | {
            "input": [1, self.heads, self.length, self.head_size],
            "dtype": self.precision,
            "block_size": self.block_size,
            "pattern": self.pattern,
            "density": kept.double().mean().item(),
            "training": self.training,
            "flops": self.flops(),
        }


@dataclass(frozen=True)
class PatternBench(Case):
    """What a pattern costs: importances of all blocks, and the mask made of them; beside one dense forward pass."""

    length: int = 1024
    precision: str = "fp32"
    heads: int = 8
    head_size: int = 64
    block_size: int = field(default=128, kw_only=True)
    select: float = field(default=0.3, kw_only=True)

    @property
    def new_tokens(self) -> int:
        """The second half is being generated."""
        return self.length // 2

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """The scores once, at the dtype's peak: what even a pattern with log-sum-exps must do."""
        rate = _arithmetic(peaks, precision)
        return None if rate is None else 2.0 * self.heads * self.length**2 * self.head_size / rate

    def describe(self) -> dict:
        return super().describe() | {
            "input": [1, self.heads, self.length, self.head_size],
            "dtype": self.precision,
            "block_size": self.block_size,
            "new_tokens": self.new_tokens,
            "select": self.select,
        }


@dataclass(frozen=True)
class ConfidenceBench(Case):
    """The most likely token of each row of logits and its probability: a step of masked diffusion."""

    rows: int = 32
    vocabulary: int = 126464
    precision: str = "fp32"

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """The logits read once."""
        moved = self.rows * self.vocabulary * ITEM_BYTES[self.precision]
        return moved / peaks.bandwidth(moved)

    def describe(self) -> dict:
        return super().describe() | {"input": [self.rows, self.vocabulary], "dtype": self.precision}


@dataclass(frozen=True)
class GenerationBench(Case):
    """A whole masked-diffusion generation, the second half of the sequence being new, with and without SparseD.

    The model is a :class:`pydenoise.models.masked_lm.MaskedLM` with random weights; 16 steps in 4 blocks, of which
    SparseD runs 5 with all keys: few, compared with the 128 and more that such models take.
    """

    length: int = 1024
    precision: str = "fp32"
    width: int = 512
    layers: int = 2
    heads: int = 8
    vocabulary: int = 256
    steps: int = field(default=16, kw_only=True)
    block_size: int = field(default=128, kw_only=True)
    select: float = field(default=0.3, kw_only=True)

    def describe(self) -> dict:
        model = {"width": self.width, "layers": self.layers, "heads": self.heads, "vocabulary": self.vocabulary}
        rest = {"steps": self.steps, "select": self.select, "block_size": self.block_size}
        return super().describe() | {"tokens": self.length, "dtype": self.precision, "model": model} | rest


@dataclass(frozen=True)
class MemoryBench(Case):
    """The peak of a fresh process: ``what`` is "attention" at a density, or "pattern" (the mask of SparseD)."""

    what: str = "attention"
    length: int = 32768
    precision: str = "fp32"
    density: float = 0.3
    heads: int = 8
    head_size: int = 64
    block_size: int = field(default=128, kw_only=True)

    def needed_bytes(self) -> int:
        """Inputs and outputs: query, key, value and output; of a pattern query, key and the importances."""
        tokens = self.heads * self.length * self.head_size * ITEM_BYTES[self.precision]
        if self.what == "attention":
            return 4 * tokens
        n = blocks_of(self.length, self.block_size)
        return 2 * tokens + 4 * self.heads * n * (n + blocks_of(self.length // 2, self.block_size))

    def allowed_bytes(self) -> int:
        return int(MEMORY_FACTOR * self.needed_bytes()) + MEMORY_EXTRA

    def describe(self) -> dict:
        return super().describe() | {
            "input": [1, self.heads, self.length, self.head_size],
            "dtype": self.precision,
            "what": self.what,
            "needed_bytes": self.needed_bytes(),
            "allowed_bytes": self.allowed_bytes(),
        }


# --------------------------------------------------------------------------------------------------------- patterns


@lru_cache(maxsize=8)
def kept_blocks(pattern: str, density: float, heads: int, n: int) -> Tensor:
    """Boolean [1, heads, n, n], the same every time.

    "random": each row has ``n * density`` random blocks, rounded down or up such that rows add up to the density.
    "sparsed": SparseD's selection with ``select=density`` from importances like those that it was made for: each head
    leans towards its neighbourhood, some columns that all rows attend to, or nothing; the second half is generated.
    """
    generator = torch.Generator().manual_seed(n)
    if pattern == "random":
        total = (torch.arange(heads * n + 1, dtype=torch.float64) * n * density + 1e-6).floor().long()
        counts = total.diff().reshape(1, heads, n, 1)
        order = torch.rand(1, heads, n, n, generator=generator).argsort(-1).argsort(-1)
        return order < counts
    if pattern != "sparsed":
        raise ValueError(f"pattern: expected 'random' or 'sparsed', got {pattern!r}")
    scores = _importances(heads, n, generator)
    return sparsed_block_mask(scores, scores[..., n // 2 :], density, "reference")


def _importances(heads: int, n: int, generator: torch.Generator) -> Tensor:
    """[1, heads, n, n]: a diagonal band, shared columns and noise, in shares that differ between heads."""
    rows, columns = torch.arange(n)[:, None], torch.arange(n)
    band = torch.exp(-(rows - columns).abs() / (n / 8))
    sinks = torch.rand(heads, 1, n, generator=generator) ** 4
    share = torch.rand(heads, 1, 1, generator=generator)
    return (share * band + (1 - share) * sinks + 0.2 * torch.rand(heads, n, n, generator=generator))[None]


# ------------------------------------------------------------------------------------------------------------ cases


def _kilo(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _bars(precision: str, density: float | None) -> tuple[Bar, ...]:
    """Against the better layout of dense attention, and compiled FlexAttention; both have to be met."""
    subjects = named(("ours-cpu",), precision)
    bars = []
    speedup = SPEEDUPS.get(precision, {}).get(density)
    if speedup is not None:
        bars.append(Bar(named(DENSE, precision), speedup=speedup, subjects=subjects))
    if speedup is not None and density == min(DENSITIES):
        bars.append(Bar(named(("flex",), precision), speedup=OVER_FLEX, subjects=subjects))
    return tuple(bars)


def _rounds(length: int) -> int | None:
    return 3 if length >= SLOW_LENGTH else None


def _forward(precision: str, lengths: tuple[int, ...], optional: bool) -> Iterator[Case]:
    for length in lengths:
        extra = {"optional": optional, "rounds": _rounds(length)}
        for density in DENSITIES:
            bars = () if optional else _bars(precision, density)
            name, why = f"{_kilo(length)} {density}", "random blocks"
            yield AttentionBench(name, f"forward {precision}", why, bars, length, precision, density, **extra)
        name, why = f"{_kilo(length)} sparsed 0.3", "a pattern as SparseD selects it: rows and heads differ"
        yield AttentionBench(name, f"forward {precision}", why, (), length, precision, 0.3, "sparsed", **extra)


def _training(precision: str, optional: bool) -> Iterator[Case]:
    for length, densities in ((1024, (1.0, 0.3)), (2048, (1.0, 0.3)), (4096, (0.3,))):
        for density in densities:
            name, why = f"{_kilo(length)} {density}", "forward and backward to query, key and value"
            group = f"training {precision}"
            yield AttentionBench(name, group, why, (), length, precision, density, training=True, optional=optional)


def _patterns(precision: str, lengths: tuple[int, ...], optional: bool) -> Iterator[Case]:
    dense = named(DENSE, precision)
    bars = (
        Bar(dense, speedup=1.0, subjects=named(("ours-pattern",), precision)),
        Bar(dense, speedup=2.0, subjects=named(("ours-pattern-lse",), precision)),
    )
    for length in lengths:
        name, why = _kilo(length), "importances of all blocks, and the mask: at most a dense pass, with lse half of one"
        extra = {"optional": optional, "rounds": _rounds(length)}
        yield PatternBench(name, f"pattern {precision}", why, bars, length, precision, **extra)


def _confidence() -> Iterator[Case]:
    for precision in ("fp32", "bf16"):
        for rows, why in ((32, "the masked positions of a block"), (256, "those of a batch of blocks")):
            group = f"confidence {precision}"
            yield ConfidenceBench(f"{rows}×126464", group, why, (), rows, precision=precision)


def _generation() -> Iterator[Case]:
    for precision, lengths in (("fp32", LENGTHS), ("bf16", LENGTHS[-1:])):
        bars = (Bar(named(("dense-generation",), precision), 1.0, subjects=named(("ours-generation",), precision)),)
        for length in lengths:
            why = "16 steps, two layers of width 512; half of the sequence is new"
            yield GenerationBench(_kilo(length), f"generation {precision}", why, bars, length, precision, rounds=3)


def _memory() -> Iterator[Case]:
    for what, length, optional in (
        ("attention", 32768, False),
        ("attention", 65536, False),
        ("pattern", 32768, False),
        ("pattern", 65536, True),
    ):
        case = MemoryBench(f"{what} {_kilo(length)}", "memory", "the peak of a fresh process", (), what, length)
        bar = Bar(peak_bytes=case.allowed_bytes(), subjects=("ours-memory",))
        yield MemoryBench(case.name, case.group, case.why, (bar,), what, length, optional=optional)


def attention_cases(quick: bool = False) -> list[Case]:
    """Suite ``attention``. ``quick`` gives a tiny case per kind, for a smoke test.

    The optional cases (8k to 64k tokens, float16) run when ``--cases`` names them.
    """
    if quick:
        return list(_quick())
    cases: list[Case] = []
    for precision in ("fp32", "bf16", "fp16"):
        optional = precision == "fp16"
        cases += _forward(precision, LENGTHS, optional)
        cases += _forward(precision, LONG_LENGTHS, True)
    for precision in ("fp32", "bf16", "fp16"):
        cases += _training(precision, precision == "fp16")
    for precision in ("fp32", "bf16"):
        cases += _patterns(precision, LENGTHS, False)
        cases += _patterns(precision, LONG_LENGTHS, True)
    return [*cases, *_confidence(), *_generation(), *_memory()]


def _quick() -> Iterator[Case]:
    small = {"heads": 2, "head_size": 32, "block_size": 32}
    for precision in ("fp32", "bf16", "fp16"):
        bars = _bars(precision, 0.3)
        group = f"forward {precision}"
        yield AttentionBench("100 0.3", group, "smoke test", bars, 100, precision, 0.3, **small)
    yield AttentionBench("100 sparsed 0.3", "forward fp32", "smoke test", (), 100, "fp32", 0.3, "sparsed", **small)
    yield AttentionBench("100 0.5", "training fp32", "smoke test", (), 100, "fp32", 0.5, training=True, **small)
    yield PatternBench("100", "pattern fp32", "smoke test", (), 100, "fp32", **small)
    yield ConfidenceBench("3×1000", "confidence bf16", "smoke test", (), 3, 1000, "bf16")
    model = {"width": 64, "layers": 1, "heads": 2, "vocabulary": 20, "steps": 8, "block_size": 16}
    yield GenerationBench("64", "generation fp32", "smoke test", (), 64, "fp32", **model, rounds=2)
    tiny = MemoryBench("attention 512", "memory", "smoke test", (), "attention", 512, **small)
    bar = Bar(peak_bytes=tiny.allowed_bytes(), subjects=("ours-memory",))
    yield MemoryBench("attention 512", "memory", "smoke test", (bar,), "attention", 512, **small)
