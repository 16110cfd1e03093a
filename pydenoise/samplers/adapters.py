"""Models of other conventions as denoisers, ``denoiser(x, t, **conditioning) -> output``, for ``Sampler``."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.samplers._level_table import LevelTable, over_samples
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import PREDICTION_TYPES

Model = Callable[..., object]


class DiffusersModel:
    """A U-Net or transformer of diffusers, or any model that returns an object with ``.sample`` or a tuple.

    Everything that the model wants beside the sample and the time is conditioning, by the names of its forward:
    ``encoder_hidden_states``, ``class_labels``, ``added_cond_kwargs`` (a dict of tensors), ``pooled_projections``, ...

    Args:
        model: the model. Its forward takes the sample first.
        time_scale: what times are multiplied by before the model is told them: 1/1000 for models of flow matching that
            want sigma itself (Flux).
        channels: the first so many channels of the output are kept: models that also predict a variance, with a solver
            that has no use for it.
        **fixed: conditioning that is the same in every call.

    Raises:
        TypeError: a model that is not callable, or an output without a tensor.
    """

    def __init__(self, model: Model, *, time_scale: float = 1.0, channels: int | None = None, **fixed: object):
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels: expected a positive number, got {channels}")
        if not time_scale > 0:
            raise ValueError(f"time_scale: expected a positive number, got {time_scale}")
        self.model, self.time_scale, self.channels, self.fixed = model, time_scale, channels, fixed
        self._time_by_name = "timestep" in _parameters(model)

    def __call__(self, x: Tensor, t: Tensor | float, **conditioning: object) -> Tensor:
        """The model's output for x [B, ...] at the times t ([B], one, or a number)."""
        times = t if isinstance(t, Tensor) else torch.tensor(t, device=x.device)
        times = times.reshape(-1).expand(x.shape[0]) if times.numel() == 1 else times
        if self.time_scale != 1:
            times = times * self.time_scale
        # Some transformers take the text before the time.
        named = {"timestep": times} if self._time_by_name else {}
        place = () if self._time_by_name else (times,)
        out = tensor_of(self.model(x, *place, **named, **self.fixed, **conditioning))
        return out if self.channels is None else out[:, : self.channels]


def _parameters(model: Model) -> set[str]:
    """The names of a model's arguments; none, where they are not known."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    try:
        return set(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):
        return set()


def tensor_of(output: object) -> Tensor:
    """The tensor in a model's result: itself, ``.sample``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "sample", None)
    if not isinstance(found, Tensor) and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"model: expected a tensor, an object with .sample or a tuple that begins with one, got "
            f"{type(output).__name__}"
        )
    return found


@dataclass(frozen=True)
class Scalings:
    """c_skip, c_out, c_in and c_noise of a preconditioned network, each shaped as sigma."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def _edm(sigma: Tensor, data: float) -> Scalings:
    norm = sigma**2 + data**2
    return Scalings(data**2 / norm, sigma * data / norm.sqrt(), 1 / norm.sqrt(), sigma.log() / 4)


def _ve(sigma: Tensor, data: float) -> Scalings:
    ones = torch.ones_like(sigma)
    return Scalings(ones, sigma, ones, (sigma / 2).log())


PRECONDITIONINGS = {"edm": _edm, "ve": _ve}


class KarrasDenoiser:
    """A network in the conventions of Karras et al. as a denoiser of any schedule.

    The network is either raw, D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), or already D(x, sigma), an estimate of
    x0 from x = x0 + sigma z. On a "ve" schedule times are sigmas. A "vp" or "flow" schedule is served at
    sigma = sigma_t / alpha_t and x / alpha_t.

    Args:
        network: F(x, c_noise, **conditioning) or D(x, sigma, **conditioning); c_noise and sigma are [B].
        preconditioning: "edm" or "ve" (table 1 of the paper) for a raw network, or "none": the network is D.
        sigma_data: standard deviation of the data ("edm").
        schedule: the schedule that the sampler runs on, if that is not "ve".
        prediction_type: what is returned, "sample" (x0) or "epsilon"; give the sampler the same.

    Source: Karras et al., https://arxiv.org/abs/2206.00364, table 1 and equation 7.
    """

    def __init__(
        self,
        network: Model,
        *,
        preconditioning: str = "edm",
        sigma_data: float = 0.5,
        schedule: NoiseSchedule | None = None,
        prediction_type: str = "sample",
    ):
        if not callable(network):
            raise TypeError(f"network: expected a callable, got {type(network).__name__}")
        if preconditioning not in (*PRECONDITIONINGS, "none"):
            allowed = ", ".join((*PRECONDITIONINGS, "none"))
            raise ValueError(f"preconditioning: expected one of {allowed}, got {preconditioning!r}")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: expected a positive number, got {sigma_data}")
        if prediction_type not in ("sample", "epsilon"):
            raise ValueError(f"prediction_type: expected 'sample' or 'epsilon', got {prediction_type!r}")
        self.network, self.preconditioning, self.sigma_data = network, preconditioning, float(sigma_data)
        self.prediction_type = prediction_type
        self._levels = None if schedule is None or schedule.kind == "ve" else LevelTable(schedule)
        if self._levels is not None and schedule.kind == "vp" and float(schedule.alphas_cumprod.min()) == 0:
            raise ValueError("schedule: where alpha is 0 there is no sigma / alpha for D(x, sigma)")

    def __call__(self, x: Tensor, t: Tensor | float, **conditioning: object) -> Tensor:
        """x0 or epsilon for x [B, ...] at the times t ([B], one, or a number), in the network's dtype."""
        times = torch.as_tensor(t, device=x.device).reshape(-1).expand(x.shape[0])
        if self._levels is None:
            return self._denoise(x, times, conditioning)
        alpha, sigma = self._levels(times)
        return self._denoise(x / over_samples(alpha, x), sigma / alpha, conditioning)

    def _denoise(self, x: Tensor, sigma: Tensor, conditioning: dict[str, object]) -> Tensor:
        sigma = sigma.to(torch.float64)
        if self.preconditioning == "none":
            x0 = tensor_of(self.network(x, sigma.to(x.dtype), **conditioning))
            return x0 if self.prediction_type == "sample" else (x - x0) / over_samples(sigma, x)
        scaled = PRECONDITIONINGS[self.preconditioning](sigma, self.sigma_data)
        raw = tensor_of(self.network(over_samples(scaled.into, x) * x, scaled.noise.to(x.dtype), **conditioning))
        skip, out = scaled.skip, scaled.out
        if self.prediction_type == "epsilon":
            # (x - D) / sigma, with 1 - c_skip as a product: at small sigma a difference would lose every digit.
            skip = sigma / (sigma**2 + self.sigma_data**2) if self.preconditioning == "edm" else torch.zeros_like(sigma)
            out = -out / sigma
        return over_samples(skip, x) * x + over_samples(out, x) * raw


class ScheduleDenoiser:
    """The other way: a model trained on a "vp" or "flow" schedule as D(x, sigma) -> x0, for a "ve" schedule.

    Args:
        model: ``model(x, t, **conditioning)`` on ``schedule``.
        schedule: the model's schedule.
        prediction_type: what the model returns: "epsilon", "v_prediction", "sample" or "flow".
        whole_times: round times to the whole ones that the model was trained on (not for "flow").

    A sigma beyond the schedule's is served at its end. The sampler's prediction_type is "sample".
    """

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        *,
        prediction_type: str = "epsilon",
        whole_times: bool = False,
    ):
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if getattr(schedule, "kind", None) not in ("vp", "flow"):
            raise ValueError(f"schedule: expected a vp or flow schedule, got {schedule!r}")
        if schedule.kind == "vp" and float(schedule.alphas_cumprod.min()) == 0:
            raise ValueError("schedule: alphas_cumprod ends at 0, where no sigma of a ve schedule is")
        allowed = PREDICTION_TYPES if schedule.kind == "flow" else PREDICTION_TYPES[:-1]
        if prediction_type not in allowed:
            raise ValueError(f"prediction_type: expected one of {', '.join(allowed)}, got {prediction_type!r}")
        if whole_times and schedule.kind == "flow":
            raise ValueError("whole_times: a flow schedule has no whole times")
        self.model, self.schedule, self.prediction_type = model, schedule, prediction_type
        self.whole_times, self._levels = whole_times, LevelTable(schedule)

    def __call__(self, x: Tensor, sigma: Tensor | float, **conditioning: object) -> Tensor:
        """x0 for x = x0 + sigma z [B, ...]; sigma is [B], one, or a number."""
        ratio = torch.as_tensor(sigma, device=x.device).to(torch.float64).reshape(-1).expand(x.shape[0])
        if self.schedule.kind == "flow":
            times = ratio / (1 + ratio) * self.schedule.num_timesteps
        else:
            times = self._levels.time_of(-ratio.log())
            times = times.round().long() if self.whole_times else times
        told = times if self.whole_times else times.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        # The level of the true sigma, whatever its time was rounded to: the model's input then has the right variance.
        alpha = 1 / (1 + ratio) if self.schedule.kind == "flow" else 1 / (1 + ratio**2).sqrt()
        scaled = x * over_samples(alpha, x)
        out = tensor_of(self.model(scaled, told, **conditioning))
        if self.prediction_type == "sample":
            return out
        if self.prediction_type == "epsilon":
            return x - over_samples(ratio, x) * out
        if self.prediction_type == "flow":
            return scaled - over_samples(alpha * ratio, x) * out
        return over_samples(alpha, x) * scaled - over_samples(alpha * ratio, x) * out
