"""What ``accelerate`` did, as data, as a table and as JSON."""

import json
import textwrap
from collections import defaultdict
from dataclasses import asdict, dataclass, field


@dataclass
class Swap:
    """One convolution that became a fused layer. ``kernel`` names the algorithm; ``backend`` ran it on the example."""

    name: str
    original: str
    fused: tuple[str, ...]
    replacement: str
    kernel: str = ""
    backend: str = "not called by the example"
    shape: tuple[int, ...] | None = None


@dataclass
class Kept:
    """One layer or operation that was left as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class QuantizedLayer:
    """One int8 layer: its scheme, why it has it, and the signal over noise of its output on the calibration samples.

    ``snr_db`` is ``None`` where nothing was measured; ``per_bucket`` holds it for each range of timesteps (``None``
    where no sample fell into one).
    """

    name: str
    scheme: str
    snr_db: float | None
    reason: str
    per_bucket: tuple[float | None, ...] | None = None


@dataclass
class Errors:
    """Largest absolute and relative (to the largest reference value) error over the example's outputs."""

    max_abs: float
    relative: float


@dataclass
class AccelerationReport:
    """The result of :func:`pydenoise.accelerate`: print it, or take ``to_json()``.

    Attributes:
        precision: "fp32" or "bf16". mode: how the model was read ("graph" or "modules").
        swapped, kept: one entry per layer. notes: what the user should know (other ways taken, precision limits).
        error: of the accelerated model against the original on the example; ``error_float64`` and
            ``original_error_float64``: both against the original in float64, ``None`` where that was not run.
        original_ms, accelerated_ms, speedup: medians of interleaved runs on the example, and the median of their
            ratios; ``None`` if not measured.
        fallbacks: op -> number of calls that ran on the reference backend during the example.
        layers: with precision "int8", the scheme and the accuracy of each int8 layer. snr_db: of the model's output on
            the example, ``None`` without error.
    """

    model: str
    precision: str
    mode: str = "graph"
    swapped: list[Swap] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: Errors | None = None
    error_float64: Errors | None = None
    original_error_float64: Errors | None = None
    original_ms: float | None = None
    accelerated_ms: float | None = None
    speedup: float | None = None
    rounds: int = 0
    threads: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    layers: list[QuantizedLayer] = field(default_factory=list)
    snr_db: float | None = None

    def to_json(self, indent: int | None = 2) -> str:
        """All of the report as JSON text."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        parts = [self._headline()]
        if self.swapped:
            columns = ("layer", "was", "fused in", "is", "algorithm", "backend")
            rows = [
                (s.name, s.original, ", ".join(s.fused) or "-", s.replacement, s.kernel or "-", s.backend)
                for s in self.swapped
            ]
            parts += ["", "swapped", *_table(columns, rows)]
        if self.layers:
            columns = ("int8 layer", "scheme", "SNR [dB]", "why")
            rows = [
                (entry.name, entry.scheme, "-" if entry.snr_db is None else f"{entry.snr_db:.1f}", entry.reason)
                for entry in self.layers
            ]
            parts += ["", "quantized", *_table(columns, rows)]
        if self.kept:
            parts += ["", "kept", *_table(("what", "where", "why"), self._kept_rows())]
        return "\n".join([*parts, "", *self._summary()])

    def plot(self, path: str | None = None):
        """Draw the signal over noise of each int8 layer, and of each range of timesteps where there are several.

        Args:
            path: of a picture to write (its ending says the format); ``None`` writes none.

        Returns:
            The matplotlib figure. Raises ``ValueError`` for a report without int8 layers.
        """
        from pydenoise.surgery.plots import plot_snr

        return plot_snr(self, path)

    def _headline(self) -> str:
        count = f"{len(self.swapped)} layer{'' if len(self.swapped) == 1 else 's'} swapped"
        return f"pydenoise.accelerate: {self.model}, precision {self.precision}: {count}, read by {self.mode}"

    def _kept_rows(self) -> list[tuple[str, str, str]]:
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for kept in self.kept:
            groups[kept.kind, kept.reason].append(kept.name)
        rows = []
        for (kind, reason), names in groups.items():
            where = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            rows.append((kind, where, reason))
        return rows

    def _summary(self) -> list[str]:
        lines = []
        if self.speedup is not None:
            lines.append(
                f"time on the example: {self.original_ms:.2f} ms -> {self.accelerated_ms:.2f} ms, {self.speedup:.2f}x "
                f"(median of {self.rounds} interleaved runs, {self.threads} thread{'' if self.threads == 1 else 's'})"
            )
        if self.error is not None:
            lines.append(f"error against the original: {_error_text(self.error)}")
        if self.snr_db is not None:
            lines.append(f"signal over noise of the output: {self.snr_db:.1f} dB")
        if self.error_float64 is not None:
            lines.append(
                f"error against float64: accelerated {_error_text(self.error_float64)}; "
                f"original {_error_text(self.original_error_float64)}"
            )
        for op, count in self.fallbacks.items():
            lines.append(f"fallback: {op} ran {count}x on the reference backend (plain torch)")
        lines += [f"note: {note}" for note in self.notes]
        return lines


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], width: int = 40) -> list[str]:
    """Lines of a plain-text table; cells longer than ``width`` are wrapped (the last column at twice that)."""
    limits = [width] * (len(columns) - 1) + [2 * width]
    cells = [[textwrap.wrap(cell, limit) for cell, limit in zip(row, limits, strict=True)] for row in rows]
    widths = [max(len(name), *(len(line) for row in cells for line in row[i])) for i, name in enumerate(columns)]
    lines = ["  ".join(name.ljust(w) for name, w in zip(columns, widths, strict=True)).rstrip()]
    lines.append("  ".join("-" * w for w in widths))
    for row in cells:
        for number in range(max(len(cell) for cell in row)):
            texts = [cell[number] if number < len(cell) else "" for cell in row]
            lines.append("  ".join(text.ljust(w) for text, w in zip(texts, widths, strict=True)).rstrip())
    return lines


def _error_text(error: Errors) -> str:
    return f"{error.max_abs:.2e} absolute, {error.relative:.2e} relative"
