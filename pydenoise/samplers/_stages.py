"""Several launches between two calls of the model, for updates that clamp what depends on the degraded sample too.

``sampler_step`` clamps a combination of the sample and of the output. Where x0 also depends on the saved sample or on
an earlier output, a first launch keeps the sample in a slot and puts x0 in its place, and the next one clamps that.
"""

import math
from collections.abc import Sequence

import torch

from pydenoise import step_row as C
from pydenoise.samplers.levels import Level
from pydenoise.samplers.plan import Control, Conversion, Launch, Run, row

Row = list[float]
_NOWHERE = Level.clean()  # these rows convert nothing


class Stages(Control):
    """Runs the rows ``stages[call]`` one after the other in place of the plan's row ``call``.

    All of them see the model's output. Noise belongs into the last one, which also makes the next model input and the
    preview.
    """

    def __init__(self, run: Run, stages: Sequence[Sequence[Row]]):
        table = torch.tensor([row for rows in stages for row in rows], dtype=torch.float64)
        counts = torch.tensor([len(rows) for rows in stages])
        table[:, C.INPUT_SCALE] = run.plan.table[:, C.INPUT_SCALE].repeat_interleave(counts)
        self._table = table.to(run.device, run.dtype)
        numbers = torch.arange(len(table), device=run.device).split(1)
        ends = counts.cumsum(0).tolist()
        self._rows = [numbers[end - len(rows) : end] for end, rows in zip(ends, stages, strict=True)]

    def apply(self, call: int, launch: Launch) -> None:
        for number in self._rows[call]:
            launch(rows=number, table=self._table)


def keep_sample(slot: int, **combination: object) -> Row:
    """A row that keeps the sample in ``slot`` and replaces it by a combination (``plan.row``'s arguments)."""
    return row(Conversion(), _NOWHERE, (1.0, 0.0), slot=slot, **combination)


def clamp(source: str, limit: float | None, **combination: object) -> Row:
    """A row with m = x0 = "sample" or "output", clamped to [-limit, limit] (``None``: not)."""
    values = row(Conversion("sample", clip=limit), _NOWHERE, "sample", **combination)
    if source == "sample":
        values[C.X0_SAMPLE], values[C.X0_OUTPUT] = 1.0, 0.0
    return values


def of_two(values: Row, first: float, second: float) -> Row:
    """``values`` with first * (the first prediction) + second * (the second one) for its term of the output.

    The two halves of a model's output are combined as those of guidance are: y = second + g (first - second).
    """
    total = first + second
    if total == 0 or not math.isfinite(first / total):
        raise ValueError("schedule: the two predictions of this step cannot be combined; neighbouring levels are equal")
    values[C.OUTPUT], values[C.GUIDANCE] = total, first / total
    return values
