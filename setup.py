"""Build of the compiled libraries: ``pydenoise._C`` (CPU kernels and bindings) and, where nvcc is found, ``_cuda``.

Each kernel source is compiled once per ISA level, with the flags of the table below; the processor of the machine that
builds does not matter. torch is not imported: only its headers are needed.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # under pip's isolation the project's folder is not on the path

import setup_cuda  # noqa: E402

# Adding an ISA level: a row here, one in csrc/core/isa.{h,cpp}, one in csrc/core/levels.h.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {
        "avx2": AVX2,
        "avx2vnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
        "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    }

# The levels a source is compiled for; in its dispatch table, the others point at the next lower one.
FLOAT_LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")
INT8_LEVELS = ("baseline", "avx2", "avx2vnni", "avx512", "avx512vnni")
PER_ISA_SOURCES = {
    "csrc/weighted_conv/cpu.cpp": FLOAT_LEVELS,
    "csrc/quantize/cpu.cpp": FLOAT_LEVELS,
    "csrc/norm_quantize/cpu.cpp": FLOAT_LEVELS,
    "csrc/int8_conv2d/cpu.cpp": INT8_LEVELS,
    "csrc/attention/cpu.cpp": tuple(ISA_FLAGS),
    "csrc/block_importance/cpu.cpp": FLOAT_LEVELS,
    "csrc/block_sparse_attention/cpu.cpp": FLOAT_LEVELS,
    "csrc/token_confidence/cpu.cpp": FLOAT_LEVELS,
    "csrc/adaptive_bilateral_filter/cpu.cpp": FLOAT_LEVELS,
    "csrc/sampler_step/cpu.cpp": FLOAT_LEVELS,
    "csrc/dcls_kernel/cpu.cpp": FLOAT_LEVELS,
    "csrc/wavelet_gate/cpu.cpp": FLOAT_LEVELS,
    "csrc/softmax_aggregate/cpu.cpp": FLOAT_LEVELS,
    "csrc/routed_norm/cpu.cpp": FLOAT_LEVELS,
    "csrc/ode_stage/cpu.cpp": FLOAT_LEVELS,
    "csrc/core/peaks_isa.cpp": tuple(ISA_FLAGS),
}
SOURCES = [
    "csrc/core/isa.cpp",
    "csrc/core/threads.cpp",
    "csrc/core/pool.cpp",
    "csrc/core/tape.cpp",
    "csrc/core/peaks.cpp",
    "csrc/weighted_conv/dispatch.cpp",
    "csrc/quantize/dispatch.cpp",
    "csrc/norm_quantize/dispatch.cpp",
    "csrc/int8_conv2d/dispatch.cpp",
    "csrc/attention/dispatch.cpp",
    "csrc/block_importance/dispatch.cpp",
    "csrc/block_sparse_attention/dispatch.cpp",
    "csrc/token_confidence/dispatch.cpp",
    "csrc/adaptive_bilateral_filter/dispatch.cpp",
    "csrc/sampler_step/dispatch.cpp",
    "csrc/dcls_kernel/dispatch.cpp",
    "csrc/wavelet_gate/dispatch.cpp",
    "csrc/softmax_aggregate/dispatch.cpp",
    "csrc/routed_norm/dispatch.cpp",
    "csrc/ode_stage/dispatch.cpp",
    "csrc/bindings/weighted_conv.cpp",
    "csrc/bindings/quantize.cpp",
    "csrc/bindings/norm_quantize.cpp",
    "csrc/bindings/int8_conv2d.cpp",
    "csrc/bindings/attention.cpp",
    "csrc/bindings/block_sparse_attention.cpp",
    "csrc/bindings/block_importance.cpp",
    "csrc/bindings/block_sparse_attention_backward.cpp",
    "csrc/bindings/token_confidence.cpp",
    "csrc/bindings/adaptive_bilateral_filter.cpp",
    "csrc/bindings/sampler_step.cpp",
    "csrc/bindings/dcls_kernel.cpp",
    "csrc/bindings/wavelet_gate.cpp",
    "csrc/bindings/softmax_aggregate.cpp",
    "csrc/bindings/routed_norm.cpp",
    "csrc/bindings/ode_stage.cpp",
    "csrc/bindings/module.cpp",
]
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 reports the undefined operands of its own AVX-512 intrinsics as uninitialised.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
CUDA = "pydenoise._cuda"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover"]


def torch_directory() -> Path:
    """Where torch is installed, found without importing it."""
    candidates = [os.environ.get("PYDENOISE_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        candidates.append(str(Path(spec.origin).parent))
    candidates.append(str(Path(sysconfig.get_path("platlib")) / "torch"))
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "torch" / "csrc" / "stable").is_dir():
            return Path(candidate)
    raise SystemExit(
        "pydenoise: torch >= 2.10 must be installed before pydenoise is built. Run `pip install 'torch>=2.10'` first, "
        "then this command again, or set PYDENOISE_TORCH_DIR to torch's package folder."
    )


class BuildKernels(build_ext):
    """Compile every source, the kernels once per ISA level, on all cores; link one shared library."""

    def build_extensions(self) -> None:
        with ThreadPoolExecutor(len(self.extensions)) as pool:
            list(pool.map(self.build_extension, self.extensions))

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            self._build_cuda(ext)
        else:
            self._build_cpu(ext)

    def _build_cuda(self, ext: Extension) -> None:
        objects = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        objects.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        compile_commands, link = setup_cuda.commands(objects, library, torch_directory(), [TORCH_TARGET])
        for command in [*compile_commands, link]:
            self._run(command)

    def _build_cpu(self, ext: Extension) -> None:
        import pybind11

        torch = torch_directory()
        objects = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        objects.mkdir(parents=True, exist_ok=True)
        sanitize = SANITIZE if os.environ.get("PYDENOISE_SANITIZE") else []
        compiler = os.environ.get("CXX", "g++")
        includes = [
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            f"-isystem{torch / 'include'}",
            f"-isystem{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        ]
        jobs = []
        for source, levels in PER_ISA_SOURCES.items():
            for isa in (level for level in levels if level in ISA_FLAGS):
                target = objects / f"{source.replace('/', '_')}.{isa}.o"
                flags = [*KERNEL_FLAGS, *ISA_FLAGS[isa], *sanitize]
                jobs.append((target, [*FLAGS, *flags, f"-DPDN_ISA={isa}", source]))
        for source in SOURCES:
            target = objects / f"{source.replace('/', '_')}.o"
            info = f'-DPDN_BUILD_FLAGS="{" ".join([*FLAGS, *KERNEL_FLAGS, *sanitize])}"'
            jobs.append((target, [*FLAGS, *sanitize, TORCH_TARGET, info, *includes, source]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [[compiler, *arguments, "-c", "-o", str(target)] for target, arguments in jobs]
            list(pool.map(self._run, commands))
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, "-shared", *sanitize, *(str(target) for target, _ in jobs), "-o", str(library)]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-pthread", "-ldl"]
        self._run([*link, *libraries])

    @staticmethod
    def _run(command: list[str]) -> None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit(
                f"pydenoise: the C++ compiler {command[0]!r} was not found. Install g++ 11 or later (Debian, Ubuntu: "
                "`apt-get install g++`), or name another one in the environment variable CXX."
            ) from None
        if done.returncode != 0:
            raise SystemExit(f"pydenoise: this command failed:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
        if done.stderr:
            print(done.stderr)


extensions = [Extension("pydenoise._C", sources=[*PER_ISA_SOURCES, *SOURCES])]
if setup_cuda.wanted():
    extensions.insert(0, Extension(CUDA, sources=[*setup_cuda.SOURCES, *setup_cuda.BINDINGS]))

setup(
    # the Triton files lie in kernels/ and are installed as pydenoise.kernels
    packages=[*find_packages(include=["pydenoise", "pydenoise.*"]), "pydenoise.kernels"],
    package_dir={"pydenoise.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
)
