"""Streams: order, back-pressure, the filter, errors from either side, both ways of waiting, and the end."""

import asyncio
import gc
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers import NoiseSchedule, SimilarityFilter, Stream, StreamBatch, StreamFrame  # noqa: E402
from pydenoise.samplers.stream_queue import Channel, Ended, GivenUp  # noqa: E402

SHAPE, STAGES = (2, 4, 4), [900.0, 500.0, 100.0]
WAIT = 20  # seconds, for what happens at once


class Model:
    """An exact denoiser that counts its calls, and stops at a gate or fails at a call if told to."""

    def __init__(self, gate: threading.Event | None = None, fails_at: int | None = None):
        self.calls, self._gate, self._fails_at = 0, gate, fails_at
        self._true = cv.gaussian().denoiser(cv.schedule())

    def __call__(self, x, t):
        if self._gate is not None:
            self._gate.wait(WAIT)
        self.calls += 1
        if self.calls - 1 == self._fails_at:
            raise RuntimeError("the denoiser broke")
        return self._true(x, t)


def stream(model=None, **options) -> Stream:
    given = {"timesteps": STAGES, "seed": 0} | options
    return Stream(model or Model(), cv.schedule(), SHAPE, **given)


def frames(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


def wanted(given: torch.Tensor, **options) -> torch.Tensor:
    """Each frame's result by the stream batch itself."""
    batch = StreamBatch(Model(), cv.schedule(), SHAPE, **({"timesteps": STAGES, "seed": 0} | options))
    padded = torch.cat([given, given.new_zeros(batch.warm_up * batch.frame_buffer, *SHAPE)])
    groups = padded.unflatten(0, (-1, batch.frame_buffer))
    return torch.cat([batch.step(g) for g in groups])[batch.warm_up * batch.frame_buffer :]


def until(condition, seconds: float = WAIT) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("guidance", ["none", "self-negative"])
@pytest.mark.parametrize("stages", [STAGES, STAGES[:1]])
def test_results_in_order(guidance, stages):
    options = {"guidance": guidance, "guidance_scale": 1.2} if guidance != "none" else {}
    options["timesteps"] = stages
    given = frames(9)
    with stream(**options) as running:
        results = list(running.feed(given))
    assert [r.number for r in results] == [r.source for r in results] == list(range(9))
    assert not any(r.repeated for r in results) and isinstance(results[0], StreamFrame)
    assert torch.equal(torch.stack([r.sample for r in results]), wanted(given, **options))


def test_groups_of_frames():
    given = frames(7)  # the last group has one frame
    model = Model()
    with stream(model, frame_buffer=3) as running:
        results = list(running.feed(given))
    assert [r.source for r in results] == list(range(7)) and model.calls == 3 + 2
    padded = torch.cat([given, given[-1:], given[-1:]])
    assert torch.equal(torch.stack([r.sample for r in results]), wanted(padded, frame_buffer=3)[:7])


def test_frames_are_copied():
    given, buffer = frames(6), torch.empty(SHAPE)
    with stream(queue_size=8) as running:
        for frame in given:
            running.put(buffer.copy_(frame))
        running.finish()
        results = torch.stack([r.sample for r in running])
    assert torch.equal(results, wanted(given))


def test_no_frames_at_all():
    model = Model()
    with stream(model) as running:
        assert list(running.feed([])) == [] and running.get() is None and model.calls == 0
        assert running.stats.latency is None and running.stats.throughput is None


def test_figures():
    with stream() as running:
        results = list(running.feed(frames(10)))
        stats = running.stats
    assert (stats.frames, stats.results, stats.skipped, stats.evaluations) == (10, 10, 0, 12)
    assert 0 < stats.latency <= stats.slowest and stats.throughput > 0 and stats.busy > 0
    assert len(results) == 10


def test_conditioning_changes():
    def model(x, t, gain):
        return x * gain.view(-1, 1, 1, 1)

    with stream(model, timesteps=STAGES[:1], conditioning={"gain": torch.zeros(1)}) as running:
        frame = frames(1)[0]
        running.put(frame)
        first = running.get(WAIT).sample
        running.set_conditioning({"gain": torch.ones(1)})
        running.put(frame)
        assert not torch.equal(first, running.get(WAIT).sample)


# --------------------------------------------------------------------------------------------------------------- filter


@pytest.mark.parametrize("frame_buffer", [1, 2])
def test_a_still_stream_costs_a_fifth_at_most(frame_buffer):
    model, number = Model(), 220
    still = frames(1).expand(number, *SHAPE)
    with stream(model, similarity=SimilarityFilter(0.98, 10, seed=0), frame_buffer=frame_buffer) as running:
        results = list(running.feed(still))
        stats = running.stats
    assert [r.number for r in results] == list(range(number)), "a result for every frame"
    assert stats.evaluations == model.calls and number >= 5 * model.calls * frame_buffer
    assert stats.skipped == sum(r.repeated for r in results) > 0.8 * number


def test_skipped_frames_repeat_the_result_before():
    scenes = frames(4, seed=3)
    given = scenes.repeat_interleave(12, 0)
    with stream(similarity=SimilarityFilter(0.98, 100, seed=0)) as running:
        results = list(running.feed(given))
    accepted = sorted({r.source for r in results})
    assert {0, 12, 24, 36} <= set(accepted), "a new scene is evaluated"
    assert [r.source for r in results] == sorted(r.source for r in results)
    fresh = {r.source: r.sample for r in results if not r.repeated}
    assert list(fresh) == accepted
    assert all(r.sample is fresh[r.source] for r in results if r.repeated)
    assert torch.equal(torch.stack(list(fresh.values())), wanted(given[accepted]))


# -------------------------------------------------------------------------------------------------------- back-pressure


def test_a_slow_model_makes_producers_wait():
    gate = threading.Event()
    running = stream(Model(gate), queue_size=2)
    given = frames(4)
    for frame in given[:3]:  # one in the model, two in the queue
        running.put(frame, timeout=WAIT)
    with pytest.raises(TimeoutError):
        running.put(given[3], timeout=0.05)
    gate.set()
    running.put(given[3], timeout=WAIT)
    running.finish()
    assert torch.equal(torch.stack([r.sample for r in running]), wanted(given))
    running.close()


def test_a_slow_consumer_makes_everybody_wait():
    model, taken = Model(), []

    def source():
        for number, frame in enumerate(frames(40)):
            taken.append(number)
            yield frame

    running = stream(model, queue_size=2).feed(source())
    assert until(lambda: len(taken) >= 8)
    time.sleep(0.05)
    # two results wait and one is offered, after two stages of others; two frames wait, one is offered
    assert model.calls == 2 + 3 and len(taken) == 5 + 3
    assert [r.source for r in running] == list(range(40))
    running.close()


def test_waiting_for_results_ends_in_time():
    with stream() as running, pytest.raises(TimeoutError):
        running.get(timeout=0.02)


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_of_the_denoiser_come_after_the_results_before_them():
    running = stream(Model(fails_at=4), queue_size=8)
    results = []
    with pytest.raises(RuntimeError, match="broke"):
        for result in running.feed(frames(20)):
            results.append(result)
    assert [r.source for r in results] == [0, 1]
    with pytest.raises(RuntimeError, match="broke"):
        running.get()
    with pytest.raises(ValueError, match="error"):
        running.put(frames(1)[0])
    running.close()


def test_nan_is_an_error():
    with stream(lambda x, t: x * float("nan")) as running, pytest.raises(ValueError, match="finite"):
        list(running.feed(frames(5)))


@pytest.mark.parametrize("broken", ["raises", "shape", "kind", "type"])
def test_a_producer_that_dies(broken):
    def source():
        yield from frames(5)
        if broken == "raises":
            raise OSError("the camera is gone")
        yield {"shape": torch.zeros(2, 4, 5), "kind": torch.zeros(SHAPE, dtype=torch.uint8), "type": 3}[broken]

    error = {"raises": OSError, "shape": ValueError, "kind": TypeError, "type": TypeError}[broken]
    with stream() as running:
        results = []
        with pytest.raises(error, match="camera" if broken == "raises" else "frame"):
            for result in running.feed(source()):
                results.append(result)
    assert torch.equal(torch.stack([r.sample for r in results]), wanted(frames(5))), "what it gave is denoised"


def test_a_producer_says_that_it_dies():
    with stream() as running:
        running.put(frames(1)[0])
        running.finish(OSError("unplugged"))
        assert running.get(WAIT).source == 0
        with pytest.raises(OSError, match="unplugged"):
            running.get(WAIT)
        with pytest.raises(ValueError, match="error"):
            running.put(frames(1)[0])


# ------------------------------------------------------------------------------------------------------------------ end


def test_closing_ends_everything():
    def forever():
        while True:
            yield from frames(3)

    running = stream().feed(forever())
    assert running.get(WAIT).source == 0
    running.close()
    assert not running._worker.is_alive()
    running._feeder.join(WAIT)
    assert not running._feeder.is_alive()
    assert running.get() is None and list(running) == []
    for call in (running.close, running.finish, lambda: running.put(frames(1)[0]), lambda: running.feed([])):
        with pytest.raises(ValueError, match="clos"):
            call()


def test_closing_waits_for_no_queue_and_drops_what_is_there():
    gate, model_calls = threading.Event(), []

    def model(x, t):
        model_calls.append(1)
        gate.wait(WAIT)
        return x

    running = stream(model, queue_size=2)
    for frame in frames(3):
        running.put(frame, timeout=WAIT)
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(running.get()))
    blocked = threading.Thread(target=lambda: pytest.raises(ValueError, running.put, frames(1)[0]))
    for thread in (waiting, blocked):
        thread.start()
    assert until(lambda: len(model_calls) == 1)
    threading.Timer(0.05, gate.set).start()
    running.close()
    for thread in (waiting, blocked):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert ended == [None] and len(model_calls) == 1 and not running._worker.is_alive()


def test_a_context_that_raises_closes():
    with pytest.raises(KeyError), stream() as running:
        running.feed(frames(50))
        raise KeyError("outside")
    assert not running._worker.is_alive()
    with stream() as running:
        running.close()  # closing inside is no second time


def test_a_forgotten_stream_ends_its_threads():
    running = stream()
    running.put(frames(1)[0])
    worker, seen = running._worker, weakref.ref(running)
    del running
    gc.collect()
    assert seen() is None
    worker.join(WAIT)
    assert not worker.is_alive()


# ------------------------------------------------------------------------------------------------------- asynchronously


def test_async_iteration_in_one_loop():
    given = frames(30)

    async def main():
        ticks = 0

        async def produce(running):
            for frame in given:
                await running.aput(frame)  # the queue is shorter than the stream
            running.finish()

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        async with stream(queue_size=2) as running:
            producing, ticking = asyncio.create_task(produce(running)), asyncio.create_task(tick())
            results = [result async for result in running]
            await producing
            ticking.cancel()
        return results, ticks, running

    results, ticks, running = asyncio.run(asyncio.wait_for(main(), WAIT))
    assert torch.equal(torch.stack([r.sample for r in results]), wanted(given))
    assert ticks > 1 and not running._worker.is_alive()


def test_async_errors_and_cancelling():
    async def main():
        async with stream(Model(fails_at=3)) as running:
            running.feed(frames(10))
            with pytest.raises(RuntimeError, match="broke"):
                async for _ in running:
                    pass
            with pytest.raises(ValueError, match="error"):
                await running.aput(frames(1)[0])
        async with stream(timesteps=STAGES[:1]) as running:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(running), 0.02)
            running.put(frames(1)[0])  # the one that was cancelled has not taken it
            assert (await asyncio.wait_for(anext(running), WAIT)).source == 0
            running.close()
            assert [r async for r in running] == []

    asyncio.run(main())


# -------------------------------------------------------------------------------------------------------- the queue


def test_channel():
    channel = Channel(2)
    channel.put(1)
    channel.put(2)
    with pytest.raises(TimeoutError):
        channel.put(3, timeout=0)
    channel.end()
    with pytest.raises(GivenUp):
        channel.put(3)
    assert [channel.get(), channel.get()] == [1, 2]
    with pytest.raises(Ended):
        channel.get()
    failing = Channel(2)
    failing.put(1)
    failing.end(OSError("x"))
    failing.end()
    assert failing.get() == 1
    for _ in range(2):
        with pytest.raises(OSError):
            failing.get()


def test_channel_with_many_threads():
    channel, got, lock = Channel(3), [], threading.Lock()

    def produce(first):
        for k in range(200):
            channel.put((first, k))

    def consume():
        while True:
            try:
                item = channel.get()
            except Ended:
                return
            with lock:
                got.append(item)

    producers = [threading.Thread(target=produce, args=(i,)) for i in range(3)]
    consumers = [threading.Thread(target=consume) for _ in range(3)]
    for thread in producers + consumers:
        thread.start()
    for thread in producers:
        thread.join(WAIT)
    channel.end()
    for thread in consumers:
        thread.join(WAIT)
    assert sorted(got) == [(i, k) for i in range(3) for k in range(200)]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"queue_size": 0}, ValueError, "queue_size"),
        ({"queue_size": 1.0}, TypeError, "queue_size"),
        ({"similarity": 0.9}, TypeError, "similarity"),
        ({"guidance": "half"}, ValueError, "guidance"),
        ({"frame_buffer": 0}, ValueError, "frame_buffer"),
    ],
)
def test_bad_options(options, error, message):
    before = threading.active_count()
    with pytest.raises(error, match=message):
        stream(**options)
    assert threading.active_count() == before


def test_bad_frames_and_feeds():
    with stream() as running:
        for frame, error in (
            (3, TypeError),
            (torch.zeros(1, *SHAPE), ValueError),
            (torch.zeros(SHAPE).int(), TypeError),
        ):
            with pytest.raises(error, match="frame"):
                running.put(frame)
        with pytest.raises(TypeError, match="error"):
            running.finish("broken")
        with pytest.raises(TypeError):
            running.feed(3)
        running.feed(frames(2))
        with pytest.raises(ValueError, match="frames"):
            running.feed(frames(2))
        assert len(list(running)) == 2
        with pytest.raises(ValueError, match="finished"):
            running.feed(frames(2))


def test_schedules_of_other_kinds():
    with Stream(
        lambda x, t: x, NoiseSchedule.flow(), SHAPE, timesteps=[700.0, 200.0], prediction_type="flow"
    ) as running:
        assert len(list(running.feed(frames(3)))) == 3
