"""The Time-Shift Sampler against its public code, and against its rule written as a plain loop."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.ddim import DDIM  # noqa: E402
from pydenoise.samplers.ddpm import DDPM  # noqa: E402
from pydenoise.samplers.levels import NoiseSchedule  # noqa: E402
from pydenoise.samplers.plan import Conversion, Run  # noqa: E402
from pydenoise.samplers.pndm import PNDM  # noqa: E402
from pydenoise.samplers.runtime import Sampler  # noqa: E402
from pydenoise.samplers.time_shift import TimeShift  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
TIMES = [801.0, 701.0, 601.0, 501.0, 401.0, 301.0, 201.0, 101.0, 1.0]  # the public code's, for ten steps


def schedule() -> NoiseSchedule:
    """As the public code has it: betas and their product in float32."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()
    return NoiseSchedule.from_alphas_cumprod((1 - betas).cumprod(0).double())


def recorded(denoiser, told: list):
    def call(x: Tensor, t: Tensor) -> Tensor:
        told.append(t.clone())
        return denoiser(x, t)

    return call


def trajectory(solver, times=TIMES, told=None, x=None, **options):
    plain = cv.mixture().denoiser(schedule())
    denoiser = plain if told is None else recorded(plain, told)
    sampler = Sampler(denoiser, schedule(), solver, timesteps=times, backend="reference")
    return sampler.sample(cv.start() if x is None else x, return_trajectory=True, **options)


# ------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("system", ["euler", "ddpm"])  # the public code's DDPM is DDIM with an eta, here 0
def test_repo_variant_is_the_public_code(system):
    states = trajectory(TimeShift(DDIM(set_alpha_to_one=False), 40, 300, "repo")).states
    golden = cv.tensor(f"repo_tsdpm_{system}_ts_w40_c300")
    torch.testing.assert_close(states[:-1], golden, rtol=0, atol=1e-12)
    last = cv.tensor(f"repo_tsdpm_{system}_ts_w40_c300_out01")
    torch.testing.assert_close(((states[-1] + 1) / 2).clamp(0, 1), last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["repo", "paper"])
def test_variants_are_the_golden_ones(variant):
    told: list[Tensor] = []
    result = trajectory(TimeShift(DDIM(set_alpha_to_one=False), 40, 300, variant), told=told)
    torch.testing.assert_close(result.states, cv.tensor(f"own_tsdpm_{variant}_variant"), rtol=0, atol=1e-12)
    if variant == "paper":
        assert torch.equal(torch.stack(told), cv.tensor("own_tsdpm_paper_variant_tmodel").long())
    else:
        assert torch.equal(torch.stack(told), torch.tensor(TIMES).long()[:, None].expand(-1, 3))


def test_above_the_cutoff_nothing_is_shifted():
    solver = DDIM(set_alpha_to_one=False)
    plain = trajectory(solver)
    torch.testing.assert_close(plain.states[:-1], cv.tensor("repo_tsdpm_euler_plain"), rtol=0, atol=1e-12)
    for variant in ("paper", "repo"):
        assert torch.equal(trajectory(TimeShift(solver, 40, 801, variant)).states, plain.states)


# --------------------------------------------------------------------------------------------------------- plain loops


def nearest(x: Tensor, centre: float, window: int, alphas_cumprod: Tensor, low: float, high: float) -> list[int]:
    variance = x.flatten(1).var(1)
    near = [int(centre) + k for k in range(-(window // 2), window // 2 + 1)]
    near = torch.tensor([t for t in near if low < t < high and 0 <= t <= len(alphas_cumprod) - 1])
    distance = (variance[:, None] - (1 - alphas_cumprod[near])) ** 2
    return near[distance.argmin(1)].tolist()


def plain_loop(family: str, variant: str, window: int, cutoff: float, noises: list[Tensor]) -> Tensor:
    """The trajectory, sample by sample; F-PNDM's half steps rounded down."""
    bar, model = schedule().alphas_cumprod, cv.mixture().denoiser(schedule())
    finals = {"ddpm": 1.0}
    noises = list(noises)

    def alpha_bar(t: float) -> float:
        return float(bar[int(t)]) if t >= 0 else finals.get(family, float(bar[0]))

    def transfer(x, e, t, n):
        a, b = alpha_bar(t), alpha_bar(n)
        return (b / a) ** 0.5 * x + ((1 - b) ** 0.5 - (b / a * (1 - a)) ** 0.5) * e

    x, past, states = cv.start(), [[] for _ in range(3)], [cv.start()]
    for i, t in enumerate(TIMES):
        target = TIMES[i + 1] if i + 1 < len(TIMES) else -1.0
        starts, ends = [t] * 3, [target] * 3
        if i > 0 and variant == "paper" and t > cutoff:
            starts = nearest(x, t, window, bar, target, TIMES[i - 1])
        if i > 0 and variant == "repo" and target > cutoff:
            later = TIMES[i + 2] if i + 2 < len(TIMES) else -1.0
            ends = nearest(x, target, window, bar, later, t)
        z = noises.pop(0) if family == "ddpm" and i + 1 < len(TIMES) else None
        rows = []
        for b in range(3):
            now, then, one = float(starts[b]), float(ends[b]), x[b : b + 1]
            e = model(one, now)
            if family == "ddpm":
                a, n = alpha_bar(now), alpha_bar(then)
                beta = 1 - a / n
                x0 = (one - (1 - a) ** 0.5 * e) / a**0.5
                mean = (n**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - n) * one) / (1 - a)
                std = (max(beta * (1 - n) / (1 - a), 1e-20)) ** 0.5
                rows.append(mean if z is None else mean + std * z[b : b + 1])
                continue
            mix = e
            if i == 0 and family == "s":
                mix = (e + model(transfer(one, e, now, then), then)) / 2
            elif family == "s":
                mix = (3 * e - past[b][-1]) / 2
            elif i < 3:
                middle = (now + then) // 2
                second = model(transfer(one, e, now, middle), middle)
                third = model(transfer(one, second, now, middle), middle)
                fourth = model(transfer(one, third, now, then), then)
                mix = (e + 2 * second + 2 * third + fourth) / 6
            else:
                mix = (55 * e - 59 * past[b][-1] + 37 * past[b][-2] - 9 * past[b][-3]) / 24
            past[b].append(e)
            rows.append(transfer(one, mix, now, then))
        x = torch.cat(rows)
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("variant", ["repo", "paper"])
@pytest.mark.parametrize("family", ["ddpm", "s", "f"])
@pytest.mark.parametrize("window", [5, 41])  # 41: half steps that are not whole
def test_other_solvers_are_the_plain_loop(family, variant, window):
    solver = DDPM() if family == "ddpm" else PNDM(family, set_alpha_to_one=False)
    noises = list(cv.tensor("an_noise")[:8])
    given = {"noise": noises} if family == "ddpm" else {}
    states = trajectory(TimeShift(solver, window, 300, variant), **given).states
    torch.testing.assert_close(states, plain_loop(family, variant, window, 300, noises), rtol=0, atol=1e-10)


def test_candidates_stay_between_neighbouring_times_and_inside_the_schedule():
    """A window wider than the steps: each goes on, and the first level and the last are not passed."""
    told: list[Tensor] = []
    times = [999.0, 990.0, 980.0, 40.0, 5.0]
    trajectory(TimeShift(DDIM(), 100, 0, "paper"), times, told, x=5 * cv.start())
    assert told[1].max() <= 998 and told[2].tolist()[0] < 990 and all(t.min() >= 0 for t in told)
    assert len({tuple(t.tolist()) for t in told}) == len(told)


# ------------------------------------------------------------------------------------------------------------- runtime


def test_a_sample_does_not_depend_on_its_batch():
    solver = TimeShift(DDPM(), 40, 300)
    plain = cv.mixture().denoiser(schedule())
    sampler = Sampler(plain, schedule(), solver, timesteps=TIMES, backend="reference")
    whole = sampler.sample(cv.start(), seed=[1, 2, 3])
    parts = sampler.sample(cv.start(), seed=[1, 2, 3], max_batch=2)
    alone = sampler.sample(cv.start()[1:2], seed=[2])
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["repo", "paper"])
def test_float32_takes_the_same_times(variant):
    denoiser = cv.mixture().denoiser(schedule())

    def low(x, t):
        return denoiser(x.double(), t).to(x.dtype)

    solver = TimeShift(PNDM("s"), 40, 300, variant)
    fast = Sampler(low, schedule(), solver, timesteps=TIMES).sample(cv.start().float())
    exact = Sampler(denoiser, schedule(), solver, timesteps=TIMES, backend="reference").sample(cv.start())
    torch.testing.assert_close(fast.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"dynamic_threshold": 0.9}, {"clip": 1.0}])
def test_guidance_and_thresholds_reach_the_shifted_rows(options):
    """Guidance of a condition with itself, and of a scale of 1, is the plain run."""
    plain = cv.mixture().denoiser(schedule())

    def denoiser(x, t, scale):
        return plain(x, t) * scale[:, None, None, None]

    def run(solver, **given):
        sampler = Sampler(denoiser, schedule(), solver, timesteps=TIMES, backend="reference", **options, **given)
        halves = {"unconditional": {"scale": torch.full((3,), 0.5)}} if given else {}
        return sampler.sample(cv.start(), conditioning={"scale": torch.ones(3)}, **halves)

    solver = TimeShift(DDIM(), 40, 300)
    torch.testing.assert_close(run(solver, guidance_scale=1.0), run(solver), rtol=0, atol=1e-10)
    # 0.5 + 3 (1 - 0.5) = 2 times the model's output.
    assert not torch.allclose(run(solver, guidance_scale=3.0), run(solver))
    doubled = Sampler(lambda x, t: 2 * plain(x, t), schedule(), solver, timesteps=TIMES, backend="reference", **options)
    torch.testing.assert_close(run(solver, guidance_scale=3.0), doubled.sample(cv.start()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [DDIM(), PNDM("f")], ids=["ddim", "f"])
def test_choices_stay_on_the_device(solver):
    """Nothing between two launches reads a value back, which on a GPU would wait for it."""
    shift = TimeShift(solver, 40, 300)
    conversion, shape = Conversion(), torch.Size((3, 2, 4, 4))
    plan = shift.plan(schedule(), TIMES, conversion)
    control = shift.control(Run(plan, schedule(), conversion, shape, torch.float32, torch.device("cpu")))
    launched = []

    def launch(rows=None, table=None, output=True, statistics="none"):
        launched.append(rows)
        return torch.tensor([[1.0, 20.0], [2.0, 25.0], [0.0, 15.0]], dtype=torch.float64)

    with Reads() as reads:
        told = [(control.time(call), control.apply(call, launch))[0] for call in range(plan.calls)]
    assert not reads.found
    assert sum(rows is not None for rows in launched) == sum(t is not None for t in told) >= 4


class Reads(TorchDispatchMode):
    """Collects the operations that bring a value to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: TimeShift(3), TypeError, "solver"),
        (lambda: TimeShift(PNDM("fon")), ValueError, "fon"),
        (lambda: TimeShift(PNDM("f", index="repo")), ValueError, "index"),
        (lambda: TimeShift(DDIM(target="stride")), ValueError, "target"),
        (lambda: TimeShift(window=1), ValueError, "window"),
        (lambda: TimeShift(window=2.5), TypeError, "window"),
        (lambda: TimeShift(cutoff=-1), ValueError, "cutoff"),
        (lambda: TimeShift(cutoff="late"), TypeError, "cutoff"),
        (lambda: TimeShift(variant="both"), ValueError, "variant"),
        (lambda: TimeShift().plan(NoiseSchedule.flow(), [900.0, 500.0], Conversion("flow")), ValueError, "schedule"),
        (lambda: Sampler(lambda x, t: x, schedule(), TimeShift(), 4).sample(torch.zeros(2, 1)), ValueError, "x:"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
