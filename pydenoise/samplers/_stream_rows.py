"""The rows of a stream batch: which times its stages have, and what each of them does to what the model returns.

Every quantity here is a linear form of the sample, the model's output, the stock noise and the renewed noise, so that
one row for each stage holds all of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers.levels import Level, NoiseSchedule
from pydenoise.samplers.plan import Conversion, row

GUIDANCE = ("none", "self-negative", "onetime-negative", "full")
RENOISE = ("initial", "predicted", "none")
ORIGINAL_STEPS = 50  # of the latent consistency models' distillation
SIGMA_DATA = 0.5

Form = tuple[float, float, float, float]
SAMPLE: Form = (1.0, 0.0, 0.0, 0.0)
OUTPUT: Form = (0.0, 1.0, 0.0, 0.0)
STOCK: Form = (0.0, 0.0, 1.0, 0.0)
NOISE: Form = (0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Options:
    """What a stage's row depends on beside its level."""

    prediction_type: str
    guidance: str
    scale: float
    delta: float
    renoise: str
    timestep_scaling: float
    noisy_frames: bool

    @property
    def residual(self) -> bool:
        """Whether stock noise takes the part of the unconditional prediction."""
        return self.guidance in ("self-negative", "onetime-negative")


def lcm_times(schedule: NoiseSchedule, num_steps: int) -> list[float]:
    """Times of a latent consistency sampler: ``num_steps`` of the 50 that the model was distilled on, descending."""
    if schedule.kind != "vp":
        raise ValueError(f"t_index_list: indices belong to a 'vp' schedule, got {schedule.kind!r}; give timesteps")
    if isinstance(num_steps, bool) or not hasattr(num_steps, "__index__"):
        raise TypeError(f"num_steps: expected an int, got {type(num_steps).__name__}")
    if not 1 <= num_steps <= ORIGINAL_STEPS:
        raise ValueError(f"num_steps: expected 1 to {ORIGINAL_STEPS}, got {num_steps}")
    if schedule.num_timesteps < ORIGINAL_STEPS:
        raise ValueError(f"schedule: expected at least {ORIGINAL_STEPS} timesteps, got {schedule.num_timesteps}")
    stride = schedule.num_timesteps // ORIGINAL_STEPS
    places = (ORIGINAL_STEPS * k // int(num_steps) for k in range(int(num_steps)))
    return [float(stride * (ORIGINAL_STEPS - place) - 1) for place in places]


def stage_times(
    schedule: NoiseSchedule, indices: Sequence[int] | None, num_steps: int, timesteps: Sequence[float] | None
) -> list[float]:
    """The time of every stage, descending."""
    if (indices is None) == (timesteps is None):
        both = ", got both" if indices is not None else ""
        raise ValueError(f"t_index_list: expected either t_index_list or timesteps{both}")
    if timesteps is not None:
        name, times = "timesteps", [float(t) for t in timesteps]
    else:
        name, grid = "t_index_list", lcm_times(schedule, num_steps)
        if any(isinstance(i, bool) or not hasattr(i, "__index__") for i in indices):
            raise TypeError(f"t_index_list: expected ints, got {list(indices)}")
        if any(not 0 <= i < len(grid) for i in indices):
            raise ValueError(f"t_index_list: expected indices from 0 to {len(grid) - 1}, got {list(indices)}")
        times = [grid[i] for i in indices]
    if not times:
        raise ValueError(f"{name}: expected at least one")
    if any(later >= earlier for earlier, later in zip(times, times[1:], strict=False)):
        raise ValueError(f"{name}: expected descending times, got {times}")
    return times


def boundary(time: float, scaling: float) -> tuple[float, float]:
    """(c_skip, c_out) of the consistency function c_skip x + c_out x0; with ``scaling`` inf it is x0 itself."""
    if scaling == math.inf:
        return 0.0, 1.0
    scaled = time * scaling
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / math.sqrt(norm)


def stage_rows(options: Options, times: Sequence[float], levels: Sequence[Level]) -> Tensor:
    """float64 [stages, 32]: each stage's sample at the level of the next one, or its result after the last."""
    following = [*levels[1:], None]
    return torch.tensor([_stage(options, *each) for each in zip(times, levels, following, strict=True)],
                        dtype=torch.float64)  # fmt: skip


def entry_row(level: Level, noisy: bool) -> Tensor:
    """float64 [1, 32]: a frame brought to the first level with the noise that is ``base``, unless it is there."""
    frame, noise = (1.0, 0.0) if noisy else level
    return torch.tensor([row(Conversion("sample"), level, sample=frame, base=noise)], dtype=torch.float64)


def epsilon_row(prediction_type: str, level: Level) -> Tensor:
    """float64 [1, 32]: the noise that an output predicts."""
    conversion = Conversion(prediction_type)
    on_sample, on_output = conversion.epsilon(level)
    return torch.tensor([row(conversion, level, sample=on_sample, output=on_output)], dtype=torch.float64)


def _stage(options: Options, time: float, level: Level, following: Level | None) -> list[float]:
    conversion, scale, delta = Conversion(options.prediction_type), options.scale, options.delta
    skip, out = boundary(time, options.timestep_scaling)
    epsilon = _linear(*zip(conversion.epsilon(level), (SAMPLE, OUTPUT), strict=True))
    if options.residual:
        if level.alpha == 0:
            raise ValueError(f"guidance: {options.guidance!r} needs signal at every time, time {time:g} has none")
        epsilon = _linear((scale, epsilon), ((1 - scale) * delta, STOCK))
        clean = _linear((1 / level.alpha, SAMPLE), (-level.sigma / level.alpha, epsilon))
    else:
        clean = _linear(*zip(conversion.x0(level), (SAMPLE, OUTPUT), strict=True))
    denoised = _linear((out, clean), (skip, SAMPLE))
    if following is None:
        new = denoised
    else:
        renewed = {"initial": NOISE, "predicted": epsilon}.get(options.renoise)
        new = _linear((following.alpha, denoised), (following.sigma if renewed else 0.0, renewed or NOISE))
    kept = _stock(options, level, following, epsilon, skip, out) if options.residual and following else {}
    values = row(
        conversion, level, (0.0, 1.0) if kept else None,
        sample=new[0], output=new[1], history={0: new[2]}, base=new[3], kept=kept,
    )  # fmt: skip
    if options.guidance == "full":
        values[C.GUIDANCE] = scale
    return values


def _stock(options: Options, level: Level, following: Level, epsilon: Form, skip: float, out: float) -> dict:
    """The stock noise at the next stage: its initial noise, and what the stock of this one was wrong by."""
    if following.sigma == 0:
        raise ValueError(f"guidance: {options.guidance!r} needs noise at every time, one of them has none")
    error = _linear(
        (out * level.sigma / level.alpha, _linear((1.0, STOCK), (-1.0, epsilon))), (skip * level.sigma, STOCK)
    )
    on_sample, on_output, on_stock, on_noise = _linear((1.0, NOISE), (following.alpha / following.sigma, error))
    return {"sample": on_sample, "m": on_output, 0: on_stock, "base": on_noise}


def _linear(*terms: tuple[float, Form]) -> Form:
    return tuple(sum(factor * form[place] for factor, form in terms) for place in range(4))
