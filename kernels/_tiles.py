"""Tile sizes: what can be launched, which of it is worth timing for a problem, and the launch itself.

A kernel module keeps one table of variants; tests and the ahead-of-time check loop over it.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import triton
from torch import Tensor

MOST_CANDIDATES = 6
MOST_WASTE = 1.4  # of the work spent on padding, relative to the tile that wastes least
_MOST_IN_INTERPRETER = {
    "BLOCK_M": 1024, "BLOCK_N": 128, "BLOCK_O": 128, "BLOCK_K": 256, "BLOCK_C": 128, "BLOCK_R": 512, "BLOCK_P": 512,
    "BLOCK_L": 2048,
}  # fmt: skip


@triton.jit
def _probe():
    pass


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return not isinstance(_probe, triton.JITFunction)


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of tile sizes, for compute capabilities ``least`` to ``most``: others would spill."""

    kernel: str
    meta: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    least: int = 80
    most: int = 999

    @property
    def name(self) -> str:
        blocks = "_".join(f"{key.removeprefix('BLOCK_').lower()}{value}" for key, value in self.meta)
        return f"{self.kernel}-{blocks}-w{self.num_warps}-s{self.num_stages}"

    def config(self) -> triton.Config:
        return triton.Config(dict(self.meta), num_warps=self.num_warps, num_stages=self.num_stages)


def variants(kernel: str, names: tuple[str, ...], rows: Sequence[tuple]) -> tuple[Variant, ...]:
    """One variant per row: its block sizes, warps, stages, and the least (80) and the most compute capability."""
    count = len(names)
    return tuple(Variant(kernel, tuple(zip(names, row[:count], strict=True)), *row[count:]) for row in rows)


def _device(arguments: dict) -> torch.device:
    return next(value.device for value in arguments.values() if isinstance(value, Tensor))


@cache
def _capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; without a GPU the tiles of the smallest are as good as any."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:  # has the instructions and the shared memory of 8.9
        return 89
    return 10 * major + minor


@dataclass(frozen=True, eq=False)
class Kernel:
    """A jitted function under one name, with its tiles; among those that waste little, the first is the default.

    ``extents`` gives the problem's extent along each block axis, from the arguments. ``keys`` are the arguments that a
    timed choice depends on; without any, the default is taken. ``matrix``: the work is matrix products. ``whole`` names
    a block axis that must cover its extent, unless the argument WHOLE is false.
    """

    name: str
    function: Callable
    variants: tuple[Variant, ...]
    extents: Callable[[dict], dict[str, int]]
    keys: tuple[str, ...] = ()
    matrix: bool = False
    whole: str = ""
    _tuners: list = field(default_factory=list)

    def candidates(self, arguments: dict) -> list[Variant]:
        """The tiles worth timing for a problem, the default first: those that spend little work on padding."""
        extents = self.extents(arguments)

        def padded(variant: Variant) -> float:
            blocks = dict(variant.meta)
            return math.prod(-(-extent // blocks[axis]) * blocks[axis] for axis, extent in extents.items())

        capability = _capability(_device(arguments))
        able = [v for v in self.variants if v.least <= capability <= v.most]
        if self.whole and arguments.get("WHOLE", True):
            able = [v for v in able if dict(v.meta)[self.whole] >= extents[self.whole]]
        least = min(map(padded, able))
        return [v for v in able if padded(v) <= MOST_WASTE * least][:MOST_CANDIDATES]

    def tuned(self) -> triton.runtime.Autotuner:
        """The function with a timed choice among the candidates, made once."""
        if not self._tuners:

            def keep(configs, named, **kwargs):
                names = {v.name for v in self.candidates({**named, **kwargs})}
                return [c for c, v in zip(configs, self.variants, strict=True) if v.name in names]

            configs = [v.config() for v in self.variants]
            decorate = triton.autotune(
                configs, key=list(self.keys), prune_configs_by={"early_config_prune": keep}, cache_results=True
            )
            self._tuners.append(decorate(self.function))
        return self._tuners[0]

    def default_config(self, arguments: dict) -> triton.Config:
        """The configuration that is used where nothing is timed."""
        if not interpreting():
            return self.candidates(arguments)[0].config()
        # Few, large tiles: the interpreter's time goes by steps, hardly by their size.
        meta = dict(self.variants[0].meta)
        for axis, extent in self.extents(arguments).items():
            least = 32 if axis == "BLOCK_K" else 16  # what a product of int8 tiles needs
            most = 4096 if axis == self.whole else _MOST_IN_INTERPRETER[axis]
            meta[axis] = max(least, min(most, triton.next_power_of_2(extent)))
        return triton.Config(meta)


@dataclass(frozen=True)
class Launch:
    """One kernel call without its tile sizes; ``grid`` maps the tile sizes to the number of programs."""

    kernel: Kernel
    arguments: dict[str, object]
    grid: Callable[[dict], tuple[int, ...]]

    @property
    def device(self) -> torch.device:
        return _device(self.arguments)

    def run(self, config: triton.Config | None = None) -> None:
        """Launch with ``config``, or with the tuned one.

        Nothing is timed, and the first candidate is taken, under ``torch.use_deterministic_algorithms(True)`` (another
        tile may round another way), with ``PYDENOISE_AUTOTUNE=0``, and in the interpreter.
        """
        wanted = not torch.are_deterministic_algorithms_enabled() and os.environ.get("PYDENOISE_AUTOTUNE") != "0"
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if config is None and self.kernel.keys and wanted and not interpreting():
                self.kernel.tuned()[self.grid](**self.arguments)
                return
            config = config or self.kernel.default_config(self.arguments)
            self.kernel.function[self.grid](**self.arguments, **config.all_kwargs())


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def exact_float32() -> bool:
    """Whether float32 products must keep all bits, by the settings of torch."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses the question once its newer per-backend settings were used: those decide
        return torch.backends.cuda.matmul.fp32_precision != "tf32"
