"""A time for each frame: the golden step, known frames, rows by frame against plain runs, long videos."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.euler import Euler  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402
from pydenoise.samplers.vector_times import HELD, VectorTimes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
SCHEDULE = cv.public_schedule()
ON_FRAMES = cv.mixture().denoiser(SCHEDULE)


def by_frame(x: Tensor, t: Tensor, **conditioning) -> Tensor:
    """The mixture's epsilon of every frame of [B, F, 2, 4, 4] by itself, at its own time."""
    assert t.shape == x.shape[:2]
    return ON_FRAMES(x.flatten(0, 1), t.flatten()).view_as(x)


def channels_first(x: Tensor, t: Tensor) -> Tensor:
    """The same for [B, 2, F, 4, 4]."""
    return by_frame(x.transpose(1, 2), t).transpose(1, 2)


def sampler(solver=None, denoiser=by_frame, num_steps=8, **options) -> Sampler:
    return Sampler(denoiser, SCHEDULE, solver or DDIM(), num_steps, **options)


def clip(frames=4, batch=2, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, frames, 2, 4, 4, dtype=torch.float64, generator=generator).to(dtype)


def test_golden_step():
    """The golden step: 50 timesteps down for every frame, and the frame at 0 stays."""
    start, x = cv.golden()["own_fvdm_t"].tolist(), cv.tensor("own_fvdm_x")
    run = VectorTimes(sampler(), frame_axis=1)
    after = [t - 50.0 for t in start[1:]]
    times = torch.tensor([[HELD, *start[1:]], [HELD, *after]], dtype=torch.float64)
    states = run.sample(x, times=times, return_trajectory=True).states
    torch.testing.assert_close(states[1], cv.tensor("own_fvdm_next"), rtol=0, atol=1e-12)
    assert torch.equal(states[2][:, 0], x[:, 0])


@pytest.mark.parametrize("solver", [DDIM(), DDIM(eta=0.7), DDIM(set_alpha_to_one=False), DDPM(), DDPM("fixed_large")])
@pytest.mark.parametrize("clip_value", [None, 0.6])
def test_without_known_frames_it_is_the_plain_sampler(solver, clip_value):
    """Every frame as a sample of its own: the same states."""
    x = clip()
    noise = torch.randn(8, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = Sampler(ON_FRAMES, SCHEDULE, solver, 8, clip=clip_value)
    noise = noise[: len(plain.plan.noisy_calls)]
    run = VectorTimes(sampler(solver, clip=clip_value), frame_axis=1)
    got = run.sample(x, noise=noise, return_trajectory=True).states
    wanted = plain.sample(x.flatten(0, 1), noise=noise.flatten(1, 2), return_trajectory=True).states
    torch.testing.assert_close(got.flatten(1, 2), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_frames_never_move(dtype):
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(x, t):
        seen.append((x.clone(), t.clone()))
        return channels_first(x.double(), t).to(dtype)

    run = VectorTimes(sampler(DDPM(), recorded))
    video = clip(dtype=dtype).transpose(1, 2).contiguous()
    known = torch.tensor([[True, False, False, True], [False, True, False, False]])
    got = run.sample(shape=video.shape, dtype=dtype, known=known, video=video, seed=3)
    stays = known[:, None, :, None, None].expand_as(video)
    assert torch.equal(got[stays], video[stays]) and got.isfinite().all()
    assert float((got[~stays] - video[~stays]).abs().mean()) > 0.3
    for call, (x, t) in enumerate(seen):
        assert torch.equal(x[stays], video[stays]), "the model sees them as they are in every call"
        assert torch.equal(t, torch.where(known, 0, int(run.sampler.timesteps[call])))


def test_layouts_and_seeds():
    known = torch.tensor([True, False, False])
    video = clip(3)
    first = VectorTimes(sampler(), frame_axis=1).sample(video, known=known)
    second = VectorTimes(sampler(denoiser=channels_first)).sample(video.transpose(1, 2).contiguous(), known=known)
    torch.testing.assert_close(first, second.transpose(1, 2), rtol=0, atol=1e-12)
    run = VectorTimes(sampler(DDPM()), frame_axis=1)
    given = {"shape": video.shape, "dtype": torch.float64, "known": known, "video": video}
    whole = run.sample(**given, seed=[1, 2])
    assert torch.equal(whole, run.sample(**given, seed=[1, 2], max_batch=1))
    assert torch.equal(whole[1:], run.sample(video=video[1:], shape=(1, *video.shape[1:]), seed=[2], known=known,
                                             dtype=torch.float64))  # fmt: skip
    plain = run.sampler.replace(denoiser=lambda x, t: by_frame(x, t[:, None].expand(x.shape[:2])))
    torch.testing.assert_close(run.sample(shape=video.shape, dtype=torch.float64, seed=4),
                               plain.sample(shape=video.shape, dtype=torch.float64, seed=4))  # fmt: skip


def test_guidance_tells_both_halves():
    def conditional(x, t, shift):
        assert t.shape == x.shape[:2] and x.shape[0] == 4
        return by_frame(x, t) + shift.view(-1, 1, 1, 1, 1)

    x, known = clip(), torch.tensor([True, False, False, False])
    run = VectorTimes(sampler(DDIM(), conditional, guidance_scale=3.0), frame_axis=1)
    zero, tenth = torch.zeros(2, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    got = run.sample(x, known=known, conditioning={"shift": tenth}, unconditional={"shift": zero})
    alone = VectorTimes(sampler(denoiser=lambda x, t: by_frame(x, t) + 0.3), frame_axis=1).sample(x, known=known)
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-12)


def test_staggered_frames():
    """Frames that begin later end as if they had begun together: a denoiser of single frames does not mind."""
    run = VectorTimes(sampler(num_steps=4), frame_axis=1)
    times = run.staggered(3, 2)
    assert times.shape == (8, 3) and times[:, 0].tolist() == [750, 500, 250, 0, -1, -1, -1, -1]
    assert times[:, 2].tolist() == [750, 750, 750, 750, 750, 500, 250, 0]
    x = clip(3)
    got = run.sample(x, times=times, return_trajectory=True)
    torch.testing.assert_close(got.sample, run.sample(x), rtol=0, atol=1e-12)
    assert torch.equal(got.states[4, :, 2], x[:, 2]) and torch.equal(got.states[4, :, 0], got.sample[:, 0])


def test_times_that_are_not_whole():
    told = []

    def recorded(x, t):
        told.append(t)
        return torch.zeros_like(x)

    times = torch.tensor([[700.0, 500.5], [300.0, 100.0]])
    VectorTimes(sampler(denoiser=recorded), frame_axis=1).sample(clip(2), times=times)
    assert torch.equal(told[0][0].float(), times[0]) and torch.equal(told[1][0].float(), times[1])


def test_long_videos():
    seen = []

    def recorded(x, t):
        seen.append(x.clone())
        return by_frame(x, t)

    run = VectorTimes(sampler(DDPM(), recorded, num_steps=3), frame_axis=1)
    begin = clip(2)
    got = run.extend(begin, 9, clip=5, overlap=2, seed=0)
    assert got.shape == (2, 9, 2, 4, 4) and torch.equal(got[:, :2], begin)
    assert len(seen) == 9, "three clips of three calls"
    assert torch.equal(seen[3][:, :2], got[:, 3:5]) and torch.equal(seen[6][:, :2], got[:, 6:8])
    assert not torch.equal(seen[0][:, 2:], seen[3][:, 2:]), "every clip has its own noise"
    assert torch.equal(got, run.extend(begin, 9, clip=5, overlap=2, seed=0))
    assert not torch.equal(got, run.extend(begin, 9, clip=5, overlap=2, seed=1))
    assert torch.equal(run.extend(begin, 2, clip=5, overlap=2), begin)
    each = run.extend(begin, 6, clip=4, overlap=1, seed=[3, 4])
    assert torch.equal(each[1:], run.extend(begin[1:], 6, clip=4, overlap=1, seed=[4]))


VIDEO = torch.zeros(2, 4, 2, 4, 4)


@pytest.mark.parametrize("make, error, message", [
    (lambda: VectorTimes(3), TypeError, "sampler: expected a Sampler"),
    (lambda: VectorTimes(sampler(Euler())), ValueError, "sampler: expected the solver DDIM"),
    (lambda: VectorTimes(sampler(DDIM(target="stride"))), ValueError, "sampler: expected the solver DDIM"),
    (lambda: VectorTimes(sampler(time_table=[1.0] * 8)), ValueError, "sampler: time_table"),
    (lambda: VectorTimes(sampler(), frame_axis=3), ValueError, "frame_axis: expected 1 or 2"),
    (lambda: VectorTimes(sampler(), held_time=1000.0), ValueError, "t: expected a time"),
    (lambda: VectorTimes(sampler()).staggered(0), ValueError, "frames: expected at least 1"),
])  # fmt: skip
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("given, error, message", [
    ({"x": None}, ValueError, "x: expected either x or shape"),
    ({"x": 3}, TypeError, "x: expected a floating-point tensor"),
    ({"x": torch.zeros(2)}, ValueError, "x: expected frames at dim 1"),
    ({"known": [True] * 4}, TypeError, "known: expected a bool tensor"),
    ({"known": torch.ones(3, dtype=torch.bool)}, ValueError, "known: expected shape"),
    ({"video": VIDEO}, ValueError, "video: given without known"),
    ({"known": torch.ones(4, dtype=torch.bool), "video": VIDEO[:1]}, ValueError, "video: expected shape"),
    ({"times": [[1.0]]}, TypeError, "times: expected a tensor"),
    ({"times": torch.ones(2, 3)}, ValueError, "times: expected .calls, 4. or"),
    ({"times": torch.arange(2.0)[:, None].expand(2, 4)}, ValueError, "times: expected times that do not rise"),
    ({"times": torch.full((2, 4), -0.5)}, ValueError, "times: expected times of the schedule"),
    ({"times": torch.full((2, 4), 5000.0)}, ValueError, "t: expected a time from 0 to 999"),
    ({"known": torch.eye(2, 4).bool(), "max_batch": 1}, ValueError, "max_batch: expected None"),
])  # fmt: skip
def test_bad_input(given, error, message):
    run = VectorTimes(sampler(), frame_axis=1)
    with pytest.raises(error, match=message):
        run.sample(**({"x": VIDEO} | given))


@pytest.mark.parametrize("given, error, message", [
    ({"video": 3}, TypeError, "video: expected"),
    ({"clip": 1}, ValueError, "clip: expected at least 2"),
    ({"overlap": 5}, ValueError, "overlap: expected 1 to 4"),
    ({"video": VIDEO[:, :1]}, ValueError, "video: expected at least 2 frames"),
    ({"num_frames": 3}, ValueError, "num_frames: expected at least the 4"),
    ({"noise": VIDEO}, ValueError, "noise: not for a video"),
])  # fmt: skip
def test_bad_long_videos(given, error, message):
    given = {"video": VIDEO, "num_frames": 9, "clip": 5, "overlap": 2} | given
    with pytest.raises(error, match=message):
        VectorTimes(sampler(), frame_axis=1).extend(given.pop("video"), given.pop("num_frames"), **given)
