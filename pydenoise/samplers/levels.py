"""Noise levels: how much of the clean sample and how much noise a sample holds at each time."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("vp", "ve", "flow", "residual")


class Level(NamedTuple):
    """x = alpha x0 + sigma epsilon."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma): inf for a clean sample, -inf for pure noise."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha) - math.log(self.sigma) if self.alpha else -math.inf

    @classmethod
    def clean(cls) -> "Level":
        """Without noise, in every kind of schedule."""
        return cls(1.0, 0.0)

    @classmethod
    def of_log_snr(cls, log_snr: float, kind: str = "vp") -> "Level":
        """The level of a ``kind`` of schedule that has this lambda; neither number loses digits at either end."""
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "residual":
            raise ValueError(
                "kind: a 'residual' schedule has a table of levels, log(alpha / sigma) alone does not say one"
            )
        if kind == "ve":
            return cls(1.0, math.exp(-log_snr))
        if kind == "flow":
            return cls(_logistic(log_snr), _logistic(-log_snr))
        return cls(math.sqrt(_logistic(2 * log_snr)), math.sqrt(_logistic(-2 * log_snr)))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels a model was trained on, in float64. Made by the class methods.

    ``kind`` says what a time is: in "vp" (alpha^2 + sigma^2 = 1) a timestep from 0 to num_timesteps - 1, which need not
    be whole; in "ve" (alpha = 1) sigma itself; in "flow" (alpha = 1 - sigma) sigma times num_timesteps. Levels of
    kind "residual" restore a degraded sample y, x - y = alpha (x0 - y) + sigma epsilon; a time is a whole timestep.

    Args:
        kind: "vp", "ve", "flow" or "residual".
        alphas, sigmas: x = alpha x0 + sigma noise; float64 [num_timesteps] on the CPU, the least noise first.
    """

    kind: str
    alphas: Tensor
    sigmas: Tensor

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        levels = [Level(a, s) for a, s in zip(self.alphas.tolist(), self.sigmas.tolist(), strict=True)]
        object.__setattr__(self, "_levels", levels)
        object.__setattr__(self, "_noise", [-level.log_snr for level in levels])  # ascending, as the times are

    def __repr__(self) -> str:
        first, last = self._levels[0], self._levels[-1]
        return f"NoiseSchedule({self.kind!r}, {self.num_timesteps} levels, sigma {first.sigma:.4g} to {last.sigma:.4g})"

    # ------------------------------------------------------------------------------------------------------ making one

    @classmethod
    def linear(cls, num: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """beta from ``beta_start`` to ``beta_end`` in equal steps (Ho et al., 2020)."""
        _check_betas_ends(num, beta_start, beta_end)
        return cls.from_betas(torch.linspace(beta_start, beta_end, num, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, num: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> "NoiseSchedule":
        """sqrt(beta) in equal steps (latent diffusion)."""
        _check_betas_ends(num, beta_start, beta_end)
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, num: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "NoiseSchedule":
        """sqrt(alphas_cumprod) as a quarter of a cosine, beta at most ``max_beta`` (Nichol and Dhariwal, 2021)."""
        check_count("num", num)
        _check_between("s", s, 0, math.inf)
        _check_between("max_beta", max_beta, 0, 1)
        turn = (torch.arange(num + 1, dtype=torch.float64) / num + s) / (1 + s) * (math.pi / 2)
        bar = turn.cos() ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> "NoiseSchedule":
        """alphas_cumprod = cumprod(1 - betas); betas in (0, 1)."""
        betas = _vector("betas", betas)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas: expected numbers between 0 and 1, got {float(betas.min())} to {float(betas.max())}"
            )
        return cls.from_alphas_cumprod(torch.cumprod(1 - betas, 0))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> "NoiseSchedule":
        """alphas_cumprod = alpha^2 in (0, 1], falling with the timestep."""
        bar = _vector("alphas_cumprod", alphas_cumprod)
        if not bool(((bar > 0) & (bar <= 1)).all()):
            raise ValueError(
                f"alphas_cumprod: expected numbers in (0, 1], got {float(bar.min())} to {float(bar.max())}; "
                "zero_terminal_snr() makes a schedule that ends at 0"
            )
        if not bool((bar[1:] < bar[:-1]).all()):
            raise ValueError("alphas_cumprod: expected every number to be less than the one before")
        return cls("vp", bar.sqrt(), (1 - bar).sqrt())

    @classmethod
    def karras(
        cls, num: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> "NoiseSchedule":
        """alpha = 1, sigma^(1/rho) in equal steps (Karras et al., 2022)."""
        check_count("num", num)
        _check_between("sigma_min", sigma_min, 0, math.inf)
        _check_between("sigma_max", sigma_max, sigma_min, math.inf)
        _check_between("rho", rho, 0, math.inf)
        return cls.from_sigmas(karras_ramp(sigma_min, sigma_max, num, rho))

    @classmethod
    def from_sigmas(cls, sigmas: Tensor | Sequence[float]) -> "NoiseSchedule":
        """alpha = 1 with these sigmas, rising or falling, all above 0."""
        sigmas = _vector("sigmas", sigmas)
        if not bool((sigmas > 0).all()):
            raise ValueError(f"sigmas: expected numbers above 0, got {float(sigmas.min())}")
        sigmas = _rising("sigmas", sigmas)
        return cls("ve", torch.ones_like(sigmas), sigmas)

    @classmethod
    def flow(cls, num: int = 1000, shift: float = 1.0) -> "NoiseSchedule":
        """alpha = 1 - sigma, sigma = shift u / (1 + (shift - 1) u) for u = 1/num ... 1 (rectified flow).

        ``shift`` moves the levels that a sampler steps through towards noise (Esser et al., 2024). The last level is
        pure noise.
        """
        check_count("num", num)
        _check_between("shift", shift, 0, math.inf)
        u = torch.arange(1, num + 1, dtype=torch.float64) / num
        sigmas = shift * u / (1 + (shift - 1) * u)
        sigmas[-1] = 1.0
        return cls("flow", 1 - sigmas, sigmas)

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """alpha shifted and scaled so that the last level is pure noise and the first stays (Lin et al., 2024)."""
        if self.kind != "vp":
            raise ValueError(f"zero_terminal_snr: expected a schedule of kind 'vp', got {self.kind!r}")
        if self.num_timesteps < 2:
            raise ValueError("zero_terminal_snr: expected at least two timesteps")
        first, last = self.alphas[0], self.alphas[-1]
        alphas = (self.alphas - last) * (first / (first - last))
        return NoiseSchedule("vp", alphas, (1 - alphas**2).sqrt())

    # ----------------------------------------------------------------------------------------------------- asking one

    @property
    def num_timesteps(self) -> int:
        """How many levels there are."""
        return len(self._levels)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 [num_timesteps], of a "vp" schedule."""
        self._only_vp("alphas_cumprod")
        return self.alphas**2

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alphas_cumprod_t / alphas_cumprod_(t-1) [num_timesteps], of a "vp" schedule."""
        self._only_vp("betas")
        bar = self.alphas**2
        return 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])

    @property
    def times(self) -> Tensor:
        """The times of the levels, rising, float64 [num_timesteps]."""
        if self.kind in ("vp", "residual"):
            return torch.arange(self.num_timesteps, dtype=torch.float64)
        return self.sigmas.clone() if self.kind == "ve" else self.sigmas * self.num_timesteps

    @property
    def first(self) -> Level:
        """The level with the least noise."""
        return self._levels[0]

    @property
    def last(self) -> Level:
        """The level with the most noise."""
        return self._levels[-1]

    @property
    def initial_scale(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return self.last.sigma if self.kind in ("ve", "residual") else 1.0

    def level(self, t: float) -> Level:
        """The level at time ``t``. Between two timesteps of a "vp" schedule log(alpha / sigma) is linear.

        Next to a level without noise or without signal, where the logarithm has no end, the angle atan(sigma / alpha)
        is linear instead.
        """
        t = self._time(t)
        if self.kind == "ve":
            return Level(1.0, t)
        if self.kind == "flow":
            return Level(1 - t / self.num_timesteps, t / self.num_timesteps)
        low = int(t)
        part = t - low
        if part == 0:
            return self._levels[low]
        if self.kind == "residual":
            raise ValueError(f"t: expected a whole timestep of a 'residual' schedule, got {t}")
        below, above = -self._noise[low], -self._noise[low + 1]
        if math.isfinite(below) and math.isfinite(above):
            return Level.of_log_snr(below + part * (above - below))
        angle = _angle(self._levels[low]) * (1 - part) + _angle(self._levels[low + 1]) * part
        return Level(math.cos(angle), math.sin(angle))

    def log_snr(self, t: float) -> float:
        """lambda = log(alpha / sigma) at time ``t``."""
        return self.level(t).log_snr

    def time_of(self, log_snr: float) -> float:
        """The time whose lambda this is; the inverse of ``log_snr``.

        A value beyond the ends of a "vp" schedule by no more than rounding gives the end; further out is an error.
        """
        noise = -float(log_snr)
        if math.isnan(noise):
            raise ValueError("log_snr: expected a number, got nan")
        if self.kind == "residual":
            raise ValueError("log_snr: a 'residual' schedule has whole timesteps, none between them")
        if self.kind == "ve":
            return math.exp(noise)
        if self.kind == "flow":
            return _logistic(noise) * self.num_timesteps
        least, most = self._noise[0], self._noise[-1]
        slack = 1e-9 * max(1.0, abs(noise)) if math.isfinite(noise) else 0.0
        if not least - slack <= noise <= most + slack:
            raise ValueError(f"log_snr: expected {-most:.6g} to {-least:.6g}, the ends of the schedule, got {log_snr}")
        high = bisect_left(self._noise, noise)
        if high >= self.num_timesteps or high == 0:
            return float(min(high, self.num_timesteps - 1))
        below, above = self._noise[high - 1], self._noise[high]
        if noise == above:
            return float(high)
        if math.isfinite(below) and math.isfinite(above):
            return high - 1 + (noise - below) / (above - below)
        low, top = _angle(self._levels[high - 1]), _angle(self._levels[high])
        return high - 1 + (_angle(Level.of_log_snr(-noise)) - low) / (top - low)

    def index_of(self, t: float) -> int:
        """The last of the schedule's levels whose time is at most ``t``; 0 before the first."""
        t = self._time(t)
        return int(t) if self.kind in ("vp", "residual") else max(bisect_right(self.times.tolist(), t) - 1, 0)

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """alpha x0 + sigma noise at time ``t``: a number, or one for each sample [B]. In x0's dtype."""
        if noise.shape != x0.shape:
            raise ValueError(f"noise: expected shape {tuple(x0.shape)}, got {tuple(noise.shape)}")
        if not isinstance(t, Tensor) or t.dim() == 0:
            level = self.level(float(t))
            return level.alpha * x0 + level.sigma * noise
        if t.shape != (x0.shape[0],):
            raise ValueError(f"t: expected a number or shape [{x0.shape[0]}], got {tuple(t.shape)}")
        levels = torch.tensor([self.level(value) for value in t.tolist()], dtype=torch.float64).view(-1, 2)
        alpha, sigma = (part.to(x0).view(-1, *[1] * (x0.dim() - 1)) for part in levels.unbind(1))
        return alpha * x0 + sigma * noise

    def _only_vp(self, name: str) -> None:
        if self.kind != "vp":
            raise ValueError(f"{name}: only a schedule of kind 'vp' has it, this one is {self.kind!r}")

    def _time(self, t: float) -> float:
        last = self.num_timesteps - 1
        most = {"vp": last, "residual": last, "ve": math.inf, "flow": self.num_timesteps}[self.kind]
        if isinstance(t, bool) or not isinstance(t, (int, float)):
            t = _number("t", t)
        if not 0 <= t <= most or math.isinf(t):
            raise ValueError(f"t: expected a time from 0 to {most:g} of a {self.kind!r} schedule, got {t}")
        return float(t)


def karras_ramp(sigma_min: float, sigma_max: float, num: int, rho: float) -> Tensor:
    """``num`` sigmas from ``sigma_max`` down to ``sigma_min``, float64; sigma^(1/rho) falls in equal steps."""
    if num == 1:
        return torch.tensor([sigma_max], dtype=torch.float64)
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num, dtype=torch.float64) ** rho
    ramp[0], ramp[-1] = sigma_max, sigma_min  # the root and the power round
    return ramp


def check_count(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if int(value) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def _angle(level: Level) -> float:
    return math.atan2(level.sigma, level.alpha)


def _number(name: str, value: object) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _check_between(name: str, value: object, low: float, high: float) -> None:
    if not low < _number(name, value) < high:
        bound = f"above {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name}: expected a finite number {bound}, got {value}")


def _check_betas_ends(num: int, beta_start: float, beta_end: float) -> None:
    check_count("num", num)
    _check_between("beta_start", beta_start, 0, 1)
    _check_between("beta_end", beta_end, 0, 1)


def _vector(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """float64 [n >= 1], finite, on the CPU, and nobody else's memory."""
    try:
        # A list of floats would become float32 first.
        vector = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
        vector = vector.detach().to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(values).__name__}") from error
    if vector.dim() != 1 or not len(vector):
        raise ValueError(f"{name}: expected one dimension and at least one number, got shape {tuple(vector.shape)}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers")
    return vector


def _rising(name: str, values: Tensor) -> Tensor:
    values = values.flip(0) if values[0] > values[-1] else values
    if not bool((values[1:] > values[:-1]).all()):
        raise ValueError(f"{name}: expected numbers that only rise or only fall")
    return values
