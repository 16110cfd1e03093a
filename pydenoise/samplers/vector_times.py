"""A time for each frame: video models that are told how noisy every frame of a clip is.

Source: Liu et al., "Redefining Temporal Modeling in Video Diffusion: The Vectorized Timestep Approach" (FVDM), 2024.
Frames that are known stay as they are and condition the others: the first one (image to video), the ends
(interpolation), or the last frames of the clip before (long videos). Every frame has its own row of coefficients,
chosen on the device, and a known one has the row that changes nothing: it never moves, where other code writes it again
after every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.samplers._noise import initial_noise
from pydenoise.samplers._seeds import Generator, Seed, SeedStream, sample_keys
from pydenoise.samplers.ddim import DDIM, ddim_row
from pydenoise.samplers.ddpm import DDPM, ddpm_row
from pydenoise.samplers.levels import Level, NoiseSchedule, check_count
from pydenoise.samplers.plan import Control, Conversion, Launch, Plan, Run, Solver, row
from pydenoise.samplers.runtime import FLOATS, Sampler, Trajectory

HELD = -1.0  # among the times of a frame: it is known, or finished, and stays


class VectorTimes:
    """``sampler`` with a time for each frame.

    Args:
        sampler: its solver is DDIM(target="next") or DDPM(); its denoiser is told times [B, F] and works on clips. Its
            steps are those of every frame that has no times of its own.
        frame_axis: which dim of a clip counts frames: 1 for [B, F, ...], 2 for [B, C, F, ...].
        held_time: what the model is told of frames that are known; ``None``: the schedule's least time.
    """

    def __init__(self, sampler: Sampler, *, frame_axis: int = 2, held_time: float | None = None):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        solver = sampler.solver
        if not isinstance(solver, (DDIM, DDPM)) or getattr(solver, "target", "next") != "next":
            raise ValueError(f"sampler: expected the solver DDIM(target='next') or DDPM(), got {solver}")
        for name in ("time_table", "input_scale"):
            if sampler._options[name] is not None:
                raise ValueError(f"sampler: {name} is not made for a time for each frame")
        if frame_axis not in (1, 2):
            raise ValueError(f"frame_axis: expected 1 or 2, got {frame_axis}")
        least = float(sampler.schedule.times[0])
        self.held_time = least if held_time is None else float(held_time)
        sampler.schedule.level(self.held_time)
        self.sampler, self.frame_axis = sampler, frame_axis
        self._kept: tuple[Tensor, Sampler] | None = None

    def staggered(self, frames: int, delay: int = 1) -> Tensor:
        """Times [calls, frames] with which every frame begins ``delay`` calls after the one before it.

        Until then it stays what it is at the first time, noise; a finished frame stays as well.
        """
        check_count("frames", frames)
        check_count("delay", delay, 0)
        times = torch.tensor(self.sampler.timesteps, dtype=torch.float64)
        own = torch.arange(len(times) + (frames - 1) * delay)[:, None] - delay * torch.arange(frames)
        return torch.where(own < len(times), times[own.clamp(0, len(times) - 1)], HELD)

    def sample(
        self,
        x: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        known: Tensor | None = None,
        video: Tensor | None = None,
        times: Tensor | None = None,
        generator: Generator = None,
        seed: Seed = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_batch: int | None = None,
        **options: object,
    ) -> Tensor | Trajectory:
        """From noise to clips.

        Args:
            x: where to start, [B, F, ...] or [B, C, F, ...]; or noise of ``shape``.
            known: bool [F], or [B, F]: frames that stay as they are in ``video``.
            video: clean frames like x; of these only the known ones are read. ``None``: they are in x.
            times: [calls, F] or [calls, B, F]: what the model is told of each frame at each call. A frame's step goes
                to its time of the next call; after the last call, and before a time of -1, to a clean frame. Where a
                time stays the frame stays, and -1 says that it is finished. ``None``: the sampler's times for all.
            generator, seed, dtype, device, max_batch, options: as in ``Sampler.sample``.

        Raises:
            TypeError, ValueError: a bad argument, or a bad result of the denoiser; the message names it.
        """
        x, frames = self._start(x, shape, dtype, device, generator, seed)
        table = self._times(times, x.shape[0], frames)
        if known is not None:
            known = _mask(known, x.shape[0], frames).to("cpu")
            table = torch.where(known.view(1, -1, frames), HELD, table)
            x = x if video is None else self._with_known(x, known, video)
        elif video is not None:
            raise ValueError("video: given without known, which says which of its frames count")
        if max_batch is not None and table.shape[1] > 1:
            raise ValueError("max_batch: expected None where samples have different times or known frames")
        return self._sampler_of(table).sample(x, generator=generator, seed=seed, max_batch=max_batch, **options)

    def extend(
        self,
        video: Tensor,
        num_frames: int,
        *,
        clip: int,
        overlap: int,
        generator: Generator = None,
        seed: Seed = None,
        **options: object,
    ) -> Tensor:
        """A longer video: clip by clip, each with the last frames before it as known ones.

        Args:
            video: the beginning, [B, F, ...] or [B, C, F, ...] with at least ``overlap`` frames.
            num_frames: how many frames the result has, those of ``video`` among them.
            clip: frames that the model works on at once.
            overlap: how many of them are known: from 1 to ``clip`` - 1.
            generator, seed: one, or one for each sample; every clip has its own noise.
            options: of ``sample``, for every clip.
        """
        axis = self.frame_axis
        if not isinstance(video, Tensor) or video.dtype not in FLOATS or video.dim() <= axis:
            raise TypeError(f"video: expected a floating-point tensor with frames at dim {axis}, got {_of(video)}")
        check_count("clip", clip, 2)
        if not 1 <= check_count("overlap", overlap) < clip:
            raise ValueError(f"overlap: expected 1 to {clip - 1} of {clip} frames, got {overlap}")
        if video.shape[axis] < overlap:
            raise ValueError(f"video: expected at least {overlap} frames (overlap), got {video.shape[axis]}")
        if check_count("num_frames", num_frames) < video.shape[axis]:
            raise ValueError(f"num_frames: expected at least the {video.shape[axis]} of video, got {num_frames}")
        for name in ("x", "shape", "known", "video", "times", "noise", "return_trajectory"):
            if name in options:
                raise ValueError(f"{name}: not for a video of many clips")
        known = torch.arange(clip) < overlap
        shape = list(video.shape)
        shape[axis] = clip
        seeds = SeedStream(seed, generator, video.shape[0])
        parts, last, number = [video], video, 0
        while (missing := num_frames - sum(p.shape[axis] for p in parts)) > 0:
            begin = video.new_zeros(shape)
            begin.narrow(axis, 0, overlap).copy_(last.narrow(axis, last.shape[axis] - overlap, overlap))
            last = self.sample(shape=shape, known=known, video=begin, seed=seeds.of(number), dtype=video.dtype,
                               device=video.device, **options)  # fmt: skip
            parts.append(last.narrow(axis, overlap, min(missing, clip - overlap)))
            number += 1
        return torch.cat(parts, axis)

    def _start(self, x, shape, dtype, device, generator: Generator, seed: Seed) -> tuple[Tensor, int]:
        """(x [B, ...], the number of frames)."""
        axis = self.frame_axis
        if (x is None) == (shape is None):
            raise ValueError("x: expected either x or shape" + (", got both" if shape is not None else ""))
        size = tuple(shape) if x is None else tuple(getattr(x, "shape", ()))
        if (x is not None and (not isinstance(x, Tensor) or x.dtype not in FLOATS)) or dtype not in FLOATS:
            raise TypeError(f"x: expected a floating-point tensor, got {_of(x) if x is not None else dtype}")
        if len(size) <= axis or size[axis] < 1:
            raise ValueError(f"x: expected frames at dim {axis}, got shape {size}")
        if x is None:
            keys = sample_keys(seed, generator, size[0], torch.device(device))
            x = initial_noise(size, keys, self.sampler.plan.initial_scale, dtype, self.sampler._setting.backend)
        return x, size[axis]

    def _times(self, given, batch: int, frames: int) -> Tensor:
        """float64 [calls, 1 or B, F], checked."""
        if given is None:
            return torch.tensor(self.sampler.timesteps, dtype=torch.float64)[:, None, None].expand(-1, 1, frames)
        if not isinstance(given, Tensor):
            raise TypeError(f"times: expected a tensor, got {type(given).__name__}")
        times = given.detach().to("cpu", torch.float64)
        times = times[:, None] if times.dim() == 2 else times
        if times.dim() != 3 or not len(times) or times.shape[1] not in (1, batch) or times.shape[2] != frames:
            raise ValueError(
                f"times: expected [calls, {frames}] or [calls, {batch}, {frames}], got {tuple(given.shape)}"
            )
        if not bool((times[1:] <= times[:-1]).all()):
            raise ValueError("times: expected times that do not rise from call to call")
        if not bool(((times >= 0) | (times == HELD)).all()):
            raise ValueError("times: expected times of the schedule, or -1 for a finished frame")
        return times

    def _with_known(self, x: Tensor, known: Tensor, video: Tensor) -> Tensor:
        if not isinstance(video, Tensor) or video.shape != x.shape:
            raise ValueError(f"video: expected shape {tuple(x.shape)}, got {getattr(video, 'shape', video)}")
        view = [known.shape[0], *[1] * (self.frame_axis - 1), known.shape[1], *[1] * (x.dim() - self.frame_axis - 1)]
        return torch.where(known.to(x.device).view(view), video.to(x), x)

    def _sampler_of(self, times: Tensor) -> Sampler:
        """The sampler of these times; the last one is kept, with its buffers."""
        if self._kept is None or self._kept[0].shape != times.shape or not torch.equal(self._kept[0], times):
            solver = _FrameSteps(self.sampler.solver, times, self.frame_axis, self.held_time)
            self._kept = (times.clone(), self.sampler.replace(solver=solver, graph=None))
        return self._kept[1]


@dataclass(frozen=True, eq=False)
class _FrameSteps(Solver):
    """The rows of every pair of times that a frame steps between, and which frame takes which."""

    base: DDIM | DDPM
    times: Tensor  # float64 [calls, 1 or B, F]
    axis: int
    held_time: float

    name = "Vector times"

    def plan(self, schedule: NoiseSchedule, timesteps: Sequence[float], conversion: Conversion) -> Plan:
        """A call's row is that of its noisiest frame: it says which calls have noise, and ``control`` the rest."""
        table, rows = self._table(schedule, conversion)
        chosen, told = [], []
        for used, times in zip(rows.flatten(1), self.times.flatten(1).tolist(), strict=True):
            each = table[used.unique()]
            chosen.append(each[each[:, C.NOISE].argmax()].tolist())
            moving = [t for t in times if t != HELD] or [self.held_time]
            told.append(max(moving, key=lambda t: (t != round(t), t)))  # a time that is not whole makes all float
        levels = [schedule.level(t) for t in told]
        return Plan.of(told, levels, chosen, initial_scale=schedule.initial_scale)

    def _table(self, schedule: NoiseSchedule, conversion: Conversion) -> tuple[Tensor, Tensor]:
        """(the rows [R, 32], which one each frame takes: int64 [calls, 1 or B, F])."""
        following = torch.cat([self.times[1:], torch.full_like(self.times[:1], HELD)])
        waits = (self.times == HELD) | (self.times == following)
        steps = torch.stack([self.times, following], -1).masked_fill(waits[..., None], HELD)
        pairs, rows = steps.flatten(0, 2).unique(dim=0, return_inverse=True)
        table = [self._row(schedule, conversion, *pair) for pair in pairs.tolist()]
        return torch.tensor(table, dtype=torch.float64), rows.view(self.times.shape)

    def _row(self, schedule: NoiseSchedule, conversion: Conversion, start: float, end: float) -> list[float]:
        if start == HELD:
            return row(conversion, Level.clean(), sample=1.0)
        level, last = schedule.level(start), end == HELD
        if isinstance(self.base, DDPM):
            target = Level.clean() if last else schedule.level(end)
            return ddpm_row(conversion, level, target, self.base.variance, last=last)
        final = Level.clean() if self.base.set_alpha_to_one else schedule.first
        return ddim_row(conversion, level, final if last else schedule.level(end), self.base.eta)

    def control(self, run: Run) -> Control:
        return _FrameRows(self, run)


class _FrameRows(Control):
    """Every frame takes its row, and the model is told its time."""

    def __init__(self, steps: _FrameSteps, run: Run):
        table, rows = steps._table(run.schedule, run.conversion)
        self._table = table.to(run.device, run.dtype)
        rows = rows if steps.axis == 1 else rows[:, :, None]
        self._rows = rows.to(run.device).unbind(0)
        told = steps.times.masked_fill(steps.times == HELD, steps.held_time)
        self._told = told.expand(-1, run.shape[0], -1).contiguous().to(run.device).unbind(0)

    def time(self, call: int) -> Tensor:
        return self._told[call]

    def apply(self, call: int, launch: Launch) -> None:
        launch(rows=self._rows[call], table=self._table)


def _mask(known: object, batch: int, frames: int) -> Tensor:
    """bool [1 or B, F]."""
    if not isinstance(known, Tensor) or known.dtype != torch.bool:
        raise TypeError(f"known: expected a bool tensor, got {_of(known)}")
    if tuple(known.shape) not in ((frames,), (1, frames), (batch, frames)):
        raise ValueError(f"known: expected shape ({frames},) or ({batch}, {frames}), got {tuple(known.shape)}")
    return known.reshape(-1, frames)


def _of(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
