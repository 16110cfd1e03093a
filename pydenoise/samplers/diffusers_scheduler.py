"""Any of our solvers as a scheduler of diffusers, for its pipelines.

diffusers is imported when ``DiffusersScheduler`` is first asked for: the class derives from its base classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._diffusers_settings import Settings
from pydenoise.samplers._level_table import LevelTable, over_samples
from pydenoise.samplers._seeds import Generator
from pydenoise.samplers._stepper import Stepper
from pydenoise.samplers.euler import Heun
from pydenoise.samplers.from_diffusers import INSTALL, KNOWN, FromDiffusers, class_name_of, from_diffusers
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import Conversion, Plan, Solver
from pydenoise.samplers.pndm import PNDM, entered

NOISES = ("fused", "torch")
SOLVERS = ("DDIM", "DDPM", "PNDM", "DPMSolverPP", "UniPC", "EVODiff", "Euler", "EulerAncestral", "Heun", "FastDDPM")
SOLVERS += ("TimeShift",)
STEPPERS = 8  # that are kept, for one list of timesteps


class SchedulerMethods:
    """What ``DiffusersScheduler`` does, apart from its configuration. See there."""

    def _set_up(self, solver: str | Solver, options: Mapping[str, Any] | None, noise: str) -> None:
        if isinstance(solver, Solver):
            if options:
                raise ValueError("solver_options: expected them in the solver itself, which is an object already")
            name, options = encoded(solver)
            self.register_to_config(solver=name, solver_options=options)
        self._solver = solver if isinstance(solver, Solver) else decoded(solver, options or {})
        if noise not in NOISES:
            raise ValueError(f"noise: expected one of {', '.join(NOISES)}, got {noise!r}")
        self.backend = "auto"
        self._parts: FromDiffusers | None = None
        self.num_inference_steps: int | None = None
        last = self.parts.settings.num_train_timesteps - 1
        self.timesteps = torch.arange(last, -1, -1)
        self._plan: Plan | None = None
        self._prepared: tuple | None = None
        self._begin_index = self._step_index = None
        self._steppers: dict[tuple, Stepper] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins anew: what a run keeps stays with the original, and compiled steps cannot be copied.
        running = ("_stepper", "_offset", "_generator", "_variant")
        return {k: v for k, v in self.__dict__.items() if k not in running} | {"_steppers": {}, "_step_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._first_address = self.timesteps.data_ptr()

    # ------------------------------------------------------------------------------------------------- configuration

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the configuration of this class or of another one, or from another scheduler.

        Of the classes that ``from_diffusers`` knows, everything is taken over, also what was a default there: schedule,
        times, and the solver, unless ``solver`` says another. Of others what has the same name; ``solver`` is needed.

        Raises:
            ValueError: an option that is not supported; the message names it.
        """
        if isinstance(getattr(config, "config", None), Mapping):  # a scheduler
            config = {**config.config, "_class_name": type(config).__name__}
        if isinstance(config, Mapping):
            config = cls._translated(config, kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _translated(cls, config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        # Values that were a default of the other class are values all the same: ours has other defaults.
        result = {key: value for key, value in config.items() if key != "_use_default_values"}
        origin = class_name_of(config)
        if origin != cls.__name__:
            if origin in KNOWN:
                parts = from_diffusers({**config, "_class_name": origin})
                result |= asdict(parts.settings)
                result["solver"], result["solver_options"] = encoded(parts.solver)
            elif "solver" not in kwargs:
                raise ValueError(f"solver: expected one, since the configuration is of {origin or 'an unknown class'}")
        result["_class_name"] = cls.__name__
        if "solver" in kwargs:
            result.pop("solver_options", None)
        return result

    @property
    def parts(self) -> FromDiffusers:
        """Solver, schedule and options, as ``from_diffusers`` gives them."""
        # Read again each time: pipelines replace the configuration of a scheduler.
        settings = Settings.of(self.config)
        if self._parts is None or self._parts.settings != settings:
            self._parts = FromDiffusers(settings.spaced(self._solver), settings)
            self._levels = LevelTable(self._parts.schedule)
        return self._parts

    @property
    def solver(self) -> Solver:
        """The solver that steps."""
        return self.parts.solver

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise levels."""
        return self.parts.schedule

    @property
    def order(self) -> int:
        """How many calls of the model a step takes, as pipelines count them."""
        return 2 if isinstance(self._solver, Heun) else 1

    @property
    def alphas_cumprod(self) -> Tensor:
        """float32 [num_train_timesteps], on the CPU; not of a flow schedule."""
        return self.schedule.alphas_cumprod.float()

    @property
    def betas(self) -> Tensor:
        """float32 [num_train_timesteps], on the CPU; not of a flow schedule."""
        return self.schedule.betas.float()

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting noise."""
        parts = self.parts
        first = float(parts.schedule.times[-1]) if self._plan is None else self._plan.times[0]
        return parts.settings.initial_scale(parts.solver, parts.schedule, first)

    def __len__(self) -> int:
        return self.parts.settings.num_train_timesteps

    # ----------------------------------------------------------------------------------------------------- timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run; ``self.timesteps`` then holds the time of every call of the model.

        Args:
            num_inference_steps: steps of the solver, unless ``timesteps`` or ``sigmas`` say them.
            device: of ``self.timesteps``.
            timesteps: the times themselves, descending; not with flow sigmas.
            sigmas: with flow sigmas: from near 1 down, before they are shifted.
            mu: the shift, with use_dynamic_shifting.
        """
        parts, times = self.parts, timesteps
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("num_inference_steps: expected one of num_inference_steps, timesteps and sigmas")
        flow = parts.settings.use_flow_sigmas
        if sigmas is not None:
            if not flow:
                raise ValueError("sigmas: only with use_flow_sigmas")
            times, told = parts.settings.flow_times(parts.solver, [float(s) for s in sigmas], mu)
        elif timesteps is not None:
            if flow:
                raise ValueError("timesteps: expected sigmas, since the schedule is one of flow matching")
            times = told = [float(t) for t in timesteps]
        else:
            times, told = parts.times(int(num_inference_steps), mu)
        self._prepare(parts, list(times), list(told))
        self.num_inference_steps = len(self._times)
        self.timesteps = self._told_tensor.to(device)
        self._first_address = self.timesteps.data_ptr()
        self._begin_index = self._step_index = None

    def _prepare(self, parts: FromDiffusers, times: list[float], told: list[float]) -> None:
        """The plan of these times; kept, with the buffers of its runs, until there is another."""
        if self._prepared == (parts, times, told):
            return
        self._prepared, self._times = (parts, times, told), times
        self._steppers.clear()
        self._plan = plan = parts.solver.plan(parts.schedule, times, self._conversion(False))
        named = dict(zip(times, told, strict=True))
        # In a step of several calls there are times between; those are told as they are.
        calls = torch.tensor([named.get(t, t) for t in plan.times], dtype=torch.float64)
        self._exact = calls.tolist() == list(plan.times)
        whole = bool((calls == calls.round()).all()) and not parts.settings.use_flow_sigmas
        self._told_tensor = calls.to(torch.int64 if whole else torch.float32)
        self._told = [float(t) for t in self._told_tensor.tolist()]

    def _conversion(self, rederives: bool) -> Conversion:
        options = self.parts.options
        clip, dynamic = options.get("clip"), "dynamic_threshold" in options
        return Conversion(options["prediction_type"], clip, rederives, dynamic)

    @property
    def step_index(self) -> int | None:
        """The number of the next call of the model; ``None`` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The call that the run begins with, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this call: pipelines that start from a noised image."""
        self._begin_index = int(begin_index)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The call at this time; of several the second, which begins a step."""
        value = float(timestep)
        found = [i for i, told in enumerate(self._told) if told == value]
        if not found:
            raise ValueError(f"timestep: {value:g} is none of this scheduler's timesteps, {_some(self._told)}")
        return found[min(1, len(found) - 1)]

    def _index_of(self, timestep: float | Tensor) -> int:
        """Which call this is, without reading a device if there is another way."""
        expected = self._step_index
        if expected is None or expected >= len(self._told):
            expected = self._begin_index
        if isinstance(timestep, Tensor):
            # A pipeline's loop gives out views of ``self.timesteps``: the address says which.
            place, rest = divmod(timestep.data_ptr() - self._first_address, self.timesteps.element_size())
            if 0 <= place < len(self._told) and not rest and timestep.device == self.timesteps.device:
                return place
            if expected is not None and timestep.device.type != "cpu":
                return expected
            timestep = timestep.reshape(-1)[0]
        value = float(timestep)
        known = expected is not None and expected < len(self._told) and self._told[expected] == value
        return expected if known else self.index_for_timestep(value)

    # ---------------------------------------------------------------------------------------------------------- a step

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: it is at the level that the model was trained on."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One call's output taken into the sample.

        Args:
            model_output: [B, ...], or [B, 2 C, ...] for a solver with learned variance.
            timestep: one of ``self.timesteps``.
            sample: [B, ...], what the model was called with.
            eta: of solvers that have it; 0, which is what pipelines pass, leaves the solver's own.
            use_clipped_model_output: after a clip epsilon is derived again from x0.
            generator: one, or one for each sample.
            variance_noise: z [B, ...] instead of generated noise.

        Returns:
            An object with prev_sample and pred_original_sample (x0), or with ``return_dict=False`` (prev_sample,). Both
            are tensors of their own.

        Raises:
            TypeError, ValueError: a bad argument, or (on a CPU) a sample that is not finite; the message names it.
        """
        if self._plan is None:
            raise ValueError("num_inference_steps: call set_timesteps before step")
        if not isinstance(model_output, Tensor) or not isinstance(sample, Tensor):
            wrong = "sample" if isinstance(model_output, Tensor) else "model_output"
            raise TypeError(f"{wrong}: expected a tensor")
        index, variant = self._index_of(timestep), (float(eta), bool(use_clipped_model_output))
        if self._step_index is None or index != self._step_index or variant != self._variant:
            self._begin(index, variant, sample, return_dict)
        noise = self._noise(index, model_output, sample, generator, variance_noise)
        prev, x0 = self._stepper.step(index - self._offset, model_output, sample, noise, return_dict)
        self._step_index = index + 1
        return self._output(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev,)

    def _begin(self, index: int, variant: tuple[float, bool], sample: Tensor, preview: bool) -> None:
        """A run that begins with call ``index``."""
        self._variant, self._generator = variant, None
        self._stepper, self._offset = self._stepper_at(index, variant)
        table = self._stepper.plan.table
        self._adds_noise = (table[:, C.NOISE] != 0).tolist()
        noisy = self._stepper.plan.needs_noise  # what the keys are is said where they are first needed
        keys = torch.zeros(sample.shape[0], 2, dtype=torch.int64, device=sample.device) if noisy else None
        self._seeded = False
        self._stepper.begin(sample, keys, preview)

    def _stepper_at(self, index: int, variant: tuple[float, bool]) -> tuple[Stepper, int]:
        """(what steps from call ``index`` on, the number of its first call)."""
        eta, rederives = variant
        solver, conversion = self._with_eta(eta), self._conversion(rederives)
        make = lambda: solver.plan(self.schedule, self._times, conversion)  # noqa: E731
        whole = self._kept(variant, 0, make, solver, conversion)
        plan = whole.plan
        if index == 0 or not (plan.slots or plan.uses_base or whole.controlled):
            return whole, 0
        make = lambda: self._entered(solver, conversion, plan, index)  # noqa: E731
        return self._kept(variant, index, make, solver, conversion), index

    def _kept(self, variant, index, make, solver, conversion) -> Stepper:
        key = (*variant, index, self.backend)
        if key not in self._steppers:
            while len(self._steppers) >= STEPPERS:
                self._steppers.pop(next(iter(self._steppers)))
            options = self.parts.options
            self._steppers[key] = Stepper(
                make(), self.schedule, solver, conversion, quantile=options.get("dynamic_threshold"),
                most=options.get("dynamic_max", 1.0), backend=self.backend,
            )  # fmt: skip
        return self._steppers[key]

    def _with_eta(self, eta: float) -> Solver:
        solver = self.parts.solver
        if eta == 0:
            return solver
        if not any(f.name == "eta" for f in fields(solver)):
            raise ValueError(f"eta: {solver.name} has none, got {eta}")
        return replace(solver, eta=eta)

    def _entered(self, solver: Solver, conversion: Conversion, plan: Plan, index: int) -> Plan:
        """A plan of calls ``index`` and later, whose history begins there."""
        if index >= plan.calls:
            raise ValueError(f"begin_index: expected a call from 0 to {plan.calls - 1}, got {index}")
        if isinstance(solver, PNDM):
            return entered(solver, self.schedule, plan.times[index:], conversion)
        rest = self._times[sum(plan.ends[:index]) :]
        later = solver.plan(self.schedule, rest, conversion)
        if later.times != plan.times[index:]:
            raise ValueError(
                f"begin_index: {solver.name} cannot begin at call {index} (time {plan.times[index]:g}), within a step"
            )
        return later

    def _noise(self, index, model_output, sample, generator, given) -> Tensor | None:
        """z, where it does not come from the kernel."""
        if not self._adds_noise[index - self._offset]:
            return None
        if given is not None:
            if generator is not None:
                raise ValueError("variance_noise: expected either generator or variance_noise, got both")
            return given.to(sample.dtype)
        if self.config.noise == "torch":
            from diffusers.utils.torch_utils import randn_tensor

            z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
            return z.to(sample.dtype)
        if not self._seeded or generator is not self._generator:
            self._stepper.set_keys(keys_of(generator, sample))
            self._seeded, self._generator = True, generator
        return None

    # ------------------------------------------------------------------------------------------------ levels of samples

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), ready to be multiplied with ``like``; nothing is read from a device."""
        self.parts  # noqa: B018 - the configuration may have changed
        times = timesteps.to(like.device).reshape(-1)
        if self._plan is not None and not self._exact and self._begin_index is not None:
            # The model is told rounded times: the level is the call's.
            call = self._begin_index if self._step_index is None else min(self._step_index, self._plan.calls - 1)
            level = self._plan.levels[call]
            alpha, sigma = (torch.full(times.shape, v, dtype=torch.float64, device=like.device) for v in level)
        else:
            alpha, sigma = self._levels(times)
        return over_samples(alpha, like), over_samples(sigma, like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise; a time for each sample, or one."""
        alpha, sigma = self._levels_at(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` by the name that pipelines of flow matching use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a v-prediction (of a flow schedule: a flow) is trained on: alpha noise - sigma x0, or noise - x0."""
        if self.schedule.kind == "flow":
            return noise - sample
        alpha, sigma = self._levels_at(timesteps, sample)
        return alpha * noise - sigma * sample


# --------------------------------------------------------------------------------------------------------------- noise


def keys_of(generator: Generator, sample: Tensor) -> Tensor:
    """int64 [B, 2]: seed and number of every sample, drawn where the generator is and not read here."""
    batch = sample.shape[0]
    several = isinstance(generator, Sequence)
    if several and len(generator) != batch:
        raise ValueError(f"generator: expected one for each of {batch} samples, got {len(generator)}")
    seeds = [_seed(one).to(sample.device) for one in (generator if several else [generator])]
    numbers = torch.arange(batch, device=sample.device) << 32
    # With one for each sample, a sample gets the noise that it gets by itself.
    return torch.stack([torch.cat(seeds).expand(batch), torch.zeros_like(numbers) if several else numbers], 1)


def _seed(generator: torch.Generator | None) -> Tensor:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    return torch.randint(2**63 - 1, (1,), generator=generator, device="cpu" if generator is None else generator.device)


# ------------------------------------------------------------------------------------------------- solvers in JSON


def encoded(solver: Solver) -> tuple[str, dict[str, Any]]:
    """(name, options) of a solver, for a JSON file."""
    name = type(solver).__name__
    if solver_classes().get(name) is not type(solver):
        raise ValueError(f"solver: expected one of {', '.join(solver_classes())}, got {name}")
    return name, {f.name: _plain(getattr(solver, f.name)) for f in fields(solver) if f.init}


def _plain(value: Any) -> Any:
    if isinstance(value, Solver):
        name, options = encoded(value)
        return {"solver": name, "solver_options": options}
    return list(value) if isinstance(value, tuple) else value


def decoded(name: str, options: Mapping[str, Any]) -> Solver:
    """The solver of a name and options."""
    classes = solver_classes()
    if not isinstance(name, str):
        raise TypeError(f"solver: expected a solver or its name, got {type(name).__name__}")
    if name not in classes:
        raise ValueError(f"solver: expected one of {', '.join(classes)}, got {name!r}")
    allowed = [f.name for f in fields(classes[name]) if f.init]
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise ValueError(f"solver_options: {name} has {', '.join(allowed)}; got {', '.join(unknown)}")
    values = {}
    for key, value in options.items():
        nested = isinstance(value, Mapping) and "solver" in value
        value = decoded(value["solver"], value.get("solver_options") or {}) if nested else value
        values[key] = tuple(value) if isinstance(value, list) else value
    return classes[name](**values)


def solver_classes() -> dict[str, type[Solver]]:
    """The solvers by name that a configuration can hold."""
    from pydenoise import samplers

    return {name: getattr(samplers, name) for name in SOLVERS}


def _some(times: Sequence[float]) -> str:
    return ", ".join(f"{t:g}" for t in times[:8]) + (", ..." if len(times) > 8 else "")


# ------------------------------------------------------------------------------------------------------------ the class


def _make() -> dict[str, type]:
    """The class, that of its results and its base; needs diffusers."""
    try:
        from diffusers import ConfigMixin, SchedulerMixin
        from diffusers.configuration_utils import register_to_config
        from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
        from diffusers.utils import BaseOutput
    except ImportError as error:
        raise ImportError(f"DiffusersScheduler needs diffusers: {INSTALL}") from error

    @dataclass
    class DiffusersSchedulerOutput(BaseOutput):
        """The sample after a step, and the predicted clean sample."""

        prev_sample: Tensor
        pred_original_sample: Tensor | None = None

    class DiffusersScheduler(SchedulerMethods, SchedulerMixin, ConfigMixin):
        """Any of our solvers as a scheduler of diffusers.

        ``DiffusersScheduler.from_config(pipe.scheduler.config)`` does what the pipeline's own scheduler does, faster;
        ``from_config(pipe.scheduler.config, solver=DPMSolverPP(3))`` puts another solver in its place. A step is one
        fused launch; samples keep their dtype, arithmetic is in float32. Steps are counted here, so that no time is
        read from a device. A sample is always alpha x0 + sigma z, for every solver; ``scale_model_input`` changes
        nothing.

        Args:
            solver: a solver, or the name of its class, with ``solver_options``: "DDIM", "DDPM", "PNDM", "DPMSolverPP",
                "UniPC", "EVODiff", "Euler", "EulerAncestral", "Heun", "FastDDPM", "TimeShift".
            noise: "fused": noise is made inside of the step from a seed that the generator gives, the same for one seed
                on every backend; "torch": the numbers that diffusers' own schedulers draw, with their cost.
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
                levels; beta_schedule is "linear", "scaled_linear", "squaredcos_cap_v2" or "sigmoid".
            prediction_type: "epsilon", "v_prediction", "sample", "flow" (or diffusers' "flow_prediction").
            clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: limits of x0.
            timestep_spacing, steps_offset: "leading", "linspace", "trailing", or another name of
                ``pydenoise.samplers.timesteps``; ``None``: the solver's own. The offset counts for "leading".
            use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas, sigma_min, sigma_max: times by sigma / alpha.
            use_flow_sigmas, flow_shift, use_dynamic_shifting, time_shift_type, shift_terminal: flow matching.

        The attribute ``backend`` ("auto") is that of ``sampler_step`` and belongs to no configuration.

        Raises:
            TypeError, ValueError: a bad option; the message names it.
        """

        _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
        _output = DiffusersSchedulerOutput

        @register_to_config
        def __init__(
            self,
            solver: str | Solver = "DDIM",
            solver_options: dict[str, Any] | None = None,
            noise: str = "fused",
            num_train_timesteps: int = 1000,
            beta_start: float = 0.0001,
            beta_end: float = 0.02,
            beta_schedule: str = "linear",
            trained_betas: list[float] | None = None,
            rescale_betas_zero_snr: bool = False,
            prediction_type: str = "epsilon",
            clip_sample: bool = False,
            clip_sample_range: float = 1.0,
            thresholding: bool = False,
            dynamic_thresholding_ratio: float = 0.995,
            sample_max_value: float = 1.0,
            timestep_spacing: str | None = None,
            steps_offset: int = 0,
            use_karras_sigmas: bool = False,
            use_exponential_sigmas: bool = False,
            use_lu_lambdas: bool = False,
            sigma_min: float | None = None,
            sigma_max: float | None = None,
            use_flow_sigmas: bool = False,
            flow_shift: float = 1.0,
            use_dynamic_shifting: bool = False,
            time_shift_type: str = "exponential",
            shift_terminal: float | None = None,
        ):
            self._set_up(solver, solver_options, noise)

    for cls in (DiffusersScheduler, DiffusersSchedulerOutput):  # as if it stood at the top of this file: for pickles
        cls.__qualname__ = cls.__name__
    # A saved pipeline looks here for the base class, to find out how to load a scheduler of this module.
    return {cls.__name__: cls for cls in (DiffusersScheduler, DiffusersSchedulerOutput, SchedulerMixin)}


def __getattr__(name: str) -> Any:
    if name not in ("DiffusersScheduler", "DiffusersSchedulerOutput", "SchedulerMixin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_make())
    return globals()[name]
