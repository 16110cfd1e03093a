"""RED-diff: inverse problems by optimization, with a denoiser as the regularizer.

Source: Mardani et al., "A Variational Perspective on Solving Inverse Problems with Diffusion Models", ICLR 2024. The
mean mu of a distribution of clean samples is moved by Adam: towards the measurement, and against the error that the
denoiser makes on noisy mu. The denoiser itself is never differentiated.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._progress import Progress
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.operators import LinearOperator, check_operator
from pydenoise.samplers.plan import Conversion, row
from pydenoise.samplers.runtime import FLOATS
from pydenoise.samplers.timesteps import check_times, linspace

ADAM_EPSILON = 1e-8


class REDDiff:
    """Minimizes v/2 mean((y - H mu)^2) + w_t mean((epsilon(x_t) - epsilon) mu), one Adam step for each time.

    x_t = alpha mu + sigma epsilon with new noise at every time, times descending; w_t = regularization sigma / alpha.
    Means are over each sample's numbers, those of y over what was measured, so that a sample does not depend on its
    batch. One call of the denoiser a step.

    Args:
        denoiser: ``denoiser(x, t, **conditioning) -> output``, as for ``Sampler``; twice the batch with guidance.
        schedule: the noise levels it was trained on, without one of pure noise.
        operator: H.
        num_steps: how many times, from the schedule's last to its first in equal steps; or ``timesteps``, descending.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        guidance_scale: classifier-free guidance u + w (c - u).
        learning_rate, betas: of Adam.
        regularization: of the denoiser's term, w_t at sigma = alpha.
        observation: v.
        backend: of ``sampler_step``, which makes x_t and the denoiser's part of the gradient.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: NoiseSchedule,
        operator: LinearOperator,
        num_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        guidance_scale: float | None = None,
        learning_rate: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        regularization: float = 0.25,
        observation: float = 1.0,
        backend: str = "auto",
    ):
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
        if schedule.kind == "residual":
            raise ValueError("schedule: RED-diff begins at no degraded sample, got one of kind 'residual'")
        if (num_steps is None) == (timesteps is None):
            raise ValueError("num_steps: expected either num_steps or timesteps")
        if guidance_scale is not None:
            _check_number("guidance_scale", guidance_scale, -math.inf)
        _check_number("learning_rate", learning_rate, 0, above=True)
        _check_number("regularization", regularization, 0)
        _check_number("observation", observation, 0)
        if len(tuple(betas)) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")
        self.denoiser, self.schedule, self.operator = denoiser, schedule, check_operator(operator)
        times = linspace(schedule, num_steps) if timesteps is None else timesteps
        self.timesteps = tuple(check_times(schedule, times))
        self.conversion, self.guidance_scale = Conversion(prediction_type), guidance_scale
        self.learning_rate, self.betas = float(learning_rate), tuple(map(float, betas))
        self.regularization, self.observation = float(regularization), float(observation)
        self._backend = backend
        self._rows = [self._pair(schedule.level(t)) for t in self.timesteps]

    def __repr__(self) -> str:
        return f"REDDiff({type(self.operator).__name__}, {len(self.timesteps)} steps)"

    def _pair(self, level: Level) -> tuple[list[float], list[float]]:
        """Rows for x_t of mu, and for w_t (epsilon(x_t) - epsilon) of x_t: the same noise, made twice."""
        if level.alpha == 0:
            raise ValueError("timesteps: a level of pure noise says nothing of a clean sample; begin after it")
        weight = self.regularization * level.sigma / level.alpha
        noisy = row(self.conversion, level, sample=level.alpha, noise=level.sigma)
        error = row(self.conversion, level, "epsilon", m=weight, noise=-weight)
        error[C.GUIDANCE] = 1.0 if self.guidance_scale is None else float(self.guidance_scale)
        return noisy, error

    def solve(
        self,
        y: Tensor,
        *,
        x: Tensor | None = None,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        noise: Sequence[Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        max_batch: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The clean samples mu [B, ...] for the measurements ``y`` [B, ...].

        Args:
            x: where mu begins; ``None``: H^+ y.
            conditioning, unconditional: keyword arguments of the denoiser, as in ``Sampler.sample``.
            generator, seed: of the noise, one or one for each sample.
            noise: epsilon of every step, each like mu, instead.
            callback: called with the number of each step and mu, the solver's own tensor: clone it to keep it.
            max_batch: larger batches are run in pieces of this size, with the same result.
            progress: a line on stderr.

        Raises:
            TypeError, ValueError: a bad argument, or a bad result of the denoiser; the message names it.
        """
        x = self._start(y, x)
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch: expected a positive number, got {max_batch}")
        noise = _noise(noise, x, len(self.timesteps))
        keys = sample_keys(seed, generator, x.shape[0], x.device)
        conditions = Conditions(conditioning, unconditional, x, self.guidance_scale is not None)
        size = max(1, x.shape[0] if max_batch is None else max_batch)
        pieces = [slice(i, i + size) for i in range(0, x.shape[0], size)] or [slice(0, 0)]
        results = []
        with Progress(progress, "RED-diff", len(pieces) * len(self.timesteps)) as line, torch.no_grad():
            for part in pieces:
                run = _Run(self, x[part], y[part], keys[part], conditions.part(part))
                for step in range(len(self.timesteps)):
                    run.step(step, None if noise is None else noise[step][part])
                    line.advance()
                    if callback is not None:
                        callback(step, run.mu)
                results.append(run.mu)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _start(self, y: object, x: Tensor | None) -> Tensor:
        if not isinstance(y, Tensor):
            raise TypeError(f"y: expected a tensor, got {type(y).__name__}")
        if y.dim() < 1 or not (y.is_floating_point() or y.is_complex()):
            raise ValueError(f"y: expected floating-point or complex [B, ...], got {y.dtype} {tuple(y.shape)}")
        with torch.no_grad():
            if x is None:
                return self.operator.pinv(y).contiguous()
            if not isinstance(x, Tensor) or x.dtype not in FLOATS:
                raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
            image = self.operator(x)
            if x.shape[0] != y.shape[0] or image.shape != y.shape:
                raise ValueError(f"x: H x has shape {tuple(image.shape)}, expected that of y, {tuple(y.shape)}")
            return x.detach().contiguous()


class _Run:
    """mu of one piece of a batch, and Adam's state."""

    def __init__(self, solver: REDDiff, x: Tensor, y: Tensor, keys: Tensor, conditions: Mapping[str, object]):
        self._solver, self._y, self._keys, self._conditions = solver, y, keys, conditions
        self.mu, self._noisy = x.clone(), torch.empty_like(x)
        self._exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._variable = self.mu.to(self._exact, copy=True)  # half precision would round small steps away
        self._adam = torch.optim.Adam(
            [self._variable], solver.learning_rate, solver.betas, eps=ADAM_EPSILON, foreach=False
        )
        self._share = 1 / max(1, math.prod(x.shape[1:]))
        self._pull = solver.observation / max(1, solver.operator.measurements(y))

    def step(self, step: int, noise: Tensor | None) -> None:
        solver, mu = self._solver, self.mu
        table = torch.tensor(solver._rows[step], dtype=torch.float64).to(mu.device, self._exact)
        given = {"seed": self._keys, "step": step + 1} if noise is None else {"noise": noise.to(mu).contiguous()}
        given["backend"] = solver._backend
        PF.sampler_step(mu, None, table, 0, out=self._noisy, **given)
        output, other = self._predict(step)
        error = PF.sampler_step(self._noisy, output, table, 1, unconditional=other, **given)
        pull = solver.operator.adjoint(solver.operator(mu) - self._y)
        self._variable.grad = error.to(self._exact) * self._share + pull.to(self._exact) * self._pull
        if not bool(self._variable.grad.isfinite().all()):
            raise ValueError(f"denoiser: the gradient of step {step} has NaN or infinity")
        self._adam.step()
        mu.copy_(self._variable)

    def _predict(self, step: int) -> tuple[Tensor, Tensor | None]:
        solver, x = self._solver, self._noisy
        copies = 1 if solver.guidance_scale is None else 2
        time = solver.timesteps[step]
        whole = solver.schedule.kind == "vp" and time == int(time)
        times = torch.full(
            (copies * x.shape[0],), int(time) if whole else time, dtype=torch.int64 if whole else self._exact,
            device=x.device,
        )  # fmt: skip
        output = solver.denoiser(torch.cat([x, x]) if copies == 2 else x, times, **self._conditions)
        if not isinstance(output, Tensor):
            raise TypeError(f"denoiser: expected a tensor at step {step}, got {type(output).__name__}")
        wanted = (copies * x.shape[0], *x.shape[1:])
        if tuple(output.shape) != wanted:
            raise ValueError(f"denoiser: expected shape {wanted} at step {step}, got {tuple(output.shape)}")
        return (output, None) if copies == 1 else (output[x.shape[0] :], output[: x.shape[0]])


def _noise(given: Sequence[Tensor] | None, x: Tensor, steps: int) -> Sequence[Tensor] | None:
    if given is None:
        return None
    if len(given) != steps:
        raise ValueError(f"noise: expected one tensor for each of {steps} steps, got {len(given)}")
    for number, z in enumerate(given):
        if not isinstance(z, Tensor) or z.shape != x.shape:
            raise ValueError(f"noise[{number}]: expected shape {tuple(x.shape)}, got {getattr(z, 'shape', z)}")
    return given


def _check_number(name: str, value: object, least: float, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not least <= value < math.inf or (above and value == least):
        raise ValueError(f"{name}: expected a finite number {'above' if above else 'from'} {least:g}, got {value}")
