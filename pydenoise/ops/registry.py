"""The table of backends: who can run an op, in which order they are asked, and why one cannot.

One row per op and backend. ``backend="auto"`` takes the first row, by descending priority, whose ``unsupported``
returns ``None``; a named backend that cannot run raises :class:`BackendUnavailable` with the reason. Running the
``reference`` row because nothing faster could is announced once per op (:class:`FallbackWarning`) and counted in
``fallbacks``.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

AUTO = "auto"
REFERENCE = "reference"
BACKENDS = (REFERENCE, "cpu", "triton", "cuda")


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why."""


class FallbackWarning(UserWarning):
    """An op ran on the reference backend because no compiled backend could take the call."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One row: how one backend runs one op.

    ``unsupported(*args)`` gets the op's positional arguments and returns a sentence, or ``None`` when ``run(*args)``
    will work. ``measured`` says where the priority comes from.
    """

    op: str
    name: str
    priority: int
    unsupported: Callable[..., str | None]
    run: Callable
    measured: str


_rows: dict[str, list[Backend]] = {}
_warned: set[str] = set()
fallbacks: Counter[str] = Counter()


def register(row: Backend) -> Backend:
    """Add a row; rows of an op are kept in descending priority."""
    if row.name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {row.name!r}")
    rows = _rows.setdefault(row.op, [])
    if any(existing.name == row.name for existing in rows):
        raise ValueError(f"backend {row.name!r} is already registered for op {row.op!r}")
    rows.append(row)
    rows.sort(key=lambda item: -item.priority)
    return row


def ops() -> list[str]:
    """Names of all registered ops."""
    return sorted(_rows)


def rows(op: str) -> list[Backend]:
    """The rows of ``op`` in the order in which ``auto`` asks them."""
    if op not in _rows:
        raise ValueError(f"op: no op named {op!r}; known ops: {', '.join(ops())}")
    return list(_rows[op])


def select(op: str, backend: str, args: tuple) -> Backend:
    """The row that runs ``op`` on ``args``. Raises ``BackendUnavailable`` or ``ValueError``."""
    if backend == AUTO:
        for row in _rows[op]:
            if row.unsupported(*args) is None:
                if row.name == REFERENCE:
                    _note_fallback(op, args)
                return row
        raise BackendUnavailable(f"{op}: no backend can run this call.\n{_verdict_text(op, args)}")
    for row in _rows[op]:
        if row.name == backend:
            reason = row.unsupported(*args)
            if reason is not None:
                raise BackendUnavailable(f"{op}: backend {backend!r} cannot run this call: {reason}")
            return row
    known = ", ".join(row.name for row in _rows[op])
    if backend in BACKENDS:
        raise BackendUnavailable(f"{op}: has no {backend!r} backend; it has {known}")
    raise ValueError(f"backend: expected 'auto' or one of {known}, got {backend!r}")


def verdicts(op: str, args: tuple) -> list[tuple[str, str | None]]:
    """(backend, reason or ``None`` if it can run) for every row, in the order in which they are asked."""
    return [(row.name, row.unsupported(*args)) for row in rows(op)]


def _verdict_text(op: str, args: tuple) -> str:
    return "\n".join(f"  {name}: {reason or 'can run'}" for name, reason in verdicts(op, args))


def _note_fallback(op: str, args: tuple) -> None:
    fallbacks[op] += 1
    if op in _warned:
        return
    _warned.add(op)
    reasons = "; ".join(f"{name}: {why}" for name, why in verdicts(op, args) if why is not None)
    warnings.warn(
        f"{op} runs on the reference backend (plain torch), because no compiled backend can take this call "
        f"({reasons}). "
        "This is said once per op.",
        FallbackWarning,
        stacklevel=4,
    )
