"""Denoising MCMC: a chain among noisy samples that stays near the data, and short runs of a solver from its states.

Source: Kim and Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models", ICML 2023, with their Denoising
Langevin Gibbs. The chain's state is a sample x and its noise level sigma, of a "ve" schedule: a Langevin step on x,
then sigma by a classifier of noise levels. Of so many steps the state with the least noise is integrated to a clean
sample, with the integrators of Karras et al. (2022), each sample on its own grid of levels. The chain goes on from
where it was.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._evaluate import evaluate
from pydenoise.samplers._noise import gumbel_noise, initial_noise
from pydenoise.samplers._seeds import Generator, Seed, SeedStream, sample_keys
from pydenoise.samplers.levels import Level, NoiseSchedule, check_count
from pydenoise.samplers.plan import Control, Conversion, Launch, Plan, Run, Solver
from pydenoise.samplers.runtime import FLOATS, Sampler

INTEGRATORS = ("kar1", "kar2")
CHOICES = ("argmax", "draw")
_CHOICE = 2**31  # the number of the first random choice of levels; the chain's Langevin steps have lower ones
_START = -1  # the part of a seed that starts a chain


class DMCMC:
    """Denoising Langevin Gibbs around the denoiser of ``sampler``.

    Args:
        sampler: of a "ve" schedule; it makes the first samples of a chain, and its denoiser, prediction type, guidance
            (one number) and clip are those of everything else.
        classifier: ``classifier(x) -> logits [B, K]`` over the levels ``sigmas``.
        sigmas: float [K]; ``None``: the public code's 1000 from the schedule's largest down to 0.01.
        step: eta of x' = x + eta / 2 score(x, sigma) + sqrt(eta) z. (CIFAR-10: 0.8.)
        skip: steps of the chain for each result; of these states the one with the least sigma is integrated.
        choice: of sigma: "argmax", the likeliest; "draw", by its probability, a Gibbs step proper.
        integrator: "kar1", Heun's method for the ODE; "kar2", the same with noise added before a step.
        num_steps: levels of the integrator, the last of them ``sigma_min``; a step to no noise follows. 2 num_steps - 1
            calls.
        sigma_min, rho: of the grids: sigma^(1 / rho) in equal steps.
        churn, churn_range, churn_noise: of "kar2": sigma grows by min(churn / num_steps, sqrt(2) - 1) of itself where
            it lies in the range, and the noise's deviation is multiplied by churn_noise.
        tweedie: after all, x0 is predicted once more from the result as if it had this much noise; ``None``: not.
        burn_in: steps before the first result, with ``burn_in_step`` (``None``: step), after noise of deviation
            ``start_noise`` was added to the sampler's samples.

    A result costs skip + 2 num_steps - 1 + 1 calls of the denoiser and skip of the classifier.
    """

    def __init__(
        self,
        sampler: Sampler,
        classifier: Callable[[Tensor], Tensor],
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        step: float = 0.8,
        skip: int = 10,
        choice: str = "argmax",
        integrator: str = "kar1",
        num_steps: int = 5,
        sigma_min: float = 0.01,
        rho: float = 7.0,
        churn: float = 80.0,
        churn_range: tuple[float, float] = (0.05, 1.0),
        churn_noise: float = 1.007,
        tweedie: float | None = 0.01,
        burn_in: int = 20,
        burn_in_step: float | None = None,
        start_noise: float = 0.5,
    ):
        _check_sampler(sampler)
        if not callable(classifier):
            raise TypeError(f"classifier: expected a callable, got {type(classifier).__name__}")
        for name, value, allowed in (("choice", choice, CHOICES), ("integrator", integrator, INTEGRATORS)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        least, most = churn_range
        positive = {"step": step, "sigma_min": sigma_min, "rho": rho, "churn_noise": churn_noise}
        positive |= {"tweedie": tweedie, "burn_in_step": burn_in_step}
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if not 0 <= churn < math.inf or not 0 <= least <= most or not 0 <= start_noise < math.inf:
            raise ValueError(
                f"churn: expected finite numbers from 0 (churn, churn_range in order, start_noise), got {churn}, "
                f"{churn_range}, {start_noise}"
            )
        self.sampler, self.classifier, self.choice = sampler, classifier, choice
        self.skip, self.burn_in = check_count("skip", skip), check_count("burn_in", burn_in, 0)
        self.step, self.burn_in_step = float(step), float(step if burn_in_step is None else burn_in_step)
        self.start_noise, self.sigmas = float(start_noise), _levels(sigmas, sampler.schedule)
        grid = _Grid(
            check_count("num_steps", num_steps), float(sigma_min), float(rho),
            float(churn) if integrator == "kar2" else 0.0, (least, most), float(churn_noise), tweedie,
        )  # fmt: skip
        guidance = None if sampler.guidance is None else sampler.guidance[0]
        self.integrator = sampler.replace(
            solver=_GridHeun(grid), num_steps=None, timesteps=[1.0], guidance_scale=guidance, graph=None
        )

    def chain(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Iterator[Tensor]:
        """Results [B, ...] without end, of B chains.

        Args:
            x: where the chains begin, [B, ...], noisy samples; ``None``: the sampler's samples of ``shape``, and
                ``start_noise``, both followed by ``burn_in`` steps.
            conditioning, unconditional, generator, seed, dtype, device: as in ``Sampler.sample``.
        """
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        if x is not None and (not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() < 1):
            raise TypeError(f"x: expected a floating-point tensor [B, ...], got {getattr(x, 'dtype', type(x))}")
        given = {"conditioning": conditioning, "unconditional": unconditional}
        seeds = SeedStream(seed, generator, x.shape[0] if x is not None else int(shape[0]))
        if x is None:
            x = self.sampler.sample(shape=shape, seed=seeds.of(_START), dtype=dtype, device=device, **given)
            keys = sample_keys(seeds.of(_START - 1), None, x.shape[0], x.device)
            x = x + initial_noise(tuple(x.shape), keys, self.start_noise, x.dtype, self.sampler._setting.backend)
        walk = _Walk(self, x.detach().clone().contiguous(), Conditions(**given, x=x, guided=_guided(self)), seeds)
        return self._results(walk, given, seeds)

    def _results(self, walk: "_Walk", given: Mapping[str, object], seeds: SeedStream) -> Iterator[Tensor]:
        for _ in range(self.burn_in):
            walk.step(self.burn_in_step)
        grid = self.integrator.solver.grid
        for number in itertools.count():
            x, sigma = walk.least(self.skip)
            seed = seeds.of(number + 1)
            keys = sample_keys(seed, None, x.shape[0], x.device)
            grid.begin(sigma)
            x = grid.first_churn(x, keys, self.sampler._setting.backend)
            yield self.integrator.sample(x, seed=seed, **given)

    def sample(self, num: int = 1, x: Tensor | None = None, **options: object) -> Tensor:
        """``num`` results of every chain: [num, B, ...]; ``options`` are those of ``chain``."""
        count = check_count("num", num)
        return torch.stack(list(itertools.islice(self.chain(x, **options), count)))


class _Walk:
    """The chains: x [B, ...] and sigma [B]."""

    def __init__(self, own: DMCMC, x: Tensor, conditions: Conditions, seeds: SeedStream):
        self._own, self._sampler, self.x = own, own.sampler, x
        self._conditions = conditions.part(slice(None))
        self._exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._keys = sample_keys(seeds.of(0), None, x.shape[0], x.device)
        self._sigmas = own.sigmas.to(x.device, self._exact)
        self._rows = torch.arange(x.shape[0], device=x.device)
        self._count = 0
        self.sigma = self._classified()

    def step(self, eta: float) -> None:
        """A Langevin step on x, then its sigma."""
        self._count += 1
        backend = self._sampler._setting.backend
        with torch.no_grad():
            output, other = evaluate(self._sampler, self.x, self.sigma, self._conditions)
            pull = eta / 2 / self.sigma**2  # times x0 - x: the score
            table = _x0_rows(self._sampler, self.sigma)
            table[:, C.SAMPLE], table[:, C.M], table[:, C.NOISE] = 1 - pull, pull, math.sqrt(eta)
            self.x = PF.sampler_step(
                self.x, output, table, self._rows, unconditional=other, seed=self._keys, step=self._count,
                backend=backend,
            )  # fmt: skip
        if not bool(self.x.isfinite().all()):
            raise ValueError(f"denoiser: the chain is not finite after {self._count} steps; a smaller step may help")
        self.sigma = self._classified()

    def least(self, steps: int) -> tuple[Tensor, Tensor]:
        """Of the states after each of so many steps: those with the least noise."""
        best, least = self.x, torch.full_like(self.sigma, math.inf)
        for _ in range(steps):
            self.step(self._own.step)
            better = self.sigma < least
            best = torch.where(better.view(-1, *[1] * (self.x.dim() - 1)), self.x, best)
            least = torch.where(better, self.sigma, least)
        return best, least

    def _classified(self) -> Tensor:
        with torch.no_grad():
            logits = self._own.classifier(self.x)
        expected = (self.x.shape[0], len(self._sigmas))
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            raise ValueError(f"classifier: expected logits of shape {expected}, got {getattr(logits, 'shape', logits)}")
        if bool(logits.isnan().any()):
            raise ValueError(f"classifier: NaN after {self._count} steps of the chain")
        if self._own.choice == "draw":
            backend = self._sampler._setting.backend
            logits = logits.double() + gumbel_noise(expected, self._keys, backend, _CHOICE + self._count)
        return self._sigmas[logits.argmax(1)]


def _x0_rows(sampler: Sampler, sigma: Tensor) -> Tensor:
    """Rows [..., 32] whose m is x0 at the levels sigma [...]."""
    table = sigma.new_zeros(*sigma.shape, C.WIDTH)
    table[..., C.GUIDANCE] = 1.0 if sampler.guidance is None else sampler.guidance[0]
    _fill_x0(table, sampler.conversion, sigma)
    return table


def _fill_x0(table: Tensor, conversion: Conversion, sigma: Tensor) -> None:
    on_sample, on_output = conversion.x0(Level(1.0, sigma))
    table[..., C.X0_SAMPLE], table[..., C.X0_OUTPUT] = on_sample, on_output
    table[..., C.CLIP] = math.inf if conversion.clip is None else conversion.clip
    table[..., C.M_X0] = table[..., C.INPUT_SCALE] = 1.0
    table[..., C.SLOT] = -1.0


@dataclass(eq=False)
class _Grid:
    """The levels of an integration: for each sample from its own sigma down to ``least``, then to none."""

    num_steps: int
    least: float
    rho: float
    churn: float
    churn_range: tuple[float, float]
    churn_noise: float
    tweedie: float | None
    start: Tensor = field(default_factory=lambda: torch.ones(1))  # [B], of the next run

    def begin(self, sigma: Tensor) -> None:
        """The next run's samples have these levels."""
        self.start = sigma.clamp(min=self.least)

    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sigma [N + 1, B] with 0 at the end, raised by churn [N, B], deviation of churn's noise [N, B]), float64."""
        root = self.start.double() ** (1 / self.rho)
        share = torch.linspace(0, 1, self.num_steps, dtype=torch.float64, device=root.device)[:, None]
        sigma = (root + share * (self.least ** (1 / self.rho) - root)) ** self.rho
        inside = (sigma >= self.churn_range[0]) & (sigma <= self.churn_range[1])
        raised = sigma * (1 + inside * min(self.churn / self.num_steps, math.sqrt(2) - 1))
        added = (raised**2 - sigma**2).clamp(min=0).sqrt() * self.churn_noise
        return torch.cat([sigma, torch.zeros_like(sigma[:1])]), raised, added

    def first_churn(self, x: Tensor, keys: Tensor, backend: str) -> Tensor:
        """x with the noise of the first step's churn; a later step's is added by the step before it."""
        added = self.levels()[2][0]
        if not self.churn or not bool((added > 0).any()):
            return x
        table = added.new_zeros(len(added), C.WIDTH)
        table[:, C.SAMPLE], table[:, C.NOISE], table[:, C.SLOT] = 1.0, added, -1
        rows = torch.arange(len(added), device=x.device)
        return PF.sampler_step(x, None, table, rows, seed=keys, step=_CHOICE, backend=backend)

    def calls(self, conversion: Conversion) -> tuple[Tensor, Tensor, list[bool]]:
        """(times [calls, B], rows [calls, B, 32], which calls end a step)."""
        sigma, raised, added = self.levels()
        times, rows, ends = [], [], []
        for i in range(self.num_steps):
            now, then, last = raised[i], sigma[i + 1], i + 1 == self.num_steps
            euler = now.new_zeros(len(now), C.WIDTH)
            _fill_x0(euler, conversion, now)
            euler[:, C.GUIDANCE] = 1.0
            euler[:, C.SAMPLE], euler[:, C.M] = then / now, 1 - then / now
            times.append(now)
            rows.append(euler)
            ends.append(last)
            if last:
                break
            euler[:, C.SLOT], euler[:, C.KEPT_SAMPLE] = 0.0, 1.0
            heun, half = torch.zeros_like(euler), (then - now) / 2
            _fill_x0(heun, conversion, then)
            heun[:, C.GUIDANCE] = 1.0
            heun[:, C.BASE], heun[:, C.HISTORY] = 1 + half / now, -half / now
            heun[:, C.SAMPLE], heun[:, C.M] = half / then, -half / then
            heun[:, C.NOISE] = added[i + 1]
            times.append(then)
            rows.append(heun)
            ends.append(True)
        if self.tweedie is not None:
            level = torch.full_like(sigma[0], self.tweedie)
            final = level.new_zeros(len(level), C.WIDTH)
            _fill_x0(final, conversion, level)
            final[:, C.GUIDANCE] = final[:, C.M] = 1.0
            times.append(level)
            rows.append(final)
            ends.append(True)
        return torch.stack(times), torch.stack(rows), ends


@dataclass(frozen=True, eq=False)
class _GridHeun(Solver):
    """Heun's method with a grid for each sample; the plan's own rows are those of one sample at sigma 1."""

    grid: _Grid

    name = "DMCMC"

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        times, rows, ends = self.grid.calls(conversion)
        rows = rows[:, 0]
        if self.grid.churn:  # any sample may have it
            rows[:, C.NOISE] = torch.where(rows[:, C.BASE] != 0, 1.0, 0.0)
        levels = [Level(1.0, t) for t in times[:, 0].tolist()]
        return Plan.of(times[:, 0].tolist(), levels, rows.tolist(), ends=ends)

    def control(self, run: Run) -> Control:
        return _OwnGrids(self.grid, run)


class _OwnGrids(Control):
    """Every sample takes its rows, and the model is told its sigma."""

    def __init__(self, grid: _Grid, run: Run):
        times, rows, _ = grid.calls(run.conversion)
        self._times = times.to(run.device, run.dtype)
        self._tables = rows.to(run.device, run.dtype)
        self._rows = torch.arange(run.shape[0], device=run.device)

    def time(self, call: int) -> Tensor:
        return self._times[call]

    def apply(self, call: int, launch: Launch) -> None:
        launch(rows=self._rows, table=self._tables[call])


def _guided(own: DMCMC) -> bool:
    return own.sampler.guidance is not None


def _check_sampler(sampler: object) -> None:
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
    if sampler.schedule.kind != "ve":
        raise ValueError(f"sampler: expected a 've' schedule, got {sampler.schedule.kind!r}")
    for name in ("time_table", "input_scale", "epsilon_scale", "dynamic_threshold"):
        if sampler._options[name] is not None:
            raise ValueError(f"sampler: {name} does not go with a chain whose levels differ from sample to sample")
    if sampler.guidance is not None and len(set(sampler.guidance)) > 1:
        raise ValueError("sampler: expected one guidance_scale for all levels")
    if sampler.observers:
        raise ValueError("sampler: observers count the calls of one run, and a chain has no end")
    if sampler._setting.learned_variance:
        raise ValueError("sampler: a model that returns a variance needs an adapter that drops it")


def _levels(given: Sequence[float] | Tensor | None, schedule: NoiseSchedule) -> Tensor:
    """The classifier's levels, float64 [K]."""
    if given is None:
        share = torch.linspace(1, 1e-3, 1000, dtype=torch.float64)
        return 0.01 * (schedule.last.sigma / 0.01) ** share
    sigmas = torch.as_tensor(given, dtype=torch.float64)
    if sigmas.dim() != 1 or not len(sigmas) or not bool(((sigmas > 0) & sigmas.isfinite()).all()):
        raise ValueError(f"sigmas: expected finite numbers above 0 in one dimension, got shape {tuple(sigmas.shape)}")
    return sigmas
