"""Gradients through sampling: against autograd through a plain loop, memory, what is refused."""

import sys
from functools import cache
from math import comb
from pathlib import Path

import pytest
import torch
from torch import nn

from pydenoise import step_row as C
from pydenoise.reference.sampler_step import noise_of
from pydenoise.samplers import (
    DDIM,
    DDPM,
    PNDM,
    DPMSolverPP,
    Euler,
    EulerAncestral,
    EVODiff,
    Heun,
    NoiseSchedule,
    Sampler,
    TimeShift,
    UniPC,
)  # fmt: skip
from pydenoise.samplers._adjoint import interval_weights, last_step, weights
from pydenoise.samplers._checkpoint import first_states, reversal
from pydenoise.samplers._seeds import sample_keys
from pydenoise.samplers.rddm import RDDM, residual_schedule

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
VP, VE, FLOW = NoiseSchedule.linear(), NoiseSchedule.karras(sigma_max=5.0), NoiseSchedule.flow()
SHAPE = (3, 2, 4, 4)


class Net(nn.Module):
    """A smooth network, near the exact answer for normal data; ``y`` is its condition."""

    def __init__(self, schedule, prediction_type="epsilon", dtype=torch.float64, variance=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.exact, self.variance = cv.gaussian().denoiser(schedule, prediction_type), variance
        self.first = nn.Parameter(torch.randn(32, 6, generator=generator).to(dtype) * 0.2)
        self.second = nn.Parameter(torch.randn(6, 32, generator=generator).to(dtype) * 0.2)

    def forward(self, x, t, y=None):
        shift = 0.0 if y is None else 0.2 * y.view(-1, 1, 1, 1) * torch.sin(x)
        out = self.exact(x, t) + ((x.flatten(1) @ self.first).tanh() @ self.second).view_as(x) + shift
        return torch.cat([out, torch.sin(0.7 * x) + out], 1) if self.variance else out


def start(dtype=torch.float64):
    return cv.start().to(dtype).requires_grad_()


def label(dtype=torch.float64):
    return torch.tensor([-1.0, 0.3, 0.8], dtype=dtype, requires_grad=True)


def plain(sampler, x, seed=None, noise=None, y=None, other=None):
    """The run as a plain loop of torch operations, whose autograd is the measure."""
    quantile, keys = sampler._setting.quantile, None if seed is None else sample_keys(seed, None, len(x), x.device)
    noise, base, history = [] if noise is None else list(noise), x, [torch.zeros_like(x)] * C.SLOTS
    scale = sampler.first_input_scale
    for call, row in enumerate(sampler.plan.table.tolist()):
        kept = row[C.KEPT_HISTORY : C.KEPT_HISTORY + C.SLOTS]
        whole = all(time == round(time) for time in sampler.times) and sampler.schedule.kind == "vp"
        t = torch.full((len(x),), sampler.times[call], dtype=torch.int64 if whole else x.dtype)
        told = {} if y is None else {"y": y}
        out = sampler.denoiser(scale * x, t, **told)
        scale = row[C.INPUT_SCALE]
        if sampler.guidance is not None:
            unconditional = sampler.denoiser(x, t, y=other)
            out = unconditional + sampler.guidance[call] * (out - unconditional)
        std = 1.0
        if sampler.plan.learned_variance:
            out, v = out.chunk(2, 1)
            std = (row[C.LOG_SMALL] + (v + 1) / 2 * (row[C.LOG_LARGE] - row[C.LOG_SMALL])).exp()
        x0 = row[C.X0_SAMPLE] * x + row[C.X0_OUTPUT] * out
        if quantile is None:
            x0 = x0.clamp(-row[C.CLIP], row[C.CLIP])
        else:
            bound = torch.quantile(x0.flatten(1).abs(), quantile, dim=1).clamp(1, sampler._setting.most)
            bound = bound.view(-1, 1, 1, 1)
            x0 = torch.maximum(torch.minimum(x0, bound), -bound) / bound
        m = row[C.M_SAMPLE] * x + row[C.M_OUTPUT] * out + row[C.M_X0] * x0
        new = row[C.SAMPLE] * x + row[C.BASE] * base + row[C.OUTPUT] * out + row[C.M] * m
        new = new + sum(row[C.HISTORY + j] * past for j, past in enumerate(history))
        if row[C.NOISE]:
            z = noise.pop(0) if keys is None else noise_of(x, keys, torch.tensor(call + 1), x.dtype)
            new = new + row[C.NOISE] * std * z
        if any(row[C.KEPT_SAMPLE :]):
            base = row[C.KEPT_SAMPLE] * x + row[C.KEPT_BASE] * base + row[C.KEPT_M] * m + row[C.KEPT_OUT] * new
            base = base + sum(k * past for k, past in zip(kept, history, strict=True))
        if row[C.SLOT] >= 0:
            history = [m if j == row[C.SLOT] else past for j, past in enumerate(history)]
        x = new
    return x


def difference(found, wanted):
    """The largest relative difference of two lists of gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@cache
def direction(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).to(dtype)


# ------------------------------------------------------------------------------------------------ exact gradients

SOLVERS = {
    "ddim": (VP, DDIM(), {}),
    "ddim, eta": (VP, DDIM(eta=0.7), {}),
    "ddpm": (VP, DDPM(), {}),
    "pndm": (VP, PNDM(), {}),
    "pndm, runge-kutta": (VP, PNDM("f"), {}),
    "dpm-solver++ 3": (VP, DPMSolverPP(3), {}),
    "dpm-solver++ sde": (VP, DPMSolverPP(2, sde=True), {}),
    "unipc": (VP, UniPC(3), {}),
    "heun": (VP, Heun(), {}),
    "heun, sigmas": (VE, Heun(), {"prediction_type": "sample"}),
    "euler, scaled input": (VE, Euler(), {"input_scale": lambda level: 1 / (1 + level.sigma**2) ** 0.5}),
    "euler, flow": (FLOW, Euler(), {"prediction_type": "flow"}),
    "ancestral": (VE, EulerAncestral(), {}),
    "v, clip": (VP, DDIM(), {"prediction_type": "v_prediction", "clip": 0.8, "clip_rederives": True}),
    "clip, multistep": (VP, DPMSolverPP(2), {"clip": 0.8}),
    "dynamic": (VP, DPMSolverPP(2), {"dynamic_threshold": 0.8, "dynamic_max": 1.5}),
    "epsilon scale": (VP, DDIM(), {"epsilon_scale": 1.01}),
}  # fmt: skip


def of_case(name, dtype=torch.float64, steps=14, **options):
    schedule, solver, own = SOLVERS[name]
    net = Net(schedule, own.get("prediction_type", "epsilon"), dtype)
    backend = "reference" if dtype == torch.float64 else "auto"
    return Sampler(net, schedule, solver, steps, backend=backend, **own, **options)


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("name", SOLVERS)
def test_checkpoint_equals_a_plain_loop(name, slots):
    sampler, x, y = of_case(name), start(), label()
    inputs = [x, y, *sampler.denoiser.parameters()]
    found = sampler.sample(x, conditioning={"y": y}, seed=3, differentiable="checkpoint", checkpoints=slots)
    wanted = plain(sampler, x, 3, y=y)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(found, sampler.sample(x, conditioning={"y": y}, seed=3))
    found, wanted = (torch.autograd.grad((r * direction()).sum(), inputs) for r in (found, wanted))
    assert difference(found, wanted) < 1e-10


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++ 3", "heun", "clip, multistep"])
def test_checkpoint_in_float32(name):
    sampler, x, y = of_case(name, torch.float32), start(torch.float32), label(torch.float32)
    inputs = [x, y, *sampler.denoiser.parameters()]
    runs = (
        sampler.sample(x, conditioning={"y": y}, seed=3, differentiable="checkpoint", checkpoints=4),
        plain(sampler, x, 3, y=y),
    )
    found, wanted = (torch.autograd.grad((r * direction(torch.float32)).sum(), inputs) for r in runs)
    assert difference(found, wanted) < 1e-4


@pytest.mark.parametrize("name", ["ddim, eta", "pndm", "unipc", "heun", "dynamic"])
def test_gradcheck(name):
    schedule, solver, own = SOLVERS[name]
    gain = torch.linspace(0.5, 1.0, 2, dtype=torch.float64)

    def denoise(x, t, y):
        return torch.tanh(x * y[:, None]) * gain

    sampler = Sampler(denoise, schedule, solver, 12, backend="reference", **own)
    x = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.tensor([0.5, -0.4], dtype=torch.float64, requires_grad=True)

    def run(x, y):
        return sampler.sample(x, conditioning={"y": y}, seed=1, differentiable="checkpoint", checkpoints=3)

    assert torch.autograd.gradcheck(run, (x, y))


@pytest.mark.parametrize("way", ["checkpoint", "adjoint"])
@pytest.mark.parametrize("scale", [2.0, "each"])
def test_guidance(way, scale):
    """Gradients reach the condition and what replaces it, through pieces of a batch."""
    steps = 12 if way == "checkpoint" else 200
    scale = torch.linspace(1.5, 2.5, steps).tolist() if scale == "each" else scale
    solver = DPMSolverPP(2, spacing="uniform_log_snr")
    sampler = Sampler(Net(VP), VP, solver, steps, guidance_scale=scale, backend="reference")
    x, y, other = start(), label(), (label().detach() * 0.1).requires_grad_()
    inputs = [x, y, other, *sampler.denoiser.parameters()]
    told = {"conditioning": {"y": y}, "unconditional": {"y": other}}
    whole = sampler.sample(x, **told, differentiable=way)
    wanted = torch.autograd.grad((plain(sampler, x, y=y, other=other) * direction()).sum(), inputs)
    pieces = sampler.sample(x, **told, differentiable=way, max_batch=2)
    for result in (whole, pieces):
        found = torch.autograd.grad((result * direction()).sum(), inputs)
        assert difference(found, wanted) < (1e-10 if way == "checkpoint" else 3e-3)


def test_given_noise_has_gradients():
    sampler, x = of_case("ddim, eta", steps=6), start()
    z = torch.randn(len(sampler.plan.noisy_calls), *SHAPE, dtype=torch.float64).requires_grad_()
    runs = sampler.sample(x, noise=z, differentiable="checkpoint"), plain(sampler, x, noise=z)
    found, wanted = (torch.autograd.grad((r * direction()).sum(), [x, z]) for r in runs)
    assert difference(found, wanted) < 1e-10


@pytest.mark.parametrize("given", [False, True])
def test_learned_variance(given):
    net = Net(VP, variance=True)
    sampler, x = Sampler(net, VP, DDPM("learned_range"), 6, backend="reference"), start()
    z = list(torch.randn(len(sampler.plan.noisy_calls), *SHAPE, dtype=torch.float64)) if given else None
    seed = None if given else 3
    runs = sampler.sample(x, seed=seed, noise=z, differentiable="checkpoint"), plain(sampler, x, seed, z)
    found, wanted = (torch.autograd.grad((r * direction()).sum(), [x, *net.parameters()]) for r in runs)
    assert difference(found, wanted) < 1e-10


def test_variance_that_is_not_used():
    net = Net(VP, variance=True)
    sampler, x = Sampler(net, VP, DDIM(), 6, learned_variance=True, backend="reference"), start()
    plain_net = Sampler(lambda x, t: net(x, t)[:, :2], VP, DDIM(), 6, backend="reference")
    runs = sampler.sample(x, differentiable="checkpoint"), plain(plain_net, x)
    found, wanted = (torch.autograd.grad((r * direction()).sum(), [x, *net.parameters()]) for r in runs)
    assert difference(found, wanted) < 1e-10


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("head, eta", [("both", 0.0), ("both", 0.6), ("residual", 0.6)])
def test_restoration(head, eta, given):
    """A degraded sample enters by the start and in every step."""

    def denoise(x, t):
        residual, noise = (0.5 * x).sin(), (0.3 * x).cos()
        return torch.cat([residual, noise], 1) if head == "both" else residual

    sampler = Sampler(denoise, residual_schedule(20), RDDM(head, eta), 4, backend="reference")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 3, dtype=torch.float64, generator=generator).requires_grad_()
    z = torch.randn(1 + len(sampler.plan.noisy_calls), 1, 3, dtype=torch.float64, generator=generator)
    options = {"differentiable": "checkpoint", "checkpoints": 2}
    if given:
        assert torch.autograd.gradcheck(lambda y, z: sampler.sample(y, noise=z, **options), (y, z.requires_grad_()))
    else:
        assert torch.autograd.gradcheck(lambda y: sampler.sample(y, seed=2, **options), y)
    with pytest.raises(ValueError, match="differentiable: "):
        sampler.sample(y, differentiable="adjoint")


# ------------------------------------------------------------------------------------------------------ adjoint ODE

SMOOTH = {
    "dpm-solver++": (VP, DPMSolverPP(2, spacing="uniform_log_snr", final="sigma_min"), {}),
    "unipc": (VP, UniPC(3, spacing="uniform_log_snr"), {}),
    "pndm": (VP, PNDM(), {}),
    "v": (VP, DPMSolverPP(2, spacing="uniform_log_snr"), {"prediction_type": "v_prediction"}),
    "sigmas": (VE, Heun(), {"prediction_type": "sample"}),
    "flow": (FLOW, Heun(), {"prediction_type": "flow"}),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_adjoint_equals_autograd(name):
    schedule, solver, own = SMOOTH[name]
    net = Net(schedule, own.get("prediction_type", "epsilon"), torch.float32)
    sampler = Sampler(net, schedule, solver, 300, **own)
    x, y = start(torch.float32), label(torch.float32)
    with torch.no_grad():
        x.mul_(sampler.plan.initial_scale)
    inputs = [x, y, *net.parameters()]
    runs = sampler.sample(x, conditioning={"y": y}, differentiable="adjoint"), plain(sampler, x, y=y)
    found, wanted = (torch.autograd.grad((r * direction(torch.float32)).sum(), inputs) for r in runs)
    assert difference(found, wanted) < 1e-3


@pytest.mark.parametrize("steps", [40, 80])
def test_adjoint_of_a_normal_distribution(steps):
    """The exact flow is linear there: its gradient is the ratio of the standard deviations."""
    data, solver = cv.gaussian(), DDIM(spacing="uniform_log_snr", set_alpha_to_one=False)
    schedule = cv.uniform_grid(steps)
    sampler = Sampler(data.denoiser(schedule), schedule, solver, timesteps=schedule.times.flip(0)[:-1].tolist(),
                      backend="reference")  # fmt: skip
    x = start()
    found = torch.autograd.grad((sampler.sample(x, differentiable="adjoint") * direction()).sum(), x)[0]
    ends = [level.alpha**2 * data.variance + level.sigma**2 for level in (schedule.last, schedule.first)]
    wanted = direction() * (ends[1] / ends[0]).sqrt()
    assert difference([found], [wanted]) < 20 / steps**2, "of the second order, though the run is of the first"


def test_weights_integrate_polynomials():
    places = [0.3, 0.1, -0.2]
    for power in range(3):
        got = sum(w * p**power for w, p in zip(weights(places, 0.1, 0.3), places, strict=True))
        assert got == pytest.approx((0.3 ** (power + 1) - 0.1 ** (power + 1)) / (power + 1))
    tiny = [1e-5 * place for place in places]
    assert weights(tiny, 1e-6, 3e-6) == pytest.approx([1e-5 * w for w in weights(places, 0.1, 0.3)])
    assert interval_weights([0.0, 1.0])[0] == (pytest.approx([1.0]), pytest.approx([0.5, 0.5]))


@pytest.mark.parametrize("name", SMOOTH)
def test_the_end_of_a_run(name):
    schedule, solver, own = SMOOTH[name]
    sampler = Sampler(Net(schedule), schedule, solver, 12, **own)
    call, end = last_step(sampler.plan, sampler.conversion)
    wanted = schedule.first if name == "dpm-solver++" else None
    assert end.sigma == pytest.approx(wanted.sigma if wanted else 0, abs=1e-9) and 0 < call < sampler.plan.calls
    assert end.alpha == pytest.approx(wanted.alpha if wanted else 1)


# ---------------------------------------------------------------------------------------------------------- memory


def peak_bytes(sampler, way):
    """The most memory that torch's allocator holds during a run and its gradients, above what there was."""
    x = torch.randn(2, 2, 48, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        sampler.sample(x, differentiable=way).square().sum().backward()
    held = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > x.nbytes
    return most


@pytest.mark.parametrize("way", ["checkpoint", "adjoint"])
def test_memory_is_flat(way):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    peaks = [
        peak_bytes(Sampler(lambda x, t: net(x), VP, DPMSolverPP(3), steps), way) for steps in (20, 200)
    ]  # fmt: skip
    assert peaks[1] <= 1.2 * peaks[0]


# --------------------------------------------------------------------------------------------- order of repetition


def walk(calls, slots):
    """(how often a call is repeated, the most states at a time) of a way back, checked on the way."""
    stored, undone, repeated, most = set(first_states(calls, slots)), [], 0, 0
    for action, source, target in reversal(0, calls, slots, stored):
        most = max(most, len(stored))
        if action == "drop":
            stored.remove(target)
            continue
        assert source in stored
        repeated += target - source
        if action == "store":
            stored.add(target)
        else:
            undone.append(target)
    assert undone == list(reversed(range(calls))) and stored == {0}
    return repeated, max(most, len(stored))


@cache
def fewest(calls, slots):
    """Repetitions of the best way back, the run itself among them, by trying all places for the next state."""
    if calls == 1:
        return 0
    if slots == 1:
        return calls * (calls - 1) // 2
    return min(m + fewest(calls - m, slots - 1) + fewest(m, slots) for m in range(1, calls))


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16])
def test_repetitions_are_the_fewest(slots):
    for calls in range(1, 41):
        repeated, most = walk(calls, slots)
        assert most <= slots
        assert repeated + first_states(calls, slots)[-1] == fewest(calls, slots)
    assert walk(200, 16)[0] < 2 * 200 and comb(18, 16) < 200


# ------------------------------------------------------------------------------------------------- how it is called


def test_other_runs_in_between():
    sampler, x = of_case("unipc"), start()
    alone = torch.autograd.grad(sampler.sample(x, differentiable="checkpoint").sum(), x)[0]
    result = sampler.sample(x, differentiable="checkpoint")
    sampler.sample(start() + 1, differentiable="checkpoint")
    sampler.sample(start() + 1)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], alone)


@pytest.mark.parametrize("way", ["checkpoint", "adjoint"])
def test_backward_twice(way):
    sampler, x = of_case("dpm-solver++ 3"), start()
    result = sampler.sample(x, differentiable=way)
    first = torch.autograd.grad(result.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], first)


def test_without_gradients_it_is_a_plain_run():
    sampler, x = of_case("ddim"), start()
    with torch.no_grad():
        assert not sampler.sample(x, differentiable="checkpoint").requires_grad
    assert not sampler.sample(x).requires_grad, "nothing was asked for"
    frozen = Sampler(lambda x, t: 0.1 * x, VP, DDIM(), 4, backend="reference")
    assert not frozen.sample(x.detach(), differentiable="checkpoint").requires_grad


def test_parameters_alone_from_generated_noise():
    sampler = of_case("ddpm", torch.float32, steps=5)
    sampler.sample(shape=SHAPE, seed=0, differentiable="checkpoint").sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in sampler.denoiser.parameters())
    seen = []
    sampler.sample(shape=SHAPE, seed=0, differentiable="checkpoint", callback=lambda info: seen.append(info.call))
    assert seen == list(range(5))


@pytest.mark.parametrize("way", ["checkpoint", "adjoint"])
def test_empty_batch(way):
    x = start()[:0].detach().requires_grad_()
    result = Sampler(lambda x, t: 0.1 * x, VP, DDIM(), 3, backend="reference").sample(x, differentiable=way)
    assert result.shape == x.shape and torch.autograd.grad(result.sum(), x)[0].shape == x.shape


def test_what_a_denoiser_holds():
    net = Net(VP)
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    sampler = Sampler(lambda x, t: net(x, t) * gain, VP, DDIM(), 4, backend="reference")
    sampler.sample(start(), differentiable="checkpoint").sum().backward()
    assert gain.grad is not None and net.first.grad is not None, "leaves are found in any callable"
    computed = 2 * gain
    sampler = Sampler(lambda x, t: net(x, t) * computed, VP, DDIM(), 4, backend="reference")
    with pytest.raises(ValueError, match="denoiser: uses a tensor that was computed, .* give it as conditioning"):
        sampler.sample(start(), differentiable="checkpoint")


def test_a_parameter_that_changed_since():
    sampler = of_case("ddim", steps=4)
    result = sampler.sample(start(), differentiable="checkpoint")
    with torch.no_grad():
        sampler.denoiser.first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("way", ["checkpoint", "adjoint"])
def test_a_denoiser_with_dropout(way):
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.1), nn.Linear(64, 4))
    sampler, x = Sampler(lambda x, t: net(x), VP, DDIM(), 4), torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="denoiser: returned something else .* dropout"):
        sampler.sample(x, differentiable=way).sum().backward()
    net.eval()
    sampler.sample(x, differentiable=way).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    sampler = of_case("dpm-solver++ 3", dtype)
    x, exact = start(dtype), start()
    found = torch.autograd.grad((sampler.sample(x, differentiable="checkpoint") * direction(dtype)).sum(), x)[0]
    wanted = of_case("dpm-solver++ 3")
    wanted = torch.autograd.grad((wanted.sample(exact, differentiable="checkpoint") * direction()).sum(), exact)[0]
    assert found.dtype == dtype and difference([found.double()], [wanted]) < 0.1


def test_autocast():
    linear = nn.Linear(4, 4)
    dtypes = set()

    def denoise(x, t):
        out = linear(x)
        dtypes.add(out.dtype)
        return out.float()

    sampler, x = Sampler(denoise, VP, DDIM(), 4), torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = sampler.sample(x, differentiable="checkpoint")
    result.sum().backward()
    assert dtypes == {torch.bfloat16}, "on the way back, too"


class Observer:
    """Knows of every call, and what it means alone."""

    def __init__(self):
        self.calls = []

    def begin_step(self, call, calls):
        self.calls.append(call)

    def graph_key(self, call):
        return 0


def test_observers():
    observer = Observer()
    sampler = of_case("ddim", steps=4, observers=[observer])
    result = sampler.sample(start(), differentiable="checkpoint", checkpoints=2)
    assert observer.calls == [0, 1, 2, 3]
    result.sum().backward()
    assert len(observer.calls) > 8
    blind = type("Blind", (), {"begin_step": lambda self, call, calls: None})()
    with pytest.raises(ValueError, match="differentiable: calls are repeated .* Blind"):
        of_case("ddim", observers=[blind]).sample(start(), differentiable="checkpoint")


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, arguments, error, message",
    [
        ({}, {"differentiable": "exact"}, ValueError, "differentiable: expected 'checkpoint' or 'adjoint'"),
        ({}, {"differentiable": True}, ValueError, "differentiable: expected"),
        ({}, {"checkpoints": 4}, ValueError, "checkpoints: given without"),
        ({}, {"differentiable": "adjoint", "checkpoints": 4}, ValueError, "checkpoints: 'adjoint' stores no"),
        ({}, {"differentiable": "checkpoint", "checkpoints": 0}, ValueError, "checkpoints: expected at least 1"),
        ({}, {"differentiable": "checkpoint", "checkpoints": 2.5}, TypeError, "checkpoints: expected an int"),
        ({}, {"differentiable": "checkpoint", "return_trajectory": True}, ValueError, "return_trajectory"),
        ({"graph": True}, {"differentiable": "checkpoint"}, ValueError, "graph: no CUDA graph"),
        ({"solver": EVODiff()}, {"differentiable": "checkpoint"}, ValueError, "differentiable: the coeff.* EVODiff"),
        ({"solver": TimeShift(DDIM())}, {"differentiable": "adjoint"}, ValueError, "differentiable: the coeff.*"),
        ({"solver": DDIM(eta=1.0)}, {"differentiable": "adjoint"}, ValueError, "without noise"),
        ({"clip": 1.0}, {"differentiable": "adjoint"}, ValueError, "without clip"),
        ({"dynamic_threshold": 0.9}, {"differentiable": "adjoint"}, ValueError, "without clip or dynamic"),
        ({"epsilon_scale": 1.1}, {"differentiable": "adjoint"}, ValueError, "epsilon_scale"),
    ],
)
def test_bad_input(options, arguments, error, message):
    solver = options.pop("solver", DDIM())
    sampler = Sampler(Net(VP), VP, solver, 4, backend="reference", **options)
    with pytest.raises(error, match=message):
        sampler.sample(start(), **arguments)


def test_a_denoiser_that_fails_is_named():
    sampler = Sampler(lambda x, t: None, VP, DDIM(), 4)
    with pytest.raises(TypeError, match="denoiser: expected a tensor at call 0"):
        sampler.sample(torch.randn(2, 3), differentiable="checkpoint")
    sampler = Sampler(lambda x, t: x * float("nan"), VP, DDIM(), 4)
    with pytest.raises(ValueError, match="denoiser: the sample is not finite after call 0"):
        sampler.sample(torch.randn(2, 3), differentiable="adjoint")
