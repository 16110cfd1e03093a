"""The cases of the ``sampler`` suite: steps, noise, overhead and whole loops of diffusion samplers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from pydenoise import step_row as C
from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.samplers import DDIM, DDPM, PNDM, Conversion, DPMSolverPP, Euler, NoiseSchedule, Plan, Solver, UniPC

SOLVERS: dict[str, Solver] = {
    "DDIM": DDIM(),
    "DDIM eta=1": DDIM(eta=1.0),
    "DDPM": DDPM(),
    "PLMS": PNDM(variant="plms"),
    "DPM++2M": DPMSolverPP(2),
    "DPM++3M": DPMSolverPP(3),
    "UniPC2": UniPC(2),
    "Euler": Euler(spacing="leading"),  # whole timesteps, which diffusers' linspace does not have
}
SCHEDULE = NoiseSchedule.linear()  # 1000 steps from 1e-4 to 0.02: the default of diffusers' schedulers
LATENT, LATENTS, PICTURE, PICTURES = (1, 4, 64, 64), (4, 4, 64, 64), (1, 3, 256, 256), (8, 3, 256, 256)
COLD_BYTES = 208 << 20  # what a case that finds its data in memory goes through before it comes back
MEMORY = 1 << 62  # a working set that no cache holds
ITEM_BYTES = {"fp32": 4, "bf16": 2}
STEPS, LOOP_STEPS = 100, 20
OVERHEAD_SECONDS = 10e-6  # of the sampler, beside model and step, per call of the model
SMALL_SECONDS, OVER_DIFFUSERS = 20e-6, 4.0  # the smallest latent
OVER_TUNED, OF_COPY = 3.0, 0.8  # pictures past the caches
OVER_RANDN = 4.0
GUIDANCE = 7.5


@lru_cache
def plan_of(solver: str, steps: int) -> Plan:
    """The rows of a solver for a model that predicts the noise."""
    chosen = SOLVERS[solver]
    return chosen.plan(SCHEDULE, chosen.timesteps(SCHEDULE, steps), Conversion("epsilon"))


def streams(row: Tensor) -> tuple[int, int]:
    """(tensors of the state, model outputs) that a step with this row of coefficients reads or writes in full."""

    def used(*columns: int) -> bool:
        return any(float(row[column]) != 0 for column in columns)

    x0, kept = used(C.M_X0), [C.KEPT_SAMPLE, C.KEPT_BASE, C.KEPT_M, C.KEPT_OUT]
    kept += range(C.KEPT_HISTORY, C.KEPT_HISTORY + C.SLOTS)
    inputs = [
        used(C.SAMPLE, C.M_SAMPLE, C.KEPT_SAMPLE) or (x0 and used(C.X0_SAMPLE)),
        used(C.BASE, C.KEPT_BASE),
        *(used(C.HISTORY + slot, C.KEPT_HISTORY + slot) for slot in range(C.SLOTS)),
    ]
    results = [True, float(row[C.SLOT]) >= 0, used(*kept)]
    return sum(inputs) + sum(results), int(used(C.OUTPUT, C.M_OUTPUT) or (x0 and used(C.X0_OUTPUT)))


@dataclass(frozen=True)
class StepBench(Case):
    """One step of a solver, the model's output at hand; the calls of a run one after the other.

    ``precision``: dtype of the model's output; the samples are float32. ``guided``: the model's output has a batch of
    two, to be combined, and its next input has to be made of two copies. ``cold``: sets of tensors take turns, so that
    a step finds nothing of its own in the caches, as after a call of a model.
    """

    solver: str = "DDIM"
    shape: tuple[int, ...] = LATENT
    precision: str = "fp32"
    cold: bool = False
    guided: bool = field(default=False, kw_only=True)
    steps: int = field(default=STEPS, kw_only=True)

    @property
    def plan(self) -> Plan:
        return plan_of(self.solver, self.steps)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of what the model returns."""
        return (self.shape[0] * (2 if self.guided else 1), *self.shape[1:])

    def moved_bytes(self) -> float:
        """Every tensor that a row reads or writes once, on average over the run's rows."""
        counts, both = [streams(row) for row in self.plan.table], 2 if self.guided else 1
        inputs = 8 if self.guided else 0  # two copies of x'
        sizes = [4 * state + ITEM_BYTES[self.precision] * both * outputs + inputs for state, outputs in counts]
        return math.prod(self.shape) * sum(sizes) / len(sizes)

    def sets(self) -> int:
        """Sets of tensors that take turns."""
        return 1 + math.ceil(COLD_BYTES / self.moved_bytes()) if self.cold else 1

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """Memory traffic alone; of noise that is nothing, since it is computed."""
        moved = self.moved_bytes()
        return moved / peaks.bandwidth(MEMORY if self.cold else int(moved))

    def describe(self) -> dict:
        rest = {"cold": self.cold, "sets": self.sets(), "bytes": self.moved_bytes(), "steps": self.steps}
        return (
            super().describe()
            | {"input": list(self.shape), "dtype": self.precision, "solver": self.solver, "guided": self.guided}
            | rest
        )


@dataclass(frozen=True)
class NoiseBench(Case):
    """Standard normal numbers into a tensor that is there already; ``cold`` as in :class:`StepBench`."""

    shape: tuple[int, ...] = LATENT
    cold: bool = False

    def moved_bytes(self) -> float:
        return 4.0 * math.prod(self.shape)

    def sets(self) -> int:
        """Tensors that take turns."""
        return 1 + math.ceil(COLD_BYTES / self.moved_bytes()) if self.cold else 1

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """The result written once; the arithmetic of the noise takes longer."""
        return self.moved_bytes() / peaks.bandwidth(MEMORY if self.cold else int(self.moved_bytes()))

    def describe(self) -> dict:
        return super().describe() | {"input": list(self.shape), "cold": self.cold, "bytes": self.moved_bytes()}


@dataclass(frozen=True)
class LoopBench(Case):
    """A whole run of a solver. ``model``: "trivial" (returns a tensor that is there already), "digits" or "diffusers".

    ``bare``: the same calls of model and prepared step, and nothing else, are a contender too.
    """

    solver: str = "DDIM"
    shape: tuple[int, ...] = LATENT
    model: str = "trivial"
    bare: bool = False
    steps: int = field(default=LOOP_STEPS, kw_only=True)

    @property
    def plan(self) -> Plan:
        return plan_of(self.solver, self.steps)

    def describe(self) -> dict:
        model = {"model": self.model, "steps": self.steps, "calls": self.plan.calls}
        return super().describe() | {"input": list(self.shape), "solver": self.solver} | model


def is_random(solver: str) -> bool:
    """Whether a solver draws noise at its steps."""
    return plan_of(solver, 2).needs_noise


# ------------------------------------------------------------------------------------------------------------ cases

OURS, TUNED = ("ours", "ours-bf16"), ("diffusers-tuned", "diffusers-tuned-bf16")
RIVALS = ("diffusers", "diffusers-bf16", *TUNED)
SMALL_BARS = (Bar(seconds=SMALL_SECONDS, subjects=OURS), Bar(RIVALS, speedup=OVER_DIFFUSERS, subjects=OURS))
# The bandwidth that a copy reaches beside the steps; the run's own peaks are often disturbed by other work.
LARGE_BARS = (Bar(TUNED, speedup=OVER_TUNED, subjects=OURS), Bar(("copy",), speedup=OF_COPY, subjects=OURS))


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _steps() -> Iterator[Case]:
    for shape, cold, why, bars in (
        (LATENT, False, "a latent: what a call costs", SMALL_BARS),
        (LATENTS, False, "a batch of latents, in the second-level caches", ()),
        (PICTURE, True, "a picture, out of memory as after a call of a model", ()),
        (PICTURES, True, "pictures, out of memory as after a call of a model", LARGE_BARS),
    ):
        for solver in SOLVERS:
            yield StepBench(solver, f"step {_shape(shape)}", why, bars, solver, shape, "fp32", cold)
    for solver in ("DDIM", "DPM++2M"):
        for shape, cold, bars in ((LATENT, False, SMALL_BARS), (PICTURES, True, LARGE_BARS)):
            why = "the model's output in bfloat16"
            yield StepBench(solver, f"step bf16 {_shape(shape)}", why, bars, solver, shape, "bf16", cold)


def _guided() -> Iterator[Case]:
    for solver in ("DDIM", "DPM++2M"):
        for shape, cold, bars in ((LATENT, False, SMALL_BARS), (PICTURES, True, LARGE_BARS)):
            why = "with classifier-free guidance, from the model's output to its next input"
            group = f"step guided {_shape(shape)}"
            yield StepBench(solver, group, why, bars, solver, shape, "fp32", cold, guided=True)


def _noise() -> Iterator[Case]:
    bars = (Bar(("randn", "normal"), speedup=OVER_RANDN, subjects=("ours-noise",)),)
    for shape, cold in ((LATENT, False), (LATENTS, False), (PICTURE, True), (PICTURES, True)):
        yield NoiseBench(_shape(shape), "noise", "a step that only draws noise", bars, shape, cold)


def _overhead() -> Iterator[Case]:
    for solver in ("DDIM", "DDPM", "DPM++2M"):
        calls = plan_of(solver, LOOP_STEPS).calls
        name, why = f"{solver}, {calls} calls", "what Sampler.sample takes beyond calls of model and step"
        bars = (Bar(("bare",), extra_seconds=OVERHEAD_SECONDS * calls, subjects=("ours-sampler",)),)
        yield LoopBench(name, "overhead", why, bars, solver, LATENT, bare=True)


def _loops() -> Iterator[Case]:
    for solver in SOLVERS:
        name, why = f"{solver} {_shape(LATENT)}", "20 steps of a model that takes no time"
        yield LoopBench(name, "loop", why, (), solver, LATENT)
    for solver in ("DDIM", "DDPM", "DPM++2M"):
        yield LoopBench(f"{solver} {_shape(PICTURES)}", "loop", "20 steps of large samples", (), solver, PICTURES)
    for solver in ("DDIM", "DPM++2M"):
        name, why = f"{solver} 16 digits", "20 steps of the denoiser of digits that comes with the package"
        yield LoopBench(name, "loop digits", why, (), solver, (16, 1, 8, 8), "digits")
        name, why = f"{solver} 3×16²", "20 steps of a small U-Net of diffusers"
        yield LoopBench(name, "loop U-Net", why, (), solver, (1, 3, 16, 16), "diffusers")


def sampler_cases(quick: bool = False) -> list[Case]:
    """Suite ``sampler``. ``quick`` gives a tiny case per kind, for a smoke test."""
    if quick:
        return list(_quick())
    return [case for maker in (_steps, _guided, _noise, _overhead, _loops) for case in maker()]


def _quick() -> Iterator[Case]:
    shape = (2, 2, 8, 8)
    for solver in SOLVERS:
        yield StepBench(solver, "step", "smoke test", SMALL_BARS, solver, shape, steps=8)
    yield StepBench("DDIM", "step bf16", "smoke test", SMALL_BARS, "DDIM", shape, "bf16", steps=8)
    yield StepBench("DPM++2M", "step guided", "smoke test", SMALL_BARS, "DPM++2M", shape, guided=True, steps=8)
    yield NoiseBench("2×2×8×8", "noise", "smoke test", (), shape)
    yield LoopBench("DDIM", "overhead", "smoke test", (), "DDIM", shape, bare=True, steps=3)
    for model, size in (("trivial", shape), ("digits", (1, 1, 8, 8)), ("diffusers", (1, 3, 8, 8))):
        yield LoopBench(f"DPM++2M {model}", "loop", "smoke test", (), "DPM++2M", size, model, steps=3)
    yield LoopBench("DDPM trivial", "loop", "smoke test", (), "DDPM", shape, steps=3)
