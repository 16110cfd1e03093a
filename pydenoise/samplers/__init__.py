"""Samplers: loops around any callable denoiser. They know no modules of this package, only its functional API."""

import importlib

_MODULES = ("masked",)


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"pydenoise.samplers.{name}")
    raise AttributeError(f"module 'pydenoise.samplers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
