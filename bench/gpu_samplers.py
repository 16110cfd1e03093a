"""The sampler part of bench/gpu.py: both GPU rows of sampler_step against float64, whole runs, then steps and loops.

python bench/gpu_samplers.py --dry     # no GPU: the reference on small cases, to see that the script runs
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMAL_ERROR = 2e-6  # of a normal number
SUM_ERROR = 1e-5  # of a sum, relative to that of the squares
RUN_ERROR = 2e-5  # of a whole run in float32, relative to its largest value
OF_BANDWIDTH, OVER_RANDN, LARGE = 0.8, 1.0, 64 << 20  # bars, for steps that move at least LARGE bytes
REPEATS = 50  # of a small step in one graph
STEPS = 50


# --------------------------------------------------------------------------------------------------------- correctness


def checks(
    wanted: str = "", *, backends: tuple[str, ...] = BACKENDS, device: str = "cuda", dtypes=DTYPES
) -> Iterator[tuple[str, str | None]]:
    """(name of one check, what is wrong or ``None``); "skipped: ..." where a row cannot take a case."""
    from pydenoise.benchmarks.sampler_cases import SOLVERS
    from pydenoise.testing.sampler_step import SAMPLER_STEP_CASES

    for dtype in dtypes:
        for case in SAMPLER_STEP_CASES:
            if wanted in case.name:
                for backend in backends:
                    name = f"sampler_step {case.name} {str(dtype).removeprefix('torch.')} {backend}"
                    yield name, _guarded(lambda c=case, d=dtype, b=backend: _check_case(c, d, b, device))
    for solver in SOLVERS:
        for backend in backends:
            if wanted in f"run {solver}":
                yield f"run {solver} {backend}", _guarded(lambda s=solver, b=backend: _check_run(s, b, device))
                if device == "cuda":
                    yield f"run {solver} {backend}, waits", _guarded(lambda s=solver, b=backend: _check_waits(s, b))


def _guarded(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  (the other checks still count)
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


@cache
def _expected(name: str, dtype: torch.dtype) -> tuple[list, list]:
    """(exact results, torch's own in the dtype): the sums, then the arguments, some of which are written."""
    from pydenoise.reference.sampler_step import sampler_step as reference
    from pydenoise.testing.sampler_step import SAMPLER_STEP_CASES

    case = next(case for case in SAMPLER_STEP_CASES if case.name == name)
    found = []
    for exact in (True, False):
        args = case.args(dtype, exact=exact)
        found.append([reference(*args), *args])
    return found[0], found[1]


def _check_case(case, dtype: torch.dtype, backend: str, device: str) -> str | None:
    from pydenoise.testing.sampler_step import WRITTEN

    args = case.args(dtype, device)
    row = _row_of(backend)
    reason = "no such row" if row is None else row.unsupported(*args)
    if reason is not None:
        return f"skipped: {reason}"
    with torch.no_grad():
        sums = row.run(*args)
    _wait(device)
    exact, own = _expected(case.name, dtype)
    wrong = [_sums_wrong(sums.cpu(), exact[0])]
    for place, name in WRITTEN.items():
        if args[place] is not None:
            wrong.append(_wrong(case, name, args[place].cpu(), exact[place + 1], own[place + 1]))
    return "; ".join(text for text in wrong if text) or None


def _sums_wrong(sums: Tensor, exact: Tensor) -> str | None:
    if sums.shape != exact.shape or sums.dtype != torch.float64:
        return f"sums: {sums.dtype} {tuple(sums.shape)}, expected float64 {tuple(exact.shape)}"
    if not exact.numel():
        return None
    error, allowed = (sums - exact).abs().max().item(), SUM_ERROR * exact.abs().max().item()
    return None if error <= allowed else f"sums: error {error:.3e}, allowed {allowed:.3e}"


def _wrong(case, name: str, value: Tensor, exact: Tensor, own: Tensor) -> str | None:
    """What is wrong under the policy of pydenoise.testing, or ``None``; unwritten poison stays what it is."""
    from pydenoise import step_row
    from pydenoise.testing import error_bound

    if name == "faults":
        return None if torch.equal(value, exact) else f"faults: {value.tolist()}, expected {exact.tolist()}"
    if value.shape != exact.shape or not torch.equal(value.isnan(), exact.isnan()):
        return f"{name}: another shape, or NaN elsewhere"
    if not exact.numel():
        return None
    value, exact, own = (t.nan_to_num(0.0) for t in (value, exact, own))
    noise = case.table()[:, step_row.NOISE].abs().max().item() if case.noise in ("keys", "seed") else 0.0
    allowed = error_bound(exact, own) + 2 * NORMAL_ERROR * noise
    error = (value.double() - exact).abs().max().item()
    return None if error <= allowed else f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def _row_of(backend: str):
    from pydenoise.ops import registry, sampler_step

    return next((row for row in registry.rows(sampler_step.OP) if row.name == backend), None)


def _denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Smooth, of every element alone, and of the time."""
    return torch.tanh(0.9 * x + 1e-3 * t.to(x.dtype).view(-1, *(1,) * (x.dim() - 1)))


def _sampler(solver: str, backend: str, steps: int = 12, denoiser: Callable = _denoiser, **options):
    from pydenoise.benchmarks.sampler_cases import SCHEDULE, SOLVERS
    from pydenoise.samplers import Sampler

    return Sampler(denoiser, SCHEDULE, SOLVERS[solver], steps, backend=backend, **options)


def _start(device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device, dtype)


def _check_run(solver: str, backend: str, device: str) -> str | None:
    """A whole run - on a GPU as a captured graph, and step by step - against float64 on the CPU."""
    exact = _sampler(solver, "reference").sample(_start("cpu", torch.float64), seed=5)
    for graph in (None, False) if device == "cuda" else (None,):
        found = _sampler(solver, backend, graph=graph).sample(_start(device, torch.float32), seed=5)
        error = (found.cpu().double() - exact).abs().max().item() / exact.abs().max().item()
        if not error <= RUN_ERROR:
            return f"{'captured' if graph is None else 'step by step'}: error {error:.3e}, allowed {RUN_ERROR:.0e}"
    return None


def _check_waits(solver: str, backend: str) -> str | None:
    """The host waits for the GPU as often in a long run as in a short one: never within the loop."""
    counts = []
    for steps in (6, 12):
        sampler, x = _sampler(solver, backend, steps), _start("cuda", torch.float32)
        sampler.sample(x, seed=5)  # captures
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sampler.sample(x, seed=5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(w.message) for w in caught))
    return None if counts[0] == counts[1] else f"{counts[0]} waits in 6 steps, {counts[1]} in 12"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- timings


@dataclass(frozen=True)
class Step:
    """One timed step: a row from the middle of a solver's plan; "noise" is a row of noise alone."""

    solver: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"sampler_step {self.solver} {'x'.join(map(str, self.shape))}"

    def row(self) -> Tensor:
        """Its coefficients, [32] float64."""
        from pydenoise import step_row as C
        from pydenoise.benchmarks.sampler_cases import plan_of

        if self.solver != "noise":
            return plan_of(self.solver, STEPS).table[STEPS // 2]
        row = torch.zeros(C.WIDTH, dtype=torch.float64)
        row[C.NOISE], row[C.SLOT], row[C.CLIP] = 1, -1, math.inf
        return row

    def moved_bytes(self) -> float:
        """Every tensor that the row reads or writes, once."""
        from pydenoise.benchmarks.sampler_cases import streams

        return self.dtype.itemsize * math.prod(self.shape) * (1 if self.solver == "noise" else sum(streams(self.row())))


def steps(dry: bool = False) -> list[Step]:
    """From one latent to pictures that no cache holds."""
    if dry:
        return [Step(solver, (2, 3, 16, 16)) for solver in ("DDIM", "DPM++3M", "UniPC2", "noise")]
    latent, pictures, large = (1, 4, 64, 64), (8, 3, 256, 256), (64, 4, 256, 256)
    solvers = ("DDIM", "DDIM eta=1", "PLMS", "DPM++2M", "DPM++3M", "UniPC2")
    found = [Step(solver, shape) for shape in (latent, pictures, large) for solver in solvers]
    found += [Step(solver, large, torch.bfloat16) for solver in ("DDIM", "DDIM eta=1", "DPM++2M")]
    return found + [Step("noise", shape) for shape in (latent, pictures, large)]


class Lane:
    """The tensors of a step, and what can run it."""

    def __init__(self, step: Step, device: str):
        from pydenoise import step_row as C

        generator = torch.Generator(device).manual_seed(1)

        def draw(*leading: int) -> Tensor:
            return torch.randn(*leading, *step.shape, generator=generator, device=device).to(step.dtype)

        self.step, self.device, row = step, device, step.row()
        self.sample, self.output, self.base = draw(), draw(), draw()
        self.history = draw(C.SLOTS)
        self.old_history = self.history.clone()
        self.out, self.kept = torch.empty_like(self.sample), torch.empty_like(self.sample)
        self.table = row.float()[None].to(device)
        self.coefficients = [float(c) for c in row]

    def args(self) -> tuple:
        """Arguments of the backend rows."""
        from pydenoise.ops import sampler_step

        return sampler_step.prepare(
            self.sample, None if self.step.solver == "noise" else self.output, self.table, base=self.base,
            history=self.history, kept=self.kept, out=self.out, seed=3, step=4,
        )  # fmt: skip

    def ours(self, backend: str) -> Callable | str:
        """A step by a row, or why it has none."""
        args, row = self.args(), _row_of(backend)
        reason = "no such row" if row is None else row.unsupported(*args)
        return reason or (lambda: row.run(*args))

    def plain(self) -> Tensor:
        """The step as torch operations, one for each term: what a scheduler in Python launches."""
        from pydenoise import step_row as C

        c, x, y = self.coefficients, self.sample, self.output
        if self.step.solver == "noise":
            return self.out.normal_()

        def combined(*terms: tuple[int, Tensor]) -> Tensor | float:
            parts = [c[column] * tensor for column, tensor in terms if c[column] != 0]
            return sum(parts[1:], parts[0]) if parts else 0.0

        m = combined((C.M_SAMPLE, x), (C.M_OUTPUT, y))
        if c[C.M_X0] != 0:
            m = m + c[C.M_X0] * combined((C.X0_SAMPLE, x), (C.X0_OUTPUT, y))
        past = [(C.HISTORY + j, self.history[j]) for j in range(C.SLOTS)]
        fresh = combined((C.SAMPLE, x), (C.BASE, self.base), (C.OUTPUT, y), *past)
        if c[C.M] != 0:
            fresh = fresh + c[C.M] * m
        if c[C.NOISE] != 0:
            fresh = fresh + c[C.NOISE] * torch.randn_like(x)
        past = [(C.KEPT_HISTORY + j, self.history[j]) for j in range(C.SLOTS)]
        kept = combined((C.KEPT_SAMPLE, x), (C.KEPT_BASE, self.base), (C.KEPT_OUT, fresh), *past)
        if c[C.KEPT_M] != 0:
            kept = kept + c[C.KEPT_M] * m
        if c[C.SLOT] >= 0:
            self.history[int(c[C.SLOT])].copy_(m)
        if isinstance(kept, Tensor):
            self.kept.copy_(kept)
        return self.out.copy_(fresh)


def graphed(call: Callable, repeats: int) -> Callable:
    """A CUDA graph of ``repeats`` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def _providers(lane: Lane, backends: tuple[str, ...], with_compile: bool) -> dict[str, Callable | str]:
    found = {backend: lane.ours(backend) for backend in backends}
    found["torch"] = lane.plain
    if with_compile:
        torch.compiler.reset()
        found["compile"] = torch.compile(lane.plain, dynamic=False)
    return found


def _noise_apart(lane: Lane) -> bool:
    """Whether providers draw different numbers, so that only their sizes can be compared."""
    from pydenoise import step_row as C

    return lane.coefficients[C.NOISE] != 0


def _result_wrong(lane: Lane, call: Callable, expected: Tensor) -> str | None:
    lane.out.fill_(torch.nan)
    lane.history.copy_(lane.old_history)  # of which a step overwrites a slot
    call()
    _wait(lane.device)
    found = lane.out.double()
    if _noise_apart(lane):
        error = abs(float(found.std() - expected.std())) / float(expected.std())
        return None if error < (0.1 if found.numel() < 10**5 else 0.02) else f"WRONG: spread off by {error:.1e}"
    error = float((found - expected).abs().max() / expected.abs().max())
    return None if error <= (1e-5 if lane.step.dtype == torch.float32 else 2e-2) else f"WRONG: error {error:.1e}"


def time_step(
    step: Step, interleaved: Callable[[dict, int], dict], *, rounds: int, device: str = "cuda",
    backends: tuple[str, ...] = BACKENDS, with_compile: bool = True, bandwidth: float | None = None,
) -> dict:  # fmt: skip
    """Milliseconds of every provider that runs and is right, on a GPU from graphs; ``bandwidth`` in GB/s.

    ``interleaved(calls, rounds)`` gives medians in milliseconds, the caches overwritten before each call. Small steps
    are repeated in one graph instead, and find their tensors in the L2 cache, as after a call of a small model.
    """
    lane = Lane(step, device)
    wide = Lane(step, device)
    wide.out = torch.empty(step.shape, dtype=torch.float64, device=device)
    for name in ("sample", "output", "base", "history"):
        setattr(wide, name, getattr(lane, name).double())
    wide.kept = torch.empty_like(wide.out)
    expected = wide.plain().clone()
    del wide
    repeats = 1 if step.moved_bytes() >= LARGE or device == "cpu" else REPEATS
    calls, failed = {}, {}
    for name, call in _providers(lane, backends, with_compile).items():
        if isinstance(call, str):
            failed[name] = call
            continue
        try:
            wrong = _result_wrong(lane, call, expected)
            if wrong is None:
                calls[name] = graphed(call, repeats) if device == "cuda" else call
            else:
                failed[name] = wrong
        except Exception as error:  # noqa: BLE001  (one provider's failure must not end the run)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    ms = {name: value / repeats for name, value in interleaved(calls, rounds).items()}
    return _row(step, ms, failed, bandwidth)


def _row(step: Step, ms: dict[str, float], failed: dict[str, str], bandwidth: float | None) -> dict:
    moved = step.moved_bytes()
    row = {"case": step.name, "dtype": str(step.dtype).removeprefix("torch."), "bytes": moved}
    row["us"] = {name: round(1e3 * value, 2) for name, value in ms.items()}
    row["GB/s"] = {name: round(moved / value / 1e6, 1) for name, value in ms.items()}
    rivals = [name for name in ("torch", "compile") if name in ms]
    ours = [name for name in ms if name not in ("torch", "compile")]
    for rival in rivals:
        row[f"speedup_over_{rival}"] = {name: round(ms[rival] / ms[name], 2) for name in ours}
    row["bars"] = []
    if moved >= LARGE:
        for name in ours:
            if step.solver == "noise":
                over = ms["torch"] / ms[name] if "torch" in ms else math.nan
                row["bars"].append({"provider": name, "bar": f">= {OVER_RANDN}x randn", "met": over >= OVER_RANDN})
            elif bandwidth is not None:
                share = moved / ms[name] / 1e6 / bandwidth
                row.setdefault("of_bandwidth", {})[name] = round(share, 3)
                row["bars"].append(
                    {"provider": name, "bar": f">= {OF_BANDWIDTH} of the bandwidth", "met": share >= OF_BANDWIDTH}
                )
    row["not_run"] = failed
    return row


def describe_row(row: dict) -> Iterator[str]:
    """The lines that are printed of a row."""
    parts = [f"{name} {value:.2f}" for name, value in row["us"].items()]
    yield f"{row['case']:40s} {row['dtype']:9s} us: " + " | ".join(parts)
    rest = {key: value for key, value in row.items() if key.startswith(("speedup", "GB/s", "of_"))}
    yield "    " + " | ".join(f"{key} {value}" for key, value in rest.items())
    for bar in row["bars"]:
        if not bar["met"]:
            yield f"    missed: {bar['provider']} {bar['bar']}"
    for provider, why in row["not_run"].items():
        yield f"    {provider} not timed: {why}"


def time_loop(solver: str, shape: tuple[int, ...], *, rounds: int, device: str, backends: tuple[str, ...]) -> dict:
    """Microseconds of a call in a whole run whose model does nothing, by the clock: captured, and step by step."""
    output = torch.randn(shape, device=device)
    x, found, failed = torch.randn(shape, device=device), {}, {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return output

    lanes = {f"{backend} captured": (backend, None) for backend in backends} if device == "cuda" else {}
    lanes |= {f"{backend} step by step": (backend, False) for backend in backends}
    for name, (backend, graph) in lanes.items():
        try:
            sampler = _sampler(solver, backend, STEPS, model, graph=graph)
            sampler.sample(x, seed=1)
            times = []
            for _ in range(rounds):
                _wait(device)
                start = time.perf_counter()
                sampler.sample(x, seed=1)
                _wait(device)
                times.append(time.perf_counter() - start)
            found[name] = round(1e6 * median(times) / sampler.plan.calls, 2)
        except Exception as error:  # noqa: BLE001  (the other lanes still count)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {"case": f"loop {solver} {'x'.join(map(str, shape))}", "us_per_call": found, "not_run": failed}


def loops(dry: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """Solvers and shapes of whole runs."""
    shapes = [(1, 4, 8, 8)] if dry else [(1, 4, 64, 64), (8, 3, 256, 256)]
    return [(solver, shape) for shape in shapes for solver in ("DDIM", "DDPM", "DPM++2M", "UniPC2")]


def on_cpu(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds by the clock, in turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> int:
    """A dry run: small cases on the CPU, through the same functions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "small cases on the CPU (bench/gpu.py is the real run)"
    parser.add_argument("--dry", action="store_true", required=True, help=text)
    parser.add_argument("--filter", default="", help="only checks whose case contains this text")
    parser.add_argument("--backends", nargs="+", default=["reference"], help="of ours: reference, cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    args = parser.parse_args(argv)
    failures, backends = 0, tuple(args.backends)
    for name, wrong in checks(args.filter, backends=backends, device="cpu"):
        if wrong is not None and not wrong.startswith("skipped"):
            failures += 1
            print(f"FAILED {name}: {wrong}")
    print(f"{failures} checks failed")
    options = {"rounds": 2, "device": "cpu", "backends": backends, "with_compile": args.compile, "bandwidth": 10.0}
    for step in steps(dry=True):
        print("\n".join(describe_row(time_step(step, on_cpu, **options))))
    for solver, shape in loops(dry=True):
        print(time_loop(solver, shape, rounds=2, device="cpu", backends=backends))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
