"""Providers of the ``sampler`` suite's steps and noise, and the float64 reference of all its cases."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pydenoise import functional as PF
from pydenoise import step_row as C
from pydenoise.benchmarks import sampler_loop, sampler_peers, sampler_tuned
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.providers import NO_PART, RESULT_BOUNDS, Contender, Provider, Setting, Skip, cpu_only, images
from pydenoise.benchmarks.sampler_cases import GUIDANCE, LoopBench, NoiseBench, StepBench, is_random

CHECKED = 5  # steps of a run whose result is compared: as many as the deepest history needs, and one more
SEED = 3
RUNS = 8  # of the steps on one sample before it begins anew: a constant output makes it grow, and floats end
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Whole runs add up the rounding of every call of a model.
BOUNDS = RESULT_BOUNDS | {"fp32": 5e-5}


def _draw(case: StepBench, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.precision]
    return [torch.randn(case.output_shape, generator=generator).to(dtype) for _ in range(count)]


def _start(case: StepBench) -> Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(0))


def _checked(case: StepBench) -> int:
    return min(CHECKED, case.plan.calls)


def _turns(lanes: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call of the next of the lanes."""
    if len(lanes) == 1:
        return lanes[0]
    place = -1

    def run() -> object:
        nonlocal place
        place = place + 1 if place + 1 < len(lanes) else 0
        return lanes[place]()

    return run


def _pass_first_steps(lanes: Sequence) -> None:
    """A multistep method's first steps are of a lower order and cheaper; the best sample would be one of them."""
    for lane in lanes:
        for _ in range(CHECKED):
            lane.step()


# ------------------------------------------------------------------------------------------------------------ ours


class _Lane:
    """A prepared step on tensors of its own, as a ``Sampler`` has it, and a model output that stays the same."""

    def __init__(self, case: StepBench, output: Tensor, start: Tensor, backend: str):
        plan = case.plan
        self._calls, self._output, self._start = plan.calls, output, start
        self.sample = start.clone()
        self._base = start.clone() if plan.uses_base else None
        self._batch = case.shape[0] if case.guided else None
        self._bound = PF.bind_sampler_step(
            PF.StepBuffers(
                self.sample, _table(case).float(), self.sample, base=self._base, kept=self._base,
                keys=_keys(case.shape[0]) if plan.needs_noise else None,
                history=start.new_zeros(plan.slots, *case.shape) if plan.slots else None,
                model_input=start.new_empty(case.output_shape) if case.guided else None,
            ),
            backend,
        )  # fmt: skip
        self._call = self._runs = 0

    def step(self) -> None:
        call = self._call
        if not self._run(self._output, call):
            raise RuntimeError(f"not finite after call {call}")
        self._call = call + 1
        if self._call == self._calls:
            self._begin()

    def _run(self, output: Tensor, call: int) -> bool:
        batch = self._batch
        if batch is None:
            return self._bound.run(output, None, call, call + 1)
        return self._bound.run(output[batch:], output[:batch], call, call + 1)

    def _begin(self) -> None:
        self._call, self._runs = 0, self._runs + 1
        if self._runs % RUNS == 0:
            self.sample.copy_(self._start)
            if self._base is not None:
                self._base.copy_(self._start)

    def first_states(self, outputs: Sequence[Tensor]) -> Tensor:
        """The state after the first ``len(outputs)`` calls."""
        for call, output in enumerate(outputs):
            self._run(output, call)
        return self.sample


def _table(case: StepBench) -> Tensor:
    table = case.plan.table.clone()
    if case.guided:
        table[:, C.GUIDANCE] = GUIDANCE
    return table


def _keys(batch: int) -> Tensor:
    return torch.stack([torch.full((batch,), SEED), torch.arange(batch)], 1)


def _ours(precision: str, backend: str = "auto"):
    def prepare(case: Case, setting: Setting) -> Contender:
        case = _of_case(case, precision, setting)
        start = _start(case)
        lanes = [_Lane(case, output, start, backend) for output in _draw(case, case.sets(), 1)]
        _pass_first_steps(lanes)

        def outputs() -> dict[str, Tensor]:
            fresh = _Lane(case, lanes[0]._output, start, backend)
            return {"output": images(fresh.first_states(_draw(case, _checked(case), 2)))}

        return Contender(_turns([lane.step for lane in lanes]), outputs, note="prepared step on static buffers")

    return prepare


def _of_case(case: Case, precision: str, setting: Setting) -> StepBench:
    if not isinstance(case, StepBench) or case.precision != precision:
        raise Skip(NO_PART)
    cpu_only(setting)
    return case


# ------------------------------------------------------------------------------------------------------- diffusers


def diffusers_step(case: StepBench) -> Contender:
    """A scheduler's own step."""
    start = _start(case)
    lanes = [sampler_peers.SchedulerLane(case, output, start) for output in _draw(case, case.sets(), 1)]
    _pass_first_steps(lanes)

    def outputs() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        state = sampler_peers.first_states(case, _draw(case, _checked(case), 2), start, generator)
        return {"output drawn" if is_random(case.solver) else "output": images(state)}

    return Contender(_turns([lane.step for lane in lanes]), outputs)


def _diffusers(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        return diffusers_step(_of_case(case, precision, setting))

    return prepare


def _tuned(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        if isinstance(case, LoopBench) and precision == "fp32" and case.model == "trivial" and not case.bare:
            cpu_only(setting)
        else:
            case = _of_case(case, precision, setting)
        return sampler_tuned.contender(case, setting)

    return prepare


# ---------------------------------------------------------------------------------------------------------- memory


def _traffic(kind: str):
    """What moving as many bytes takes with torch: "copy" (as much read as written) or "add" (two reads, one write).

    Measured beside the steps, in samples as short: on a machine with neighbours the peaks of a run's start and end say
    little. A copy also reads what it overwrites, which an addition in place does not.
    """

    def prepare(case: Case, setting: Setting) -> Contender:
        if not isinstance(case, StepBench) or not case.cold:
            raise Skip(NO_PART)
        cpu_only(setting)
        count = round(case.moved_bytes() / (8 if kind == "copy" else 12))
        pairs = [(torch.zeros(count), torch.zeros(count)) for _ in range(case.sets())]
        calls = [partial(to.copy_ if kind == "copy" else to.add_, source) for to, source in pairs]
        return Contender(_turns(calls), note=f"{case.moved_bytes():.0f} bytes")

    return prepare


# ----------------------------------------------------------------------------------------------------------- noise


def _of_noise(case: Case, setting: Setting) -> NoiseBench:
    if not isinstance(case, NoiseBench):
        raise Skip(NO_PART)
    cpu_only(setting)
    return case


def _ours_noise(case: Case, setting: Setting) -> Contender:
    case = _of_noise(case, setting)
    table = torch.zeros(1, C.WIDTH)
    table[0, C.NOISE], table[0, C.SLOT] = 1.0, -1.0
    targets, keys = [torch.zeros(case.shape) for _ in range(case.sets())], _keys(case.shape[0])
    steps = [PF.bind_sampler_step(PF.StepBuffers(x, table, x, keys=keys)).run for x in targets]
    run = _turns([lambda step=step: step(None, None, 0, 1) for step in steps])

    def outputs() -> dict[str, Tensor]:
        for _ in steps:
            run()
        return {"noise": images(targets[0])}

    return Contender(run, outputs)


def _randn(case: Case, setting: Setting) -> Contender:
    case = _of_noise(case, setting)
    return Contender(lambda: torch.randn(case.shape))


def _normal(case: Case, setting: Setting) -> Contender:
    case = _of_noise(case, setting)
    return Contender(_turns([torch.empty(case.shape).normal_ for _ in range(case.sets())]))


PROVIDERS = (
    Provider("ours", "ours", _ours("fp32"), ours=True),
    Provider("ours-bf16", "ours bf16", _ours("bf16"), "bf16", ours=True),
    Provider("ours-noise", "ours", _ours_noise, ours=True),
    *sampler_loop.OURS,
    Provider("diffusers", "diffusers", _diffusers("fp32")),
    Provider("diffusers-tuned", "diffusers, no trim", _tuned("fp32")),
    Provider("diffusers-bf16", "diffusers bf16", _diffusers("bf16"), "bf16"),
    Provider("diffusers-tuned-bf16", "diffusers bf16, no trim", _tuned("bf16"), "bf16"),
    Provider("copy", "copy of as many bytes", _traffic("copy")),
    Provider("add", "add_ of as many bytes", _traffic("add")),
    Provider("randn", "torch.randn", _randn),
    Provider("normal", "normal_ in place", _normal),
    *sampler_loop.PEERS,
)


# ------------------------------------------------------------------------------------------------------- reference


def expected_results(case: Case, setting: Setting) -> Expected:
    """The float64 results; of steps and noise those of the last sample of the batch."""
    if isinstance(case, LoopBench):
        return sampler_loop.expected_results(case)
    last = slice(case.shape[0] - 1, case.shape[0])
    if isinstance(case, NoiseBench):
        table = torch.zeros(1, C.WIDTH, dtype=torch.float64)
        table[0, C.NOISE], table[0, C.SLOT] = 1.0, -1.0
        x = torch.zeros(1, *case.shape[1:], dtype=torch.float64)
        keys = _keys(case.shape[0])[last]
        return {"noise": [((last,), PF.sampler_step(x, None, table, seed=keys, step=1, backend="reference"))]}
    results = {"output": [((last,), _states(case, last, None))]}
    if is_random(case.solver):
        generator = torch.Generator().manual_seed(SEED)
        dtype = DTYPES[case.precision]
        drawn = [torch.randn(case.shape, generator=generator, dtype=dtype)[last] for _ in range(_checked(case))]
        results["output drawn"] = [((last,), _states(case, last, drawn))]
    return results


def _states(case: StepBench, part: slice, drawn: Sequence[Tensor] | None) -> Tensor:
    """The state of some samples after the first calls, with the noise of :class:`_Lane` or the one given."""
    plan, x = case.plan, _start(case)[part].double()
    history = x.new_zeros(plan.slots, *x.shape) if plan.slots else None
    base = x.clone() if plan.uses_base else None
    keys = _keys(case.shape[0])[part] if plan.needs_noise else None
    table = _table(case)
    for call, output in enumerate(_draw(case, _checked(case), 2)):
        *others, given = output.double().split(case.shape[0])
        z = None if drawn is None else drawn[call].double()
        PF.sampler_step(
            x, given[part], table, call, unconditional=others[0][part] if others else None, base=base,
            history=history, noise=z, seed=keys if z is None else None, step=call + 1, out=x, kept=base,
            backend="reference",
        )  # fmt: skip
    return x
