"""The options that diffusers' schedulers share, by their names, and what they mean for our schedules and solvers."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pydenoise.samplers.dpm_solver import DPMSolverPP
from pydenoise.samplers.euler import Euler, EulerAncestral, Heun
from pydenoise.samplers.evodiff import EVODiff
from pydenoise.samplers.levels import NoiseSchedule, karras_ramp
from pydenoise.samplers.plan import PREDICTION_TYPES, Solver
from pydenoise.samplers.timesteps import karras, uniform_log_snr
from pydenoise.samplers.unipc import UniPC

SMALLEST_ALPHAS_CUMPROD = 2.0**-24  # what diffusers puts in the place of 0 where sigma / alpha has to be finite
LARGEST_FLOW_SIGMA = 1 - 1e-6  # of UniPC in diffusers, for the same reason
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
MULTISTEP, IN_SIGMA = (DPMSolverPP, UniPC, EVODiff), (Euler, EulerAncestral, Heun)
Times = tuple[list[float], list[float]]  # (of the noise levels, what the model is told)


@dataclass(frozen=True)
class Settings:
    """A schedule, times and the treatment of x0, in the words of diffusers' configurations."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str | None = None
    steps_offset: int = 0
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None

    def __post_init__(self):
        if self.beta_schedule not in BETA_SCHEDULES and self.trained_betas is None:
            allowed = ", ".join(BETA_SCHEDULES)
            raise ValueError(f"beta_schedule: expected one of {allowed}, or trained_betas; got {self.beta_schedule!r}")
        if self.prediction not in PREDICTION_TYPES:
            allowed = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction_type: expected one of {allowed}, got {self.prediction_type!r}")
        if sum((self.use_karras_sigmas, self.use_exponential_sigmas, self.use_lu_lambdas)) > 1:
            raise ValueError("use_karras_sigmas: only one of use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas")
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type: expected exponential or linear, got {self.time_shift_type!r}")
        if self.use_flow_sigmas and self.use_lu_lambdas:
            raise ValueError("use_lu_lambdas: not with use_flow_sigmas")
        flow_only = {"use_dynamic_shifting": self.use_dynamic_shifting, "shift_terminal": self.shift_terminal}
        for name, value in flow_only.items():
            if value and not self.use_flow_sigmas:
                raise ValueError(f"{name}: only with use_flow_sigmas")

    @classmethod
    def of(cls, options: Any) -> "Settings":
        """From a mapping that may hold more."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

    @property
    def prediction(self) -> str:
        """``prediction_type`` in our words."""
        return "flow" if self.prediction_type == "flow_prediction" else self.prediction_type

    @property
    def sampler_options(self) -> dict[str, Any]:
        """prediction_type and the treatment of x0, as keyword arguments of ``Sampler``."""
        if self.thresholding:
            limits = {"dynamic_threshold": self.dynamic_thresholding_ratio, "dynamic_max": self.sample_max_value}
        else:
            limits = {"clip": self.clip_sample_range} if self.clip_sample else {}
        return {"prediction_type": self.prediction, **limits}

    def schedule(self, solver: Solver) -> NoiseSchedule:
        """The noise levels. Solvers in sigma / alpha get a zero terminal SNR that is not quite 0, as in diffusers."""
        if self.use_flow_sigmas:
            return NoiseSchedule.flow(self.num_train_timesteps)
        schedule = self._of_betas()
        if not self.rescale_betas_zero_snr:
            return schedule
        schedule = schedule.zero_terminal_snr()
        if not isinstance(solver, (*MULTISTEP, *IN_SIGMA)):
            return schedule
        # Not from_alphas_cumprod: with many timesteps the level before the last has a smaller alpha than this.
        squared = schedule.alphas_cumprod
        squared[-1] = SMALLEST_ALPHAS_CUMPROD
        return NoiseSchedule("vp", squared.sqrt(), (1 - squared).sqrt())

    def _of_betas(self) -> NoiseSchedule:
        num, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return NoiseSchedule.from_betas(torch.as_tensor(self.trained_betas, dtype=torch.float64))
        if self.beta_schedule == "linear":
            return NoiseSchedule.linear(num, start, end)
        if self.beta_schedule == "scaled_linear":
            return NoiseSchedule.scaled_linear(num, start, end)
        if self.beta_schedule == "squaredcos_cap_v2":
            return NoiseSchedule.cosine(num)
        ramp = torch.linspace(-6, 6, num, dtype=torch.float64).sigmoid()
        return NoiseSchedule.from_betas(ramp * (end - start) + start)

    # ----------------------------------------------------------------------------------------------------------- times

    def spaced(self, solver: Solver) -> Solver:
        """The solver with ``timestep_spacing`` and ``steps_offset``, where these are options of it."""
        names = {f.name for f in fields(solver)}
        if self.timestep_spacing is None or "spacing" not in names or self.use_flow_sigmas:
            return solver
        changed: dict[str, Any] = {"spacing": self.timestep_spacing}
        if "steps_offset" in names:
            # Only "leading" has an offset; pipelines of diffusers set it whatever the spacing is.
            changed["steps_offset"] = int(self.steps_offset) if self.timestep_spacing == "leading" else 0
        return replace(solver, **changed)

    def times(self, solver: Solver, schedule: NoiseSchedule, num_steps: int, mu: float | None = None) -> Times:
        """(times of the noise levels, times that the model is told), as diffusers has them for this solver."""
        if num_steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {num_steps}")
        if mu is not None and not self.use_dynamic_shifting:
            raise ValueError("mu: only with use_dynamic_shifting")
        if self.use_flow_sigmas:
            sigmas = self._flow_start(solver, num_steps).tolist()
            return self.flow_times(solver, sigmas, mu)
        if self.use_karras_sigmas or self.use_exponential_sigmas or self.use_lu_lambdas:
            return self._ramp(solver, schedule, num_steps)
        times = self._spaced_times(solver, schedule, num_steps)
        return times, times

    def _spaced_times(self, solver: Solver, schedule: NoiseSchedule, num_steps: int) -> list[float]:
        if self.timestep_spacing == "linspace" and isinstance(solver, IN_SIGMA):  # not rounded
            last = schedule.num_timesteps - 1
            return torch.linspace(last, 0, num_steps, dtype=torch.float64).tolist()
        if self.timestep_spacing is not None and isinstance(solver, IN_SIGMA):
            solver = replace(solver, final="zero")  # the same times, wherever the last step ends
        return [float(t) for t in self.spaced(solver).timesteps(schedule, num_steps)]

    def _ramp(self, solver: Solver, schedule: NoiseSchedule, num_steps: int) -> Times:
        """Times of sigmas in a row of Karras', or in equal steps of their logarithm."""
        low, high = self._ramp_ends(solver, schedule, num_steps)
        if self.use_karras_sigmas:
            times = karras(schedule, num_steps, sigma_min=low, sigma_max=high)
        else:
            first, last = (schedule.time_of(-math.log(sigma)) for sigma in (high, low))
            times = uniform_log_snr(schedule, num_steps, first=first, last=last)
        return times, [self._told(solver, t) for t in times]

    def _ramp_ends(self, solver: Solver, schedule: NoiseSchedule, num_steps: int) -> tuple[float, float]:
        ends = schedule.first, schedule.last
        if isinstance(solver, IN_SIGMA):  # those of the spacing's times
            times = self._spaced_times(solver, schedule, num_steps)
            ends = schedule.level(times[-1]), schedule.level(times[0])
        low, high = (math.exp(-level.log_snr) for level in ends)
        return self.sigma_min or low, self.sigma_max or high

    def _told(self, solver: Solver, time: float) -> float:
        """Multistep schedulers have whole times: rounded, or cut off."""
        if isinstance(solver, IN_SIGMA):
            return time
        cuts = self.use_exponential_sigmas
        cuts |= isinstance(solver, DPMSolverPP) and self.beta_schedule == "squaredcos_cap_v2"
        return float(int(time)) if cuts else float(round(time))

    # ------------------------------------------------------------------------------------------------------------ flow

    def _flow_start(self, solver: Solver, num_steps: int) -> torch.Tensor:
        """The sigmas before they are shifted: every scheduler of diffusers has its own."""
        smallest = 1 / self.num_train_timesteps
        if isinstance(solver, DPMSolverPP):
            return torch.linspace(1 - smallest, 0, num_steps + 1, dtype=torch.float64)[:-1]
        if isinstance(solver, UniPC):
            return torch.linspace(1, smallest, num_steps + 1, dtype=torch.float64)[:-1]
        if not self.use_dynamic_shifting:  # shifted here, and once more with all of them
            smallest = self.flow_shift * smallest / (1 + (self.flow_shift - 1) * smallest)
        return torch.linspace(1, smallest, num_steps, dtype=torch.float64)

    def flow_times(self, solver: Solver, sigmas: list[float], mu: float | None = None) -> Times:
        """From sigmas, which are shifted, stretched and spaced as the options say."""
        if self.use_dynamic_shifting and mu is None:
            raise ValueError("mu: use_dynamic_shifting needs it")
        shift = self.flow_shift
        if mu is not None:
            shift = math.exp(mu) if self.time_shift_type == "exponential" else mu
        moved = torch.tensor(sigmas, dtype=torch.float64)
        moved = shift * moved / (1 + (shift - 1) * moved)
        if self.shift_terminal:
            moved = 1 - (1 - moved) / ((1 - moved[-1]) / (1 - self.shift_terminal))
        if self.use_karras_sigmas:
            moved = karras_ramp(float(moved[-1]), float(moved[0]), len(moved), 7.0)
        elif self.use_exponential_sigmas:
            moved = torch.linspace(math.log(moved[0]), math.log(moved[-1]), len(moved), dtype=torch.float64).exp()
        if isinstance(solver, UniPC):
            moved = moved.clamp(max=LARGEST_FLOW_SIGMA)
        times = (moved * self.num_train_timesteps).clamp(max=self.num_train_timesteps).tolist()
        return times, [float(int(t)) for t in times] if isinstance(solver, MULTISTEP) else times

    def initial_scale(self, solver: Solver, schedule: NoiseSchedule, first: float) -> float:
        """Standard deviation of the starting noise: diffusers' Euler and Heun start from sigma z, others from z."""
        if schedule.kind == "vp" and isinstance(solver, IN_SIGMA) and self.timestep_spacing in ("linspace", "trailing"):
            return schedule.level(first).sigma
        return schedule.initial_scale
