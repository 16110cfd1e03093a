"""The stream batch: several frames, each at another stage of its denoising, in one call of the model.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation", 2023.
A frame enters at the first stage and moves on by one stage with every call, so that a denoising of n stages costs one
call of n rows for each frame, and a frame is finished n calls after it entered.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.samplers._conditions import Conditions
from pydenoise.samplers._loop import NO_FAULT
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._output_pool import OutputPool
from pydenoise.samplers._seeds import Generator, Seed, sample_keys
from pydenoise.samplers._stream_rows import (
    GUIDANCE,
    RENOISE,
    Options,
    entry_row,
    epsilon_row,
    stage_rows,
    stage_times,
)
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.plan import PREDICTION_TYPES

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StreamBatch:
    """Denoises frames that come one after the other; ``Stream`` has the queue and the threads around it.

    Rows of the batch are stages, from the most noise on; with ``frame_buffer`` F every stage has F frames beside each
    other. A call takes a group of F frames, calls the model once for all stages and returns the group that entered
    ``warm_up`` calls before; what the first ``warm_up`` calls return means nothing.

    Args:
        denoiser: ``denoiser(x, t, **conditioning) -> output``; x [rows, ...], t [rows]. The rows are F for each stage;
            with "onetime-negative" F unconditional ones of the first stage come before them, with "full" an
            unconditional one for each. It must not change x.
        schedule: the noise levels that the denoiser was trained on.
        shape: of one frame, without the batch.
        t_index_list: the stages, ascending places in the ``num_steps`` (at most 50) times of a latent consistency
            sampler on a "vp" schedule; or ``timesteps``: their times themselves, descending.
        frame_buffer: F, the frames of a group.
        guidance: classifier-free guidance u + w (c - u) of the predicted noise. "full": u from the model, twice the
            rows. "self-negative": u is delta times a stock of noise, that of the frame's entry corrected at every
            stage, and costs no evaluation. "onetime-negative": the stock begins with the model's unconditional
            prediction for the first stage. "none".
        guidance_scale: w, from 1 (off); delta: of the two with a stock.
        renoise: how a denoised frame gets the noise of its next stage: "initial", noise fixed for each stage;
            "predicted", its own, which is DDIM; "none", only scaled.
        timestep_scaling: of the boundary condition of consistency models, D = c_skip x + c_out x0 with c_skip = 0.25 /
            ((scaling t)^2 + 0.25) and c_out = scaling t / sqrt((scaling t)^2 + 0.25). inf: D is x0. ``None``: 10, as
            in latent consistency models, for a "vp" schedule, and inf for others.
        noisy_frames: frames are samples at the first time as they come: noise, for generation without pictures.
        conditioning, unconditional: keyword arguments of the denoiser; tensors have F rows or one.
        noise: the fixed noise [stages F, ...]; else drawn by ``seed`` (an int, or one for each row) or ``generator``.
        dtype, device: of the frames inside; ``model_dtype``: of the model's input, if another.
        check_finite: NaN and infinity are an error.
        backend: of ``sampler_step``.

    The public code takes the first frame's noise and stock for a whole group; here every frame of a group has its own.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: NoiseSchedule,
        shape: Sequence[int],
        *,
        t_index_list: Sequence[int] | None = None,
        num_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        frame_buffer: int = 1,
        prediction_type: str = "epsilon",
        guidance: str = "none",
        guidance_scale: float | None = None,
        delta: float = 1.0,
        renoise: str = "initial",
        timestep_scaling: float | None = None,
        noisy_frames: bool = False,
        conditioning: Mapping[str, object] | None = None,
        unconditional: Mapping[str, object] | None = None,
        noise: Tensor | None = None,
        seed: Seed = None,
        generator: Generator = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        model_dtype: torch.dtype | None = None,
        check_finite: bool = True,
        backend: str = "auto",
    ):
        _check_parts(denoiser, schedule, shape, frame_buffer, dtype, model_dtype)
        scale = _check_guidance(guidance, guidance_scale, delta)
        _check_options(prediction_type, renoise, timestep_scaling)
        times = stage_times(schedule, t_index_list, num_steps, timesteps)
        levels = [schedule.level(t) for t in times]
        self.denoiser, self.schedule, self.times = denoiser, schedule, tuple(times)
        self.frame_buffer, self.dtype, self.device = int(frame_buffer), dtype, torch.device(device)
        self.frame_shape = torch.Size((self.frame_buffer, *shape))
        self.guidance, self._check_finite = guidance, check_finite
        if timestep_scaling is None:
            timestep_scaling = 10.0 if schedule.kind == "vp" else math.inf
        self._options = Options(
            prediction_type, guidance, scale, float(delta), renoise, float(timestep_scaling), bool(noisy_frames)
        )
        self._rows = len(times) * self.frame_buffer
        self.set_conditioning(conditioning, unconditional)
        noise = self._noise(noise, seed, generator, backend)
        with torch.inference_mode():
            self._t = self._times_of_rows(schedule)
            self._build(noise, levels, model_dtype or dtype, backend)
        self._pool = OutputPool()

    @property
    def warm_up(self) -> int:
        """Calls until a frame that entered is finished, less one."""
        return len(self.times) - 1

    def set_conditioning(
        self, conditioning: Mapping[str, object] | None, unconditional: Mapping[str, object] | None = None
    ) -> None:
        """Other keyword arguments of the denoiser from the next call on, for frames at all stages."""
        groups = {"full": len(self.times), "onetime-negative": 1}.get(self.guidance, 0)
        if not groups and unconditional is not None:
            raise ValueError(f"unconditional: guidance {self.guidance!r} does not evaluate it")
        one = torch.empty(self.frame_buffer, 0)
        given = Conditions(conditioning, unconditional, one, groups > 0).part(slice(None))
        each = torch.arange(self.frame_buffer)
        places = [*[each] * groups, *[each + self.frame_buffer * (groups > 0)] * len(self.times)]
        rows = self.frame_buffer * (2 if groups else 1)
        self._conditions = {name: _spread(value, rows, torch.cat(places)) for name, value in given.items()}

    def step(self, frames: Tensor) -> Tensor:
        """A group of frames [F, ...] in, the group that entered ``warm_up`` calls before out.

        Raises:
            TypeError, ValueError: frames of another shape, a bad result of the denoiser, NaN or infinity.
        """
        self.check_frames(frames)
        with torch.inference_mode():
            here, there = self._sides
            frames = frames.detach().to(self.device, self.dtype).contiguous()
            here.enter(None, None, self._first, self._step, sample=frames)
            for place in here.entry_copies:
                place.copy_(here.entry)
            output, other = self._split(self.denoiser(here.input, self._t, **self._conditions))
            if self.guidance == "onetime-negative":
                here.stock_entry(other, None, self._first, self._step, sample=here.first)
                other = None
            here.advance(output, other, self._stages, self._step)
            self._sides = (there, here)
            if self._check_finite and int(self._faults) != NO_FAULT:
                self._faults.fill_(NO_FAULT)
                raise ValueError("denoiser: a frame is not finite: it returned NaN, infinity or too large numbers")
        # Made outside of inference mode, what leaves is an ordinary tensor.
        return self._pool.copy(there.finished)

    def check_frames(self, frames: object) -> None:
        """Raise what ``step`` raises for these frames."""
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: expected a tensor, got {type(frames).__name__}")
        if frames.shape != self.frame_shape:
            raise ValueError(f"frames: expected shape {tuple(self.frame_shape)}, got {tuple(frames.shape)}")
        if frames.dtype not in FLOATS:
            raise TypeError(f"frames: expected a floating-point tensor, got {frames.dtype}")

    # --------------------------------------------------------------------------------------------------------- buffers

    def _noise(self, given, seed, generator, backend) -> Tensor:
        """[rows, ...], of every stage and frame."""
        shape = (self._rows, *self.frame_shape[1:])
        if given is None:
            keys = sample_keys(seed, generator, self._rows, self.device)
            return initial_noise(shape, keys, 1.0, self.dtype, backend)
        if seed is not None or generator is not None:
            raise ValueError("noise: expected either noise, or seed or generator")
        if not isinstance(given, Tensor) or tuple(given.shape) != shape:
            raise ValueError(f"noise: expected shape {shape}, got {getattr(given, 'shape', type(given).__name__)}")
        return given.detach().to(self.device, self.dtype).clone()

    def _times_of_rows(self, schedule: NoiseSchedule) -> Tensor:
        whole = schedule.kind == "vp" and all(t == round(t) for t in self.times)
        dtype = torch.int64 if whole else torch.float64 if self.dtype == torch.float64 else torch.float32
        each = torch.tensor(self.times, dtype=torch.float64).repeat_interleave(self.frame_buffer)
        before = {"full": each, "onetime-negative": each[: self.frame_buffer]}.get(self.guidance, each[:0])
        return torch.cat([before, each]).to(dtype).to(self.device)

    def _build(self, noise: Tensor, levels: Sequence, model_dtype: torch.dtype, backend: str) -> None:
        group, options, device = self.frame_buffer, self._options, self.device
        self._faults = torch.full((1,), NO_FAULT, dtype=torch.int32, device=device)
        self._first, self._step = (torch.full((1,), n, dtype=torch.int64, device=device) for n in (0, 1))
        self._stages = torch.arange(len(levels), device=device).repeat_interleave(group)
        self.noise = noise
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        tables = [
            table.to(device, exact)
            for table in (
                stage_rows(options, self.times, levels),
                entry_row(levels[0], options.noisy_frames),
                epsilon_row(options.prediction_type, levels[0]),
            )
        ]
        # A stage's result goes to the place of the next one: whatever moves has two buffers, read and written in turn.
        pair = [_Buffers.like(noise, group, self.guidance, model_dtype, options.residual) for _ in range(2)]
        launchers = (self._side(*both, tables, backend) for both in (pair, pair[::-1]))
        self._sides = tuple(launchers)
        self.stock = [buffers.stock for buffers in pair] if options.residual else None

    def _side(self, here: "_Buffers", there: "_Buffers", tables: Sequence[Tensor], backend: str) -> "_Side":
        group, rows = self.frame_buffer, self._rows
        stages, entry, epsilon = tables
        first = here.states[:group]
        separate = here.input.dtype != here.states.dtype or self.guidance == "full"
        placed = here.input[here.lead : here.lead + group]
        advance = PF.StepBuffers(
            here.states[:rows], stages, there.states[group:], base=self.noise.roll(-group, 0),
            history=here.stock[None, :rows] if here.stock is not None else None,
            kept=there.stock[group:] if there.stock is not None else None,
            model_input=there.behind(group, rows) if separate else None,
        )  # fmt: skip
        enter = PF.StepBuffers(first, entry, first, base=self.noise[:group].clone(),
                               model_input=placed if separate else None)  # fmt: skip
        stock_entry = None
        if self.guidance == "onetime-negative":
            stock_entry = PF.StepLauncher(PF.StepBuffers(first, epsilon, here.stock[:group]), self._faults, backend)
        elif here.stock is not None:
            here.stock[:group] = self.noise[:group]
        copies = {"full": [rows], "onetime-negative": [0]}.get(self.guidance, [])
        return _Side(
            input=here.input[: self._t.shape[0]],
            first=first,
            finished=here.states[rows:],
            entry=placed,
            entry_copies=[here.input[place : place + group] for place in copies],
            enter=PF.StepLauncher(enter, self._faults, backend),
            stock_entry=stock_entry,
            advance=PF.StepLauncher(advance, self._faults, backend),
        )

    def _split(self, output: object) -> tuple[Tensor, Tensor | None]:
        """(rows of the stages, unconditional ones or None) of the model's output, checked."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"denoiser: expected a tensor, got {type(output).__name__}; pydenoise.samplers.adapters has wrappers"
            )
        wanted = (self._t.shape[0], *self.frame_shape[1:])
        if tuple(output.shape) != wanted:
            raise ValueError(f"denoiser: expected shape {wanted}, got {tuple(output.shape)}")
        if not output.is_floating_point() or (output.dtype == torch.float64 and self.dtype != torch.float64):
            raise TypeError(f"denoiser: expected a floating-point tensor for {self.dtype} frames, got {output.dtype}")
        before = wanted[0] - self._rows
        return (output[before:], output[:before]) if before else (output, None)


@dataclass(frozen=True)
class _Buffers:
    """One of the two sets: the model's input, the stages with room for a finished group behind them, the stock."""

    input: Tensor
    lead: int  # rows of the input before the first stage's
    states: Tensor  # [rows + F, ...]
    stock: Tensor | None  # [rows + F, ...]

    @classmethod
    def like(cls, noise: Tensor, group: int, guidance: str, model_dtype: torch.dtype, residual: bool) -> "_Buffers":
        rows, shape = noise.shape[0], noise.shape[1:]
        lead = group if guidance == "onetime-negative" else 0
        copies = 2 if guidance == "full" else 1
        input = torch.zeros(lead + copies * rows + group, *shape, dtype=model_dtype, device=noise.device)
        shared = copies == 1 and model_dtype == noise.dtype
        states = input[lead:] if shared else noise.new_zeros(rows + group, *shape)
        return cls(input, lead, states, noise.new_zeros(rows + group, *shape) if residual else None)

    def behind(self, group: int, rows: int) -> Tensor:
        """Where the next input's stages after the first lie. The last stage's result of a first copy ends up where
        the second copy's frame enters, and is overwritten then."""
        begin = self.lead + group
        copies = (self.input.shape[0] - begin) // rows
        return self.input[begin : begin + copies * rows]


@dataclass(frozen=True)
class _Side:
    """What a call reads and launches in one of the two turns."""

    input: Tensor
    first: Tensor  # the frames that enter, at the first level
    finished: Tensor
    entry: Tensor  # the same in the model's input
    entry_copies: list[Tensor]  # further places of the model's input for them
    enter: Callable[..., Tensor]
    stock_entry: Callable[..., Tensor] | None
    advance: Callable[..., Tensor]


def _spread(value: object, rows: int, places: Tensor) -> object:
    """One row of a condition for each row of the batch."""
    if isinstance(value, Mapping):
        return {key: _spread(inner, rows, places) for key, inner in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape[0] == 1:
        return value.expand(len(places), *value.shape[1:]).contiguous()
    return value.index_select(0, places.to(value.device)) if value.shape[0] == rows else value


def _check_parts(denoiser, schedule, shape, frame_buffer, dtype, model_dtype) -> None:
    if not callable(denoiser):
        raise TypeError(f"denoiser: expected a callable, got {type(denoiser).__name__}")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")
    if not isinstance(shape, Sequence) or not all(hasattr(n, "__index__") for n in shape):
        raise TypeError(f"shape: expected ints, got {shape!r}")
    if not shape or any(n < 1 for n in shape):
        raise ValueError(f"shape: expected positive sizes, got {tuple(shape)}")
    if isinstance(frame_buffer, bool) or not hasattr(frame_buffer, "__index__"):
        raise TypeError(f"frame_buffer: expected an int, got {type(frame_buffer).__name__}")
    if frame_buffer < 1:
        raise ValueError(f"frame_buffer: expected at least 1, got {frame_buffer}")
    for name, value in (("dtype", dtype), ("model_dtype", model_dtype or dtype)):
        if value not in FLOATS:
            raise TypeError(f"{name}: expected a floating-point dtype, got {value}")


def _check_guidance(guidance: str, scale: float | None, delta: float) -> float:
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance: expected one of {', '.join(map(repr, GUIDANCE))}, got {guidance!r}")
    for name, value in (("guidance_scale", 1.0 if scale is None else scale), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    if guidance == "none" and scale is not None:
        raise ValueError("guidance_scale: given without guidance")
    if guidance != "none" and scale is None:
        raise ValueError(f"guidance_scale: guidance {guidance!r} needs one")
    if scale is not None and scale < 1:
        raise ValueError(f"guidance_scale: expected a number from 1, got {scale}")
    if delta != 1 and guidance in ("none", "full"):
        raise ValueError(f"delta: belongs to a stock of noise, which guidance {guidance!r} does not have")
    return 1.0 if scale is None else float(scale)


def _check_options(prediction_type: str, renoise: str, timestep_scaling: float | None) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
    if renoise not in RENOISE:
        raise ValueError(f"renoise: expected one of {', '.join(map(repr, RENOISE))}, got {renoise!r}")
    if timestep_scaling is None:
        return
    if isinstance(timestep_scaling, bool) or not isinstance(timestep_scaling, (int, float)):
        raise TypeError(f"timestep_scaling: expected a number, got {type(timestep_scaling).__name__}")
    if not timestep_scaling > 0:
        raise ValueError(f"timestep_scaling: expected a positive number, got {timestep_scaling}")
