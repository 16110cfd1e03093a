"""Compile every Triton kernel ahead of time and hold it to a budget; needs no GPU and no driver.

    python tests/aot/triton_budget.py [--arch 90] [--kernel conv] [--jobs 2] [--write]

Every variant is compiled in its dtypes for each architecture, with the arguments that the launcher itself makes for a
typical layer (``triton_layers.py``). Checked: matrix products in fp16, bf16, tf32 and int8 use the tensor-core
instruction of the architecture, nothing spills, and registers and shared memory stay within ``triton_budget.json``.
Code generation differs between versions of Triton, so the budget is kept per version; a kernel without one in a version
is held to the limits of the hardware only. ``--write`` records what was found, plus a margin, as this version's budget.
Exits with 1 on a violation.
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
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton_layers import FAMILIES, Family, Problem

BUDGET = Path(__file__).with_suffix(".json")
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 255
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block
REGISTER_MARGIN = 8  # ptxas moves by a few registers with any change
TENSOR_CORE = {
    "float": {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma|\bmma\.sync"},
    "int8": {
        80: r"\bmma\.sync\S*\.s8\.s8",
        90: r"\bwgmma\.mma_async\S*\.s8\.s8",
        100: r"\btcgen05\.mma\S*kind::i8|\bmma\.sync\S*\.s8\.s8",
    },
}
WARPGROUP_ROWS = 64  # wgmma multiplies 64 rows at a time; a tile with fewer is left to mma.sync
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    family: int  # place in FAMILIES
    variant: int  # place in the family's variants
    problem: Problem
    arch: int

    @property
    def rules(self) -> Family:
        return FAMILIES[self.family]

    @property
    def tile(self):
        """The variant: a kernel's name and its tile sizes."""
        return self.rules.variants[self.variant]

    @property
    def name(self) -> str:
        problem, dtype = self.problem
        return f"{self.tile.name}/{problem}/{str(dtype).removeprefix('torch.')}/sm_{self.arch}"

    @property
    def instruction(self) -> str | None:
        """Pattern of the tensor-core instruction that the job is meant to compile to, ``None`` if none."""
        dtype = self.rules.products(self.tile)
        if dtype is None:
            return None
        few = self.arch == 90 and self.rules.rows(self.tile) < WARPGROUP_ROWS
        return TENSOR_CORE[dtype][80 if few else self.arch]


@dataclass(frozen=True)
class Result:
    seconds: float
    registers: int
    spills: int  # bytes of local memory
    shared: int
    tensor_core: bool


def jobs() -> list[Job]:
    """Everything to compile."""
    return [
        Job(place, number, problem, arch)
        for place, family in enumerate(FAMILIES)
        for number, variant in enumerate(family.variants)
        for arch in ARCHITECTURES
        for problem in family.problems(variant, arch)
    ]


def source(kernel: triton.JITFunction, values: dict) -> ASTSource:
    """What the just-in-time compiler would make of a launch: the same types, constants and alignments."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialise and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_job(job: Job) -> Result:
    tile, start = job.tile, time.perf_counter()
    values = {**job.rules.arguments(tile, job.problem), **dict(tile.meta)}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    made = source(job.rules.functions[tile.kernel], values)
    compiled = triton.compile(made, target=GPUTarget("cuda", job.arch, 32), options=options)
    registers, spills = resource_usage(compiled.asm["cubin"])
    tensor_core = job.instruction is not None and bool(re.search(job.instruction, compiled.asm["ptx"]))
    return Result(time.perf_counter() - start, registers, spills, compiled.metadata.shared, tensor_core)


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
    if job.instruction is not None and not result.tensor_core:
        found.append(f"no tensor-core instruction ({job.instruction}) in the PTX")
    limits = budget.get(job.name, {"registers": MAX_REGISTERS, "shared": MAX_SHARED[job.arch]})
    found += [
        f"{key} {getattr(result, key)} over its budget of {limit}"
        for key, limit in limits.items()
        if getattr(result, key) > limit
    ]
    if job.name not in budget and any(name.startswith(f"{job.tile.kernel}-") for name in budget):
        found.append("not in the budget (run with --write)")
    return found


def try_job(job: Job) -> tuple[Job, Result | str]:
    try:
        return job, compile_job(job)
    except Exception as error:  # the table reports it and the exit status counts it
        return job, f"{type(error).__name__}: {str(error)[:300]}"


def main() -> int:
    kernels = sorted({name for family in FAMILIES for name in family.functions})
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="this architecture only")
    parser.add_argument("--kernel", choices=kernels, help="this kernel only")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help="record the result as this version's budget")
    options = parser.parse_args()
    everything = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    budget = {} if options.write else everything.get(triton.__version__, {})
    chosen = [job for job in jobs() if options.arch in (None, job.arch) and options.kernel in (None, job.tile.kernel)]
    start, failed, measured = time.perf_counter(), 0, {}
    print(f"triton {triton.__version__}, {len(chosen)} compilations, budget: {len(budget)} entries")
    print(f"{'registers':>9} {'shared':>7} {'spills':>6} {'tensor core':>11} {'seconds':>7}  kernel")
    # Fresh processes: the compiler's cache must not answer, nor one job's settings reach another.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for job, result in pool.imap(try_job, chosen):
                if isinstance(result, str):
                    failed += 1
                    print(f"{'':>45}  {job.name}\n    FAILED: {result}", flush=True)
                    continue
                measured[job.name] = {"registers": result.registers, "shared": result.shared}
                problems_found = violations(job, result, budget)
                failed += bool(problems_found)
                row = f"{result.registers:>9} {result.shared:>7} {result.spills:>6} {str(result.tensor_core):>11} "
                row += f"{result.seconds:>7.1f}"
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
