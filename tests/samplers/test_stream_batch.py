"""The stream batch: golden streams, plain loops in float64, what its modes have in common, bad input."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers import DDIM, NoiseSchedule, Sampler, StreamBatch  # noqa: E402
from pydenoise.samplers._stream_rows import boundary, lcm_times  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference

PLACES, SHAPE = [0, 16, 32, 45], (2, 4, 4)


def latent_schedule() -> NoiseSchedule:
    """That of the public code: betas and products in float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - betas, 0))


def rounded_schedule() -> NoiseSchedule:
    """The same with the levels that the public code rounded to float32."""
    schedule = latent_schedule()
    alphas, sigmas = schedule.alphas.clone(), schedule.sigmas.clone()
    times = cv.tensor("repo_stream_t").long()
    alphas[times], sigmas[times] = cv.tensor("repo_stream_tables")[:2]
    return NoiseSchedule("vp", alphas, sigmas)


def frames(number=7, *shape, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, *(shape or SHAPE), dtype=torch.float64, generator=generator)


def batch(denoiser=None, schedule=None, **options) -> StreamBatch:
    schedule = schedule or latent_schedule()
    given = {"dtype": torch.float64} | options
    if "timesteps" not in given:
        given.setdefault("t_index_list", PLACES)
    return StreamBatch(denoiser or cv.mixture().denoiser(schedule), schedule, given.pop("shape", SHAPE), **given)


def run(stream: StreamBatch, given: torch.Tensor) -> torch.Tensor:
    groups = given.unflatten(0, (-1, stream.frame_buffer))
    return torch.cat([stream.step(group) for group in groups])


# ----------------------------------------------------------------------------------------------------------------- rows


def test_tables_are_the_golden_ones():
    schedule, golden = latent_schedule(), cv.tensor("repo_stream_tables")
    stream = batch(schedule=schedule)
    assert stream.times == tuple(cv.golden()["repo_stream_t"].tolist())
    levels = torch.tensor([schedule.level(t) for t in stream.times], dtype=torch.float64)
    torch.testing.assert_close(levels.T, golden[:2], rtol=1e-6, atol=0)
    ends = torch.tensor([boundary(t, 10.0) for t in stream.times], dtype=torch.float64)
    torch.testing.assert_close(ends.T, golden[2:], rtol=1e-6, atol=0)


def test_times_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for steps in (50, 20, 7, 4, 1):
        scheduler = diffusers.LCMScheduler()
        scheduler.set_timesteps(steps)
        assert lcm_times(latent_schedule(), steps) == scheduler.timesteps.tolist()
    for time in (0.0, 1.0, 19.0, 999.0):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(time, dtype=torch.float64))
        assert boundary(time, 10.0) == pytest.approx((float(skip), float(out)), rel=1e-12)
    assert boundary(0.0, math.inf) == (0.0, 1.0)


@pytest.mark.parametrize(
    "key, options",
    [
        ("none", {}),
        ("full", {"guidance": "full", "guidance_scale": 1.4, "unconditional": {}}),
        ("self", {"guidance": "self-negative", "guidance_scale": 1.4, "delta": 0.7}),
    ],
)
def test_golden_streams(key, options):
    stream = batch(
        cv.mixture().denoiser(latent_schedule()), rounded_schedule(), noise=cv.tensor("repo_stream_init_noise"),
        noisy_frames=True, **options,
    )  # fmt: skip
    wanted, stock = cv.tensor(f"repo_stream_{key}_out"), cv.tensor(f"repo_stream_{key}_stock")
    for number, frame in enumerate(cv.tensor("an_stream_frames")):
        # c_skip and c_out are float32 in the public code; the stock's numbers are of some hundreds.
        torch.testing.assert_close(stream.step(frame[None]), wanted[number], rtol=1e-7, atol=1e-6)
        if key == "self":
            kept = stream.stock[(number + 1) % 2][1:4]
            torch.testing.assert_close(kept, stock[number, :3], rtol=1e-7, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- plain algebra


def plain(model, schedule, times, noise, given, *, mode, scale, delta, blind=None, renoise="initial"):
    """The streams of one frame after the other, each alone through all stages: no batch, no buffers."""
    levels, group = [schedule.level(t) for t in times], given.shape[1]
    results = []
    for frame in given:
        x, stock = levels[0].alpha * frame + levels[0].sigma * noise[0], noise[0]
        for k, (time, (a, s)) in enumerate(zip(times, levels, strict=True)):
            t = torch.full((group,), time).long()
            epsilon = model(x, t)
            if mode == "full":
                epsilon = blind(x, t) + scale * (epsilon - blind(x, t))
            elif mode != "none":
                stock = blind(x, t) if mode == "onetime-negative" and k == 0 else stock
                epsilon = delta * stock + scale * (epsilon - delta * stock)
            skip, out = boundary(time, 10.0)
            denoised = out * (x - s * epsilon) / a + skip * x
            if k + 1 < len(times):
                a_next, s_next = levels[k + 1]
                again = {"initial": noise[k + 1], "predicted": epsilon, "none": 0}[renoise]
                x = a_next * denoised + s_next * again
                wrong = out * (s * stock - s * epsilon) / a + skip * s * stock
                stock = noise[k + 1] + a_next / s_next * wrong
        results.append(denoised)
    return torch.stack(results)


@pytest.mark.parametrize("frame_buffer", [1, 3])
@pytest.mark.parametrize("renoise", ["initial", "predicted", "none"])
@pytest.mark.parametrize("mode", ["none", "self-negative", "onetime-negative", "full"])
def test_a_frame_is_denoised_as_if_alone(mode, renoise, frame_buffer):
    schedule = latent_schedule()
    noise = frames(4 * frame_buffer, seed=1)
    true = cv.mixture().denoiser(schedule)

    def model(x, t, kind=None):
        return true(x, t) if kind is None else true(x, t) * (1 + kind.view(-1, 1, 1, 1))

    guided = mode != "none"
    asks = mode in ("full", "onetime-negative")
    options = {"guidance": mode, "guidance_scale": 1.3} if guided else {}
    options |= {"delta": 0.8} if mode in ("self-negative", "onetime-negative") else {}
    options |= {"unconditional": {"kind": torch.full((1,), 0.5)}} if asks else {}
    stream = batch(model, schedule, noise=noise, frame_buffer=frame_buffer, renoise=renoise,
                   conditioning={"kind": torch.zeros(1)}, **options)  # fmt: skip
    given = frames(6 * frame_buffer)
    after = frames(3 * frame_buffer, seed=2)  # what follows is not seen in what came before
    found = run(stream, torch.cat([given, after]))[3 * frame_buffer :]
    wanted = plain(
        model, schedule, stream.times, noise.unflatten(0, (4, frame_buffer)), given.unflatten(0, (-1, frame_buffer)),
        mode=mode, scale=1.3 if guided else 1.0, delta=0.8 if "delta" in options else 1.0, renoise=renoise,
        blind=lambda x, t: true(x, t) * 1.5,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-8, atol=1e-8)


def test_predicted_noise_is_ddim():
    schedule = cv.schedule()
    times = [900.0, 600.0, 300.0, 100.0, 10.0]
    denoiser = cv.mixture().denoiser(schedule)
    stream = batch(denoiser, schedule, timesteps=times, renoise="predicted", timestep_scaling=math.inf, seed=3)
    given = frames(5)
    found = run(stream, torch.cat([given, given[:4]]))[stream.warm_up :]
    level = schedule.level(times[0])
    start = level.alpha * given + level.sigma * stream.noise[0]
    wanted = Sampler(denoiser, schedule, DDIM(), timesteps=times, backend="reference").sample(start)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("mode", ["none", "self-negative", "onetime-negative", "full"])
def test_prediction_types(kind, mode):
    schedule = latent_schedule()
    options = {"guidance": mode, "guidance_scale": 1.5} if mode != "none" else {}
    options |= {"unconditional": {}} if mode in ("full", "onetime-negative") else {}
    streams = [
        batch(cv.mixture().denoiser(schedule, p), schedule, prediction_type=p, seed=4, **options)
        for p in ("epsilon", kind)
    ]  # fmt: skip
    one, other = (run(stream, frames(8))[3:] for stream in streams)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_flow_and_pure_noise():
    schedule = NoiseSchedule.flow()
    denoiser = cv.mixture().denoiser(schedule, "flow")
    times = [1000.0, 750.0, 250.0]  # the first one without signal
    stream = batch(denoiser, schedule, timesteps=times, prediction_type="flow", renoise="predicted",
                   noisy_frames=True)  # fmt: skip
    given = frames(5)
    found = run(stream, torch.cat([given, given[:2]]))[2:]
    wanted = Sampler(
        denoiser, schedule, DDIM(), timesteps=times, prediction_type="flow", backend="reference"
    ).sample(given)  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="guidance"):
        batch(denoiser, schedule, timesteps=times, prediction_type="flow", guidance="self-negative", guidance_scale=2.0)


# ----------------------------------------------------------------------------------------------------- what a call does


@pytest.mark.parametrize("mode, rows", [("none", 8), ("self-negative", 8), ("onetime-negative", 10), ("full", 16)])
@pytest.mark.parametrize("dtype, model_dtype", [(torch.float32, None), (torch.float32, torch.bfloat16),
                                                (torch.bfloat16, None), (torch.float16, torch.float32)])  # fmt: skip
def test_one_call_of_the_model_and_other_dtypes(mode, rows, dtype, model_dtype):
    schedule, seen = latent_schedule(), []
    true = cv.mixture().denoiser(schedule)

    def model(x, t, kind):
        seen.append((x.clone(), t, kind))
        return true(x.double(), t).to(x.dtype)

    options = {"guidance": mode, "guidance_scale": 1.2} if mode != "none" else {}
    asks = mode in ("full", "onetime-negative")
    options |= {"unconditional": {"kind": torch.tensor([7, 8])}} if asks else {}
    noise = frames(8, seed=1)
    make = {"schedule": schedule, "frame_buffer": 2, "noise": noise, **options}
    stream = batch(model, conditioning={"kind": torch.tensor([1, 2])}, dtype=dtype, model_dtype=model_dtype, **make)
    found = run(stream, frames(12))
    assert len(seen) == 6 and found.dtype == dtype and not found.is_inference()
    x, t, kind = seen[-1]
    assert x.shape[0] == rows and x.dtype == (model_dtype or dtype) and t.dtype == torch.int64
    stages = [999, 999, 679, 679, 359, 359, 99, 99]
    before = {"onetime-negative": stages[:2], "full": stages}.get(mode, [])
    assert t.tolist() == before + stages
    assert kind.tolist() == [7, 8] * (len(before) // 2) + [1, 2] * 4
    if before:
        torch.testing.assert_close(x[: len(before)], x[len(before) :][: len(before)], rtol=0, atol=0)
    exact = run(batch(lambda x, t, kind: true(x, t), conditioning={"kind": torch.tensor([1, 2])}, **make), frames(12))
    tolerance = 1e-4 if (dtype, model_dtype) == (torch.float32, None) else 0.2
    assert float((found.double() - exact)[6:].abs().max()) < tolerance * float(exact[6:].abs().max())


def test_one_stage_has_no_wait():
    schedule = latent_schedule()
    noise, given = frames(1, seed=1), frames(3)
    for mode in ("none", "self-negative"):
        options = {"guidance": mode, "guidance_scale": 1.4} if mode != "none" else {}
        stream = batch(schedule=schedule, t_index_list=[32], noise=noise, **options)
        assert stream.warm_up == 0
        wanted = plain(cv.mixture().denoiser(schedule), schedule, stream.times, noise[None], given[:, None],
                       mode=mode, scale=1.4 if options else 1.0, delta=1.0)  # fmt: skip
        torch.testing.assert_close(run(stream, given), wanted.flatten(0, 1), rtol=1e-9, atol=1e-9)


def test_seeds_and_conditions():
    one, same, other = (run(batch(seed=s), frames(5)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    drawn = [batch(generator=torch.Generator().manual_seed(5)).noise for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == (4, *SHAPE)

    def model(x, t, gain, extra):
        return x * gain.view(-1, 1, 1, 1) * extra["more"].view(-1, 1, 1, 1)

    stream = batch(model, conditioning={"gain": torch.ones(1), "extra": {"more": torch.zeros(())}}, seed=1)
    first = stream.step(frames(1))
    stream.set_conditioning({"gain": torch.full((1,), 2.0), "extra": {"more": torch.ones(1)}})
    assert bool(first.isfinite().all()) and bool((stream.step(frames(1)) != 0).any())


def test_results_are_kept_apart():
    stream = batch(seed=0)
    results = [stream.step(frame[None]) for frame in frames(6)]
    copies = [result.clone() for result in results]
    run(stream, frames(4, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"denoiser": 3}, TypeError, "denoiser"),
        ({"schedule": 3}, TypeError, "schedule"),
        ({"shape": 3}, TypeError, "shape"),
        ({"shape": (2, 0)}, ValueError, "shape"),
        ({"t_index_list": None}, ValueError, "t_index_list"),
        ({"t_index_list": []}, ValueError, "t_index_list"),
        ({"t_index_list": [50]}, ValueError, "t_index_list"),
        ({"t_index_list": [3, 3]}, ValueError, "descending"),
        ({"t_index_list": [1.5]}, TypeError, "t_index_list"),
        ({"t_index_list": PLACES, "timesteps": [3.0]}, ValueError, "t_index_list"),
        ({"t_index_list": None, "timesteps": [3.0, 4.0]}, ValueError, "timesteps"),
        ({"num_steps": 51}, ValueError, "num_steps"),
        ({"num_steps": 2.0}, TypeError, "num_steps"),
        ({"schedule": NoiseSchedule.flow()}, ValueError, "t_index_list"),
        ({"schedule": NoiseSchedule.linear(20)}, ValueError, "schedule"),
        ({"frame_buffer": 0}, ValueError, "frame_buffer"),
        ({"frame_buffer": 1.0}, TypeError, "frame_buffer"),
        ({"prediction_type": "noise"}, ValueError, "prediction_type"),
        ({"guidance": "half"}, ValueError, "guidance"),
        ({"guidance": "full", "unconditional": {}}, ValueError, "guidance_scale"),
        ({"guidance": "full", "guidance_scale": 2.0}, ValueError, "unconditional"),
        ({"guidance": "full", "guidance_scale": 2.0, "delta": 2.0, "unconditional": {}}, ValueError, "delta"),
        ({"guidance": "self-negative", "guidance_scale": 0.5}, ValueError, "guidance_scale"),
        ({"guidance": "self-negative", "guidance_scale": "2"}, TypeError, "guidance_scale"),
        ({"guidance": "self-negative", "guidance_scale": 2.0, "delta": math.inf}, ValueError, "delta"),
        ({"guidance": "self-negative", "guidance_scale": 2.0, "unconditional": {}}, ValueError, "unconditional"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale"),
        ({"delta": 2.0}, ValueError, "delta"),
        ({"renoise": "again"}, ValueError, "renoise"),
        ({"timestep_scaling": 0.0}, ValueError, "timestep_scaling"),
        ({"timestep_scaling": "10"}, TypeError, "timestep_scaling"),
        ({"noise": torch.zeros(3, *SHAPE)}, ValueError, "noise"),
        ({"noise": torch.zeros(4, *SHAPE), "seed": 1}, ValueError, "noise"),
        ({"seed": [1, 2]}, ValueError, "seed"),
        ({"dtype": torch.int64}, TypeError, "dtype"),
        ({"model_dtype": torch.int64}, TypeError, "model_dtype"),
        ({"conditioning": {"label": torch.zeros(3)}}, ValueError, "conditioning"),
        ({"backend": "none"}, ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        given = {"denoiser": lambda x, t: x, "schedule": latent_schedule()} | options
        batch(given.pop("denoiser"), given.pop("schedule"), **given)


@pytest.mark.parametrize(
    "given, error",
    [(3, TypeError), (torch.zeros(SHAPE), ValueError), (torch.zeros(1, 2, 4, 5), ValueError),
     (torch.zeros(1, *SHAPE, dtype=torch.int64), TypeError)],
)  # fmt: skip
def test_bad_frames(given, error):
    with pytest.raises(error, match="frames"):
        batch().step(given)


@pytest.mark.parametrize(
    "model, error",
    [
        (lambda x, t: None, TypeError),
        (lambda x, t: x[:1], ValueError),
        (lambda x, t: x.long(), TypeError),
        (lambda x, t: x * math.nan, ValueError),
    ],
)
def test_bad_denoisers(model, error):
    stream = batch(model, dtype=torch.float32, seed=0)
    with pytest.raises(error, match="denoiser"):
        stream.step(frames(1))


def test_nothing_is_checked_where_that_is_asked():
    assert bool(batch(lambda x, t: x * math.nan, check_finite=False).step(frames(1)).isnan().any())
