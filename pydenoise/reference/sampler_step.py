"""One step of a sampler in plain torch: guidance, conversion, history, the linear update, noise.

The columns of a row, and what they do, are in ``pydenoise/step_row.py``.
"""

import math

import torch
from torch import Tensor

from pydenoise import step_row as C
from pydenoise.reference import _philox


def normal(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Philox words [R, columns] (as ``_philox.words`` lays them out) as standard normal numbers, by Box and Muller.

    Columns of the classes 0 and 1 of a block share a radius and an angle, those of 2 and 3 as well: the radius comes
    from the word of the even class, the angle from that of the odd one, as a signed fraction of half a turn.
    """
    count, columns = words.shape
    blocks = -(-columns // _philox.BLOCK)
    padded = torch.nn.functional.pad(words, (0, blocks * _philox.BLOCK - columns))
    even, odd = padded.view(count, blocks, 2, 2, _philox.LANES).unbind(3)
    upper = even >= 1 << 31  # u near 1: its logarithm from 1 - u, which loses no bit
    nearest = (torch.where(upper, even ^ _philox._LOW, even).to(dtype) + 0.5) * 2.0**-32
    radius = (-2 * torch.where(upper, torch.log1p(-nearest), nearest.log())).sqrt()
    angle = torch.where(odd >= 1 << 31, odd - (1 << 32), odd).to(dtype) * (math.pi / 2**31)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), 3)
    return pairs.reshape(count, -1)[:, :columns]


def noise_of(sample: Tensor, keys: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of ``sample``'s shape [B, ...]: by the key of each sample, the step and the place."""
    size = math.prod(sample.shape[1:])
    words = _philox.words(keys, int(step) & 0xFFFFFFFF, size) if size else keys.new_zeros(sample.shape[0], 0)
    return normal(words, dtype).view(sample.shape)


class _Groups:
    """Rows of coefficients, spread over a tensor [B, ...]: column ``c`` broadcasts against [G', n]."""

    def __init__(self, table: Tensor, rows: Tensor, dtype: torch.dtype):
        self._rows = table.to(dtype)[rows]

    def __call__(self, column: int) -> Tensor:
        return self._rows[:, column, None]

    def any(self, *columns: int) -> bool:
        return bool((self._rows[:, list(columns)] != 0).any())

    def term(self, column: int, tensor: Tensor) -> Tensor | float:
        """coefficient times tensor, where the coefficient is not 0: a tensor is not read where it is."""
        coefficient = self(column)
        if not self.any(column):
            return 0.0
        return torch.where(
            coefficient == 0, torch.zeros((), dtype=tensor.dtype, device=tensor.device), coefficient * tensor
        )


def sampler_step(
    sample: Tensor, output: Tensor | None, unconditional: Tensor | None, base: Tensor | None, history: Tensor | None,
    noise: Tensor | None, threshold: Tensor | None, table: Tensor, rows: Tensor, keys: Tensor | None, step: Tensor,
    learned_variance: bool, statistics: str, out: Tensor, kept: Tensor | None, preview: Tensor | None,
    model_input: Tensor | None, faults: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``pydenoise.functional.sampler_step``; arithmetic in float32, in float64 for a float64 sample."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    batch, groups = sample.shape[0], max(rows.shape[0], sample.shape[0])
    if sample.numel() == 0:
        return sample.new_zeros(groups, _count(statistics, history), dtype=torch.float64)
    at = _Groups(table, rows, dtype)

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).reshape(rows.shape[0], -1)

    x = wide(sample)
    y = variance = None
    if output is not None:
        first = output
        if learned_variance:
            first, variance = (half.contiguous() for half in output.chunk(2, 1))
            variance = wide(variance)
        y = wide(first)
        if unconditional is not None:
            other = unconditional.chunk(2, 1)[0] if learned_variance else unconditional
            other = wide(other)
            y = other + at(C.GUIDANCE) * (y - other)
    x0 = torch.zeros_like(x)
    if at.any(C.M_X0) or preview is not None:
        x0 = x0 + at.term(C.X0_SAMPLE, x) + (0.0 if y is None else at.term(C.X0_OUTPUT, y))
        if threshold is not None:
            bound = threshold.to(dtype).repeat_interleave(x.numel() // batch).view_as(x)
            x0 = torch.maximum(torch.minimum(x0, bound), -bound) / bound
        else:
            x0 = torch.maximum(torch.minimum(x0, at(C.CLIP)), -at(C.CLIP))
    m = at.term(C.M_SAMPLE, x) + at.term(C.M_X0, x0) + (0.0 if y is None else at.term(C.M_OUTPUT, y))
    m = m if isinstance(m, Tensor) else torch.zeros_like(x)
    past = [] if history is None else [wide(slot) for slot in history]

    new = at.term(C.SAMPLE, x) + at.term(C.M, m)
    if y is not None:
        new = new + at.term(C.OUTPUT, y)
    if base is not None:
        new = new + at.term(C.BASE, wide(base))
    for j, slot in enumerate(past):
        new = new + at.term(C.HISTORY + j, slot)
    if at.any(C.NOISE) and (noise is not None or keys is not None):
        z = wide(noise) if noise is not None else wide(noise_of(sample, keys, step, dtype))
        if variance is not None:
            low, high = at(C.LOG_SMALL), at(C.LOG_LARGE)
            z = z * torch.exp(low + (variance + 1) / 2 * (high - low))
        new = new + at.term(C.NOISE, z)
    new = new if isinstance(new, Tensor) else torch.zeros_like(x)

    result = _statistics(statistics, new, m, past, groups)
    if faults is not None:
        bad = ~(new.isfinite().all() & m.isfinite().all())
        number = (step.to(torch.int64) & 0x7FFFFFFF).to(torch.int32)
        faults.copy_(torch.where(bad, torch.minimum(faults, number), faults))
    keeps = (C.KEPT_SAMPLE, C.KEPT_BASE, C.KEPT_M, C.KEPT_OUT, *range(C.KEPT_HISTORY, C.KEPT_HISTORY + C.SLOTS))
    if kept is not None and at.any(*keeps):
        value = at.term(C.KEPT_SAMPLE, x) + at.term(C.KEPT_M, m) + at.term(C.KEPT_OUT, new)
        if base is not None:
            value = value + at.term(C.KEPT_BASE, wide(base))
        for j, slot in enumerate(past):
            value = value + at.term(C.KEPT_HISTORY + j, slot)
        written = (at._rows[:, list(keeps)] != 0).any(1, keepdim=True)
        kept.copy_(torch.where(written, value, wide(kept)).view(kept.shape))
    for j in range(len(past)):
        history[j].copy_(torch.where(at(C.SLOT) == j, m, past[j]).view(sample.shape))
    if preview is not None:
        preview.copy_(x0.view(sample.shape))
    out.copy_(new.view(sample.shape))
    if model_input is not None:
        scaled = (at(C.INPUT_SCALE) * new).view(sample.shape)
        model_input.view(-1, *sample.shape).copy_(scaled.expand(model_input.shape[0] // batch, *sample.shape))
    return result


def _count(statistics: str, history: Tensor | None) -> int:
    return {"none": 0, "moments": 2, "dots": 1 + (0 if history is None else history.shape[0])}[statistics]


def _statistics(kind: str, new: Tensor, m: Tensor, past: list[Tensor], groups: int) -> Tensor:
    if kind == "none":
        return new.new_zeros(0, 0, dtype=torch.float64)
    pairs = [(new, None), (new, new)] if kind == "moments" else [(m, m), *((m, slot) for slot in past)]
    sums = [(a if b is None else a.double() * b.double()).double().reshape(groups, -1).sum(1) for a, b in pairs]
    return torch.stack(sums, 1)
