"""The loop around a denoiser: buffers, batches, guidance, noise, what a callback sees, and what is refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydenoise import samplers
from pydenoise.ops import registry
from pydenoise.samplers import DDIM, NoiseSchedule, Sampler

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 2, 4, 6)


def noise_of(x, t, **conditioning):
    """A denoiser whose output depends on all that it is told."""
    shift = sum(v.view(-1, 1, 1, 1).to(x.dtype) for v in conditioning.values()) if conditioning else 0
    return 0.3 * x + 1e-4 * t.view(-1, 1, 1, 1).to(x.dtype) + shift


def sampler(denoiser=noise_of, steps=5, solver=None, **options):
    return Sampler(denoiser, SCHEDULE, solver or DDIM(), steps, **options)


NOISY = DDIM(eta=1.0)

# ----------------------------------------------------------------------------------------------------------- batches


def test_start_is_not_changed_and_the_result_is_ordinary():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    result = sampler().sample(x)
    assert torch.equal(x, before) and not result.is_inference()
    result.requires_grad_().sum().backward()


def test_results_do_not_share_buffers():
    run = sampler()
    first = run.sample(shape=SHAPE, seed=1)
    kept = first.clone()
    run.sample(shape=SHAPE, seed=2)
    assert torch.equal(first, kept)
    assert torch.equal(run.sample(shape=SHAPE, seed=1), kept)


@pytest.mark.parametrize("solver", [DDIM(), NOISY], ids=["ddim", "ddim eta 1"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_of_a_batch_give_the_same(solver, size):
    y = torch.arange(3) * 0.1
    run = sampler(solver=solver, guidance_scale=2.0)
    options = {"shape": SHAPE, "seed": 3, "conditioning": {"y": y}, "unconditional": {"y": y * 0}}
    whole = run.sample(**options, return_trajectory=True)
    parts = run.sample(**options, return_trajectory=True, max_batch=size)
    assert torch.equal(whole.states, parts.states) and whole.times == parts.times
    assert torch.equal(whole.sample, run.sample(**options, max_batch=size))


def test_seeds_and_generators():
    run = sampler(solver=NOISY)
    seeds = run.sample(shape=SHAPE, seed=[4, 5, 6])
    assert torch.equal(run.sample(shape=(1, *SHAPE[1:]), seed=[5])[0], seeds[1])
    make = lambda: [torch.Generator().manual_seed(s) for s in (1, 2, 3)]  # noqa: E731
    assert torch.equal(run.sample(shape=SHAPE, generator=make()), run.sample(shape=SHAPE, generator=make()))
    one = torch.Generator().manual_seed(9)
    first, second = (run.sample(shape=SHAPE, generator=one) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    drawn = run.sample(shape=SHAPE)
    torch.manual_seed(0)
    assert torch.equal(run.sample(shape=SHAPE), drawn)


def test_noise_from_outside():
    run = sampler(solver=NOISY)
    x = torch.randn(SHAPE)
    needed = int((run.plan.table[:, 12] != 0).sum())
    z = torch.randn(needed, *SHAPE)
    assert torch.equal(run.sample(x, noise=z), run.sample(x, noise=list(z)))
    assert not torch.equal(run.sample(x, noise=z), run.sample(x, noise=-z))
    with pytest.raises(ValueError, match=f"noise: expected one tensor for each of {needed} calls"):
        run.sample(x, noise=z[1:])
    with pytest.raises(ValueError, match=r"noise\[0\]: expected shape"):
        run.sample(x, noise=z[:, :1])


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 3), (5,), (1, 2, 3, 4, 5)])
def test_shapes(shape):
    result = sampler(lambda x, t: 0.1 * x, solver=NOISY).sample(shape=shape, seed=0)
    assert result.shape == shape and result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    run = sampler(lambda x, t: 0.1 * x, backend="reference" if dtype == torch.float64 else "auto")
    result = run.sample(shape=SHAPE, seed=0, dtype=dtype)
    exact = sampler(lambda x, t: 0.1 * x, backend="reference").sample(shape=SHAPE, seed=0, dtype=torch.float64)
    assert result.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01, torch.float64: 0.0}[dtype]
    assert (result.double() - exact).abs().max() <= bound * exact.abs().max()


def test_layouts():
    x = torch.randn(3, 4, 6, 2).permute(0, 3, 1, 2)
    expected = sampler().sample(x.contiguous())
    assert torch.equal(sampler().sample(x), expected)
    last = sampler(lambda x, t: noise_of(x, t).to(memory_format=torch.channels_last))
    assert torch.equal(last.sample(x), expected)


# ---------------------------------------------------------------------------------------------------------- the model


def test_guidance_is_the_formula():
    y = torch.arange(3) * 0.1
    guided = sampler(guidance_scale=3.0).sample(
        torch.ones(SHAPE), conditioning={"y": y}, unconditional={"y": torch.zeros(1)}
    )

    def combined(x, t):
        u, c = noise_of(x, t, y=y * 0), noise_of(x, t, y=y)
        return u + 3.0 * (c - u)

    torch.testing.assert_close(guided, sampler(combined).sample(torch.ones(SHAPE)), rtol=2e-6, atol=2e-6)


def test_guidance_for_each_call():
    y = torch.ones(3)
    options = {"conditioning": {"y": y}, "unconditional": {"y": y * 0}}
    same = sampler(guidance_scale=2.0).sample(torch.ones(SHAPE), **options)
    assert torch.equal(sampler(guidance_scale=[2.0] * 5).sample(torch.ones(SHAPE), **options), same)
    assert not torch.equal(sampler(guidance_scale=[2.0] * 4 + [9.0]).sample(torch.ones(SHAPE), **options), same)
    with pytest.raises(ValueError, match="guidance_scale: expected a number, or one for each of 5 calls, got 3"):
        sampler(guidance_scale=[1.0, 2.0, 3.0])


def test_the_model_is_told_times_and_conditions():
    seen = []

    def denoiser(x, t, text, scale):
        seen.append((x.shape[0], t.clone(), text["a"].clone(), scale))
        return 0.1 * x

    run = sampler(denoiser, guidance_scale=2.0)
    condition = {"text": {"a": torch.ones(3, 2)}, "scale": 7}
    run.sample(
        shape=SHAPE, seed=0, conditioning=condition, unconditional={"text": {"a": torch.zeros(3, 2)}, "scale": 7}
    )
    assert [entry[0] for entry in seen] == [6] * 5 and all(entry[3] == 7 for entry in seen)
    assert [int(entry[1][0]) for entry in seen] == [int(t) for t in run.plan.times]
    assert seen[0][1].dtype == torch.int64 and seen[0][1].shape == (6,)
    assert torch.equal(seen[0][2], torch.cat([torch.zeros(3, 2), torch.ones(3, 2)]))


def test_time_table_replaces_what_the_model_is_told():
    seen = []

    def denoiser(x, t):
        seen.append(float(t[0]))
        return 0.1 * x

    table = [900.5, 700.0, 500.0, 300.0, 100.0]
    result = sampler(denoiser, time_table=table).sample(torch.ones(SHAPE))
    assert seen == table
    assert torch.equal(result, sampler(lambda x, t: 0.1 * x).sample(torch.ones(SHAPE)))


def test_model_dtype_and_input_scale():
    seen = []

    def denoiser(x, t):
        seen.append(x.clone())
        return (0.1 * x.float()).to(x.dtype)

    run = sampler(denoiser, model_dtype=torch.bfloat16, input_scale=lambda level: 1 / (1 + level.sigma))
    states = run.sample(shape=SHAPE, seed=0, return_trajectory=True).states
    for call, level in enumerate(run.plan.levels):
        wanted = (states[call] / (1 + level.sigma)).bfloat16()
        torch.testing.assert_close(seen[call], wanted, rtol=0.008, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", [DDIM(), NOISY], ids=["ddim", "ddim eta 1"])
def test_a_variance_that_the_solver_does_not_use(solver, guided):
    """A model with learned variance under a solver without: the second half of its channels is left alone."""
    y = torch.ones(3)
    options = {"conditioning": {"y": y}, "unconditional": {"y": y * 0}} if guided else {}
    scale = 2.0 if guided else None

    def both(x, t, **conditioning):
        return torch.cat([noise_of(x, t, **conditioning), torch.full_like(x, torch.nan)], 1)

    wanted = sampler(solver=solver, guidance_scale=scale).sample(torch.ones(SHAPE), seed=0, **options)
    run = sampler(both, solver=solver, guidance_scale=scale, learned_variance=True)
    assert torch.equal(run.sample(torch.ones(SHAPE), seed=0, **options), wanted)


class Observer:
    def __init__(self):
        self.told = []

    def begin_step(self, step, num_steps):
        self.told.append((step, num_steps))


def test_observers_hear_of_every_call():
    observer = Observer()
    sampler(observers=[observer]).sample(shape=SHAPE, seed=0)
    assert observer.told == [(i, 5) for i in range(5)]
    with pytest.raises(TypeError, match="observers: int has no begin_step"):
        sampler(observers=[3])


def test_callback_and_preview():
    told = []
    run = sampler(lambda x, t: 0.2 * x)
    run.sample(
        torch.ones(SHAPE), callback=lambda info: told.append((info, info.sample.clone(), info.x0.clone())), preview=True
    )
    states = run.sample(torch.ones(SHAPE), return_trajectory=True).states
    assert [info.call for info, _, _ in told] == list(range(5)) and all(info.ends for info, _, _ in told)
    for (info, sample, x0), level, before in zip(told, run.plan.levels, states, strict=False):
        assert torch.equal(sample, states[info.call + 1]) and info.time == run.plan.times[info.call]
        torch.testing.assert_close(x0, (before - level.sigma * 0.2 * before) / level.alpha)
    without = []
    run.sample(torch.ones(SHAPE), callback=lambda info: without.append(info.x0))
    assert without == [None] * 5


def test_progress(capsys):
    sampler().sample(shape=SHAPE, seed=0, progress=True)
    assert "DDIM: step 5/5" in capsys.readouterr().err


def test_entering_late():
    """As image-to-image does: the last steps, from a noised image; a multistep solver begins anew."""
    run = sampler(guidance_scale=[1.0, 2.0, 3.0, 4.0, 5.0], solver=samplers.DPMSolverPP(1, final="sigma_min"))
    y = torch.ones(3)
    options = {"conditioning": {"y": y}, "unconditional": {"y": y * 0}}
    states = run.sample(torch.ones(SHAPE), return_trajectory=True, **options).states
    torch.testing.assert_close(run.from_step(2).sample(states[2], **options), states[-1])
    many = sampler(steps=20, solver=samplers.DPMSolverPP(3))
    alone = Sampler(noise_of, SCHEDULE, samplers.DPMSolverPP(3), timesteps=many.timesteps[8:])
    assert torch.equal(many.from_step(8).sample(torch.ones(SHAPE)), alone.sample(torch.ones(SHAPE)))
    with pytest.raises(ValueError, match="step: expected a step from 0 to 4, got 5"):
        run.from_step(5)
    with pytest.raises(TypeError, match="step: expected an int"):
        run.from_step(0.5)
    with pytest.raises(ValueError, match="guidance_scale: one for each call"):
        sampler(solver=samplers.Heun(), guidance_scale=[1.0] * 9).from_step(1)


# ----------------------------------------------------------------------------------------------------- what it costs


class Count(TorchDispatchMode):
    """Counts torch operations, and those among them that make a host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.waits += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(all(row.name != "cpu" for row in registry.rows("sampler_step")), reason="no compiled CPU kernels")
def test_no_torch_operation_between_two_calls():
    """In steady state the step on a CPU neither allocates nor dispatches."""
    output = torch.zeros(SHAPE)
    counts = []
    for steps in (5, 25):
        run = sampler(lambda x, t: output, steps, NOISY)
        run.sample(shape=SHAPE, seed=0)
        with Count() as mode:
            run.sample(torch.ones(SHAPE), seed=0)
        counts.append(mode.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("guided", [False, True])
def test_body_of_a_graph(guided):
    """What is captured on CUDA, run here call by call: the loop's result, and no value read by the host."""
    y = torch.ones(3)
    run = sampler(solver=NOISY, guidance_scale=2.0 if guided else None)
    conditions = {"conditioning": {"y": y}, "unconditional": {"y": y * 0}} if guided else {}
    wanted = run.sample(torch.ones(SHAPE), seed=1, **conditions)
    (loop,) = run._loops.values()
    from pydenoise.samplers._seeds import noise_keys

    told = {"y": torch.cat([y * 0, y])} if guided else {}
    with torch.inference_mode(), Count() as mode:
        loop.begin(torch.ones(SHAPE), noise_keys(1, None, 3, 1, torch.device("cpu"))[:, 0])
        loop._graphs._index.zero_()
        for _ in range(run.plan.calls):
            loop._graphs.body(noise_of, told)
    assert mode.waits == 0
    torch.testing.assert_close(loop.sample, wanted, rtol=1e-6, atol=1e-6)


def test_graphs_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="graph: no CUDA graph, because the sample is on cpu"):
        sampler(graph=True).sample(shape=SHAPE)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("error", "message", "denoiser"),
    [
        (ValueError, "denoiser: expected shape .* at call 0", lambda x, t: x[:, :1]),
        (TypeError, "denoiser: expected a tensor at call 0, got dict", lambda x, t: {"sample": x}),
        (TypeError, "denoiser: expected a floating-point tensor at call 0", lambda x, t: x.int()),
        (TypeError, "denoiser: float64 at call 0", lambda x, t: x.double()),
        (ValueError, r"not finite after call 2 of 5 \(time 400\)", lambda x, t: x / (t.view(-1, 1, 1, 1) - 400)),
    ],
)
def test_bad_denoisers(error, message, denoiser):
    with pytest.raises(error, match=message):
        sampler(denoiser).sample(torch.ones(SHAPE))


def test_unchecked_denoisers_may_return_anything():
    result = sampler(lambda x, t: x * torch.nan, check_finite=False).sample(torch.ones(SHAPE))
    assert result.isnan().all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "num_steps: expected num_steps or timesteps", {"steps": None}),
        (ValueError, "num_steps: expected at least 1", {"steps": 0}),
        (TypeError, "num_steps: expected an int", {"steps": 2.5}),
        (ValueError, "num_steps", {"steps": 1001}),
        (ValueError, "timesteps: expected descending", {"steps": None, "timesteps": [10, 20]}),
        (ValueError, "timesteps", {"steps": None, "timesteps": [2000, 20]}),
        (ValueError, "num_steps: 5 does not fit 2", {"timesteps": [20, 10]}),
        (ValueError, "time_table: expected a time for each of 5", {"time_table": [1.0]}),
        (ValueError, "prediction_type: expected one of epsilon", {"prediction_type": "noise"}),
        (ValueError, "clip: expected a positive", {"clip": -1.0}),
        (ValueError, "dynamic_threshold: expected either", {"clip": 1.0, "dynamic_threshold": 0.9}),
        (ValueError, "dynamic_threshold: expected a quantile", {"dynamic_threshold": 1.5}),
        (ValueError, "dynamic_max: expected a number from 1", {"dynamic_threshold": 0.9, "dynamic_max": 0.5}),
        (TypeError, "denoiser: expected a callable", {"denoiser": 3}),
        (TypeError, "solver: expected a solver", {"solver": "ddim"}),
    ],
)
def test_bad_options(error, message, options):
    with pytest.raises(error, match=message):
        sampler(**options)


def test_a_schedule_is_needed():
    with pytest.raises(TypeError, match="schedule: expected a NoiseSchedule"):
        Sampler(noise_of, None, DDIM(), 5)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "x: expected either x or shape", {}),
        (ValueError, "x: expected either x or shape, got both", {"x": torch.ones(SHAPE), "shape": SHAPE}),
        (TypeError, "x: expected a tensor", {"x": [1.0]}),
        (ValueError, "x: expected a floating-point", {"x": torch.ones(SHAPE).int()}),
        (ValueError, "max_batch: expected a positive", {"shape": SHAPE, "max_batch": 0}),
        (TypeError, "conditioning: expected a mapping", {"shape": SHAPE, "conditioning": [1]}),
        (ValueError, r"conditioning\['y'\]: expected a batch of 3 or 1",
         {"shape": SHAPE, "conditioning": {"y": torch.ones(2)}}),
        (ValueError, "unconditional: given without a guidance", {"shape": SHAPE, "unconditional": {}}),
        (ValueError, "seed: expected either", {"shape": SHAPE, "seed": 1, "generator": torch.Generator()}),
        (ValueError, "seed: expected one for each of 3", {"shape": SHAPE, "seed": [1]}),
        (TypeError, "dtype: expected", {"shape": SHAPE, "dtype": torch.int32}),
    ],
)  # fmt: skip
def test_bad_calls(error, message, options):
    with pytest.raises(error, match=message):
        sampler().sample(**options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("unconditional: guidance needs", {"conditioning": {"y": torch.ones(3)}}),
        ("unconditional: expected the names", {"conditioning": {"y": torch.ones(3)}, "unconditional": {}}),
        ("only tensors of a batch", {"conditioning": {"y": 3}, "unconditional": {"y": 4}}),
        ("expected torch.float32", {"conditioning": {"y": torch.ones(3)}, "unconditional": {"y": torch.ones(3).int()}}),
    ],
)
def test_bad_guidance(message, options):
    with pytest.raises(ValueError, match=message):
        sampler(guidance_scale=2.0).sample(shape=SHAPE, **options)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'Eular'"):
        samplers.Eular  # noqa: B018
    assert "DDIM" in dir(samplers)


@pytest.mark.parametrize("seed", [3, 2**63 + 5, -1, (4, 5, 6)])
def test_keys_of_samples_are_those_of_positions(seed):
    from pydenoise.samplers._seeds import noise_keys, sample_keys

    expected = noise_keys(seed, None, 3, 1, torch.device("cpu"))[:, 0]
    assert torch.equal(sample_keys(seed, None, 3, torch.device("cpu")), expected)
    assert sample_keys(1, None, 0, torch.device("cpu")).shape == (0, 2)
