"""Every row of the registry, the CPU's once per ISA level: what the contract tests loop over."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pydenoise import _native
from pydenoise.ops import registry


@dataclass(frozen=True)
class Variant:
    """A row, on the CPU backend at one ISA level."""

    row: registry.Backend
    isa: str | None = None

    def __str__(self) -> str:
        return self.row.name if self.isa is None else f"{self.row.name}-{self.isa}"

    @contextmanager
    def active(self):
        """Run the block at this variant's ISA level."""
        if self.isa is None:
            yield
            return
        module = _native.extension().module
        before = module.active_isa()
        module.set_isa_cap(self.isa)
        try:
            assert module.active_isa() == self.isa
            yield
        finally:
            module.set_isa_cap(before)


def isa_levels() -> list[str | None]:
    """Levels this machine offers, below or at the one in use; a single ``None`` without compiled library."""
    library = _native.extension()
    if not library.loaded:
        return [None]
    levels = list(library.module.isa_levels())
    return levels[: levels.index(library.module.active_isa()) + 1]


def variants(op: str, backend: str | None = None) -> list[Variant]:
    """Every row of ``op``, the CPU's once per ISA level."""
    rows = [row for row in registry.rows(op) if backend in (None, row.name)]
    return [Variant(row, isa) for row in rows for isa in (isa_levels() if row.name == "cpu" else [None])]


def device_of(row: registry.Backend) -> str:
    """The device on which ``row`` is tested."""
    return "cuda" if row.name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def skip_unless(row: registry.Backend, args: tuple) -> None:
    """Skip the test with the row's own reason, unless it can run on ``args``."""
    import pytest

    reason = row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)


def in_dtype(args: tuple, dtype: torch.dtype) -> tuple:
    """``args`` with their tensors on the CPU in ``dtype``."""
    return tuple(a.cpu().to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


@contextmanager
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
