"""The loop of every solver: static buffers, one launch between two calls of the model.

On a CPU a prepared step runs between the calls, without allocation. On CUDA a step - model and update - is captured in
a graph once and replayed for every call: which row, which time and which noise it reads is a number on the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._gradients import way_of
from pydenoise.samplers._loop import Loop, Setting
from pydenoise.samplers._noise import Noise, initial_noise
from pydenoise.samplers._progress import Progress
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Control, Conversion, Plan, Run, Solver

Denoiser = Callable[..., Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after a call of the model.

    Args:
        call, calls: the number of the call, from 0, and how many there are.
        time: what the model was told.
        ends: whether the call completed a step of the solver.
        sample: x' [B, ...], the sampler's own buffer: clone it to keep it.
        x0: the predicted clean sample (with ``preview=True``), also a buffer; else ``None``.
    """

    call: int
    calls: int
    time: float
    ends: bool
    sample: Tensor
    x0: Tensor | None


@dataclass(frozen=True)
class Trajectory:
    """A sample and the way to it: ``states`` [steps + 1, B, ...] from the start to the result, ``times`` [steps]."""

    sample: Tensor
    states: Tensor
    times: tuple[float, ...]


class Sampler:
    """Runs a solver around a denoiser.

    Args:
        denoiser: ``denoiser(x, t, **conditioning) -> output``; x [B, ...], t [B]: int64 where all times are whole
            numbers on a discrete schedule, else float32. Twice the batch with guidance.
            x is the sampler's own buffer: a denoiser must not change it.
        schedule: the noise levels that the denoiser was trained on.
        solver: DDIM(), DPMSolverPP(2), ...: see ``pydenoise.samplers``.
        num_steps: steps of the solver; which times they are at is the solver's choice unless ``timesteps`` says it.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        guidance_scale: classifier-free guidance u + w (c - u); a number, or one for each call of the model.
        timesteps: the times themselves, descending.
        time_table: what the model is told at each call, where that is not the time of the noise level (NoiseShift).
        clip: x0 is clamped to [-clip, clip] at every step. ``clip_rederives``: epsilon then follows from it.
        dynamic_threshold: quantile q in (0, 1): |x0| is limited to its q-quantile over each sample (at least 1, at most
            ``dynamic_max``) and divided by it (Saharia et al., 2022), instead of ``clip``.
        input_scale: what the model's input is multiplied by, for each ``Level``.
        epsilon_scale: epsilon is divided by this number, or by one for each call of the model (epsilon scaling against
            exposure bias; Ning et al., 2024). For prediction_type "epsilon" and solvers whose rows are fixed.
        observers: told of every call through ``begin_step(call, calls)`` before the model runs (sparse attention,
            networks whose width changes), and of a run's times through ``begin_run(times)``, if they have that. One
            whose ``changes_sample`` is true is given the buffers through ``begin_state`` (``ShiftedWindows``).
        learned_variance: the model returns twice the channels, a prediction and a variance. ``None``: where the solver
            uses the variance (``DDPM("learned_range")``); ``True`` for another solver on such a model.
        model_dtype: of the model's input; ``None``: the sample's.
        graph: capture a step as a CUDA graph; ``None``: on CUDA, where nothing forbids it.
        check_finite: a denoiser that returns NaN or infinity is an error that names the call.
        backend: of ``sampler_step``.

    Raises:
        TypeError, ValueError: a bad argument, or a combination that the solver does not support; the message names it.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        solver: Solver,
        num_steps: int | None = None,
        *,
        prediction_type: str = "epsilon",
        guidance_scale: float | Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        time_table: Sequence[float] | None = None,
        clip: float | None = None,
        clip_rederives: bool = False,
        dynamic_threshold: float | None = None,
        dynamic_max: float = 1.0,
        input_scale: Callable[[Level], float] | None = None,
        epsilon_scale: float | Sequence[float] | None = None,
        observers: Sequence[object] = (),
        learned_variance: bool | None = None,
        model_dtype: torch.dtype | None = None,
        graph: bool | None = None,
        check_finite: bool = True,
        backend: str = "auto",
    ):
        _check_parts(denoiser, schedule, solver, observers)
        self._options = {
            "prediction_type": prediction_type, "guidance_scale": guidance_scale, "time_table": time_table,
            "clip": clip, "clip_rederives": clip_rederives, "dynamic_threshold": dynamic_threshold,
            "dynamic_max": dynamic_max, "input_scale": input_scale,
            "epsilon_scale": epsilon_scale, "observers": observers, "learned_variance": learned_variance,
            "model_dtype": model_dtype, "graph": graph, "check_finite": check_finite, "backend": backend,
        }  # fmt: skip
        self.denoiser, self.schedule, self.solver = denoiser, schedule, solver
        self.conversion = Conversion(prediction_type, clip, clip_rederives, dynamic_threshold is not None)
        _check_dynamic(clip, dynamic_threshold, dynamic_max)
        self.timesteps = tuple(_times_of(solver, schedule, num_steps, timesteps))
        plan = solver.plan(schedule, self.timesteps, self.conversion)
        self.plan = _with_input_scale(_with_epsilon_scale(plan, epsilon_scale, prediction_type, solver), input_scale)
        self.first_input_scale = 1.0 if input_scale is None else float(input_scale(plan.levels[0]))
        self.times = _time_table(time_table, self.plan)
        self.guidance = _guidance_of(guidance_scale, self.plan.calls)
        if plan.predictions == 2 and (guidance_scale is not None or learned_variance):
            name = "learned_variance" if learned_variance else "guidance_scale"
            raise ValueError(f"{name}: the model of {solver.name} returns two predictions at once, got {name} as well")
        self._setting = Setting(
            self.plan, self.times, self.guidance, self.first_input_scale, dynamic_threshold, dynamic_max, model_dtype,
            schedule.kind, check_finite, _learned(learned_variance, plan), backend,
        )  # fmt: skip
        self.observers, self._graph = tuple(observers), graph
        self._loops: dict[tuple, Loop] = {}

    def __repr__(self) -> str:
        return f"Sampler({self.solver!r}, {self.plan.calls} calls of the model)"

    def from_step(self, step: int) -> "Sampler":
        """The sampler of the steps from ``step`` on, which a multistep solver enters without history.

        For image-to-image: ``late = sampler.from_step(k)``, begin at ``schedule.add_noise(image, noise,
        late.timesteps[0])``.
        """
        if isinstance(step, bool) or not hasattr(step, "__index__"):
            raise TypeError(f"step: expected an int, got {type(step).__name__}")
        if not 0 <= step < len(self.timesteps):
            raise ValueError(f"step: expected a step from 0 to {len(self.timesteps) - 1}, got {step}")
        options = {}
        for name in ("guidance_scale", "time_table", "epsilon_scale"):
            if isinstance(self._options[name], Sequence):
                if self.plan.calls != len(self.timesteps):
                    raise ValueError(f"{name}: one for each call does not say which belong to a step; give a new one")
                options[name] = self._options[name][step:]
        return self.replace(timesteps=self.timesteps[step:], **options)

    def replace(self, **changes: object) -> "Sampler":
        """A sampler with other arguments, by their names; those not named stay, with the same ``timesteps``."""
        given = {"denoiser": self.denoiser, "schedule": self.schedule, "solver": self.solver, **self._options}
        given |= changes
        if "num_steps" not in changes:
            given.setdefault("timesteps", self.timesteps)
        return Sampler(**given)

    def sample(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        noise: Sequence[Tensor] | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: bool = False,
        callback: Callable[[StepInfo], None] | None = None,
        preview: bool = False,
        return_trajectory: bool = False,
        max_batch: int | None = None,
        differentiable: str | None = None,
        checkpoints: int | None = None,
    ) -> Tensor | Trajectory:
        """From noise to a sample.

        Args:
            x: where to start, [B, ...]; it is not changed. ``None``: noise of ``shape``, ``dtype``, on ``device``. For
                a solver that restores (RDDM, Resfusion): the degraded sample.
            conditioning: keyword arguments of the denoiser. Tensors have the batch's size or one row.
            unconditional: what replaces them in the unconditional half of guidance; same names.
            generator: a torch.Generator, or one for each sample; ``seed``: an int, or one for each sample, instead.
                With one for each sample, a sample does not depend on what it is batched with.
            noise: the z of every call that adds noise, in order, each [B, ...], instead of generated ones; of a solver
                that restores, the start's first.
            progress: a line on stderr.
            callback: called with a ``StepInfo`` after every call of the model.
            preview: ``StepInfo.x0`` is wanted.
            return_trajectory: a ``Trajectory`` instead of the sample.
            max_batch: larger batches are run in pieces of this size, with the same result.
            differentiable: how the sample has gradients, with memory that does not grow with the number of steps.
                "checkpoint": exact ones with respect to x, conditioning, given noise and the denoiser's parameters, by
                repeating its calls from a few stored states; for solvers whose rows are fixed. "adjoint": those of the
                probability-flow ODE that the solver approximates, with respect to x, conditioning and parameters; for
                solvers without noise and enough steps. The denoiser must return the same when it is called again.
            checkpoints: with "checkpoint", how many states are stored at a time, 16 if not given; with fewer, calls are
                repeated more often.

        Raises:
            TypeError, ValueError: a bad argument, or a bad result of the denoiser; the message names it and the call.
        """
        way = way_of(self, differentiable, checkpoints, return_trajectory)
        x, keys = self._start(x, shape, dtype, device, generator, seed)
        x = x.detach() if way is None else x
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch: expected a positive number, got {max_batch}")
        conditions = Conditions(conditioning, unconditional, x, self.guidance is not None)
        given = Noise(noise, self.plan, x)
        size = x.shape[0] if max_batch is None else max(1, min(max_batch, x.shape[0]))
        pieces = range(0, x.shape[0], size) if x.shape[0] else (0,)
        results = []
        with Progress(progress, self.solver.name, len(pieces) * self.plan.calls) as line:
            for begin in pieces:
                part = slice(begin, begin + size)
                results.append(
                    self._run(x[part], None if keys is None else keys[part], conditions.part(part), given.part(part),
                              line, callback, preview, return_trajectory, way)
                )  # fmt: skip
        if not return_trajectory:
            return results[0] if len(results) == 1 else torch.cat(results)
        states = torch.cat([r.states for r in results], 1)
        return Trajectory(states[-1], states, results[0].times)

    def _start(self, x, shape, dtype, device, generator, seed) -> tuple[Tensor, Tensor | None]:
        """(the starting sample, keys [B, 2] or None)."""
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        if x is not None:
            if not isinstance(x, Tensor):
                raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
            if x.dtype not in FLOATS or x.dim() < 1:
                raise ValueError(f"x: expected a floating-point tensor [B, ...], got {x.dtype} {tuple(x.shape)}")
            batch, device = x.shape[0], x.device
        else:
            batch, device = int(shape[0]), torch.device(device)
            if dtype not in FLOATS:
                raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        _check_generator(generator, device)
        restores = self.plan.start is not None
        needs = self.plan.needs_noise or x is None or restores or bool(self._changing())
        keys = sample_keys(seed, generator, batch, device) if needs else None
        if x is None and restores:
            x = torch.zeros(tuple(shape), dtype=dtype, device=device)
        elif x is None:
            x = initial_noise(tuple(shape), keys, self.plan.initial_scale, dtype, self._setting.backend)
        return x, keys

    def _run(self, x, keys, conditions, noise, line, callback, preview, trajectory, way):
        run = Run(self.plan, self.schedule, self.conversion, x.shape,
                  torch.float64 if x.dtype == torch.float64 else torch.float32, x.device, preview)  # fmt: skip
        control = self.solver.control(run)
        for observer in self.observers:
            if hasattr(observer, "begin_run"):
                observer.begin_run(self.times)
        if way is not None and not self.plan.needs_noise and self.plan.start is None:
            keys = None  # they made x
        loop = self._loop(x, keys is not None, preview, way is not None)
        states, times = [], []

        def after(call: int) -> None:
            line.advance()
            if callback is not None:
                told = (call, self.plan.calls, self.times[call], self.plan.ends[call])
                callback(StepInfo(*told, loop.sample, loop.preview))
            if trajectory and self.plan.ends[call]:
                states.append(loop.sample.clone())
            if self.plan.ends[call]:
                times.append(self.times[call])

        if way is not None:
            return way.run(self, loop, control, x, keys, conditions, noise, after)
        with torch.inference_mode():
            loop.begin(x, keys, noise)
            if trajectory:
                states.append(loop.sample.clone())
            for observer in self._changing():
                observer.begin_state(loop.state(run))
            graphed = loop.graph_of(self._graph, self.observers, control, noise)
            loop.run(self.denoiser, conditions, noise, control or Control(), self.observers, after, graphed)
        # Buffers made under inference mode stay inside; what leaves is an ordinary tensor.
        result = loop.sample.clone()
        return Trajectory(result, torch.stack([_ordinary(s) for s in states]), tuple(times)) if trajectory else result

    def _changing(self) -> list:
        return [observer for observer in self.observers if getattr(observer, "changes_sample", False)]

    def _loop(self, x: Tensor, noisy: bool, preview: bool, differentiable: bool = False) -> Loop:
        """The buffers for tensors like ``x``; those of the last few shapes are kept."""
        key = (x.shape, x.dtype, x.device, noisy, preview, differentiable, torch.get_num_threads())
        loop = self._loops.pop(key, None)
        if loop is None:
            while len(self._loops) >= 4:
                self._loops.pop(next(iter(self._loops)))
            # A graph of autograd keeps no tensors made under inference mode.
            with torch.inference_mode(not differentiable), torch.no_grad():
                loop = Loop(self._setting, x, noisy, preview)
        self._loops[key] = loop
        return loop


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _check_parts(denoiser, schedule, solver, observers) -> None:
    if not callable(denoiser):
        raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: expected a solver such as DDIM(), got {type(solver).__name__}")
    for observer in observers:
        if not callable(getattr(observer, "begin_step", None)):
            raise TypeError(f"observers: {type(observer).__name__} has no begin_step")


def _check_dynamic(clip, quantile, most) -> None:
    if quantile is None:
        return
    if clip is not None:
        raise ValueError("dynamic_threshold: expected either clip or dynamic_threshold, got both")
    if not 0 < quantile < 1:
        raise ValueError(f"dynamic_threshold: expected a quantile between 0 and 1, got {quantile}")
    if not most >= 1:
        raise ValueError(f"dynamic_max: expected a number from 1, got {most}")


def _times_of(solver: Solver, schedule: NoiseSchedule, num_steps, timesteps) -> list[float]:
    if timesteps is None:
        if num_steps is None:
            raise ValueError("num_steps: expected num_steps or timesteps")
        if isinstance(num_steps, bool) or not hasattr(num_steps, "__index__"):
            raise TypeError(f"num_steps: expected an int, got {type(num_steps).__name__}")
        if int(num_steps) < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        return list(solver.timesteps(schedule, int(num_steps)))
    times = [float(t) for t in timesteps]
    if not times:
        raise ValueError("timesteps: expected at least one")
    if num_steps is not None and num_steps != len(times):
        raise ValueError(f"num_steps: {num_steps} does not fit {len(times)} timesteps")
    if any(later >= earlier for earlier, later in zip(times, times[1:], strict=False)):
        raise ValueError(f"timesteps: expected descending times, got {times[:8]}{'...' if len(times) > 8 else ''}")
    return times


def _time_table(given, plan: Plan) -> tuple[float, ...]:
    if given is None:
        return plan.times
    times = tuple(float(t) for t in given)
    if len(times) != plan.calls:
        raise ValueError(f"time_table: expected a time for each of {plan.calls} calls of the model, got {len(times)}")
    return times


def _guidance_of(scale, calls: int) -> tuple[float, ...] | None:
    if scale is None:
        return None
    if isinstance(scale, (int, float)):
        return (float(scale),) * calls
    scales = tuple(float(s) for s in scale)
    if len(scales) != calls:
        raise ValueError(f"guidance_scale: expected a number, or one for each of {calls} calls, got {len(scales)}")
    return scales


def _with_epsilon_scale(plan: Plan, scale, prediction_type: str, solver: Solver) -> Plan:
    """Every column that multiplies the model's output, divided."""
    if scale is None:
        return plan
    if prediction_type != "epsilon":
        raise ValueError(f"epsilon_scale: expected a model of epsilon, got prediction_type={prediction_type!r}")
    if not solver.fixed_rows:
        raise ValueError(f"epsilon_scale: the rows of {solver.name} depend on the data of each step")
    scales = (scale,) * plan.calls if isinstance(scale, (int, float)) else tuple(scale)
    if len(scales) != plan.calls:
        raise ValueError(f"epsilon_scale: expected a number, or one for each of {plan.calls} calls, got {len(scales)}")
    if not all(0 < s < math.inf for s in scales):
        raise ValueError(f"epsilon_scale: expected finite numbers above 0, got {scales[:8]}")
    table = plan.table.clone()
    table[:, [C.X0_OUTPUT, C.M_OUTPUT, C.OUTPUT]] /= torch.tensor(scales, dtype=torch.float64)[:, None]
    return replace(plan, table=table)


def _learned(asked: bool | None, plan: Plan) -> bool:
    if asked is False and plan.learned_variance:
        raise ValueError("learned_variance: this solver takes the variance from the model, got False")
    return plan.learned_variance or bool(asked)


def _with_input_scale(plan: Plan, scale: Callable[[Level], float] | None) -> Plan:
    if scale is None:
        return plan
    table = plan.table.clone()
    for call, level in enumerate(plan.levels[1:]):
        table[call, C.INPUT_SCALE] = float(scale(level))
    return replace(plan, table=table)


def _check_generator(generator: Generator, device: torch.device) -> None:
    """A generator of the CPU serves every device, since it only gives seeds; another device's must be that of x."""
    for one in generator if isinstance(generator, Sequence) else [generator]:
        if isinstance(one, torch.Generator) and one.device.type not in ("cpu", device.type):
            raise ValueError(f"generator: on {one.device}, the sample is on {device}")
