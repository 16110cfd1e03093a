"""What SparseD did in a generation, as data, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass, field


@dataclass
class LayerSparsity:
    """One layer and branch in the last generation.

    Attributes:
        layer, branch: their names.
        shape: of the queries, [B, H, Lq, D], and the number of keys.
        dense_calls, sparse_calls: how often attention was full and sparse.
        pattern_step: whose queries and keys gave the pattern; ``None`` where none was computed, with all that follows.
        density: kept blocks over all blocks.
        recall: share of the attention weights at ``pattern_step`` that the kept blocks hold, over all heads and valid
            queries.
        pattern_seconds: of computing the pattern. attention_seconds: of that step's full attention before it.
    """

    layer: str
    branch: str
    shape: tuple[int, int, int, int, int] | None = None
    dense_calls: int = 0
    sparse_calls: int = 0
    pattern_step: int | None = None
    density: float | None = None
    recall: float | None = None
    pattern_seconds: float | None = None
    attention_seconds: float | None = None


@dataclass
class SparsityReport:
    """The last generation: print it, or take ``to_json()``.

    Attributes:
        num_steps, dense_steps, sparse_steps: steps that the generation has, and those begun so far.
        layers: one entry per layer and branch, in the order of their first calls.
        changes: patterns that were computed again, and why.
        left_alone: name of a layer (or kind of call) -> why it keeps full attention.
        masked_calls: calls with masks other than padding on the right, which ran in full (``other_masks="dense"``).
    """

    skip: float
    select: float
    block_size: int
    schedule: str
    mode: str
    num_steps: int | None = None
    dense_steps: int = 0
    sparse_steps: int = 0
    layers: list[LayerSparsity] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    masked_calls: dict[str, int] = field(default_factory=dict)

    @property
    def density(self) -> float | None:
        """Mean over the layers that have a pattern."""
        return _mean([entry.density for entry in self.layers])

    @property
    def recall(self) -> float | None:
        """Mean over the layers that have a pattern."""
        return _mean([entry.recall for entry in self.layers])

    @property
    def pattern_seconds(self) -> float:
        """What all patterns took together."""
        return sum(entry.pattern_seconds or 0.0 for entry in self.layers)

    def to_json(self, indent: int | None = 2) -> str:
        """All of the report as JSON text."""
        means = {"density": self.density, "recall": self.recall, "pattern_seconds": self.pattern_seconds}
        return json.dumps({**asdict(self), **means}, indent=indent)

    def __str__(self) -> str:
        lines = [
            f"SparseD: skip={self.skip}, select={self.select}, block_size={self.block_size}, "
            f"schedule={self.schedule!r}, mode={self.mode!r}"
        ]
        if self.num_steps is None:
            lines.append("no step was begun")
        else:
            lines.append(
                f"{self.dense_steps} dense and {self.sparse_steps} sparse of {self.num_steps} steps; "
                f"density {_share(self.density)}, recall {_share(self.recall)}, "
                f"patterns took {self.pattern_seconds * 1e3:.1f} ms"
            )
        if self.layers:
            lines += ["", *self._table()]
        lines += [f"pattern again: {text}" for text in self.changes]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        lines += [
            f"full attention for {count} call{'' if count == 1 else 's'} of {layer}: the mask is not padding on the "
            "right"
            for layer, count in self.masked_calls.items()
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        rows = [("layer", "branch", "keys", "dense", "sparse", "density", "recall", "pattern [ms]", "attention [ms]")]
        for e in self.layers:
            keys = "-" if e.shape is None else str(e.shape[4])
            shares = (_share(e.density), _share(e.recall), _milliseconds(e.pattern_seconds))
            calls = (str(e.dense_calls), str(e.sparse_calls))
            rows.append((e.layer, e.branch, keys, *calls, *shares, _milliseconds(e.attention_seconds)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = [[row[i].ljust(w) if i < 2 else row[i].rjust(w) for i, w in enumerate(widths)] for row in rows]
        return ["  ".join(cells).rstrip() for cells in text]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
