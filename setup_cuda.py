"""Build of ``pydenoise._cuda``, the library of CUDA kernels; used by setup.py where nvcc is found.

nvcc's presence decides, never a GPU's: kernels are compiled for a list of architectures, and the bindings need only the
headers of torch, which may be a CPU build. Environment: PYDENOISE_CUDA=auto|0|1 (1: fail without nvcc),
PYDENOISE_CUDA_ARCHS (for example "90a" or "80,89,90a,100a"), NVCC (path of the compiler).
"""

import os
import shutil
from pathlib import Path

SOURCES = [
    "csrc/weighted_conv/cuda.cu",
    "csrc/int8_conv2d/cuda.cu",
    "csrc/norm_quantize/cuda.cu",
    "csrc/quantize/cuda.cu",
    "csrc/block_sparse_attention/cuda.cu",
    "csrc/block_sparse_attention/cuda_backward.cu",
    "csrc/block_importance/cuda.cu",
    "csrc/token_confidence/cuda.cu",
    "csrc/sampler_step/cuda.cu",
]
BINDINGS = [
    "csrc/bindings/cuda.cpp",
    "csrc/bindings/cuda_int8.cpp",
    "csrc/bindings/cuda_attention.cpp",
    "csrc/bindings/cuda_token_confidence.cpp",
    "csrc/bindings/cuda_sampler_step.cpp",
]
# sm_80 code also runs on 8.6 and 8.9, sm_90a on H100 and H200 (wgmma, the int8 tensor cores' full rate); newer ones
# compile the PTX of the last portable one, sm_80, when they first load the library. Every further architecture adds
# about fifty seconds of one core to an installation.
DEFAULT_ARCHS = "80,90a"
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]


def nvcc() -> str | None:
    """The CUDA compiler, or ``None``: $NVCC, then PATH, then $CUDA_HOME, then /usr/local/cuda."""
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc")]
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        candidates.append(str(Path(root) / "bin" / "nvcc") if root else None)
    return next((path for path in candidates if path and Path(path).is_file()), None)


def wanted() -> bool:
    """Whether ``_cuda`` is to be built. Raises ``SystemExit`` if it is required and nvcc is missing."""
    choice = os.environ.get("PYDENOISE_CUDA", "auto").strip().lower()
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"pydenoise: PYDENOISE_CUDA must be auto, 0 or 1, not {choice!r}.")
    if choice == "1" and nvcc() is None:
        raise SystemExit(
            "pydenoise: PYDENOISE_CUDA=1, but nvcc was not found. Install the CUDA toolkit (12.8 or later), or name "
            "nvcc in the environment variable NVCC, or unset PYDENOISE_CUDA to build without CUDA kernels."
        )
    return choice != "0" and nvcc() is not None


def architecture_flags(archs: str | None = None) -> list[str]:
    """nvcc's -gencode flags: machine code for every architecture, and PTX of the last one without a suffix letter."""
    names = (archs or os.environ.get("PYDENOISE_CUDA_ARCHS") or DEFAULT_ARCHS).replace(";", ",").replace(" ", "")
    names = [name.removeprefix("sm_") for name in names.split(",") if name]
    for name in names:
        if not name.rstrip("af").isdigit():
            raise SystemExit(f"pydenoise: PYDENOISE_CUDA_ARCHS: {name!r} is no architecture; write for example 80,90.")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    flags += ["-DPDN_SM90A"] * ("90a" in names)  # the host code may choose kernels that need it
    portable = [name for name in names if name.isdigit()]
    if portable:
        flags.append(f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}")
    return flags


def commands(objects: Path, library: Path, torch: Path, torch_flags: list[str]) -> tuple[list[list[str]], list[str]]:
    """(compile commands, which may run side by side; link command) that make ``library`` in ``objects``."""
    compiler = nvcc()
    includes = [f"-isystem={torch / 'include'}", f"-isystem={torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    targets = {source: str(objects / f"{source.replace('/', '_')}.o") for source in (*SOURCES, *BINDINGS)}
    compile_commands = [
        [compiler, *FLAGS, *architecture_flags(), "-c", source, "-o", targets[source]] for source in SOURCES
    ]
    for source in BINDINGS:
        compile_commands.append([compiler, *FLAGS[:4], *torch_flags, *includes, "-c", source, "-o", targets[source]])
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    link = [compiler, "-shared", "--cudart=static", "--no-device-link", *targets.values(), "-o", str(library)]
    return compile_commands, [*link, *libraries]
