"""Lazy loading of the compiled libraries, with three different answers: not built, failed to load, loaded."""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType

NOT_BUILT = "not built"
FAILED = "built but failed to load"
LOADED = "loaded"


@dataclass(frozen=True)
class Library:
    """State of one compiled library: ``state`` is NOT_BUILT, FAILED or LOADED; ``detail`` explains the first two."""

    name: str
    state: str
    detail: str = ""
    path: str = ""
    module: ModuleType | None = None

    @property
    def loaded(self) -> bool:
        return self.state == LOADED

    @property
    def reason(self) -> str | None:
        """Why the library cannot be used, as a sentence; ``None`` if it can."""
        return None if self.loaded else f"pydenoise.{self.name} is {self.state} ({self.detail})"


@cache
def extension() -> Library:
    """``pydenoise._C``: the CPU kernels, their torch bindings, and the pybind11 module that describes them."""
    return _load("_C", "reinstall with a C++20 compiler present, for example `pip install --no-build-isolation .`")


@cache
def cuda_extension() -> Library:
    """``pydenoise._cuda``: the CUDA kernels and their torch bindings."""
    return _load("_cuda", "reinstall with nvcc on PATH, or set PYDENOISE_CUDA=1 to require it")


def multiplies_bfloat16() -> bool:
    """Whether the CPU kernels in use multiply bfloat16 directly (AVX512-BF16), twice as fast as float32."""
    library = extension()
    return library.loaded and library.module.active_isa() == "avx512bf16"


def _load(name: str, remedy: str) -> Library:
    spec = importlib.util.find_spec(f"pydenoise.{name}")
    if spec is None or spec.origin is None:
        return Library(name, NOT_BUILT, remedy)
    try:
        if name == "_cuda":  # a plain shared library: it registers ops and has no Python module of its own
            import torch

            torch.ops.load_library(spec.origin)
            return Library(name, LOADED, path=spec.origin)
        import torch  # noqa: F401  (the extension links against symbols that torch brings)

        return Library(name, LOADED, path=spec.origin, module=importlib.import_module(f"pydenoise.{name}"))
    except (ImportError, OSError, RuntimeError) as error:
        return Library(name, FAILED, f"{type(error).__name__}: {error}", path=spec.origin)
