"""One More Step: a small network that makes the start of a stock sampler from pure noise.

Source: Hu et al., "One More Step: A Versatile Plug-and-Play Module for Rectifying Schedule Flaws and Enhancing
Low-Frequency Controls", CVPR 2024. Stock schedules end with a little signal at their last timestep T; samplers that
start there from pure noise miss its mean brightness. The added network predicts v at SNR 0, where x0 = -v, and so the
sample at T is sqrt(alphas_cumprod_T) x0 + sigma z.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers.levels import Level
from pydenoise.samplers.plan import Conversion, row
from pydenoise.samplers.runtime import FLOATS, Sampler, Trajectory

SIGMAS = ("paper", "repo")
_STEP = 2**32 - 1  # the number of this step's noise: no call of a sampler has it


class OneMoreStep:
    """``sampler``, started by one more step: one evaluation of ``network`` before those of the denoiser.

    Args:
        sampler: of a "vp" schedule.
        network: ``network(x, **conditioning) -> v``, both [B, ...]; twice the batch with guidance.
        sigma: what z is multiplied by: "paper", sqrt(1 - alphas_cumprod_T); "repo", the public code's 1 -
            alphas_cumprod_T.
        guidance_scale: classifier-free guidance u + w (c - u) of ``network``.
        backend: of ``sampler_step``, for this step.
    """

    def __init__(
        self,
        sampler: Sampler,
        network: Callable[..., Tensor],
        *,
        sigma: str = "paper",
        guidance_scale: float | None = None,
        backend: str = "auto",
    ):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        if sampler.schedule.kind != "vp":
            raise ValueError(f"sampler: expected a 'vp' schedule, got {sampler.schedule.kind!r}")
        if not callable(network):
            raise TypeError(f"network: expected a callable, got {type(network).__name__}")
        if sigma not in SIGMAS:
            raise ValueError(f"sigma: expected one of {', '.join(map(repr, SIGMAS))}, got {sigma!r}")
        if guidance_scale is not None and (
            isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float))
        ):
            raise TypeError(f"guidance_scale: expected a number, got {type(guidance_scale).__name__}")
        self.sampler, self.network, self.guidance_scale = sampler, network, guidance_scale
        self._backend = backend
        last = sampler.schedule.last
        values = row(
            Conversion("v_prediction"), Level(0.0, 1.0), output=-last.alpha,
            noise=last.sigma if sigma == "paper" else last.sigma**2,
        )  # fmt: skip
        values[C.GUIDANCE] = 1.0 if guidance_scale is None else float(guidance_scale)
        self._row = torch.tensor([values], dtype=torch.float64)

    def start(
        self,
        x: Tensor,
        *,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        noise: Tensor | None = None,
        max_batch: int | None = None,
    ) -> Tensor:
        """The sample at the schedule's last timestep, from pure noise x [B, ...].

        Args:
            conditioning, unconditional: keyword arguments of the network, as in ``Sampler.sample``.
            generator, seed: of z; ``noise``: z itself, instead.
            max_batch: larger batches go through the network in pieces.
        """
        _check(x, noise, max_batch)
        keys = None if noise is not None else _keys(seed, generator, x.shape[0], x.device)
        conditions = Conditions(conditioning, unconditional, x, self.guidance_scale is not None)
        return self._begin(x, conditions, keys, noise, max_batch)

    def _begin(self, x, conditions, keys, noise, max_batch) -> Tensor:
        """The start, checked arguments; z is made by ``keys`` [B, 2] or given."""
        table = self._row.to(torch.float64 if x.dtype == torch.float64 else torch.float32).to(x.device)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        size = max(1, max_batch or x.shape[0])
        with torch.no_grad():
            for begin in range(0, x.shape[0], size):
                part = slice(begin, begin + size)
                output, other = self._predict(x[part], conditions.part(part))
                PF.sampler_step(
                    x[part].contiguous(), output, table, unconditional=other, step=_STEP, out=result[part],
                    noise=None if noise is None else noise[part].to(x).contiguous(),
                    seed=None if keys is None else keys[part], backend=self._backend,
                )  # fmt: skip
        if not bool(result.isfinite().all()):
            raise ValueError("network: the start that it leads to has NaN or infinity")
        return result

    def _predict(self, x: Tensor, conditions: Mapping[str, object]) -> tuple[Tensor, Tensor | None]:
        guided = self.guidance_scale is not None
        output = self.network(torch.cat([x, x]) if guided else x, **conditions)
        if not isinstance(output, Tensor):
            raise TypeError(f"network: expected a tensor, got {type(output).__name__}")
        expected = ((2 if guided else 1) * x.shape[0], *x.shape[1:])
        if tuple(output.shape) != expected:
            raise ValueError(f"network: expected shape {expected}, got {tuple(output.shape)}")
        return (output[x.shape[0] :], output[: x.shape[0]]) if guided else (output, None)

    def sample(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        network_conditioning: Mapping[str, object] | None = None,
        network_unconditional: Mapping[str, object] | None = None,
        generator: Generator = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_batch: int | None = None,
        **options: object,
    ) -> Tensor | Trajectory:
        """From pure noise ``x``, or noise of ``shape``, to a sample; ``options`` are those of ``Sampler.sample``.

        ``network_conditioning`` and ``network_unconditional`` belong to the added network.
        """
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        if x is not None:
            _check(x, None, max_batch)
        batch = int(shape[0]) if x is None else x.shape[0]
        keys = _keys(seed, generator, batch, torch.device(device) if x is None else x.device)
        if x is None:
            if dtype not in FLOATS:
                raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
            x = initial_noise(tuple(shape), keys, 1.0, dtype, self._backend)
        conditions = Conditions(network_conditioning, network_unconditional, x, self.guidance_scale is not None)
        begun = self._begin(x, conditions, keys, None, max_batch)
        return self.sampler.sample(begun, generator=generator, seed=seed, max_batch=max_batch, **options)


def _keys(seed: Seed, generator: Generator, batch: int, device: torch.device) -> Tensor:
    return sample_keys(seed, generator, batch, device)


def _check(x: object, noise: object, max_batch: int | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"x: expected a floating-point tensor [B, ...], got {x.dtype} {tuple(x.shape)}")
    if noise is not None and (not isinstance(noise, Tensor) or noise.shape != x.shape):
        raise ValueError(f"noise: expected shape {tuple(x.shape)}, got {getattr(noise, 'shape', noise)}")
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch: expected a positive number, got {max_batch}")
