"""Denoising Diffusion GAN: a few large steps, each with a clean sample that a generator makes of x and a fresh latent.

Source: Xiao, Kreis and Vahdat, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs", ICLR 2022.
A step's x' is drawn from the posterior q(x' | x, x0), which is what ``DDPM`` does for a model that predicts x0; what is
particular is the schedule of two to four levels, and that the latent makes x0 itself random.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.ddpm import DDPM
from pydenoise.samplers.levels import NoiseSchedule, check_count
from pydenoise.samplers.runtime import FLOATS, Sampler, Trajectory

_LATENT = 2**31  # the number of the first latent; the noise of steps and of the start has lower ones
_NAME = "latents"  # of the latents among the denoiser's keyword arguments


class DenoisingGAN:
    """Samples with the generator of a denoising diffusion GAN: ``num_steps`` calls of it.

    Args:
        generator: ``generator(x, t, z, **conditioning) -> x0``: x and x0 [B, ...], t [B] int64 from num_steps - 1 down
            to 0, z [B, latent_size] standard normal, new in every call. Twice the batch with guidance.
        num_steps: as it was trained, usually 2 or 4.
        latent_size: the public code's default is 100.
        beta_min, beta_max: of the continuous process that the levels are taken from, at equal distances from time
            ``epsilon`` to 1.
        **options: of ``Sampler``: guidance_scale, clip, graph, backend, ...

    ``schedule`` are the levels, ``sampler`` is the sampler.
    """

    def __init__(
        self,
        generator: Callable[..., Tensor],
        num_steps: int = 4,
        *,
        latent_size: int = 100,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        epsilon: float = 1e-3,
        **options: object,
    ):
        if not callable(generator):
            raise TypeError(f"generator: expected a callable, got {type(generator).__name__}")
        self.latent_size = check_count("latent_size", latent_size)
        self.schedule = _levels(check_count("num_steps", num_steps), beta_min, beta_max, epsilon)
        times = range(num_steps - 1, -1, -1)
        self.sampler = Sampler(
            _Fed(generator, num_steps), self.schedule, DDPM(), timesteps=times, prediction_type="sample", **options
        )

    def sample(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        latents: Tensor | None = None,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options: object,
    ) -> Tensor | Trajectory:
        """From noise ``x``, or noise of ``shape``, to samples.

        Args:
            latents: [num_steps, B, latent_size], in the order of the calls, instead of generated ones. With guidance
                both halves have the same.
            generator, seed: of the latents, the start and the steps' noise: one, or one for each sample.
            options: of ``Sampler.sample``.
        """
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        batch, device, dtype = (x.shape[0], x.device, x.dtype) if x is not None else (int(shape[0]), device, dtype)
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        drawn = self._latents(latents, batch, seed, generator, dtype, torch.device(device))
        given = _with_latents("conditioning", conditioning, drawn)
        other = None if unconditional is None else _with_latents("unconditional", unconditional, drawn)
        return self.sampler.sample(
            x, shape=shape, conditioning=given, unconditional=other, generator=generator, seed=seed, dtype=dtype,
            device=device, **options,
        )  # fmt: skip

    def _latents(self, given, batch: int, seed: Seed, generator: Generator, dtype, device: torch.device) -> Tensor:
        """[B, num_steps, latent_size]."""
        calls, size = self.sampler.plan.calls, self.latent_size
        if given is None:
            keys, backend = sample_keys(seed, generator, batch, device), self.sampler._setting.backend
            each = [initial_noise((batch, size), keys, 1.0, dtype, backend, _LATENT + call) for call in range(calls)]
            return torch.stack(each, 1)
        if not isinstance(given, Tensor) or not given.is_floating_point():
            raise TypeError(f"latents: expected a floating-point tensor, got {getattr(given, 'dtype', type(given))}")
        if tuple(given.shape) != (calls, batch, size):
            raise ValueError(f"latents: expected shape {(calls, batch, size)}, got {tuple(given.shape)}")
        return given.to(device, dtype).transpose(0, 1)


class _Fed:
    """The generator as a denoiser: of the latents of all calls it is given that of its own."""

    def __init__(self, generator: Callable[..., Tensor], num_steps: int):
        self._generator, self._last = generator, num_steps - 1

    def __call__(self, x: Tensor, t: Tensor, latents: Tensor, **conditioning: object) -> Tensor:
        z = latents.take_along_dim((self._last - t)[:, None, None], 1)[:, 0]  # chosen on the device: a graph can
        return self._generator(x, t, z, **conditioning)


def _levels(num_steps: int, beta_min: float, beta_max: float, epsilon: float) -> NoiseSchedule:
    """The continuous process at epsilon + (1 - epsilon) k / N; what it has lost until epsilon does not count."""
    if not 0 < beta_min < beta_max < math.inf:
        raise ValueError(f"beta_min: expected 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon: expected a number from 0, less than 1, got {epsilon}")
    times = [epsilon + (1 - epsilon) * k / num_steps for k in range(num_steps + 1)]
    logs = [-0.5 * t**2 * (beta_max - beta_min) - t * beta_min for t in times]
    return NoiseSchedule.from_alphas_cumprod([math.exp(log - logs[0]) for log in logs[1:]])


def _with_latents(name: str, given: Mapping[str, object] | None, latents: Tensor) -> dict[str, object]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a mapping of keyword arguments, got {type(given).__name__}")
    if given is not None and _NAME in given:
        raise ValueError(f"{name}: {_NAME!r} is an argument of its own")
    return {**(given or {}), _NAME: latents}
