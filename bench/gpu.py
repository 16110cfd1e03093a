"""Check every GPU backend against the float64 reference, then time it: one script for a machine with an NVIDIA GPU.

    python bench/gpu.py --build             # build the package here first, then everything
    python bench/gpu.py --only check        # correctness alone
    python bench/gpu.py --only time --minutes 10 --filter depthwise
    python bench/gpu.py --build --parts attention samplers

Every line is printed, and the JSON under bench/results/ rewritten, as soon as there is something to say: a run that is
killed leaves what it had found. Exit code: 0, 1 (a check failed), 2 (no usable GPU).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cuda", "triton")
DTYPES = ("float32", "float16", "bfloat16")
DEVICE = "cuda"
PARTS = ("weighted_conv", "int8", "attention", "samplers")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", action="store_true", help="pip install --no-build-isolation -e . first")
    parser.add_argument("--only", choices=("check", "time"), help="run one section")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop starting new work after this long")
    parser.add_argument("--filter", default="", help="only cases whose name contains this text")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds per timing")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile(mode='max-autotune')")
    parser.add_argument("--output", type=Path, help="JSON file (default: bench/results/gpu-<device>-<date>.json)")
    return parser.parse_args(argv)


@dataclass
class Run:
    """What one run has found so far, and where it is written."""

    args: argparse.Namespace
    path: Path
    result: dict
    started: float = field(default_factory=time.monotonic)

    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > 60 * self.args.minutes

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")


def say(text: str = "") -> None:
    """Print at once: output may go to a pipe, and the run may be killed."""
    print(text, flush=True)


def synchronize() -> None:
    """Wait for the GPU: an error of a kernel shows here."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def build() -> None:
    """Install the package of this checkout in place."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    say("$ " + " ".join(command))
    started = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "PYDENOISE_CUDA": os.environ.get("PYDENOISE_CUDA", "auto")})
    say(f"built in {time.monotonic() - started:.0f} s")


def unusable() -> str | None:
    """Why this machine cannot run the script, or ``None``."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU (torch.cuda.is_available() is false)"
    return None


def describe() -> dict:
    """Hardware, driver and versions."""
    import torch

    import pydenoise
    from pydenoise import _native

    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"not importable ({error})"
    properties = torch.cuda.get_device_properties(0)
    wanted = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = f"unknown ({error})"
    library = _native.cuda_extension()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "driver, SM clock, memory clock, power limit": smi,
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "triton": triton_version,
        "pydenoise": getattr(pydenoise, "__version__", "unknown"),
        "pydenoise._cuda": library.reason or "loaded",
        "python": platform.python_version(),
        "host": platform.processor() or platform.machine(),
    }


# --------------------------------------------------------------------------------------------------------- correctness


@dataclass
class Verdict:
    """One checked result: error and what the policy allows."""

    case: str
    dtype: str
    backend: str
    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def compare(actual, oracle, baseline) -> tuple[float, float]:
    """(largest error, what the tolerance policy of pydenoise.testing allows); a wrong shape or a NaN is infinite."""
    import torch

    from pydenoise.testing import error_bound

    if actual.shape != oracle.shape:
        return float("inf"), 0.0
    if oracle.numel() == 0:
        return 0.0, 0.0
    error = (actual.detach().cpu().double() - oracle).abs()
    worst = error.max().item() if torch.isfinite(error).all() else float("inf")
    return worst, error_bound(oracle, baseline.cpu())


def check_case(case, dtype, backend: str) -> Iterator[Verdict | str]:
    """Forward and gradients of one backend on one case; yields a sentence where the backend does not take the call."""
    import torch

    from pydenoise.ops import registry
    from pydenoise.ops.weighted_conv import OP, OP_BACKWARD, prepare
    from pydenoise.reference import weighted_conv as reference

    options = case.options()
    names = ("input", "weight", "density", "bias", "residual")

    def arguments(tensors):
        return prepare(
            case.dims, *(tensors[n] for n in names), options["stride"], options["padding"], options["dilation"],
            options["groups"], options["activation"],
        )  # fmt: skip

    host = case.tensors(dtype)
    wide = {n: None if t is None else t.double() for n, t in host.items()}
    device = case.tensors(dtype, DEVICE)
    label = (case.name, str(dtype).removeprefix("torch."), backend)

    row = next((r for r in registry.rows(OP) if r.name == backend), None)
    args = arguments(device)
    reason = "no row" if row is None else row.unsupported(*args)
    if reason is None:
        oracle = reference.weighted_conv(*arguments(wide)[:-1])
        baseline = reference.weighted_conv(*args[:-1])
        yield Verdict(*label, "output", *compare(row.run(*args), oracle, baseline))
    else:
        yield reason

    row = next((r for r in registry.rows(OP_BACKWARD) if r.name == backend), None)
    y = reference.weighted_conv(*args[:3], None, None, *args[5:9])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def backward_arguments(args, grad):
        return grad, *args[:3], *args[5:9], "direct", [True, True, True]

    back = backward_arguments(args, grad.to(DEVICE))
    reason = "no row" if row is None else row.unsupported(*back)
    if reason is not None:
        yield reason
        return
    wide_back = backward_arguments(arguments(wide), grad.double())
    oracles = reference.weighted_conv_backward(*wide_back[:8])
    baselines = reference.weighted_conv_backward(*back[:8])
    for what, actual, oracle, base in zip(
        ("d input", "d weight", "d density"), row.run(*back), oracles, baselines, strict=True
    ):
        if oracle is not None:
            yield Verdict(*label, what, *compare(actual, oracle, base))


def check(run: Run) -> int:
    """Every backend over every case and dtype. Returns the number of failures; never stops at one."""
    import torch

    from pydenoise.testing import CONV_CASES

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    passed, failures, skipped = {}, [], []
    for case in CONV_CASES:
        if run.args.filter not in case.name:
            continue
        for name in run.args.dtypes:
            for backend in BACKENDS:
                if run.out_of_time():
                    say("check: out of time")
                    return report_checks(run, passed, failures, skipped)
                try:
                    verdicts = list(check_case(case, getattr(torch, name), backend))
                    synchronize()
                except Exception as error:  # noqa: BLE001  (every kind of failure goes into the table)
                    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    failures.append({"case": case.name, "dtype": name, "backend": backend, "what": text})
                    say(f"FAIL {case.name} {name} {backend}: {text}")
                    if "CUDA error" in text or "illegal memory" in text:
                        say("The CUDA context is lost; run again with --filter to leave this case out.")
                        return report_checks(run, passed, failures, skipped)
                    continue
                for verdict in verdicts:
                    if isinstance(verdict, str):
                        skipped.append({"case": case.name, "dtype": name, "backend": backend, "why": verdict})
                    elif verdict.passed:
                        passed[backend] = passed.get(backend, 0) + 1
                    else:
                        failures.append(vars(verdict))
                        numbers = f"{verdict.error:.3e} > {verdict.bound:.3e}"
                        say(f"FAIL {case.name} {name} {backend} {verdict.what}: {numbers}")
        run.result["check"] = {"passed": passed, "failures": failures, "not_taken": skipped}
        run.save()
    return report_checks(run, passed, failures, skipped)


def report_checks(run: Run, passed: dict, failures: list, skipped: list) -> int:
    from rich.console import Console
    from rich.table import Table

    run.result["check"] = {"passed": passed, "failures": failures, "not_taken": skipped}
    run.save()
    table = Table("case", "dtype", "backend", "what", "error", "allowed", title=f"Failures: {len(failures)}")
    for f in failures:
        numbers = [f"{f[k]:.3e}" if k in f else "" for k in ("error", "bound")]
        table.add_row(f["case"], f["dtype"], f["backend"], f["what"], *numbers)
    Console().print(table)
    say(f"passed {passed}, failed {len(failures)}, not taken by a backend {len(skipped)}")
    return len(failures)


# -------------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Layer:
    """One timed layer."""

    name: str
    channels: tuple[int, int]
    kernel: int
    size: int
    batch: int
    groups: int = 1
    activation: str = "none"
    residual: bool = False
    train: bool = False
    trainable_density: bool = False

    def flops(self) -> float:
        """Of the forward pass; a training step does three times as many."""
        cin, cout = self.channels
        macs = self.batch * self.size**2 * cout * (cin // self.groups) * self.kernel**2
        return 2.0 * macs * (3 if self.train else 1)

    def bytes(self, itemsize: int) -> float:
        """Least traffic: input read, output written, residual read; training reads and writes them again."""
        cin, cout = self.channels
        pixels = self.batch * self.size**2
        forward = pixels * (cin + cout * (2 if self.residual else 1))
        backward = pixels * (2 * cout + 2 * cin) if self.train else 0
        return float(itemsize * (forward + backward))


def layers() -> list[Layer]:
    """The shapes of the specification's bars."""
    rows = []
    for first, second in ((3, 64), (1, 64), (3, 96)):
        rows.append(Layer(f"first {first}->{second}", (first, second), 3, 512, 4, activation="relu"))
        rows.append(Layer(f"last {second}->{first}", (second, first), 3, 512, 4, residual=True))
    for kernel in (3, 5, 7):
        name = f"depthwise {kernel}x{kernel} 96"
        rows.append(Layer(name, (96, 96), kernel, 256, 8, groups=96, activation="silu"))
        rows.append(Layer(f"{name} train", (96, 96), kernel, 256, 8, groups=96, train=True, trainable_density=True))
    for channels in (64, 128):
        common = ((channels, channels), 3, 256, 8)
        rows.append(Layer(f"fused relu 3x3 {channels}", *common, activation="relu"))
        rows.append(Layer(f"fused silu+residual 3x3 {channels}", *common, activation="silu", residual=True))
        for kernel in (3, 5, 7):
            for trainable in (False, True):
                name = f"train {kernel}x{kernel} {channels}{' trainable density' if trainable else ''}"
                rows.append(Layer(name, (channels, channels), kernel, 128, 8, train=True, trainable_density=trainable))
    return rows


def providers(layer: Layer, dtype, with_compile: bool) -> dict[str, Callable[[], object]]:
    """Callables that run the layer once. "conv2d" is the plain convolution of the same shape, without a density."""
    import torch
    import torch.nn.functional as F

    import pydenoise.functional as PF
    from pydenoise.ops.registry import BackendUnavailable
    from pydenoise.reference.weighted_conv import activate

    torch.manual_seed(0)
    cin, cout = layer.channels
    last = torch.channels_last
    x = torch.randn(layer.batch, cin, layer.size, layer.size, device=DEVICE, dtype=dtype).contiguous(memory_format=last)
    weight = torch.randn(cout, cin // layer.groups, layer.kernel, layer.kernel, device=DEVICE, dtype=dtype) * 0.05
    plain_weight = weight.contiguous(memory_format=last)
    density = torch.rand(layer.kernel, layer.kernel, device=DEVICE, dtype=dtype) + 0.5
    bias = torch.randn(cout, device=DEVICE, dtype=dtype)
    shape = (layer.batch, cout, layer.size, layer.size)
    residual = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=last) if layer.residual else None
    padding = layer.kernel // 2
    if layer.train:
        leaves = [x, weight, plain_weight, bias] + ([density] if layer.trainable_density else [])
        for leaf in leaves:
            leaf.requires_grad_()
    dy = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=last)

    def conv2d(x, weight, bias, residual):
        y = activate(F.conv2d(x, weight, bias, 1, padding, 1, layer.groups), layer.activation)
        return y if residual is None else y + residual

    def ours(backend):
        return PF.weighted_conv2d(
            x, weight, density, bias, 1, padding, 1, layer.groups,
            activation=layer.activation, residual=residual, backend=backend,
        )  # fmt: skip

    def step(forward, *wanted):
        if not layer.train:
            return forward
        return lambda: torch.autograd.grad(forward(), wanted, dy)

    mine = [x, weight, bias] + ([density] if layer.trainable_density else [])
    result = {"conv2d": step(lambda: conv2d(x, plain_weight, bias, residual), x, plain_weight, bias)}
    if layer.train:  # the published formulation writes W * density first
        result["published"] = step(lambda: conv2d(x, weight * density, bias, residual), *mine)
    if with_compile:
        compiled = torch.compile(conv2d, mode="max-autotune-no-cudagraphs", dynamic=False)
        result["compile"] = step(lambda: compiled(x, plain_weight, bias, residual), x, plain_weight, bias)
    for backend in ("auto", *BACKENDS):
        run = step(lambda backend=backend: ours(backend), *mine)
        try:
            run()
        except BackendUnavailable as error:
            result[backend] = str(error)  # said in the table's stead
        else:
            result[backend] = run
    return result


def interleaved(calls: dict[str, Callable], rounds: int, flush) -> dict[str, float]:
    """Median milliseconds of each call: every round runs all of them, with the L2 cache overwritten before each."""
    import torch

    for call in calls.values():
        for _ in range(3):
            call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            call()
            end.record()
            times[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in times.items()}


def copy_bandwidth(flush) -> float:
    """GB/s of a large copy, read and written."""
    import torch

    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = interleaved({"copy": lambda: target.copy_(source)}, 10, flush)["copy"]
    return 2 * source.numel() / ms / 1e6


def peaks(flush) -> dict[str, float]:
    """What this GPU reaches: GB/s of a large copy, TFLOP/s of a large matrix product per dtype."""
    import torch

    result = {"GB/s": copy_bandwidth(flush)}
    for name in DTYPES:
        a = torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, name))
        ms = interleaved({"matmul": lambda a=a: a @ a}, 5, flush)["matmul"]
        result[f"TFLOP/s {name}"] = 2 * 8192**3 / ms / 1e9
    return {name: round(value, 1) for name, value in result.items()}


def time_layer(run: Run, layer: Layer, name: str, peak: dict, flush) -> dict:
    """Time one layer in one dtype with every provider."""
    import torch

    dtype = getattr(torch, name)
    with_compile = not run.args.no_compile and not layer.train
    calls, reasons, errors = {}, {}, {}
    for provider, call in providers(layer, dtype, with_compile).items():
        if isinstance(call, str):
            reasons[provider] = call
            continue
        try:
            call()
            synchronize()
            calls[provider] = call
        except Exception as error:  # noqa: BLE001  (one provider's failure must not end the run)
            errors[provider] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    ms = interleaved(calls, run.args.rounds, flush)
    bandwidth_floor = layer.bytes(dtype.itemsize) / (peak["GB/s"] * 1e6)
    flop_floor = layer.flops() / (peak[f"TFLOP/s {name}"] * 1e9)
    floor = max(bandwidth_floor, flop_floor)
    row = {"layer": layer.name, "dtype": name, "ms": {k: round(v, 4) for k, v in ms.items()}}
    row["floor_ms"], row["floor"] = round(floor, 4), "bytes" if bandwidth_floor > flop_floor else "flops"
    row["fraction_of_floor"] = {k: round(floor / v, 3) for k, v in ms.items()}
    row["speedup_over_conv2d"] = {k: round(ms["conv2d"] / v, 3) for k, v in ms.items() if "conv2d" in ms}
    row["not_run"] = reasons | errors
    parts = [
        f"{k} {v:.3f} ms ({row['speedup_over_conv2d'].get(k, 0):.2f}x, {100 * floor / v:.0f}%)" for k, v in ms.items()
    ]
    say(f"{layer.name:34s} {name:9s} floor {floor:.3f} ms ({row['floor']}) | " + " | ".join(parts))
    for provider, why in errors.items():
        say(f"    {provider} failed: {why}")
    return row


def timings(run: Run) -> None:
    """All layers and dtypes, printed as they come."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    peak = peaks(flush)
    say(f"measured peaks: {peak}")
    say("columns: milliseconds (speed-up over cuDNN conv2d in channels_last, percent of the floor)")
    run.result["peaks"], run.result["time"] = peak, []
    for layer in layers():
        if run.args.filter not in layer.name:
            continue
        for name in run.args.dtypes:
            if run.out_of_time():
                say("time: out of time")
                return
            try:
                run.result["time"].append(time_layer(run, layer, name, peak, flush))
            except Exception as error:  # noqa: BLE001  (the other layers still count)
                text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                run.result["time"].append({"layer": layer.name, "dtype": name, "failed": text})
                say(f"{layer.name} {name} failed: {text}")
            run.save()
            torch.cuda.empty_cache()


def check_int8(run: Run) -> int:
    """The int8 rows on their case tables; returns how many checks failed."""
    import gpu_int8

    return tally(run, "int8", gpu_int8.checks(run.args.filter))


def check_attention(run: Run) -> int:
    """The rows of sparse attention on their case tables; returns how many checks failed."""
    import gpu_attention
    import torch

    dtypes = [getattr(torch, name) for name in run.args.dtypes]
    return tally(run, "attention", gpu_attention.checks(run.args.filter, dtypes=dtypes))


def check_samplers(run: Run) -> int:
    """The rows of sampler_step on their case table, and whole runs; returns how many checks failed."""
    import gpu_samplers
    import torch

    dtypes = [getattr(torch, name) for name in run.args.dtypes]
    return tally(run, "samplers", gpu_samplers.checks(run.args.filter, dtypes=dtypes))


def tally(run: Run, part: str, checks: Iterator[tuple[str, str | None]]) -> int:
    """Count and print (name, what is wrong or ``None``); returns how many checks failed."""
    counts = {"passed": 0, "skipped": 0}
    failures, skipped = [], {}
    for name, wrong in checks:
        if wrong is None:
            counts["passed"] += 1
        elif wrong.startswith("skipped"):
            counts["skipped"] += 1
            skipped[wrong] = skipped.get(wrong, 0) + 1
        else:
            failures.append({"check": name, "wrong": wrong})
            say(f"FAILED {name}: {wrong}")
            if "CUDA error" in wrong or "illegal memory" in wrong:
                say("The CUDA context is lost; run again with --filter to leave this case out.")
                break
        if run.out_of_time():
            say(f"{part} checks: out of time")
            break
    run.result[f"check_{part}"] = {**counts, "failures": failures, "reasons": skipped}
    say(f"{part}: {counts['passed']} passed, {counts['skipped']} skipped, {len(failures)} failed")
    for reason, count in skipped.items():
        say(f"    {reason} ({count} checks)")
    run.save()
    return len(failures)


def time_int8(run: Run) -> None:
    """The int8 layers of diffusion U-Nets."""
    import gpu_int8
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    peak = gpu_int8.int8_peak(interleaved, flush)
    say(f"int8 peak of a large matrix product: {peak:.0f} TOP/s")
    run.result["int8_peak_TOPS"], run.result["time_int8"] = round(peak, 1), []
    for layer in gpu_int8.layers():
        if run.args.filter not in layer.name:
            continue
        if run.out_of_time():
            say("int8 times: out of time")
            return
        row = gpu_int8.time_layer(layer, run.args.rounds, not run.args.no_compile, peak, interleaved, flush)
        run.result["time_int8"].append(row)
        say(f"{layer.name:34s} {row['ms']} | over bf16 {row['speedup_over_bf16']} | of peak {row['of_int8_peak']}")
        for provider, why in row["not_run"].items():
            say(f"    {provider} failed: {why}")
        run.save()
        torch.cuda.empty_cache()


def time_attention(run: Run) -> None:
    """Sequences of 4k to 64k tokens beside dense attention and FlexAttention."""
    import gpu_attention
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / interleaved({"matmul": lambda: a @ a}, 10, flush)["matmul"] / 1e9
    say(f"bfloat16 peak of a large matrix product: {peak:.0f} TFLOP/s")
    run.result["bf16_peak_TFLOPS"], run.result["time_attention"] = round(peak, 1), []
    for sequence in gpu_attention.sequences():
        if run.args.filter not in sequence.name:
            continue
        if run.out_of_time():
            say("attention times: out of time")
            return
        try:
            row = gpu_attention.time_sequence(
                sequence, lambda calls, rounds: interleaved(calls, rounds, flush),
                rounds=run.args.rounds, with_compile=not run.args.no_compile, peak=peak,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  (the other lengths still count)
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            run.result["time_attention"].append({"case": sequence.name, "failed": text})
            say(f"{sequence.name} failed: {text}")
            continue
        run.result["time_attention"].append(row)
        for line in gpu_attention.describe_row(row):
            say(line)
        run.save()
        torch.cuda.empty_cache()


def time_samplers(run: Run) -> None:
    """Steps of samplers beside torch's own operations, then whole runs around a model that does nothing."""
    import gpu_samplers
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    bandwidth = copy_bandwidth(flush)
    say(f"bandwidth of a large copy: {bandwidth:.0f} GB/s")
    run.result["copy_GBs"], run.result["time_samplers"], run.result["time_sampler_loops"] = round(bandwidth, 1), [], []
    for step in gpu_samplers.steps():
        if run.args.filter not in step.name:
            continue
        if run.out_of_time():
            say("sampler times: out of time")
            return
        try:
            row = gpu_samplers.time_step(
                step, lambda calls, rounds: interleaved(calls, rounds, flush),
                rounds=run.args.rounds, with_compile=not run.args.no_compile, bandwidth=bandwidth,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001  (the other steps still count)
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            run.result["time_samplers"].append({"case": step.name, "failed": text})
            say(f"{step.name} failed: {text}")
            continue
        run.result["time_samplers"].append(row)
        for line in gpu_samplers.describe_row(row):
            say(line)
        run.save()
        torch.cuda.empty_cache()
    for solver, shape in gpu_samplers.loops():
        if run.args.filter not in f"loop {solver}" or run.out_of_time():
            continue
        row = gpu_samplers.time_loop(solver, shape, rounds=10, device="cuda", backends=BACKENDS)
        run.result["time_sampler_loops"].append(row)
        say(f"{row['case']:34s} us a call {row['us_per_call']} {row['not_run'] or ''}")
        run.save()


def main(argv: list[str] | None = None) -> int:
    """Run the sections asked for; returns the exit code."""
    args = parse(argv)
    why = unusable()
    if why is not None:
        say(f"bench/gpu.py: nothing to do here: {why}.")
        return 2
    if args.build:
        build()
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # the checkout's package where it is not installed
    facts = describe()
    for key, value in facts.items():
        say(f"{key}: {value}")
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    slug = facts["device"].lower().replace(" ", "-")
    path = args.output or ROOT / "bench" / "results" / f"gpu-{slug}-{stamp}.json"
    command = " ".join(["python", "bench/gpu.py", *(argv if argv is not None else sys.argv[1:])])
    run = Run(args, path, {"date": stamp, "command": command, "machine": facts})
    failures = 0
    if args.only != "time":
        checks = {"weighted_conv": check, "int8": check_int8, "attention": check_attention, "samplers": check_samplers}
        failures = sum(checks[part](run) for part in args.parts)
    if args.only != "check":
        timers = {"weighted_conv": timings, "int8": time_int8, "attention": time_attention, "samplers": time_samplers}
        for part in args.parts:
            timers[part](run)
    run.save()
    say(f"written: {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
