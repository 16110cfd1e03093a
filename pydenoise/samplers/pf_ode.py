"""The probability-flow ODE, integrated with adaptive steps. Needs SciPy.

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021; in the form
of PNDM's comparison ("PF": Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", ICLR 2022). Which
levels the model is called at depends on what it returns, so the host drives it: no coefficient table, no CUDA graph.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._progress import Progress
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion
from pydenoise.samplers.runtime import FLOATS

METHODS = ("RK45", "RK23", "DOP853")
VARIABLES = ("log_snr", "time")


@dataclass(frozen=True)
class PFSolution:
    """``sample`` [B, ...]; ``calls``: evaluations of the model; ``times`` [calls]: what it was told, in order."""

    sample: Tensor
    calls: int
    times: tuple[float, ...]


@dataclass(frozen=True)
class PFODE:
    """An adaptive Runge-Kutta integration from the schedule's noisiest level to ``end``.

    The state is float64 on the host; the model sees the sample's dtype and device. All samples of a batch share their
    steps, which the worst of them sets, so a sample depends on its batch within the tolerances.

    Args:
        rtol, atol: tolerances of a step's error.
        method: "RK45" (Dormand and Prince, orders 5 and 4), "RK23" or "DOP853", of SciPy.
        variable: what is integrated over. "log_snr": d(x / alpha) / d lambda = -exp(-lambda) epsilon with lambda =
            log(alpha / sigma), for "vp" and "ve"; "time": dx/dt, which on a "vp" schedule is PNDM's: -beta x / 2 + beta
            epsilon / (2 sigma) in the continuous limit of linear betas, dx/dsigma on the others. ``None``: "log_snr",
            "time" for "flow".
        end: the time to stop at, as the model is told times. ``None``: the schedule's level with the least noise; 0 for
            "flow"; with "time" on "vp", a thousandth of the schedule (PNDM's 1e-3).
        max_calls: more evaluations of the model are an error.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "RK45"
    variable: str | None = None
    end: float | None = None
    max_calls: int = 10_000

    def __post_init__(self):
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.variable is not None and self.variable not in VARIABLES:
            raise ValueError(f"variable: expected one of {', '.join(VARIABLES)} or None, got {self.variable!r}")
        if self.max_calls < 1:
            raise ValueError(f"max_calls: expected a positive number, got {self.max_calls}")

    def sample(self, *args, **kwargs) -> Tensor:
        """The ``sample`` of ``solve``."""
        return self.solve(*args, **kwargs).sample

    def solve(
        self,
        denoiser: Callable[..., Tensor],
        schedule: NoiseSchedule,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        prediction_type: str = "epsilon",
        guidance_scale: float | None = None,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> PFSolution:
        """From noise x [B, ...], or noise of ``shape``, to a sample; arguments as in ``Sampler`` and its ``sample``.

        ``denoiser(x, t, **conditioning)`` is told real times: float32 [B], float64 for a float64 x.

        Raises:
            ImportError: without SciPy.
            TypeError, ValueError: a bad argument, a schedule that the variable does not fit, or a bad result of the
                denoiser; the message names it and the call.
            RuntimeError: the integration failed, or took more than ``max_calls``.
        """
        if not callable(denoiser):
            raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
        integrate = _solve_ivp()
        x = _start(x, shape, dtype, device, generator, seed, schedule)
        ode = self._equation(schedule, Conversion(prediction_type))
        conditions = Conditions(conditioning, unconditional, x, guidance_scale is not None).part(slice(None))
        model = _Model(denoiser, conditions, guidance_scale, x)

        with torch.no_grad(), Progress(progress, "PF-ODE") as line:

            def slope(at: float, y: np.ndarray) -> np.ndarray:
                if len(model.times) >= self.max_calls:
                    raise RuntimeError(f"max_calls: {self.max_calls} evaluations of the model were not enough")
                now = ode.sample(at, y)
                line.advance()
                return ode.slope(at, y, now, model(now, ode.time(at)))

            begin = ode.state(x.double().cpu().numpy().ravel())
            solution = integrate(slope, ode.span, begin, method=self.method, rtol=self.rtol, atol=self.atol,
                                 t_eval=ode.span[1:])  # fmt: skip
        if not solution.success:
            raise RuntimeError(f"PFODE: {solution.message}")
        result = torch.from_numpy(ode.sample(ode.span[1], solution.y[:, -1])).view(x.shape).to(x)
        return PFSolution(result, len(model.times), tuple(model.times))

    def _equation(self, schedule: NoiseSchedule, conversion: Conversion):
        variable = self.variable or ("time" if schedule.kind == "flow" else "log_snr")
        if variable == "log_snr":
            return _LogSNR(schedule, conversion, self.end)
        return (_LinearBetas if schedule.kind == "vp" else _Sigma)(schedule, conversion, self.end)


def _solve_ivp() -> Callable:
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("PFODE: needs SciPy; pip install 'pydenoise[ode]'") from error
    return solve_ivp


def _start(x, shape, dtype, device, generator, seed, schedule) -> Tensor:
    if (x is None) == (shape is None):
        raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
    if x is None:
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        keys = sample_keys(seed, generator, int(shape[0]), torch.device(device))
        return initial_noise(tuple(shape), keys, schedule.initial_scale, dtype, "auto")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"x: expected a floating-point tensor [B, ...], got {x.dtype} {tuple(x.shape)}")
    return x.detach()


class _Model:
    """The denoiser on a state of the host, guidance applied, its result as float64 on the host."""

    def __init__(self, denoiser, conditions, guidance_scale, x: Tensor):
        self._denoiser, self._conditions, self._scale, self._x = denoiser, conditions, guidance_scale, x
        self.times: list[float] = []

    def __call__(self, state: np.ndarray, time: float) -> np.ndarray:
        like, call = self._x, len(self.times)
        x = torch.from_numpy(state).view(like.shape).to(like)
        if self._scale is not None:
            x = torch.cat([x, x])
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.times.append(time)
        out = self._denoiser(x, torch.full((x.shape[0],), time, dtype=dtype, device=like.device), **self._conditions)
        if not isinstance(out, Tensor):
            raise TypeError(f"denoiser: expected a tensor at call {call}, got {type(out).__name__}")
        if out.shape != x.shape:
            raise ValueError(f"denoiser: expected shape {tuple(x.shape)} at call {call}, got {tuple(out.shape)}")
        out = out.double()
        if self._scale is not None:
            other, given = out.chunk(2)
            out = other + self._scale * (given - other)
        values = out.cpu().numpy().ravel()
        if not np.isfinite(values).all():
            raise ValueError(f"denoiser: NaN or infinity at call {call} (time {time:g})")
        return values


class _LogSNR:
    """y = x / alpha over lambda."""

    def __init__(self, schedule: NoiseSchedule, conversion: Conversion, end: float | None):
        first = schedule.first if end is None else schedule.level(end)
        self.span = (schedule.last.log_snr, first.log_snr)
        if not all(map(math.isfinite, self.span)):
            raise ValueError("variable: 'log_snr' needs a schedule that ends neither clean nor in pure noise")
        if not self.span[0] < self.span[1]:
            raise ValueError(f"end: expected a time with less noise than the start's, got {end}")
        self._schedule, self._conversion = schedule, conversion

    def _level(self, at: float) -> Level:
        return Level.of_log_snr(at, self._schedule.kind)

    def state(self, x: np.ndarray) -> np.ndarray:
        return x / self._level(self.span[0]).alpha

    def sample(self, at: float, y: np.ndarray) -> np.ndarray:
        return self._level(at).alpha * y

    def time(self, at: float) -> float:
        return self._schedule.time_of(min(max(at, self.span[0]), self.span[1]))

    def slope(self, at: float, y: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        on_sample, on_output = self._conversion.epsilon(self._level(at))
        return -math.exp(-at) * (on_sample * x + on_output * out)


class _Sigma:
    """dx/dsigma of "ve" (epsilon) and "flow" (epsilon - x0)."""

    def __init__(self, schedule: NoiseSchedule, conversion: Conversion, end: float | None):
        self._flow = schedule.kind == "flow"
        self._scale = schedule.num_timesteps if self._flow else 1
        stop = (0.0 if self._flow else schedule.first.sigma * self._scale) if end is None else float(end)
        self.span = (schedule.last.sigma, schedule.level(stop).sigma)
        if not self.span[0] > self.span[1]:
            raise ValueError(f"end: expected a time with less noise than the start's, got {end}")
        self._conversion = conversion

    def state(self, x: np.ndarray) -> np.ndarray:
        return x

    def sample(self, at: float, y: np.ndarray) -> np.ndarray:
        return y

    def time(self, at: float) -> float:
        return at * self._scale

    def slope(self, at: float, y: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        level = Level(1 - at, at) if self._flow else Level(1.0, at)
        on_sample, on_output = self._conversion.epsilon(level)
        if self._flow:
            p, q = self._conversion.x0(level)
            on_sample, on_output = on_sample - p, on_output - q
        return on_sample * x + on_output * out


class _LinearBetas:
    """dx/dt over t from 1, beta(t) = T (beta_0 + t (beta_1 - beta_0)): the continuous limit of linear betas."""

    def __init__(self, schedule: NoiseSchedule, conversion: Conversion, end: float | None):
        betas = schedule.betas
        self._num = schedule.num_timesteps
        self._low, self._high = float(betas[0]), float(betas[-1])
        ramp = torch.linspace(self._low, self._high, self._num, dtype=torch.float64)
        if self._num < 2 or not torch.allclose(betas, ramp, rtol=1e-3, atol=0):
            raise ValueError("variable: 'time' needs a schedule of linear betas; use 'log_snr'")
        self.span = (1.0, 1e-3 if end is None else float(end) / (self._num - 1))
        if not 0 < self.span[1] < 1:
            raise ValueError(f"end: expected a time above 0 and below {self._num - 1}, got {end}")
        self._conversion = conversion

    def _level(self, t: float) -> Level:
        log_alpha = self._num * (-(t**2) * (self._high - self._low) / 4 - t * self._low / 2)
        return Level(math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))

    def state(self, x: np.ndarray) -> np.ndarray:
        return x

    def sample(self, at: float, y: np.ndarray) -> np.ndarray:
        return y

    def time(self, at: float) -> float:
        return at * (self._num - 1)

    def slope(self, at: float, y: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        beta, level = self._num * (self._low + at * (self._high - self._low)), self._level(at)
        on_sample, on_output = self._conversion.epsilon(level)
        return -beta / 2 * x + beta / (2 * level.sigma) * (on_sample * x + on_output * out)
