"""When SparseD attends fully, when it computes its pattern, and when it uses it."""

import enum
from dataclasses import dataclass

SCHEDULES = ("code", "paper")


class Phase(enum.Enum):
    """What attention does at a step."""

    DENSE = "dense"
    PATTERN = "dense, and the pattern is computed"
    PATTERN_AND_SPARSE = "the pattern is computed and used at once"
    SPARSE = "sparse"


@dataclass(frozen=True)
class SparseDSchedule:
    """Full attention in the first steps of a generation, sparse attention in the others.

    Args:
        skip: share of the steps in which attention is full, in [0, 1).
        kind: "code": with ``end = int(steps * skip) + 1``, steps 0 to ``end`` are full, as in SparseD's public code;
            "paper": ``int(steps * skip)`` steps are full. The last full step's queries and keys give the pattern;
            where no step is full ("paper" with a small ``skip``), step 0 computes the pattern and uses it at once.

    Source: SparseD (2025), https://arxiv.org/abs/2509.24014, and its public code.
    """

    skip: float = 0.2
    kind: str = "code"

    def __post_init__(self) -> None:
        if not isinstance(self.skip, (int, float)) or isinstance(self.skip, bool):
            raise TypeError(f"skip: expected a number, got {type(self.skip).__name__}")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip: expected a share of the steps from 0 to below 1, got {self.skip}")
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {self.kind!r}")

    def dense_steps(self, num_steps: int) -> int:
        """How many of ``num_steps`` steps are full; a single step is, because no other would use its pattern."""
        full = int(num_steps * self.skip) + (2 if self.kind == "code" else num_steps == 1)
        return min(full, num_steps)

    def phase(self, step: int, num_steps: int) -> Phase:
        """What is done at ``step`` (from 0) of ``num_steps``; a pattern that no later step uses is not computed."""
        dense = self.dense_steps(num_steps)
        if dense == 0 and step == 0:
            return Phase.PATTERN_AND_SPARSE
        if step >= dense:
            return Phase.SPARSE
        return Phase.PATTERN if step == dense - 1 and dense < num_steps else Phase.DENSE
