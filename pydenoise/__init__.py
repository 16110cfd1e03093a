"""pydenoise: compiled kernels that make PyTorch denoisers and diffusion models faster on the machine you have.

Submodules load on first use, so that ``import pydenoise`` stays cheap and needs no GPU, compiler or Triton.
"""

import importlib

__version__ = "0.1.0"

_MODULES = ("functional", "nn", "testing", "kernels", "reference", "ops", "models", "imaging")
_NAMES = {
    "accelerate": "pydenoise.accelerate",
    "AccelerationReport": "pydenoise.accelerate",
    "density": "pydenoise.density",
    "explain": "pydenoise.explain",
    "BackendUnavailable": "pydenoise.ops.registry",
    "FallbackWarning": "pydenoise.ops.registry",
}


def __getattr__(name: str):
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"pydenoise.{name}")
    else:
        raise AttributeError(f"module 'pydenoise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
