"""A diffusion model's own inputs: what it sees along full-precision sampling trajectories, with their timesteps.

PTQ4DM and Q-Diffusion calibrate on such samples, since noised training images are not what a sampler feeds its model.
Each sample keeps its own timestep: the number that the model was called with there, not the index in a shorter
schedule.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pydenoise.quantization.arguments import Arguments
from pydenoise.quantization.timesteps import NormalTimesteps, UniformTimesteps

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Conditioning = dict | Callable[[int], dict] | None


def trajectory_batches(
    denoiser: Callable,
    shape: Sequence[int],
    *,
    alphas_cumprod: Tensor | None = None,
    betas: Tensor | None = None,
    timesteps: NormalTimesteps | UniformTimesteps | None = None,
    num_steps: int = 250,
    num_samples: int = 1024,
    per_trajectory: int = 1,
    conditioning: Conditioning = None,
    prediction_type: str = "epsilon",
    clip_sample: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Arguments]:
    """Run DDIM (eta = 0) and yield the denoiser's inputs at drawn timesteps: batches for :func:`calibrate`.

    Args:
        denoiser: called as ``denoiser(x, t, **conditioning)`` with x [n, ...] and int64 t [n]; returns a tensor, a
            tuple with it in front, or an object with it as ``sample``. Twice as many channels as x: the first half is
            taken (the rest is a variance). A module is called in the dtype and on the device of its parameters.
        shape: [batch, ...]: of x, with the number of trajectories that run side by side.
        alphas_cumprod, betas: the training schedule, [T]; one of them.
        timesteps: which to sample; :class:`NormalTimesteps` (default, PTQ4DM) or :class:`UniformTimesteps`, of the same
            T, or anything with such a ``sample(n, generator)``.
        num_steps: of DDIM, at timesteps 0, T // num_steps, ...; drawn timesteps become the nearest of these.
        num_samples: in all. per_trajectory: how many of them one trajectory gives: 1 in the papers, more is cheaper.
        conditioning: keyword arguments of the denoiser, or a function of the round (0, 1, ...) that gives them. Tensors
            with ``batch`` rows are split as x is.
        prediction_type: "epsilon", "v_prediction" or "sample". clip_sample: limit of the predicted x0, or ``None``.
        generator: of the noise and of the timesteps; on the CPU.

    Yields:
        :class:`Arguments` with positional (x, t) and the conditioning as keywords; at most ``batch`` rows. Each row has
        a timestep of its own; rows of one batch are different trajectories.

    Raises:
        TypeError, ValueError: a bad argument (at the first batch); a denoiser whose output does not fit x or is not
            finite.
    """
    table = _schedule(alphas_cumprod, betas)
    sampler = NormalTimesteps(num_train_timesteps=len(table)) if timesteps is None else timesteps
    known = getattr(sampler, "num_train_timesteps", len(table))
    if known != len(table):
        raise ValueError(f"timesteps: has {known} training timesteps, the schedule {len(table)}")
    if prediction_type not in PREDICTION_TYPES:
        names = ", ".join(map(repr, PREDICTION_TYPES))
        raise ValueError(f"prediction_type: expected one of {names}, got {prediction_type!r}")
    for name, value, most in (
        ("num_steps", num_steps, len(table)), ("num_samples", num_samples, math.inf),
        ("per_trajectory", per_trajectory, num_steps),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name}: expected an int from 1 to {most}, got {value!r}")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape: expected [batch, ...] of positive sizes, got {list(shape)}")
    walk = _Walk(denoiser, table, num_steps, prediction_type, clip_sample)
    left, number = num_samples, 0
    while left > 0:
        rows = min(shape[0], math.ceil(left / per_trajectory))
        named = conditioning(number) if callable(conditioning) else conditioning or {}
        named = {key: _rows(value, slice(0, rows), shape[0]) for key, value in named.items()}
        wanted = walk.nearest(sampler.sample(rows * per_trajectory, generator)).reshape(rows, per_trajectory)
        start = torch.randn((rows, *shape[1:]), generator=generator)
        for batch in walk.collect(start, wanted, named):
            take = min(left, rows)
            left -= take
            if take > 0:
                x, t = batch
                kept = {key: _rows(value, slice(0, take), rows) for key, value in named.items()}
                yield Arguments((x[:take], t[:take]), kept)
        number += 1


class _Walk:
    """DDIM of one denoiser over a schedule, from the last timestep of the grid down."""

    def __init__(self, denoiser: Callable, table: Tensor, num_steps: int, prediction_type: str, clip: float | None):
        self.denoiser, self.table, self.prediction_type, self.clip = denoiser, table, prediction_type, clip
        self.stride = len(table) // num_steps
        self.last = num_steps - 1
        parameter = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        self.dtype = parameter.dtype if parameter is not None else torch.float32

    def nearest(self, timesteps: Tensor) -> Tensor:
        """The index in the grid that is nearest to each timestep."""
        return (timesteps.double() / self.stride).round().long().clamp(0, self.last)

    @torch.no_grad()
    def collect(self, x: Tensor, wanted: Tensor, conditioning: dict) -> list[tuple[Tensor, Tensor]]:
        """(x, t) for each column of ``wanted`` [rows, k]: every trajectory's state at the indices it names."""
        x = x.to(self.device)
        found = torch.empty((wanted.shape[1], *x.shape), device=self.device)
        rows = len(x)
        for index in range(self.last, -1, -1):
            for row, column in (wanted == index).nonzero().tolist():
                found[column, row] = x[row]
            going = (wanted.amin(1) < index).nonzero().flatten().to(self.device)  # the others have all they want
            if len(going) == 0:
                break
            named = {key: _rows(value, going, rows) for key, value in conditioning.items()}
            x[going] = self._step(x[going], index, named)
        times = (wanted * self.stride).to(self.device)
        return [(found[column].to(self.dtype), times[:, column]) for column in range(wanted.shape[1])]

    def _step(self, x: Tensor, index: int, conditioning: dict) -> Tensor:
        """x at the grid's index - 1."""
        time = index * self.stride
        now, then = self.table[time].item(), self.table[time - self.stride].item()
        a, s = math.sqrt(now), math.sqrt(1.0 - now)
        times = torch.full((len(x),), time, device=self.device, dtype=torch.int64)
        out = _output(self.denoiser(x.to(self.dtype), times, **conditioning), x).float()
        if not torch.isfinite(out).all():
            raise ValueError(f"denoiser: its output at timestep {time} is not finite")
        if self.prediction_type == "epsilon":
            x0 = (x - s * out) / a
        else:
            x0 = a * x - s * out if self.prediction_type == "v_prediction" else out
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        noise = (x - a * x0) / s
        return math.sqrt(then) * x0 + math.sqrt(1.0 - then) * noise


def _schedule(alphas_cumprod: Tensor | None, betas: Tensor | None) -> Tensor:
    if (alphas_cumprod is None) == (betas is None):
        raise ValueError("alphas_cumprod, betas: expected one of them")
    name, values = ("betas", betas) if alphas_cumprod is None else ("alphas_cumprod", alphas_cumprod)
    values = torch.as_tensor(values).double().cpu()
    if values.dim() != 1 or len(values) == 0 or not ((values > 0) & (values < 1)).all():
        raise ValueError(f"{name}: expected [T] numbers between 0 and 1")
    return values if betas is None else (1.0 - values).cumprod(0)


def _rows(value: object, which: slice | Tensor, rows: int) -> object:
    """``value[which]`` for a tensor of ``rows`` rows, else ``value``."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
        return value
    return value[which.to(value.device) if isinstance(which, Tensor) else which]


def _output(output: object, x: Tensor) -> Tensor:
    """The prediction in what a denoiser returned."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    output = getattr(output, "sample", output) if not isinstance(output, Tensor) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"denoiser: expected a tensor as its output, got {type(output).__name__}")
    if x.dim() > 1 and output.dim() == x.dim() and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if output.shape != x.shape:
        raise ValueError(f"denoiser: expected an output of shape {list(x.shape)}, got {list(output.shape)}")
    return output
