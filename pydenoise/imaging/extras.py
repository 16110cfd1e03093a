"""Optional packages: import one, or say which extra brings it."""

import importlib
from types import ModuleType


class MissingExtra(RuntimeError):
    """An optional package is not installed; the message holds the command that installs it."""


def require(module: str, package: str, what: str, extra: str = "cli") -> ModuleType:
    """Import ``module`` of ``package``, or raise :class:`MissingExtra`: ``what`` needs it, ``extra`` brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{what} needs {package} ({error}): pip install pydenoise[{extra}]") from error
