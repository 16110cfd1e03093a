"""Streams of frames through a denoiser: a stream batch behind a bounded queue, with a thread of its own.

Source: Kodaira et al., "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation", 2023.
"""

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.stream_batch import StreamBatch
from pydenoise.samplers.stream_filter import SimilarityFilter
from pydenoise.samplers.stream_queue import Channel, Ended, GivenUp

RECENT = 256  # results that latency and throughput are taken from


@dataclass(frozen=True)
class StreamFrame:
    """A result.

    Args:
        number: of the result, from 0; there are as many results as frames.
        source: the number of the frame that ``sample`` was made from.
        sample: [...], of the frames' shape.
        repeated: whether it is the result before, for a frame that the filter skipped.
    """

    number: int
    source: int
    sample: Tensor
    repeated: bool


@dataclass(frozen=True)
class StreamStats:
    """Figures of a stream.

    Args:
        frames, results: how many came and left; ``skipped``: frames that were not evaluated.
        evaluations: calls of the denoiser.
        latency: median seconds from a frame's arrival to its result, and ``slowest``, of the last 256 evaluated ones.
        throughput: results for each second, over the last 256.
        busy: seconds in the stream batch, model and update.
    """

    frames: int
    results: int
    skipped: int
    evaluations: int
    latency: float | None
    slowest: float | None
    throughput: float | None
    busy: float


class Stream:
    """Frames in, denoised frames out, in order, while further frames are denoised.

    ::

        with Stream(denoiser, schedule, (4, 64, 64), t_index_list=[0, 16, 32, 45]) as stream:
            for result in stream.feed(frames):
                show(result.sample)

    ``feed`` takes frames from an iterable in a thread of its own; ``put`` takes them one by one, and ``finish`` says
    that there are no more. Results come by iteration, asynchronous iteration (``async for``) or ``get``. Everything
    waits: where results are not taken, the queue fills and ``put`` waits. An error of the denoiser or of the iterable
    comes to whoever takes results, after the results before it.

    Without filter, result k is made from frame k. The last ones come once the stream is finished, or is given further
    frames: a frame needs a call of the model for each stage. A frame that the filter skips gives the result before it
    once more; none is skipped before there is one.

    Args:
        denoiser, schedule, shape, **options: of ``StreamBatch``; ``shape`` of one frame [...].
        similarity: the filter that lets the model rest while nothing happens; ``None``: every frame is evaluated.
        queue_size: frames and results that may wait, each.

    Raises:
        TypeError, ValueError: a bad argument; a frame of another shape; a stream that is closed, also by ``close``.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        schedule: NoiseSchedule,
        shape: Sequence[int],
        *,
        similarity: SimilarityFilter | None = None,
        queue_size: int = 4,
        **options: object,
    ):
        if similarity is not None and not isinstance(similarity, SimilarityFilter):
            raise TypeError(f"similarity: expected a SimilarityFilter or None, got {type(similarity).__name__}")
        if isinstance(queue_size, bool) or not hasattr(queue_size, "__index__"):
            raise TypeError(f"queue_size: expected an int, got {type(queue_size).__name__}")
        if queue_size < 1:
            raise ValueError(f"queue_size: expected at least 1, got {queue_size}")
        self._batch = StreamBatch(denoiser, schedule, shape, **options)
        self._shape = self._batch.frame_shape[1:]
        self._frames: Channel[_Arrival] = Channel(queue_size)
        self._results: Channel[StreamFrame] = Channel(queue_size)
        self._meter = _Meter()
        self._closed = False
        self._feeder: threading.Thread | None = None
        # The threads know the queues and not this object, so that a stream which is dropped ends them.
        self._worker = threading.Thread(
            target=_work, args=(_Line(self._batch, similarity, self._meter), self._frames, self._results),
            name="pydenoise-stream", daemon=True,
        )  # fmt: skip
        weakref.finalize(self, _give_up, self._frames, self._results)
        self._worker.start()

    # ---------------------------------------------------------------------------------------------------------- frames

    def put(self, frame: Tensor, timeout: float | None = None) -> None:
        """A frame [...], which is copied; waits for room, at most ``timeout`` seconds (TimeoutError)."""
        arrival = self._arrival(frame)
        try:
            self._frames.put(arrival, timeout)
        except GivenUp:
            raise self._refusal() from None

    async def aput(self, frame: Tensor) -> None:
        """``put`` in an event loop."""
        arrival = self._arrival(frame)
        try:
            await self._frames.aput(arrival)
        except GivenUp:
            raise self._refusal() from None

    def feed(self, frames: Iterable[Tensor]) -> "Stream":
        """Take all ``frames`` in a thread of its own, then finish; returns the stream, to iterate over."""
        if self._frames.ended:
            raise self._refusal()
        if self._feeder is not None:
            raise ValueError("frames: the stream is being fed already")
        iterator = iter(frames)
        self._feeder = threading.Thread(
            target=_feed, args=(iterator, self._shape, self._meter, self._frames), name="pydenoise-feed", daemon=True
        )
        self._feeder.start()
        return self

    def finish(self, error: BaseException | None = None) -> None:
        """No more frames; the results of those that came are still given, and ``error`` is raised after them."""
        if error is not None and not isinstance(error, BaseException):
            raise TypeError(f"error: expected an exception, got {type(error).__name__}")
        if self._closed:
            raise self._refusal()
        self._frames.end(error)

    def set_conditioning(
        self, conditioning: Mapping[str, object] | None, unconditional: Mapping[str, object] | None = None
    ) -> None:
        """Other keyword arguments of the denoiser from its next call on."""
        self._batch.set_conditioning(conditioning, unconditional)

    # --------------------------------------------------------------------------------------------------------- results

    def get(self, timeout: float | None = None) -> StreamFrame | None:
        """The next result, ``None`` after the last; waits for it, at most ``timeout`` seconds (TimeoutError)."""
        try:
            return self._results.get(timeout)
        except (Ended, GivenUp):
            return None

    def __iter__(self) -> Iterator[StreamFrame]:
        while (result := self.get()) is not None:
            yield result

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> StreamFrame:
        try:
            return await self._results.aget()
        except (Ended, GivenUp):
            raise StopAsyncIteration from None

    @property
    def stats(self) -> StreamStats:
        """The figures so far."""
        return self._meter.stats()

    # ------------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Stop: frames and results that wait are dropped, and the thread ends after the call it is in."""
        if self._closed:
            raise ValueError("stream: closed already")
        self._closed = True
        _give_up(self._frames, self._results)
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._closed:
            self.close()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._closed:
            await asyncio.get_running_loop().run_in_executor(None, self.close)

    def _arrival(self, frame: object) -> "_Arrival":
        arrival = _arrival(frame, self._shape)
        if self._frames.ended:
            raise self._refusal()
        self._meter.arrived()
        return arrival

    def _refusal(self) -> Exception:
        if self._closed:
            return ValueError("stream: closed, it takes no more frames")
        if self._results.failed:
            return ValueError("stream: stopped by an error, which its results tell")
        return ValueError("stream: finished, it takes no more frames")


# -------------------------------------------------------------------------------------------------------------- threads


@dataclass(frozen=True)
class _Arrival:
    frame: Tensor
    time: float = field(default_factory=time.perf_counter)


def _arrival(frame: object, shape: torch.Size) -> _Arrival:
    if not isinstance(frame, Tensor):
        raise TypeError(f"frame: expected a tensor, got {type(frame).__name__}")
    if frame.shape != shape:
        raise ValueError(f"frame: expected shape {tuple(shape)}, got {tuple(frame.shape)}")
    if not frame.is_floating_point():
        raise TypeError(f"frame: expected a floating-point tensor, got {frame.dtype}")
    # A camera writes into the same buffer again.
    return _Arrival(frame.detach().clone(memory_format=torch.contiguous_format))


def _give_up(*channels: Channel) -> None:
    for channel in channels:
        channel.give_up()


def _feed(frames: Iterator[Tensor], shape: torch.Size, meter: "_Meter", to: Channel[_Arrival]) -> None:
    try:
        for frame in frames:
            arrival = _arrival(frame, shape)
            meter.arrived()
            to.put(arrival)
        to.end()
    except GivenUp:
        pass
    except BaseException as error:
        to.end(error)


def _work(line: "_Line", frames: Channel[_Arrival], results: Channel[StreamFrame]) -> None:
    failure = None
    try:
        while True:
            try:
                arrival = frames.get()
            except Ended:
                break
            except GivenUp:
                raise
            except BaseException as error:  # the producer's: what it gave before is still denoised
                failure = error
                break
            for result in line.take(arrival):
                results.put(result)
            del arrival  # or it would live through the wait for the next one
        for result in line.finish():
            results.put(result)
        results.end(failure)
    except GivenUp:
        pass
    except BaseException as error:
        results.end(error)
        frames.give_up()


class _Line:
    """What becomes of the frames, one after the other: filter, groups, stages, results."""

    def __init__(self, batch: StreamBatch, similarity: SimilarityFilter | None, meter: "_Meter"):
        self._batch, self._filter, self._meter = batch, similarity, meter
        self._group: list[tuple[int, _Arrival]] = []
        self._stages: deque[list[tuple[int, float]]] = deque()  # (number, time) of the frames in each stage
        self._last: tuple[int, Tensor] | None = None
        self._taken = self._given = 0

    def take(self, arrival: _Arrival) -> Iterator[StreamFrame]:
        number = self._taken
        self._taken += 1
        skip = self._filter is not None and not self._accepts(arrival.frame)
        if skip:
            self._meter.gave(repeated=True)
            yield self._result(*self._last, repeated=True)
            return
        self._group.append((number, arrival))
        if len(self._group) == self._batch.frame_buffer:
            yield from self._advance()

    def _accepts(self, frame: Tensor) -> bool:
        if self._last is None:
            self._filter.accept(frame)
            return True
        return self._filter.accepts(frame)

    def finish(self) -> Iterator[StreamFrame]:
        """The results of frames that are still on their way."""
        if self._group:
            yield from self._advance()
        while any(self._stages):
            yield from self._advance()

    def _advance(self) -> Iterator[StreamFrame]:
        frames = self._frames()
        self._stages.append([(number, arrival.time) for number, arrival in self._group])
        self._group = []
        begin = time.perf_counter()
        finished = self._batch.step(frames)
        self._meter.evaluated(time.perf_counter() - begin)
        if len(self._stages) <= self._batch.warm_up:
            return
        for (number, arrived), sample in zip(self._stages.popleft(), finished, strict=False):
            self._last = (number, sample)
            self._meter.gave(latency=time.perf_counter() - arrived)
            yield self._result(number, sample)

    def _frames(self) -> Tensor:
        """The group, filled up with its last frame; at the end, with nothing that anybody will see."""
        frames = [arrival.frame for _, arrival in self._group]
        if not frames:
            return torch.zeros(self._batch.frame_shape, dtype=self._batch.dtype, device=self._batch.device)
        frames += [frames[-1]] * (self._batch.frame_buffer - len(frames))
        return torch.stack(frames) if len(frames) > 1 else frames[0][None]

    def _result(self, source: int, sample: Tensor, repeated: bool = False) -> StreamFrame:
        number = self._given
        self._given += 1
        return StreamFrame(number, source, sample, repeated)


class _Meter:
    """Counts and times, from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._frames = self._results = self._skipped = self._evaluations = 0
        self._busy = 0.0
        self._latencies: deque[float] = deque(maxlen=RECENT)
        self._times: deque[float] = deque(maxlen=RECENT)

    def arrived(self) -> None:
        with self._lock:
            self._frames += 1

    def evaluated(self, seconds: float) -> None:
        with self._lock:
            self._evaluations += 1
            self._busy += seconds

    def gave(self, *, repeated: bool = False, latency: float | None = None) -> None:
        with self._lock:
            self._results += 1
            self._skipped += repeated
            self._times.append(time.perf_counter())
            if latency is not None:
                self._latencies.append(latency)

    def stats(self) -> StreamStats:
        with self._lock:
            times, latencies = list(self._times), sorted(self._latencies)
            counts = (self._frames, self._results, self._skipped, self._evaluations)
            busy = self._busy
        span = times[-1] - times[0] if times else 0.0
        return StreamStats(
            *counts,
            latency=latencies[len(latencies) // 2] if latencies else None,
            slowest=latencies[-1] if latencies else None,
            throughput=(len(times) - 1) / span if span else None,
            busy=busy,
        )
