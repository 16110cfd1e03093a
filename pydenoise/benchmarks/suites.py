"""Running a suite: prepare the contenders of each case, check their results, time them interleaved, judge the bars."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from pydenoise.benchmarks import attention, blocks, convolution, int8_layers, networks, sampler, unet
from pydenoise.benchmarks.attention_cases import attention_cases
from pydenoise.benchmarks.cases import Bar, Case, network_cases, weighted_conv_cases
from pydenoise.benchmarks.int8_cases import int8_cases
from pydenoise.benchmarks.machine import describe_machine
from pydenoise.benchmarks.measure import Timing, interleave, paired_difference, paired_ratio
from pydenoise.benchmarks.peaks import Peaks, measure_peaks
from pydenoise.benchmarks.providers import RESULT_BOUNDS, Contender, Provider, Setting, Skip, choose
from pydenoise.benchmarks.sampler_cases import sampler_cases
from pydenoise.benchmarks.unet_cases import unet_cases

SCHEMA = 1
CONTROL = "a/a"


@dataclass(frozen=True)
class Suite:
    """Cases, the providers that may compute them, and the float64 reference.

    ``bounds``: the largest error over the largest value that passes as the same result, by precision.
    """

    name: str
    cases: Callable[[bool], list[Case]]
    providers: tuple[Provider, ...]
    expected: Callable
    bounds: dict[str, float] = field(default_factory=lambda: RESULT_BOUNDS)


SUITES: dict[str, Suite] = {
    "weighted_conv": Suite("weighted_conv", weighted_conv_cases, convolution.PROVIDERS, convolution.expected_results),
    "networks": Suite("networks", network_cases, networks.PROVIDERS, networks.expected_results),
    "int8-layers": Suite("int8-layers", int8_cases, int8_layers.PROVIDERS, int8_layers.expected_results),
    "unet": Suite("unet", unet_cases, unet.PROVIDERS, unet.expected_results, unet.BOUNDS),
    "attention": Suite("attention", attention_cases, attention.PROVIDERS, attention.expected_results, attention.BOUNDS),
    "sampler": Suite("sampler", sampler_cases, sampler.PROVIDERS, sampler.expected_results, sampler.BOUNDS),
    "blocks": Suite("blocks", blocks.blocks_cases, blocks.PROVIDERS, blocks.expected_results, blocks.BOUNDS),
}


@dataclass(frozen=True)
class Options:
    """How to run: at most ``repeats`` rounds or ``budget_seconds`` per case, with ``providers`` (None: the usual ones).

    ``cases`` is a shell pattern on "group/name". ``threads`` None takes torch's setting.
    """

    quick: bool = False
    repeats: int = 15
    budget_seconds: float = 12.0
    providers: tuple[str, ...] | None = None
    cases: str | None = None
    threads: int | None = None
    device: str = "cpu"


def get_suite(name: str) -> Suite:
    """The suite called ``name``; raises ``ValueError`` with the known ones."""
    if name not in SUITES:
        raise ValueError(f"suite: no suite named {name!r}; known: {', '.join(SUITES)}")
    return SUITES[name]


def select_cases(suite: Suite, options: Options) -> list[Case]:
    """The cases of ``suite`` that the options ask for; raises ``ValueError`` if there is none.

    Optional ones take part where a pattern matches nothing else: "forward bf16" does not mean 64k tokens. Quick ones
    have no bars: these are meant for the full sizes.
    """
    every = [replace(case, bars=()) for case in suite.cases(True)] if options.quick else suite.cases(False)
    pattern = options.cases
    if pattern is None:
        return [case for case in every if not case.optional]
    chosen = [case for case in every if fnmatch.fnmatch(case.key, pattern) or fnmatch.fnmatch(case.group, pattern)]
    if not chosen:
        groups = ", ".join(dict.fromkeys(case.group for case in every))
        raise ValueError(f"cases: nothing in suite {suite.name!r} matches {pattern!r}; its groups are {groups}")
    return [case for case in chosen if not case.optional] or chosen


def run_suite(
    suite: str | Suite, options: Options | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict:
    """Run a suite, or that of a name, and return the result as plain data (what the JSON file holds)."""
    options = options or Options()
    suite = get_suite(suite) if isinstance(suite, str) else suite
    cases, providers = select_cases(suite, options), choose(suite.providers, options.providers)
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        setting = Setting(torch.get_num_threads(), options.device, options.quick)
        seconds = 0.05 if options.quick else 0.3
        progress("measuring the machine's peaks")
        peaks = measure_peaks(setting.threads, setting.device, seconds)
        machine = describe_machine(setting.threads, setting.device)
        records = []
        for number, case in enumerate(cases, 1):
            progress(f"{number}/{len(cases)} {case.key}")
            records.append(run_case(suite, case, providers, setting, options))
        after = measure_peaks(setting.threads, setting.device, seconds)
    finally:
        torch.set_num_threads(before)
    best = peaks.merged(after)
    for case, record in zip(cases, records, strict=True):
        _add_floors(case, record, best, {p.name: p.precision for p in providers})
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "machine": machine,
        "options": asdict(options),
        "peaks": best.to_dict() | {"before": peaks.to_dict(), "after": after.to_dict()},
        "providers": {p.name: {"label": p.label, "precision": p.precision, "ours": p.ours} for p in providers},
        "cases": records,
    }


# -------------------------------------------------------------------------------------------------------- one case


def run_case(suite: Suite, case: Case, providers: Sequence[Provider], setting: Setting, options: Options) -> dict:
    """Prepare, check, time and compare the providers on one case."""
    states: dict[str, dict] = {}
    contenders: dict[str, Contender] = {}
    expected = None
    for provider in providers:
        try:
            contender = provider.prepare(case, setting)
            state = {"status": "ok", "note": contender.note}
            if contender.outputs is not None:
                expected = suite.expected(case, setting) if expected is None else expected
                state |= check_results(contender.outputs(), expected, suite.bounds[provider.precision])
            if contender.memory is not None:
                state["memory"] = contender.memory()
        except Skip as reason:
            state = {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # a broken provider must not end the run; the table and the JSON show what it said
            state = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        states[provider.name] = state
        if state["status"] == "ok" and "memory" not in state:
            contenders[provider.name] = contender
    twin = next((p.name for p in providers if p.ours and p.name in contenders), next(iter(contenders), None))
    if case.rounds is not None:  # where a sample takes seconds, the noise is not worth another one
        twin = None
    timings = _time(contenders, twin, setting, options, case.rounds)
    for name, state in states.items():
        if name in timings:
            state |= {"timing": timings[name].statistics(), "note": contenders[name].note}
    record = case.describe() | {"key": case.key, "providers": states, "comparisons": {}}
    subjects = [p.name for p in providers if p.ours and p.name in timings]
    for subject in subjects:
        others = [p.name for p in providers if p.name in timings and p.name != subject]
        record["comparisons"][subject] = {other: _compare(timings[subject], timings[other]) for other in others}
    record["control"] = None if twin is None else _control(twin, timings)
    record["bars"] = [verdict for bar in case.bars for verdict in judge(bar, subjects, timings)]
    record["bars"] += [verdict for bar in case.bars for verdict in judge_memory(bar, states)]
    return record


def check_results(outputs: dict, expected: dict, bound: float) -> dict:
    """The largest error, relative to the largest value of each result, and whether it is small enough to count.

    ``snr_db`` is that of the worst result: the power of the reference over that of the error.
    """
    errors, ratios = {}, {}
    for name, value in outputs.items():
        scale = max(part.abs().max().item() for _, part in expected[name])
        signal = noise = 0.0
        for index, part in expected[name]:
            if value[index].shape != part.shape:
                reason = f"{name} has shape {tuple(value[index].shape)}, expected {tuple(part.shape)}"
                return {"status": "wrong", "reason": reason}
            difference = value[index] - part
            error = difference.abs().max().item() / (scale or 1.0)
            errors[name] = max(errors.get(name, 0.0), error if math.isfinite(error) else math.inf)
            signal, noise = signal + part.square().sum().item(), noise + difference.square().sum().item()
        if 0 < noise < math.inf and signal > 0:
            ratios[name] = 10 * math.log10(signal / noise)
    worst = max(errors, key=errors.get)
    state = {"errors": errors, "error": errors[worst], "snr_db": min(ratios.values(), default=None)}
    if errors[worst] > bound:
        return state | {"status": "wrong", "reason": f"{worst} is off by {errors[worst]:.1e} (bound {bound:.0e})"}
    return state


def _time(
    contenders: dict[str, Contender], twin: str | None, setting: Setting, options: Options, rounds: int | None
) -> dict[str, Timing]:
    """Interleaved timings, in which ``twin`` takes part twice: what differs between the two is noise."""
    calls = {name: contender.run for name, contender in contenders.items()}
    samplers = {name: contender.sample for name, contender in contenders.items() if contender.sample}
    if twin is not None:
        calls[CONTROL] = calls[twin]
        if twin in samplers:
            samplers[CONTROL] = samplers[twin]
    synchronize = torch.cuda.synchronize if setting.device == "cuda" else None
    return interleave(
        calls,
        rounds=options.repeats if rounds is None else min(rounds, options.repeats),
        budget_seconds=options.budget_seconds,
        samplers=samplers,
        synchronize=synchronize,
    )


def _compare(ours: Timing, other: Timing) -> dict:
    difference = paired_difference(ours, other)
    return {
        "speedup": asdict(paired_ratio(ours, other)),
        "extra_s": dict(zip(("median", "low", "high"), difference, strict=True)),
    }


def _control(twin: str, timings: dict[str, Timing]) -> dict:
    """How unlike itself a contender looks: the A/A ratio."""
    return {"provider": twin, "speedup": asdict(paired_ratio(timings[twin], timings[CONTROL]))}


def judge(bar: Bar, subjects: Sequence[str], timings: dict[str, Timing]) -> list[dict]:
    """Verdicts of one bar: "met", "missed", or "undecided" where the range of the measurement holds the bar."""
    verdicts = []
    for subject in [name for name in subjects if name in bar.subjects]:
        if bar.seconds is not None:
            ordered = sorted(timings[subject].seconds)
            verdict = "met" if timings[subject].median <= bar.seconds else "missed"
            verdicts.append(_verdict(subject, None, "seconds", bar.seconds, ordered[len(ordered) // 2], verdict))
        for other in [name for name in bar.against if name in timings]:
            if bar.speedup is not None:
                ratio = paired_ratio(timings[subject], timings[other])
                verdict = _decide(ratio.low >= bar.speedup, ratio.high < bar.speedup)
                verdicts.append(_verdict(subject, other, "speedup", bar.speedup, ratio.median, verdict))
            if bar.extra_seconds is not None:
                median, low, high = paired_difference(timings[subject], timings[other])
                verdict = _decide(high <= bar.extra_seconds, low > bar.extra_seconds)
                verdicts.append(_verdict(subject, other, "extra seconds", bar.extra_seconds, median, verdict))
    return verdicts


def judge_floor(bar: Bar, states: dict[str, dict]) -> list[dict]:
    """Verdicts on a fraction of the floor: undecided where the best sample reaches it and the median does not."""
    verdicts = []
    for subject in bar.subjects if bar.of_floor is not None else ():
        state = states.get(subject, {})
        if state.get("floor_fraction") is not None:
            best = state["best_floor_fraction"]
            verdict = _decide(state["floor_fraction"] >= bar.of_floor, best < bar.of_floor)
            verdicts.append(_verdict(subject, None, "of floor", bar.of_floor, state["floor_fraction"], verdict))
    return verdicts


def judge_memory(bar: Bar, states: dict[str, dict]) -> list[dict]:
    """Verdicts on a peak of memory."""
    verdicts = []
    for subject in bar.subjects if bar.peak_bytes is not None else ():
        memory = states.get(subject, {}).get("memory")
        if memory is not None:
            peak = memory["peak_bytes"]
            verdict = "met" if peak <= bar.peak_bytes else "missed"
            verdicts.append(_verdict(subject, None, "peak bytes", bar.peak_bytes, peak, verdict))
    return verdicts


def _decide(met: bool, missed: bool) -> str:
    return "met" if met else "missed" if missed else "undecided"


def _verdict(subject, against, kind, target, measured, verdict) -> dict:
    return {
        "subject": subject,
        "against": against,
        "kind": kind,
        "target": target,
        "measured": measured,
        "verdict": verdict,
    }


def _add_floors(case: Case, record: dict, peaks: Peaks, precisions: dict[str, str]) -> None:
    floors = {precision: case.floor_seconds(peaks, precision) for precision in set(precisions.values())}
    record["floor_s"] = floors
    for name, state in record["providers"].items():
        floor = floors[precisions[name]]
        timed = floor is not None and "timing" in state
        state["floor_fraction"] = floor / state["timing"]["median_s"] if timed else None
        state["best_floor_fraction"] = floor / state["timing"]["min_s"] if timed else None
    record["bars"] += [verdict for bar in case.bars for verdict in judge_floor(bar, record["providers"])]
