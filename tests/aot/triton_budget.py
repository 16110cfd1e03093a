"""Compile every Triton kernel ahead of time and hold it to a budget; needs no GPU and no driver.

    python tests/aot/triton_budget.py [--arch 90] [--kernel conv] [--jobs 2] [--write]

Every variant is compiled in its dtypes for each architecture, with the arguments that the launcher itself makes for a
typical layer. Checked: matrix products in fp16, bf16 and tf32 use the tensor-core instruction of the architecture,
nothing spills, and registers and shared memory stay within ``triton_budget.json``. Code generation differs between
versions of Triton, so the budget is kept per version; a version without one is held to the limits of the hardware only.
``--write`` records what was found, plus a margin, as this version's budget. Exits with 1 on a violation.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are decorated

import torch
import triton
from pydenoise.kernels import weighted_conv as wc
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

BUDGET = Path(__file__).with_suffix(".json")
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 255
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block
REGISTER_MARGIN = 8  # ptxas moves by a few registers with any change
TENSOR_CORE = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma|\bmma\.sync"}
WARPGROUP_ROWS = 64  # wgmma multiplies 64 rows at a time; a tile with fewer is left to mma.sync
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Job:
    variant: wc.Variant
    dtype: torch.dtype
    arch: int
    problem: str

    @property
    def name(self) -> str:
        return f"{self.variant.name}/{self.problem}/{str(self.dtype).removeprefix('torch.')}/sm_{self.arch}"


@dataclass(frozen=True)
class Result:
    registers: int
    spills: int  # bytes of local memory
    shared: int
    tensor_core: bool


def launches(variant: wc.Variant, dtype: torch.dtype, problem: str) -> list[wc.Launch]:
    """The launches of a typical layer, on tensors without storage. ``problem`` is its kind and its form."""
    kind, form = problem.split("-")
    channels, outputs = {"skinny": (3, 64), "depthwise": (96, 96)}.get(kind, (128, 128))
    groups = channels if kind == "depthwise" else 1
    stride = 2 if kind == "strided" else 1
    dims, size = {"1d": (1, 4096), "2d": (2, 64), "3d": (3, 32), "wide": (2, 40000)}[form]
    activation = {"1d": "gelu", "2d": "silu", "3d": "gelu_tanh", "wide": "relu"}[form]

    def image(count: int, size: int) -> torch.Tensor:
        order = (0, dims + 1, *range(1, dims + 1))
        return torch.empty(4, *(size,) * dims, count, dtype=dtype, device="meta").permute(order)

    x, y = image(channels, size), image(outputs, size // stride)
    weight = torch.empty(outputs, channels // groups, *(3,) * dims, dtype=dtype, device="meta")
    density, bias = torch.empty_like(weight[0, 0]), torch.empty_like(weight[:, 0].flatten(1)[:, 0])
    geometry = ((stride,) * dims, (1, 1) * dims, (1,) * dims, groups)
    if variant.kernel in ("weight_gradient", "depthwise_weight_gradient", "reduce"):
        parts = torch.empty(wc.density_parts(weight), density.numel(), dtype=torch.float64, device="meta")
        return wc.plan_weight_gradient(y, x, weight, density, torch.empty_like(weight), parts, *geometry)
    if kind == "strided":
        return wc.plan_input_gradient(y, weight, density, x, *geometry)[:1]
    return wc.plan_forward(x, weight, density, bias, image(outputs, size), y, *geometry, activation)


def problems(variant: wc.Variant, arch: int) -> tuple[str, ...]:
    """Layers on which a variant is compiled; the first tile of each kernel takes the rarer paths too."""
    kind = {"conv_unfold": "skinny"}.get(variant.kernel, "depthwise" if "depthwise" in variant.kernel else "plain")
    found = [f"{kind}-2d"]
    if is_first(variant) and variant.kernel == "conv":
        found.append("strided-2d")
    if is_first(variant) and variant.kernel != "reduce" and arch == 90:
        found += [f"{kind}-{form}" for form in ("1d", "3d", "wide")]
    return tuple(found)


def is_first(variant: wc.Variant) -> bool:
    return variant is next(v for v in wc.VARIANTS if (v.kernel, v.precision) == (variant.kernel, variant.precision))


def jobs() -> list[Job]:
    """Everything to compile. bfloat16 stands for both half formats, but for one tile of each kernel."""
    return [
        Job(variant, dtype, arch, problem)
        for variant in wc.VARIANTS
        for arch in ARCHITECTURES
        for problem in problems(variant, arch)
        for dtype in variant.dtypes
        if dtype != torch.float16 or (is_first(variant) and problem.endswith("2d"))
    ]


def source(launch: wc.Launch, variant: wc.Variant) -> ASTSource:
    """What the just-in-time compiler would make of ``launch``: the same types, constants and alignments."""
    kernel = wc.KERNELS[launch.kernel]
    values = {**launch.arguments, **dict(variant.meta)}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialise and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def instruction(job: Job) -> str:
    """Pattern of the tensor-core instruction that ``job`` is meant to compile to."""
    blocks = dict(job.variant.meta)
    rows = blocks["BLOCK_O"] if job.variant.kernel == "weight_gradient" or blocks["WEIGHT_LEFT"] else blocks["BLOCK_M"]
    return TENSOR_CORE[80 if job.arch == 90 and rows < WARPGROUP_ROWS else job.arch]


def compile_job(job: Job) -> Result:
    precision = {"tf32": "high"}.get(job.variant.precision, "highest")
    torch.set_float32_matmul_precision(precision)
    launch = next(item for item in launches(job.variant, job.dtype, job.problem) if item.kernel == job.variant.kernel)
    options = {"num_warps": job.variant.num_warps, "num_stages": job.variant.num_stages}
    compiled = triton.compile(source(launch, job.variant), target=GPUTarget("cuda", job.arch, 32), options=options)
    registers, spills = resource_usage(compiled.asm["cubin"])
    matrix = job.variant.kernel in wc.MATRIX_KERNELS
    tensor_core = matrix and bool(re.search(instruction(job), compiled.asm["ptx"]))
    return Result(registers, spills, compiled.metadata.shared, tensor_core)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory) as the assembler recorded them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def violations(job: Job, result: Result, budget: dict[str, dict[str, int]]) -> list[str]:
    found = []
    if result.spills:
        found.append(f"spills {result.spills} bytes")
    if job.variant.kernel in wc.MATRIX_KERNELS and job.variant.precision != "fp32" and not result.tensor_core:
        found.append(f"no tensor-core instruction ({instruction(job)}) in the PTX")
    limits = budget.get(job.name, {"registers": MAX_REGISTERS, "shared": MAX_SHARED[job.arch]})
    found += [
        f"{key} {getattr(result, key)} over its budget of {limit}"
        for key, limit in limits.items()
        if getattr(result, key) > limit
    ]
    if budget and job.name not in budget:
        found.append("not in the budget (run with --write)")
    return found


def try_job(job: Job) -> tuple[Job, Result | str]:
    try:
        return job, compile_job(job)
    except Exception as error:  # the table reports it and the exit status counts it
        return job, f"{type(error).__name__}: {str(error)[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="this architecture only")
    parser.add_argument("--kernel", choices=sorted(wc.KERNELS), help="this kernel only")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help="record the result as this version's budget")
    options = parser.parse_args()
    everything = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget = {} if options.write else everything.get(triton.__version__, {})
    chosen = [
        job for job in jobs() if options.arch in (None, job.arch) and options.kernel in (None, job.variant.kernel)
    ]
    start, failed, measured = time.perf_counter(), 0, {}
    print(f"triton {triton.__version__}, {len(chosen)} compilations, budget: {len(budget)} entries")
    print(f"{'registers':>9} {'shared':>7} {'spills':>6} {'tensor core':>11}  kernel")
    # Fresh processes: the compiler's cache must not answer, nor one job's settings reach another.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for job, result in pool.imap(try_job, chosen):
                if isinstance(result, str):
                    failed += 1
                    print(f"{'':>37}  {job.name}\n    FAILED: {result}", flush=True)
                    continue
                measured[job.name] = {"registers": result.registers, "shared": result.shared}
                problems_found = violations(job, result, budget)
                failed += bool(problems_found)
                row = f"{result.registers:>9} {result.shared:>7} {result.spills:>6} {str(result.tensor_core):>11}"
                print(f"{row}  {job.name}" + "".join(f"\n    FAILED: {p}" for p in problems_found), flush=True)
    if options.write and not failed:
        partial = options.arch is not None or options.kernel is not None
        everything[triton.__version__] = {
            **(everything.get(triton.__version__, {}) if partial else {}),
            **{
                name: {**row, "registers": min(MAX_REGISTERS, row["registers"] + REGISTER_MARGIN)}
                for name, row in measured.items()
            },
        }
        BUDGET.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    print(f"{len(chosen)} compilations in {time.perf_counter() - start:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
