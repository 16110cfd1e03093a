"""Edit-friendly inversion: the noise of a sampler's steps that leads to a given image, and edits with that noise.

Source: Huberman-Spiegelglas, Kulikov and Michaeli, "An Edit Friendly DDPM Noise Space: Inversion and Manipulations",
CVPR 2024. The states x_t of the image are drawn with noise that is independent from level to level; what the ancestral
step adds between two of them is then its noise z. Sampling again with these z gives the image back, and with another
condition an image of the same structure. Without noise in the steps (eta = 0) the states are those of DDIM inversion,
and what a step misses is kept instead (as in Ju et al., "Direct Inversion", ICLR 2024).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.ddim import DDIM
from pydenoise.samplers.levels import Level, NoiseSchedule, check_count
from pydenoise.samplers.plan import Control, Conversion, Launch, Plan, Run, Solver, row
from pydenoise.samplers.runtime import FLOATS, Sampler, Trajectory

LASTS = ("exact", "zero")
Conditioning = Mapping[str, object] | None


class EditFriendly:
    """Inverts images for ``sampler``, and samples from what it found.

    Args:
        sampler: its solver is DDIM(eta=1), the paper's, or DDIM(eta=0), with target "next". Its guidance_scale is that
            of the inversion (the paper's: 3.5). Times are those of its steps.
        last: the step to the clean image has no noise. "exact": what its mean misses is kept as well, so that the image
            itself comes back; "zero", the public code: nothing is, and the image comes back as the model sees it.

    Memory: two tensors of the images' size for every step.
    """

    def __init__(self, sampler: Sampler, *, last: str = "exact"):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        solver = sampler.solver
        if not isinstance(solver, DDIM) or solver.eta not in (0, 1) or solver.target != "next":
            raise ValueError(
                f"sampler: expected the solver DDIM(eta=1) or DDIM(eta=0) with target 'next', got {solver}"
            )
        if last not in LASTS:
            raise ValueError(f"last: expected one of {', '.join(map(repr, LASTS))}, got {last!r}")
        if sampler.conversion.dynamic:
            raise ValueError("sampler: dynamic_threshold differs from step to step and cannot be inverted")
        self.last = last
        self.sampler = sampler.replace(solver=_Steps(solver, last), graph=None)

    def invert(
        self,
        x0: Tensor,
        *,
        conditioning: Conditioning = None,
        unconditional: Conditioning = None,
        generator: Generator = None,
        seed: Seed = None,
        noise: Sequence[Tensor] | Tensor | None = None,
        progress: bool = False,
    ) -> "Inversion":
        """The noise that leads to the images x0 [B, ...]; N calls of the model, 2 N with eta = 0.

        Args:
            conditioning, unconditional: what describes x0, as in ``Sampler.sample``.
            generator, seed: of the states' noise; ``noise``: that noise itself, one [B, ...] for each step's level, the
                most noise first. Only with eta = 1.
            progress: a line on stderr.

        Raises:
            TypeError, ValueError: a bad argument or a bad result of the model; the message names it.
        """
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0: expected a tensor, got {type(x0).__name__}")
        if x0.dtype not in FLOATS or x0.dim() < 1 or not bool(x0.isfinite().all()):
            raise ValueError(f"x0: expected a finite floating-point tensor [B, ...], got {x0.dtype} {tuple(x0.shape)}")
        x0 = x0.detach().contiguous()
        given = {"conditioning": conditioning, "unconditional": unconditional, "progress": progress}
        if self.sampler.solver.base.eta:
            states = self._drawn(x0, generator, seed, noise)
        elif noise is None and seed is None and generator is None:
            states = self._followed(x0, given)
        else:
            raise ValueError("noise: DDIM inversion (eta=0) draws none: expected no noise, seed or generator")
        found = _Found([*states[1:], x0], [torch.empty_like(x0) for _ in states])
        run = self.sampler.replace(solver=replace(self.sampler.solver, found=found))
        run = run.sample(states[0], seed=0, return_trajectory=True, **given)
        return Inversion(self.sampler, run.states, torch.stack(found.noise))

    def _drawn(self, x0: Tensor, generator: Generator, seed: Seed, noise) -> list[Tensor]:
        """x_t at every level, each with its own noise."""
        levels = self.sampler.plan.levels
        if noise is None:
            keys = sample_keys(seed, generator, x0.shape[0], x0.device)
            backend = self.sampler._setting.backend
            noise = [
                initial_noise(tuple(x0.shape), keys, 1.0, x0.dtype, backend, number)
                for number in range(1, len(levels) + 1)
            ]
        elif seed is not None or generator is not None:
            raise ValueError("noise: expected either noise or a seed, got both")
        noise = list(noise)
        if len(noise) != len(levels):
            raise ValueError(f"noise: expected one tensor for each of {len(levels)} steps, got {len(noise)}")
        for number, z in enumerate(noise):
            if not isinstance(z, Tensor) or z.shape != x0.shape:
                raise ValueError(f"noise[{number}]: expected shape {tuple(x0.shape)}, got {getattr(z, 'shape', z)}")
        return [level.alpha * x0 + level.sigma * z.to(x0) for level, z in zip(levels, noise, strict=True)]

    def _followed(self, x0: Tensor, given: Mapping[str, object]) -> list[Tensor]:
        """x_t at every level, by DDIM's steps from little noise to much."""
        names = ("guidance_scale", "epsilon_scale", "time_table")
        listed = {name: self.sampler._options[name] for name in names}
        turned = {name: value[::-1] for name, value in listed.items() if isinstance(value, Sequence)}
        up = self.sampler.replace(solver=_Up(self.sampler.plan), **turned)
        return list(up.sample(x0, return_trajectory=True, **given).states[1:].flip(0).unbind(0))


@dataclass(frozen=True, eq=False)
class Inversion:
    """What an inversion found.

    Args:
        sampler: whose steps these are.
        states: [N + 1, B, ...]: the sample before every step, and after the last.
        noise: [N, B, ...]: z of every step; where a step has no noise, what its mean misses.
    """

    sampler: Sampler
    states: Tensor
    noise: Tensor

    def reconstruct(self, conditioning: Conditioning = None, unconditional: Conditioning = None, **options) -> Tensor:
        """The images again, with the conditioning of the inversion."""
        return self.edit(conditioning, unconditional, skip=0, guidance_scale=self.sampler._options["guidance_scale"],
                         **options)  # fmt: skip

    def edit(
        self,
        conditioning: Conditioning = None,
        unconditional: Conditioning = None,
        *,
        skip: int = 0,
        guidance_scale: float | None = None,
        **options: object,
    ) -> Tensor | Trajectory:
        """The images under another condition.

        Args:
            conditioning, unconditional: of the edit.
            skip: so many steps are left out, and the edit begins at the state after them: more keeps more of the image
                (the paper's: 36 of 100).
            guidance_scale: of the edit (the paper's: 15).
            options: of ``Sampler.sample``, without ``x``, ``shape`` and what makes noise.
        """
        steps = len(self.noise)
        if check_count("skip", skip, 0) >= steps:
            raise ValueError(f"skip: expected less than {steps} steps, got {skip}")
        for name in ("x", "shape", "noise", "seed", "generator"):
            if name in options:
                raise ValueError(f"{name}: an edit begins at a state of the inversion, with its noise")
        late = self.sampler.replace(guidance_scale=guidance_scale).from_step(skip)
        noise = [self.noise[skip + call] for call in late.plan.noisy_calls]
        return late.sample(self.states[skip], noise=noise, seed=0, conditioning=conditioning,
                           unconditional=unconditional, **options)  # fmt: skip


@dataclass(eq=False)
class _Found:
    """What an inversion works on: the state after every step, and the noise that it finds."""

    targets: list[Tensor]
    noise: list[Tensor]


@dataclass(frozen=True, eq=False)
class _Steps(Solver):
    """DDIM's steps, whose noise is always given; steps without noise add what is given as it is."""

    base: DDIM
    last: str
    found: _Found | None = None

    name = "Edit-friendly"

    def timesteps(self, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        return self.base.timesteps(schedule, num_steps)

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        plan = self.base.plan(schedule, timesteps, conversion)
        silent = plan.table[:, C.NOISE] == 0
        if self.last == "zero":
            silent[-1] = False
        plan.table[silent, C.NOISE] = 1.0
        return plan

    @property
    def fixed_rows(self) -> bool:
        return True

    def control(self, run: Run) -> Control | None:
        return None if self.found is None else _Inverting(run, self.found)


class _Inverting(Control):
    """Finds a step's noise, and takes the step with it: the state that a later run will come to, rounding included."""

    def __init__(self, run: Run, found: _Found):
        forward = run.plan.table
        std = forward[:, C.NOISE]
        safe = torch.where(std == 0, 1.0, std)[:, None]
        # z = (x' - mean) / std, with x' in the place of the noise.
        inverse = forward.clone()
        inverse[:, [C.SAMPLE, C.BASE, C.OUTPUT, C.M]] /= -safe
        inverse[:, C.NOISE] = 1 / safe[:, 0]
        inverse[:, C.INPUT_SCALE] = 1.0
        self._silent = (std == 0).tolist()
        self._table, self._found = inverse.to(run.device, run.dtype), found

    def apply(self, call: int, launch: Launch) -> None:
        noise = self._found.noise
        if self._silent[call]:
            noise[call].zero_()
            launch()
        else:
            launch(table=self._table, noise=self._found.targets[call], out=noise[call])
            launch(noise=noise[call])


@dataclass(frozen=True, eq=False)
class _Up(Solver):
    """DDIM inversion: from a clean sample through the levels of ``down``, the least noise first.

    The model is told the level that a step ends at, as is usual: a clean sample has no time.
    """

    down: Plan

    name = "DDIM inversion"

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        levels, rows = self.down.levels[::-1], []
        for level, target in zip((Level.clean(), *levels), levels, strict=False):
            kept = target.alpha / level.alpha
            on_sample, on_output = conversion.epsilon(target)
            added = target.sigma - kept * level.sigma
            plain = replace(conversion, clip=None)
            rows.append(row(plain, target, sample=kept + added * on_sample, output=added * on_output))
        return Plan.of(self.down.times[::-1], levels, rows)
