"""A scheduler of diffusers as a schedule, a solver and options of ``Sampler``.

A configuration is read completely: an option that has no counterpart here is an error that names it.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from pydenoise.samplers._diffusers_settings import Settings, Times
from pydenoise.samplers.ddim import DDIM
from pydenoise.samplers.ddpm import DDPM
from pydenoise.samplers.dpm_solver import DPMSolverPP
from pydenoise.samplers.euler import Euler, EulerAncestral, Heun
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import Solver
from pydenoise.samplers.pndm import PNDM
from pydenoise.samplers.runtime import Denoiser, Sampler
from pydenoise.samplers.unipc import UniPC

INSTALL = "pip install pydenoise[diffusers]"


@dataclass(frozen=True)
class FromDiffusers:
    """What a scheduler of diffusers does, in the terms of this package.

    Args:
        solver: the solver.
        settings: the schedule, the times and the treatment of x0, by diffusers' names.
    """

    solver: Solver
    settings: Settings

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise levels."""
        return self.settings.schedule(self.solver)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``Sampler``: prediction_type, and clip or dynamic_threshold with dynamic_max."""
        return self.settings.sampler_options

    def times(self, num_steps: int, mu: float | None = None) -> Times:
        """(times of the noise levels, times that the model is told) of ``num_steps`` steps.

        They differ where diffusers rounds a time for the model and not its sigma. ``mu``: the shift of a scheduler with
        ``use_dynamic_shifting``.
        """
        return self.settings.times(self.solver, self.schedule, num_steps, mu)

    def initial_scale(self, num_steps: int, mu: float | None = None) -> float:
        """Standard deviation of the noise to start from, in the coordinates of ``schedule``.

        1, but sigma for Euler and Heun with spacing "linspace" or "trailing", as diffusers has it.
        """
        return self.settings.initial_scale(self.solver, self.schedule, self.times(num_steps, mu)[0][0])

    def sampler(self, denoiser: Denoiser, num_steps: int, *, mu: float | None = None, **options: Any) -> Sampler:
        """A ``Sampler`` with the scheduler's times and options; ``options`` are added and take precedence."""
        times, told = self.times(num_steps, mu)
        if told != times:
            options.setdefault("time_table", told)
        return Sampler(denoiser, self.schedule, self.solver, timesteps=times, **{**self.options, **options})


def from_diffusers(scheduler: Any) -> FromDiffusers:
    """A scheduler of diffusers, or its configuration, in the terms of this package.

    Known are DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler,
    EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, FlowMatchEulerDiscreteScheduler and
    our own DiffusersScheduler.

    Samples are alpha x0 + sigma z also where diffusers' own are x0 + (sigma / alpha) z and are scaled for the model
    (Euler, Heun). Schedules are in float64, diffusers' in float32. At times that are not whole log(alpha / sigma) is
    interpolated, in diffusers sigma / alpha. DDPM adds no noise in its last step, diffusers does where that step's time
    is not 0.

    Args:
        scheduler: the scheduler, or its configuration, or what its JSON file holds.

    Raises:
        TypeError: not a scheduler.
        ValueError: an unknown class, or an option that is not supported; the message names it.
        ImportError: a configuration, and diffusers is not installed.
    """
    name, config, defaults = _read(scheduler)
    if name == "DiffusersScheduler":
        from pydenoise.samplers.diffusers_scheduler import DiffusersScheduler

        own = DiffusersScheduler.from_config(config) if isinstance(scheduler, Mapping) else scheduler
        return own.parts
    if name not in _READERS:
        raise ValueError(f"scheduler: expected one of {', '.join(_READERS)}, got {name}")
    options = _Options(name, config, defaults)
    solver, settings = _READERS[name](options)
    options.close()
    return FromDiffusers(settings.spaced(solver), settings)


def _read(scheduler: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(class name, configuration, defaults of the class's own options)."""
    if isinstance(scheduler, Mapping):
        config, name = dict(scheduler), class_name_of(scheduler)
        if name is None:
            raise ValueError("scheduler: a configuration without _class_name, whose options are of no known class")
        cls = _class_of(name) if name in _READERS else None
    else:
        if not isinstance(getattr(scheduler, "config", None), Mapping):
            raise TypeError(f"scheduler: expected a scheduler of diffusers, got {type(scheduler).__name__}")
        config, cls, name = dict(scheduler.config), type(scheduler), type(scheduler).__name__
    return name, config, {} if cls is None else _defaults_of(cls)


def class_name_of(config: Mapping[str, Any]) -> str | None:
    """The class that a configuration is of; ``None`` if that cannot be told.

    A file holds ``_class_name``; ``scheduler.config`` often does not, and then the names of the options tell.
    """
    name = config.get("_class_name")
    if isinstance(name, str):
        return name
    if "solver" in config and "solver_options" in config:
        return "DiffusersScheduler"
    own = {key for key in config if not key.startswith("_")}
    found = [name for name in _READERS if set(_defaults_of(_class_of(name))) == own]
    return found[0] if len(found) == 1 else None


def _class_of(name: str) -> type:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"scheduler: reading a configuration needs diffusers ({INSTALL})") from error
    return getattr(diffusers, name)


def _defaults_of(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}


class _Options:
    """A scheduler's configuration, option by option; ``close`` finds those that nobody asked for."""

    def __init__(self, name: str, config: dict[str, Any], defaults: dict[str, Any]):
        self._name, self._defaults = name, defaults
        self._left = {key: config.get(key, default) for key, default in defaults.items()}

    def take(self, key: str, default: Any = None) -> Any:
        """The value; ``default`` for an option that this class does not have."""
        return self._left.pop(key, default)

    def only(self, key: str, *allowed: Any) -> Any:
        """The value, if it is supported."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise self.refused(key, value, allowed)
        return value

    def refused(self, key: str, value: Any, allowed: tuple = ()) -> ValueError:
        """The error for an option."""
        hint = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
        return ValueError(f"{key}: {value!r} of {self._name} has no counterpart here{hint}")

    def settings(self, **changed: Any) -> Settings:
        """The shared options that the class has."""
        names = [f.name for f in fields(Settings) if f.name in self._left]
        given = {name: self.take(name) for name in names} | changed
        # bool(None) is what some classes have as a default.
        return Settings(**{k: bool(v) if k.startswith("use_") else v for k, v in given.items()})

    def close(self) -> None:
        """Whatever is left must be at its default, which is what a version without the option does."""
        for key, value in self._left.items():
            if value != self._defaults[key]:
                raise self.refused(key, value)


# ------------------------------------------------------------------------------------------------- one for each class

Read = tuple[Solver, Settings]


def _ddim(options: _Options) -> Read:
    return DDIM(set_alpha_to_one=bool(options.take("set_alpha_to_one")), target="stride"), options.settings()


def _ddpm(options: _Options) -> Read:
    variance = options.only("variance_type", "fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    # "fixed_small_log" is the root of the same variance.
    return DDPM("fixed_small" if variance == "fixed_small_log" else variance), options.settings()


def _pndm(options: _Options) -> Read:
    # With other spacings diffusers steps by T // N all the same, to times that are not those of the list.
    options.only("timestep_spacing", "leading")
    settings = options.settings(timestep_spacing="leading")
    solver = PNDM(
        "plms" if options.take("skip_prk_steps") else "prk",
        set_alpha_to_one=bool(options.take("set_alpha_to_one")),
        combine="output" if settings.prediction_type == "v_prediction" else "epsilon",
    )
    return solver, settings


def _dpm_solver(options: _Options) -> Read:
    sde = options.only("algorithm_type", "dpmsolver++", "sde-dpmsolver++") == "sde-dpmsolver++"
    options.only("variance_type", None)
    options.only("lambda_min_clipped", -math.inf, "-inf")  # JSON has no infinity
    order, kind = options.only("solver_order", 2, 1, 3), options.only("solver_type", "midpoint", "heun")
    if order == 3 and sde:
        raise options.refused("solver_order", 3, (1, 2))  # there diffusers has another sign in the last term
    solver = DPMSolverPP(
        order, kind if order > 1 else "midpoint", sde=sde, final=_final(options),
        lower_order_final=bool(options.take("lower_order_final")),
        euler_at_final=bool(options.take("euler_at_final", False)),
    )  # fmt: skip
    return solver, options.settings()


def _unipc(options: _Options) -> Read:
    options.only("predict_x0", True)
    options.only("disable_corrector", [], None)
    options.only("solver_p", None)
    order, variant = options.only("solver_order", 2, 1, 3), options.only("solver_type", "bh2", "bh1")
    solver = UniPC(order, variant, _final(options), bool(options.take("lower_order_final")))
    return solver, options.settings()


def _euler(options: _Options) -> Read:
    options.only("interpolation_type", "linear")
    options.only("timestep_type", "discrete")
    return Euler(_final(options)), options.settings()


def _euler_ancestral(options: _Options) -> Read:
    return EulerAncestral(), options.settings()


def _heun(options: _Options) -> Read:
    return Heun(), options.settings()


def _flow_euler(options: _Options) -> Read:
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
        options.take(key)  # pipelines compute mu from them
    shift = options.take("shift")
    settings = options.settings(use_flow_sigmas=True, flow_shift=float(shift), prediction_type="flow")
    return Euler(), settings


def _final(options: _Options) -> str:
    return options.only("final_sigmas_type", "zero", "sigma_min")


_READERS: dict[str, Callable[[_Options], Read]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "UniPCMultistepScheduler": _unipc,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "HeunDiscreteScheduler": _heun,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
}
KNOWN = tuple(_READERS)
