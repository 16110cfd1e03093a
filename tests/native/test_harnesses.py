"""The torch-free harnesses: CPU algorithms at every ISA level, under sanitizers, and on emulated older processors."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESSES = sorted(path.name for path in Path(__file__).parent.glob("*_harness.cpp"))
FLAGS = ["-std=c++20", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {
    "baseline": [],
    "avx2": AVX2,
    "avx2vnni": [*AVX2, "-mavxvnni"],
    "avx2vnni_on_avx512": [*AVX2, "-mavxvnni", "-DPDN_EVEX_VNNI"],  # the same code, its one instruction in EVEX form
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
NEEDS = {
    "baseline": [],
    "avx2": ["avx2", "fma", "f16c"],
    "avx2vnni": ["avx_vnni"],
    "avx2vnni_on_avx512": ["avx512_vnni", "avx512vl"],
    "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"],
    "avx512vnni": ["avx512_vnni"],
    "avx512bf16": ["avx512_bf16"],
}
FLOAT_LEVELS = ["baseline", "avx2", "avx512"]
OWN_LEVELS = {  # of harnesses whose kernels have bodies of their own for VNNI, or for products of bfloat16
    "int8_conv2d_harness.cpp": [level for level in LEVELS if level != "avx512bf16"],
    "attention_harness.cpp": list(LEVELS),
    "block_importance_harness.cpp": [*FLOAT_LEVELS, "avx512bf16"],
    "block_sparse_backward_harness.cpp": [*FLOAT_LEVELS, "avx512bf16"],
}
RUNS = [(harness, level) for harness in HARNESSES for level in OWN_LEVELS.get(harness, FLOAT_LEVELS)]
EMULATED = {"baseline": "Nehalem", "avx2": "Haswell"}
# The last three halve the time of compilation: instrumented kernels are large functions, and need not be fast.
SANITIZERS = [
    "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover",
    "-fno-tree-pta", "-fira-region=one", "-fira-algorithm=priority",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the ISA levels are those of x86-64"),
]


def processor_has(level: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    return all(flag in flags for flag in NEEDS[level])


def build(harness: str, level: str, flags: list[str], folder: Path) -> Path:
    program = folder / f"{harness}.{level}"
    command = [
        "g++",
        *FLAGS,
        *LEVELS[level],
        *flags,
        "-pthread",
        str(ROOT / "tests" / "native" / harness),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"})
    assert done.returncode == 0, f"{' '.join(command)} -> {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize(("harness", "level"), RUNS)
def test_under_sanitizers(harness, level, tmp_path):
    if not processor_has(level):
        pytest.skip(f"this processor has no {level}")
    run([str(build(harness, level, SANITIZERS, tmp_path))])


@pytest.mark.parametrize("level", EMULATED)
@pytest.mark.parametrize("harness", HARNESSES)
def test_on_an_older_processor(harness, level, tmp_path):
    """An instruction of a higher level, leaked into a lower one, is an illegal instruction here."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 (Debian: qemu-user) is not installed")
    run([emulator, "-cpu", EMULATED[level], str(build(harness, level, ["-O2"], tmp_path))])


@pytest.mark.parametrize("level", ["baseline", "avx512"])
@pytest.mark.parametrize(
    "op",
    [
        "weighted_conv",
        "int8_conv2d",
        "attention",
        "block_importance",
        "block_sparse_attention",
        "token_confidence",
        "adaptive_bilateral_filter",
        "sampler_step",
        "dcls_kernel",
        "wavelet_gate",
        "softmax_aggregate",
        "routed_norm",
        "ode_stage",
    ],
)
def test_level_objects_share_no_symbols(op, level, tmp_path):
    """A weak symbol in the object of one level could be the copy that all levels get."""
    target = tmp_path / "cpu.o"
    source = ROOT / "csrc" / op / "cpu.cpp"
    command = ["g++", "-O1", *FLAGS, *LEVELS[level], f"-DPDN_ISA={level}", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout
    exported = [line for line in symbols.splitlines() if line[17:18] in "WVuTDBR"]
    assert [line.split()[-1] for line in exported] == [f"pdn::{op}::kernels_{level}"]
