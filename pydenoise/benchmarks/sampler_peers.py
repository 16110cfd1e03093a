"""diffusers' schedulers as the ``sampler`` suite runs them, with the options that make each the same method as ours."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pydenoise.benchmarks.providers import require
from pydenoise.benchmarks.sampler_cases import GUIDANCE, LoopBench, StepBench

# Class and options of every solver of ``sampler_cases.SOLVERS``. Nothing is clipped: that is another pass over x0.
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM eta=1": ("DDIMScheduler", {"clip_sample": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DPM++2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
}
ARGUMENTS = {"DDIM eta=1": {"eta": 1.0}}


def make_scheduler(solver: str, steps: int):
    """A scheduler with its timesteps set; :class:`Skip` where diffusers is missing."""
    name, options = SCHEDULERS[solver]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(require("diffusers"), name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def start_scale(solver: str, scheduler) -> float:
    """What a variance-preserving start is multiplied by: Euler's samples are those divided by alpha."""
    return float(scheduler.init_noise_sigma) if solver == "Euler" else 1.0


def guided(output: Tensor) -> Tensor:
    """Classifier-free guidance as in pipelines: the halves of the batch are unconditional and conditional."""
    unconditional, conditional = output.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


class SchedulerLane:
    """One run of a scheduler after the other, a step at a time, on a model output that stays the same."""

    def __init__(self, case: StepBench, output: Tensor, start: Tensor):
        self._scheduler = make_scheduler(case.solver, case.steps)
        self._arguments = ARGUMENTS.get(case.solver, {})
        self._steps, self._output = case.steps, output
        self._start = start * start_scale(case.solver, self._scheduler)
        self._times = list(self._scheduler.timesteps)
        self._scales = case.solver == "Euler"
        self._guided = case.guided
        self._x, self._call = self._start, 0

    def step(self) -> Tensor:
        """What a pipeline calls between two calls of its model."""
        call = self._call
        t = self._times[call]
        if self._scales:
            self._scheduler.scale_model_input(self._x, t)
        output = guided(self._output) if self._guided else self._output
        x = self._scheduler.step(output, t, self._x, return_dict=False, **self._arguments)[0]
        if self._guided:
            torch.cat([x] * 2)
        if call + 1 == len(self._times):
            self._scheduler.set_timesteps(self._steps)  # forgets the run's outputs
            self._call, self._x = 0, self._start
        else:
            self._call, self._x = call + 1, x
        return x


def first_states(case: StepBench, outputs: list[Tensor], start: Tensor, generator: torch.Generator) -> Tensor:
    """The state after the first ``len(outputs)`` steps, in the variance-preserving scale."""
    scheduler = make_scheduler(case.solver, case.steps)
    times = [float(t) for t in scheduler.timesteps]
    if times != list(case.plan.times):
        raise RuntimeError(f"other timesteps than ours: {times[:3]}..., ours {case.plan.times[:3]}...")
    arguments = dict(ARGUMENTS.get(case.solver, {}))
    if case.solver in ("DDPM", "DDIM eta=1"):
        arguments["generator"] = generator
    scale = start_scale(case.solver, scheduler)
    x = start * scale
    for call, output in enumerate(outputs):
        scheduler.scale_model_input(x, scheduler.timesteps[call])  # Euler's step wants to be told
        output = guided(output) if case.guided else output
        x = scheduler.step(output, scheduler.timesteps[call], x, return_dict=False, **arguments)[0]
    if case.solver == "Euler":
        x = x / torch.sqrt(scheduler.sigmas[len(outputs)] ** 2 + 1)
    return x


def run_loop(case: LoopBench, model: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Callable[[], Tensor]:
    """A call that samples as diffusers' pipelines do."""
    scheduler = make_scheduler(case.solver, case.steps)
    arguments = ARGUMENTS.get(case.solver, {})
    scaled = start * start_scale(case.solver, scheduler)

    def run() -> Tensor:
        scheduler.set_timesteps(case.steps)
        x = scaled
        with torch.inference_mode():
            for t in scheduler.timesteps:
                output = model(scheduler.scale_model_input(x, t), t)
                x = scheduler.step(output, t, x, return_dict=False, **arguments)[0]
        return x

    return run
