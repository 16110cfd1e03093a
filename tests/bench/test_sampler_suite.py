"""The sampler suite: its cases, floors, providers and reference, on tiny stand-ins. No time is asserted."""

import math

import pytest
import torch

from pydenoise import step_row as C
from pydenoise.benchmarks import sampler, sampler_cases, sampler_loop, sampler_peers, sampler_tuned, suites
from pydenoise.benchmarks.cases import Bar
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, choose
from pydenoise.benchmarks.sampler_cases import LoopBench, NoiseBench, StepBench

pytestmark = pytest.mark.usefixtures("one_thread")

PEAKS = Peaks(100e9, 200e9, {1 << 20: 80e9, 1 << 28: 10e9}, vnni_dot=400e9)
OPTIONS = suites.Options(repeats=2)
SHAPE = (2, 2, 8, 8)
QUICK = {case.key: case for case in sampler_cases.sampler_cases(True)}


def run_one(case, *names: str, providers=sampler.PROVIDERS) -> dict:
    suite = suites.get_suite("sampler")
    return suites.run_case(suite, case, choose(providers, names or None), Setting(1), OPTIONS)


# ------------------------------------------------------------------------------------------------------------ cases


@pytest.mark.parametrize(
    ("solver", "state", "outputs"),
    [
        ("DDIM", 2, 1), ("DDIM eta=1", 2, 1), ("DDPM", 2, 1), ("Euler", 2, 1),
        ("DPM++2M", 4, 1), ("DPM++3M", 5, 1), ("PLMS", 6, 1), ("UniPC2", 7, 1),
    ],
)  # fmt: skip
def test_streams_of_a_step_by_hand(solver, state, outputs):
    plan = sampler_cases.plan_of(solver, 12)
    assert sampler_cases.streams(plan.table[plan.calls // 2]) == (state, outputs)


def test_a_coefficient_of_zero_is_no_stream():
    row = torch.zeros(C.WIDTH)
    row[C.SLOT] = -1
    assert sampler_cases.streams(row) == (1, 0)
    row[C.X0_SAMPLE] = row[C.X0_OUTPUT] = 1.0  # for a preview that nobody wants
    assert sampler_cases.streams(row) == (1, 0)
    row[C.M_X0] = 1.0
    assert sampler_cases.streams(row) == (2, 1)
    row[C.KEPT_HISTORY + 2], row[C.SLOT] = 1.0, 2
    assert sampler_cases.streams(row) == (5, 1)


def test_bytes_and_floors():
    case = StepBench("", "", "", (), "DDIM", SHAPE)
    numbers = math.prod(SHAPE)
    assert case.moved_bytes() == 12 * numbers and case.sets() == 1
    assert StepBench("", "", "", (), "DDIM", SHAPE, "bf16").moved_bytes() == 10 * numbers
    assert StepBench("", "", "", (), "DDIM", SHAPE, guided=True).moved_bytes() == 24 * numbers
    assert case.floor_seconds(PEAKS, "fp32") == pytest.approx(12 * numbers / 80e9)
    cold = StepBench("", "", "", (), "DDIM", sampler_cases.PICTURES, cold=True)
    assert cold.floor_seconds(PEAKS, "fp32") == pytest.approx(12 * 8 * 3 * 256 * 256 / 10e9)
    assert (cold.sets() - 1) * cold.moved_bytes() >= 200 << 20
    noise = NoiseBench("", "", "", (), SHAPE)
    assert noise.floor_seconds(PEAKS, "fp32") == pytest.approx(4 * numbers / 80e9)
    assert LoopBench("", "", "", ()).floor_seconds(PEAKS, "fp32") is None


def test_bars():
    cases = {case.key: case for case in sampler_cases.sampler_cases()}
    small, over = cases["step 1×4×64×64/UniPC2"].bars
    assert small.seconds == 20e-6 and over.speedup == 4 and "diffusers" in over.against
    tuned, copy = cases["step 8×3×256×256/DDPM"].bars
    assert tuned.speedup == 3 and "diffusers-tuned" in tuned.against
    assert copy.speedup == 0.8 and copy.against == ("copy",)
    assert cases["step 8×3×256×256/DDPM"].cold
    (noise,) = cases["noise/8×3×256×256"].bars
    assert noise.speedup == 4 and noise.against == ("randn", "normal")
    overhead = [case for case in cases.values() if case.group == "overhead"]
    assert overhead and all(case.bars[0].extra_seconds == pytest.approx(10e-6 * case.plan.calls) for case in overhead)


# -------------------------------------------------------------------------------------------------------- providers


@pytest.mark.parametrize("key", [key for key in QUICK if not key.endswith(("digits", "diffusers"))])
def test_every_provider_agrees_with_the_reference(key):
    pytest.importorskip("diffusers")
    names = [p.name for p in sampler.PROVIDERS if "tuned" not in p.name]
    states = run_one(QUICK[key], *names)["providers"]
    said = {name: state["reason"] for name, state in states.items() if state["status"] in ("wrong", "failed")}
    assert not said
    timed = {name: state for name, state in states.items() if "timing" in state}
    assert {p.name for p in sampler.PROVIDERS if p.ours} & set(timed)
    assert {p.name for p in sampler.PROVIDERS if not p.ours} & set(timed)
    exact = [state["error"] for name, state in timed.items() if name.startswith("ours")]
    assert exact and max(exact) < 2e-6


def test_another_method_is_found():
    def prepare(case, setting):
        start, outputs = sampler._start(case), sampler._draw(case, 5, 2)
        other = StepBench("", "", "", (), "DPM++2M", case.shape, steps=case.steps)
        return Contender(lambda: None, lambda: {"output": sampler._Lane(other, outputs[0], start, "reference")
                         .first_states(outputs).double()})  # fmt: skip

    record = run_one(QUICK["step/DPM++3M"], providers=[Provider("liar", "liar", prepare)])
    assert record["providers"]["liar"]["status"] == "wrong"


@pytest.mark.parametrize("solver", sampler_cases.SOLVERS)
def test_steps_go_on_and_on(solver):
    case = StepBench("", "", "", (), solver, (1, 1, 4, 4), steps=6)
    output, start = torch.ones(case.shape), torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    lane = sampler._Lane(case, output, start, "auto")
    for _ in range(sampler.RUNS * 3 * case.plan.calls):
        lane.step()
    assert lane.sample.isfinite().all()


@pytest.mark.parametrize("solver", ["PLMS", "UniPC2", "Euler"])
def test_schedulers_begin_again(solver):
    pytest.importorskip("diffusers")
    case = StepBench("", "", "", (), solver, (1, 1, 4, 4), steps=6)
    lane = sampler_peers.SchedulerLane(case, torch.ones(case.shape), torch.ones(case.shape))
    states = [[lane.step() for _ in range(case.plan.calls)][-1] for _ in range(3)]
    assert states[0].isfinite().all() and all(torch.equal(states[0], state) for state in states[1:])


def test_sets_of_tensors_take_turns():
    seen = []
    run = sampler._turns([lambda n=n: seen.append(n) for n in range(3)])
    for _ in range(5):
        run()
    assert seen == [0, 1, 2, 0, 1]


def test_other_devices_are_refused():
    with pytest.raises(Skip, match="runs on the CPU"):
        sampler._ours("fp32")(QUICK["step/DDIM"], Setting(1, "cuda"))


# ------------------------------------------------------------------------------------------ the allocator's thresholds


@pytest.mark.slow
def test_the_tuned_allocator_runs_in_a_process_of_its_own():
    pytest.importorskip("diffusers")
    try:
        first, second = (sampler_tuned.contender(QUICK[key], Setting(1)) for key in ("step/DDIM", "loop/DDPM trivial"))
        assert first.sample() > 0 and second.sample() > 0  # prepared again where another case was in between
        assert "MALLOC_TRIM_THRESHOLD_" in first.note
        with pytest.raises(RuntimeError, match="KeyError"):
            sampler_tuned.contender(StepBench("", "", "", (), "none", SHAPE), Setting(1))
        assert first.sample() > 0
    finally:
        sampler_tuned.stop()


# ------------------------------------------------------------------------------------------------------------ loops


def test_bare_calls_take_part_where_overhead_is_measured():
    with pytest.raises(Skip):
        sampler_loop._bare(QUICK["loop/DDPM trivial"], Setting(1))
    record = run_one(QUICK["overhead/DDIM"], "ours-sampler", "bare")
    assert set(record["comparisons"]["ours-sampler"]) == {"bare"}


def test_bars_of_overhead_count_calls():
    (bar,) = next(c for c in sampler_cases.sampler_cases() if c.key.startswith("overhead/DDIM")).bars
    assert isinstance(bar, Bar) and bar.extra_seconds == pytest.approx(200e-6)


@pytest.mark.parametrize("model", ["digits", "diffusers"])
def test_real_denoisers_agree_in_both_loops(model):
    pytest.importorskip("diffusers")
    case = QUICK[f"loop/DPM++2M {model}"]
    record = run_one(case, "ours-sampler", "diffusers-loop")
    assert {state["status"] for state in record["providers"].values()} == {"ok"}, record["providers"]


def test_the_suite_is_a_command():
    assert suites.SUITES["sampler"].providers is sampler.PROVIDERS
