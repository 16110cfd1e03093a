"""pydenoise: compiled kernels that make PyTorch denoisers and diffusion models faster on the machine you have.

Submodules load on first use, so that ``import pydenoise`` stays cheap and needs no GPU, compiler or Triton.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_MODULES = (
    "functional",
    "nn",
    "quantization",
    "testing",
    "kernels",
    "reference",
    "ops",
    "models",
    "imaging",
    "self_supervised",
    "samplers",
    "hyperspectral",
)
_NAMES = {
    "accelerate": "pydenoise.accelerate",
    "AccelerationReport": "pydenoise.accelerate",
    "attach_sparsed": "pydenoise.surgery.sparsed",
    "BlockMask": "pydenoise.block_mask",
    "density": "pydenoise.densities",
    "detach_sparsed": "pydenoise.surgery.sparsed",
    "explain": "pydenoise.explain",
    "load_quantized": "pydenoise.surgery.checkpoint",
    "save_quantized": "pydenoise.surgery.checkpoint",
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


class _Package(ModuleType):
    """This package's type: importing the submodule ``pydenoise.explain`` must not hide the function ``explain``.

    The import system stores every imported submodule as an attribute of its package; where a public name is also a
    submodule's, that store is ignored, so ``pydenoise.explain`` is the function whatever was imported before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
