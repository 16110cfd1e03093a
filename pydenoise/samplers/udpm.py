"""UDPM: a diffusion whose samples shrink, so that a few steps suffice and the first of them are small.

Source: Abu-Hussein and Giryes, "UDPM: Upsampling Diffusion Probabilistic Models", 2023. A forward step halves the size,
x_t = alpha_t H x_{t-1} + sigma_t epsilon, with H H^T = I; the reverse one doubles it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.levels import Level
from pydenoise.samplers.operators import LinearOperator, block_sums, repeated
from pydenoise.samplers.plan import Conversion, row
from pydenoise.samplers.runtime import FLOATS

LEAST_SIZE = 4  # of the smallest sample: see ``UDPM``
POSTERIORS = ("published", "exact")
_START, _WHITE = 0, 2**32 - 2  # the numbers of the start's noises; that of step k is k + 1


class HalfSize(LinearOperator):
    """H of UDPM: sums of blocks of 2 x 2 pixels, halved. H^T, every pixel halved as a block, is also H^+."""

    def forward(self, x: Tensor) -> Tensor:
        return block_sums(x, 2) / 2

    def adjoint(self, y: Tensor) -> Tensor:
        return repeated(y, 2) / 2

    pinv = adjoint


class UDPM:
    """Sampling with a network that doubles its input's size; as many calls of it as there are levels.

    Level t = 1 ... L is x_t = a_t H^t x0 + s_t epsilon, a = cumprod(alphas), s_t^2 = a_t^2 sum_{i <= t} sigma_i^2 /
    a_i^2. A step from t draws x_{t-1} from the posterior given x_t and H^{t-1} x0, which the network predicts; the last
    step's prediction is the result. Images are [B, C, H, W], H and W multiples of 2^L.

    The public code applies H as a 4 x 4 filter, which is cut off, and so another operator, where the smallest sample is
    smaller than that: such sizes are refused, since here H is the true one at every size.

    Args:
        network: ``network(x, t, **conditioning) -> prediction`` of H^{t-1} x0, [B, C, h, w] -> [B, C, 2 h, 2 w]; it is
            told (t - 1/2) / L, float [B].
        alphas, sigmas: one for each level, the least noise first. Default: the published ones.
        posterior: "published": one variance for all of x_{t-1}, the paper's sampler. "exact": x_t says something only
            of the means of blocks (H^T H is a projection), so the rest keeps its level's mean and variance.
        backend: of ``sampler_step``.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        alphas: Sequence[float] = (0.5, 0.2, 1e-3),
        sigmas: Sequence[float] = (0.1, 0.2, 0.3),
        *,
        posterior: str = "published",
        backend: str = "auto",
    ):
        if not callable(network):
            raise TypeError(f"network: expected a callable, got {type(network).__name__}")
        self.alphas, self.sigmas = _numbers("alphas", alphas), _numbers("sigmas", sigmas)
        if len(self.alphas) != len(self.sigmas):
            raise ValueError(f"sigmas: expected {len(self.alphas)} numbers, as many as alphas, got {len(self.sigmas)}")
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior: expected one of {', '.join(map(repr, POSTERIORS))}, got {posterior!r}")
        self.network, self.operator, self.posterior, self._backend = network, HalfSize(), posterior, backend
        self.levels = _levels(self.alphas, self.sigmas)
        self._rows = [self._row(t) for t in range(len(self.levels), 1, -1)]
        self._details = [self._detail(t) for t in range(len(self.levels), 1, -1)]

    @property
    def factor(self) -> int:
        """How much smaller the last level is in each direction."""
        return 2 ** len(self.levels)

    def _row(self, t: int) -> list[float]:
        """The step from level t on the enlarged sample: precisions weigh the prediction and what x_t says."""
        alpha, sigma, below = self.alphas[t - 1], self.sigmas[t - 1], self.levels[t - 2]
        variance = 1 / (alpha**2 / sigma**2 + 1 / below.sigma**2)
        # the enlarged sample is twice H^T x_t
        on_sample, on_output = alpha / (2 * sigma**2), below.alpha / below.sigma**2
        return row(Conversion("sample"), below, sample=variance * on_sample, output=variance * on_output,
                   noise=math.sqrt(variance))  # fmt: skip

    def _detail(self, t: int) -> list[float]:
        """What is missing of the level below in the step from t, for all that is not a mean of blocks."""
        below, values = self.levels[t - 2], self._row(t)
        return row(Conversion("sample"), below, output=below.alpha - values[C.OUTPUT],
                   noise=below.sigma - values[C.NOISE])  # fmt: skip

    def add_noise(self, x0: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t of the images x0, for training: ``noise`` is [B, C, H / 2^t, W / 2^t], t from 1 to L."""
        if isinstance(t, bool) or not hasattr(t, "__index__"):
            raise TypeError(f"t: expected an int, got {type(t).__name__}")
        if not 1 <= t <= len(self.levels):
            raise ValueError(f"t: expected a level from 1 to {len(self.levels)}, got {t}")
        x = x0
        for _ in range(int(t)):
            x = self.operator(x)
        if noise.shape != x.shape:
            raise ValueError(f"noise: expected shape {tuple(x.shape)}, got {tuple(noise.shape)}")
        return self.levels[t - 1].alpha * x + self.levels[t - 1].sigma * noise

    def sample(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        conditioning: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        noise: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_batch: int | None = None,
    ) -> Tensor:
        """Images [B, C, H, W].

        Args:
            x: the sample of the last level, [B, C, H / 2^L, W / 2^L]; ``None``: drawn, for images of ``shape``.
            conditioning: keyword arguments of the network, as in ``Sampler.sample``.
            generator, seed: of all noise, one or one for each sample.
            noise: the z of every step but the last, [B, C, H / 2^(t-1), W / 2^(t-1)] for t = L ... 2, instead.
            max_batch: larger batches are run in pieces of this size, with the same result.

        Raises:
            TypeError, ValueError: a bad argument, or a bad result of the network; the message names it.
        """
        x, batch, device = self._checked(x, shape, dtype, device)
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch: expected a positive number, got {max_batch}")
        keys = sample_keys(seed, generator, batch, device)
        x = self._start(shape, keys, dtype) if x is None else x.detach()
        noise = _noise(noise, x, len(self._rows))
        conditions = Conditions(conditioning, None, x, False)
        pieces = [slice(i, i + (max_batch or max(batch, 1))) for i in range(0, batch, max_batch or max(batch, 1))]
        with torch.no_grad():
            results = [
                self._run(x[part], keys[part], conditions.part(part), [None if z is None else z[part] for z in noise])
                for part in pieces or [slice(0, 0)]
            ]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _checked(self, x, shape, dtype, device) -> tuple[Tensor | None, int, torch.device]:
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        if x is not None:
            if not isinstance(x, Tensor):
                raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
            if x.dtype not in FLOATS or x.dim() != 4:
                raise ValueError(f"x: expected floating-point [B, C, H, W], got {x.dtype} {tuple(x.shape)}")
            size = tuple(x.shape[2:])
        else:
            if dtype not in FLOATS:
                raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
            if len(shape) != 4 or shape[2] % self.factor or shape[3] % self.factor:
                raise ValueError(f"shape: expected [B, C, H, W], H and W multiples of {self.factor}, got {list(shape)}")
            size = (shape[2] // self.factor, shape[3] // self.factor)
        if min(size) < LEAST_SIZE:
            name, least = ("x", LEAST_SIZE) if x is not None else ("shape", LEAST_SIZE * self.factor)
            raise ValueError(
                f"{name}: expected at least {least} x {least}; where the last level has less than {LEAST_SIZE} x "
                f"{LEAST_SIZE}, networks of the public code were trained with another operator"
            )
        if x is not None:
            return x, x.shape[0], x.device
        return None, int(shape[0]), torch.device(device)

    def _start(self, shape: Sequence[int], keys: Tensor, dtype: torch.dtype) -> Tensor:
        """x_L of white images: with H H^T = I they are white at every size."""
        batch, channels, height, width = shape
        small, last = (batch, channels, height // self.factor, width // self.factor), self.levels[-1]
        noise = initial_noise(small, keys, last.sigma, dtype, self._backend, _START)
        return noise + initial_noise(small, keys, last.alpha, dtype, self._backend, _WHITE)

    def _run(self, x: Tensor, keys: Tensor, conditions: Mapping[str, object], noise: list[Tensor | None]) -> Tensor:
        calls, exact = len(self.levels), torch.float64 if x.dtype == torch.float64 else torch.float32
        for step, values in enumerate(self._rows):
            prediction = self._predict(x, calls - step, conditions)
            table, z = torch.tensor([values, self._details[step]], dtype=exact, device=x.device), noise[step]
            given = {"seed": keys, "step": step + 1} if z is None else {"noise": z.to(x).contiguous()}
            given["backend"] = self._backend
            large = repeated(x, 2)
            x = PF.sampler_step(large, prediction, table, 0, **given)
            if self.posterior == "exact":  # the same z once more
                detail = PF.sampler_step(large, prediction, table, 1, **given)
                x += detail - self.operator.adjoint(self.operator(detail))
        return self._predict(x, 1, conditions).to(x.dtype)

    def _predict(self, x: Tensor, t: int, conditions: Mapping[str, object]) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        time = torch.full((x.shape[0],), (t - 0.5) / len(self.levels), dtype=exact, device=x.device)
        output = self.network(x, time, **conditions)
        if not isinstance(output, Tensor):
            raise TypeError(f"network: expected a tensor at level {t}, got {type(output).__name__}")
        wanted = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        if output.shape != wanted:
            raise ValueError(f"network: expected shape {wanted} at level {t}, got {tuple(output.shape)}")
        if not bool(output.isfinite().all()):
            raise ValueError(f"network: NaN or infinity at level {t}")
        return output


def _levels(alphas: Sequence[float], sigmas: Sequence[float]) -> list[Level]:
    levels, product, ratio = [], 1.0, 0.0
    for alpha, sigma in zip(alphas, sigmas, strict=True):
        product *= alpha
        ratio += (sigma / product) ** 2
        levels.append(Level(product, product * math.sqrt(ratio)))
    return levels


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a sequence of numbers, got {values!r}") from error
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{name}: expected finite numbers above 0, got {numbers}")
    return numbers


def _noise(given: Sequence[Tensor] | None, x: Tensor, steps: int) -> list[Tensor | None]:
    if given is None:
        return [None] * steps
    if len(given) != steps:
        raise ValueError(f"noise: expected one tensor for each of {steps} steps with noise, got {len(given)}")
    for number, z in enumerate(given):
        wanted = (*x.shape[:2], *(2 ** (number + 1) * size for size in x.shape[2:]))
        if not isinstance(z, Tensor) or tuple(z.shape) != wanted:
            raise ValueError(f"noise[{number}]: expected shape {wanted}, got {getattr(z, 'shape', z)}")
    return list(given)
