"""Compile the CUDA kernels for every architecture, read the compiler's report, and hold it against a budget.

    python tests/aot/cuda_budget.py                   # table; exit code 1 on a violation, 2 without nvcc
    python tests/aot/cuda_budget.py --archs 90a       # one architecture
    python tests/aot/cuda_budget.py --write           # make today's registers and shared memory the budget

A kernel violates the budget if it spills registers, needs a stack frame, or exceeds the registers or the static shared
memory that tests/aot/cuda_budget.json grants it, or if its machine code lacks the tensor-core instruction that it is
written for (looked for with cuobjdump, from PATH or from Triton's package). The budget is keyed by kernel, the largest
over the architectures; nvcc's version is kept beside it, because another version may allocate differently. No GPU is
needed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_suffix(".json")
SOURCES = (
    "csrc/weighted_conv/cuda.cu",
    "csrc/int8_conv2d/cuda.cu",
    "csrc/norm_quantize/cuda.cu",
    "csrc/quantize/cuda.cu",
    "csrc/block_sparse_attention/cuda.cu",
    "csrc/block_sparse_attention/cuda_backward.cu",
    "csrc/block_importance/cuda.cu",
    "csrc/token_confidence/cuda.cu",
    "csrc/sampler_step/cuda.cu",
)
ARCHS = ("80", "89", "90a", "100a")
# (pattern at the start of the kernel's name, architecture or None for all): what its machine code must hold
_ATTENTION = r"(forward|query_grad|key_grad|row_sums|block_sums)_kernel<\w+Tile<"
INSTRUCTIONS = {
    (_ATTENTION + "BFloat16", None): r"\bHMMA\.16816\.F32\.BF16\b",
    (_ATTENTION + "Float16", None): r"\bHMMA\.16816\.F32\b(?!\.)",
    ("forward_kernel<.*(true|1)> ?>", None): r"\bIMMA\.16832\.S8\.S8\b",
    (_ATTENTION, None): r"\b(LDGSTS\.E\.BYPASS|UTMALDG)",
    ("mma_kernel", None): r"\bIMMA\.16832\.S8\.S8\b",
    ("wgmma_kernel", "90a"): r"\bIGMMA\.64x\d+x32\.S8\.S8\b",
    ("wgmma_forward_kernel<WgmmaForward<BFloat16", "90a"): r"\bHGMMA\.64x\d+x16\.F32\.BF16\b",
    ("wgmma_forward_kernel<WgmmaForward<Float16", "90a"): r"\bHGMMA\.64x\d+x16\.F32\b(?!\.)",
    ("wgmma_forward_kernel<.*(true|1)> ?>", "90a"): r"\bIGMMA\.64x\d+x32\.S8\.S8\b",
}


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    missing: str | None = None  # an instruction that its machine code should hold


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled name -> `kernel<arguments>` without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    result = {}
    for name, full in zip(names, out.splitlines(), strict=True):
        short = re.sub(r"(\w+|\(anonymous namespace\)|<unnamed>|_GLOBAL__N__\w+)::", "", full.removeprefix("void "))
        short = re.sub(r"\((?:int|bool|Statistics)\)", "", short)
        result[name] = short.split("(")[0]
    return result


def disassembler() -> str | None:
    """cuobjdump: from PATH, else the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(candidate) if candidate.is_file() else None
    return found


def machine_code(cubin: str) -> dict[str, str]:
    """Mangled kernel name -> its disassembly; empty without a disassembler."""
    tool = disassembler()
    if tool is None:
        return {}
    text = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def compile_report(source: str, arch: str) -> tuple[str, dict[str, str]]:
    """(ptxas -v output, machine code by kernel) for one architecture. Raises ``SystemExit`` if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            os.environ.get("NVCC", "nvcc"), "-std=c++20", "-O3", "-cubin", "-DPDN_SM90A", "-Xptxas", "-v,-warn-spills",
            f"-gencode=arch=compute_{arch},code=sm_{arch}", source, "-o", f"{folder}/out.cubin",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr, machine_code(f"{folder}/out.cubin")


def missing_instruction(kernel: str, arch: str, code: str | None) -> str | None:
    """The pattern that ``kernel`` should show and does not; ``None`` if all is well or nothing could be read."""
    if code is None:
        return None
    for (start, only), pattern in INSTRUCTIONS.items():
        if re.match(start, kernel) and only in (None, arch) and not re.search(pattern, code):
            return pattern
    return None


def parse_report(text: str, code: dict[str, str], arch: str) -> list[Usage]:
    """Every kernel in a ptxas -v report, with its machine code."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = list(pattern.finditer(text))
    names = demangle([match["name"] for match in found]) if found else {}
    usages = []
    for match in found:
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spills = int(match["stores"]) + int(match["loads"])
        numbers = (int(match["registers"]), int(shared[1]) if shared else 0, spills, int(match["stack"]))
        kernel = names[match["name"]]
        missing = missing_instruction(kernel, arch, code.get(match["name"]))
        usages.append(Usage(kernel, arch, *numbers, missing))
    return usages


def violations(usages: list[Usage], budget: dict) -> list[str]:
    """One sentence per violation."""
    found = []
    for use in usages:
        where = f"{use.kernel} on sm_{use.arch}"
        if use.spill_bytes or use.stack_bytes:
            found.append(f"{where}: {use.spill_bytes} bytes of spills, {use.stack_bytes} bytes of stack")
        if use.missing:
            found.append(f"{where}: no instruction like {use.missing} in its machine code")
        granted = budget.get(use.kernel)
        if granted is None:
            found.append(f"{where}: has no budget; run with --write")
            continue
        if use.registers > granted["registers"]:
            found.append(f"{where}: {use.registers} registers, {granted['registers']} granted")
        if use.shared_bytes > granted["shared_bytes"]:
            found.append(f"{where}: {use.shared_bytes} bytes of shared memory, {granted['shared_bytes']} granted")
    missing = sorted(set(budget) - {use.kernel for use in usages})
    return found + [f"{name}: in the budget, but not compiled" for name in missing]


def print_table(usages: list[Usage], archs: list[str]) -> None:
    """Registers per kernel and architecture; spills are marked."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", *(f"sm_{arch}" for arch in archs), "static shared", title="registers (spilled bytes)")
    for kernel in sorted({use.kernel for use in usages}):
        rows = {use.arch: use for use in usages if use.kernel == kernel}
        cells = [
            f"{rows[arch].registers}" + (f" ({rows[arch].spill_bytes})" if rows[arch].spill_bytes else "")
            for arch in archs
        ]
        table.add_row(kernel, *cells, str(max(use.shared_bytes for use in rows.values())))
    Console(width=110).print(table)


def main(argv: list[str] | None = None) -> int:
    """Compile, print, compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument("--write", action="store_true", help="store what was measured as the budget")
    args = parser.parse_args(argv)
    compiler = os.environ.get("NVCC", "nvcc")
    if shutil.which(compiler) is None:
        print(f"cuda_budget: {compiler} was not found; nothing was checked")
        return 2
    jobs = [(source, arch) for source in SOURCES for arch in args.archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda job: parse_report(*compile_report(*job), job[1]), jobs))
    usages = [use for report in reports for use in report]
    print_table(usages, args.archs)
    if disassembler() is None:
        print("cuda_budget: cuobjdump was not found; the machine code was not read")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", version)
    if args.write:
        kernels = {}
        for use in sorted(usages, key=lambda use: use.kernel):
            entry = kernels.setdefault(use.kernel, {"registers": 0, "shared_bytes": 0})
            entry["registers"] = max(entry["registers"], use.registers)
            entry["shared_bytes"] = max(entry["shared_bytes"], use.shared_bytes)
        BUDGET.write_text(json.dumps({"nvcc": release[1] if release else "", "kernels": kernels}, indent=1) + "\n")
    budget = json.loads(BUDGET.read_text())
    found = violations(usages, budget["kernels"])
    for line in found:
        print(line)
    print(f"{len(usages)} kernels x architectures, {len(found)} violations (budget of nvcc {budget['nvcc']})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
