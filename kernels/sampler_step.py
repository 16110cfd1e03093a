"""One step of a sampler, elementwise, in one pass: a program takes a piece of a unit; a second kernel joins the sums.

A unit is the part of a sample that one row of the table speaks for. Pieces begin at multiples of the columns that share
Philox counters and are always as long, so a result does not depend on what a sample is batched with.
"""

import triton
import triton.language as tl
from pydenoise.kernels._philox import BLOCK, LANES, normals, words
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

# The columns of a row: those of pydenoise/step_row.py.
GUIDANCE = tl.constexpr(0)
X0_SAMPLE, X0_OUTPUT, CLIP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
M_SAMPLE, M_OUTPUT, M_X0, SLOT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
SAMPLE, BASE, OUTPUT, M = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
NOISE, LOG_SMALL, LOG_LARGE = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
INPUT_SCALE = tl.constexpr(15)
HISTORY = tl.constexpr(16)
KEPT_SAMPLE, KEPT_BASE, KEPT_M, KEPT_OUT = tl.constexpr(22), tl.constexpr(23), tl.constexpr(24), tl.constexpr(25)
KEPT_HISTORY = tl.constexpr(26)
SLOTS = tl.constexpr(6)
WIDTH = tl.constexpr(32)

_COLUMNS = 4  # that share a counter
_STATISTICS = {"none": 0, "moments": 1, "dots": 2}
_SCALARS = ("units_per_sample", "pieces", "table_rows")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _coefficient(row, exists, COLUMN: tl.constexpr):
    """A row that is not there is NaN, and so is what it gives."""
    return tl.load(row + COLUMN, mask=exists, other=float("nan"))


@triton.jit
def _term(coefficient, value):
    """The product, 0 where the coefficient is: the value may be garbage then."""
    return tl.where(coefficient != 0, coefficient * value, 0.0)


@triton.jit
def _read(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mask(ok, condition):
    """``ok`` where a scalar condition holds. The interpreter has no "and" of a block and a comparison of floats."""
    return tl.where(condition, ok, False)


@triton.jit
def _drawn(keys, sample, step, first, COUNT: tl.constexpr):
    """Standard normal numbers of COUNT columns from ``first``, a multiple of BLOCK."""
    counter = first // 4 + tl.arange(0, COUNT // 4)
    w0, w1, w2, w3 = words(tl.load(keys + 2 * sample), tl.load(keys + 2 * sample + 1), step, counter)
    z0, z1, z2, z3 = normals(w0, w1, w2, w3)
    four = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [counter, word // 2, word % 2]
    four = tl.reshape(four, (COUNT // BLOCK, LANES, 4))
    return tl.reshape(tl.permute(four, (0, 2, 1)), (COUNT,))


@triton.jit(do_not_specialize=_SCALARS)
def step_kernel(
    sample, output, unconditional, base, history, noise, threshold, table, rows, keys, step, out, kept, preview,
    model_input, faults, partials, size, unit_size, units_per_sample, pieces, total, table_rows, output_stride,
    other_stride, ONE_ROW: tl.constexpr, LEARNED: tl.constexpr, STATISTICS: tl.constexpr, COUNT: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One piece: 4 BLOCK_L columns of a unit; its COUNT history slots, its sums at partials[program]."""
    item = tl.program_id(0).to(tl.int64)
    unit, piece = item // pieces, (item % pieces).to(tl.int32)
    number = unit // units_per_sample
    first = (unit % units_per_sample).to(tl.int32) * unit_size
    start = first // BLOCK * BLOCK + piece * (4 * BLOCK_L)
    column = start + tl.arange(0, 4 * BLOCK_L)
    ok = (column >= first) & (column < first + unit_size)
    at = number * size + column
    slot_size = tl.cast(total, tl.int64)

    if ONE_ROW:
        source = tl.load(rows)
    else:
        source = tl.load(rows + unit)
    exists = (source >= 0) & (source < table_rows)
    row = table + tl.where(exists, source, 0) * WIDTH
    x0_sample, x0_output = _coefficient(row, exists, X0_SAMPLE), _coefficient(row, exists, X0_OUTPUT)
    m_sample, m_output = _coefficient(row, exists, M_SAMPLE), _coefficient(row, exists, M_OUTPUT)
    m_x0, of_sample = _coefficient(row, exists, M_X0), _coefficient(row, exists, SAMPLE)
    of_output, of_m = _coefficient(row, exists, OUTPUT), _coefficient(row, exists, M)
    # Every load comes before the barrier, every store after it: a store's element may be another thread's to load.
    reads_sample = (of_sample != 0) | (m_sample != 0)
    reads_output = (of_output != 0) | (m_output != 0)
    if preview is not None:
        reads_sample |= x0_sample != 0
        reads_output |= x0_output != 0
    else:
        reads_sample |= (x0_sample != 0) & (m_x0 != 0)
        reads_output |= (x0_output != 0) & (m_x0 != 0)
    if kept is not None:
        kept_sample, kept_m = _coefficient(row, exists, KEPT_SAMPLE), _coefficient(row, exists, KEPT_M)
        kept_out = _coefficient(row, exists, KEPT_OUT)
        reads_sample |= kept_sample != 0
        writes_kept = (kept_sample != 0) | (kept_m != 0) | (kept_out != 0)
    x = _read(sample, at, _mask(ok, reads_sample))
    x0 = _term(x0_sample, x)
    m = _term(m_sample, x)
    fresh = _term(of_sample, x)
    if output is not None:
        y = _read(output, number * output_stride + column, _mask(ok, reads_output))
        if unconditional is not None:
            other = _read(unconditional, number * other_stride + column, _mask(ok, reads_output))
            y = other + _coefficient(row, exists, GUIDANCE) * (y - other)
        x0 += _term(x0_output, y)
        m += _term(m_output, y)
        fresh += _term(of_output, y)
    if threshold is not None:
        bound = tl.load(threshold + number)
    else:
        bound = _coefficient(row, exists, CLIP)
    x0 = tl.where(x0 > bound, bound, tl.where(x0 < -bound, -bound, x0))  # keeps NaN
    if threshold is not None:
        x0 = x0 / bound
    m += _term(m_x0, x0)
    fresh += _term(of_m, m)
    if kept is not None:
        keep = _term(kept_sample, x) + _term(kept_m, m)
    if base is not None:
        of_base = _coefficient(row, exists, BASE)
        reads_base = of_base != 0
        if kept is not None:
            kept_base = _coefficient(row, exists, KEPT_BASE)
            reads_base |= kept_base != 0
        value = _read(base, at, _mask(ok, reads_base))
        fresh += _term(of_base, value)
        if kept is not None:
            keep += _term(kept_base, value)
    if kept is not None:
        writes_kept |= _coefficient(row, exists, KEPT_BASE) != 0
        for j in tl.static_range(SLOTS):
            writes_kept |= _coefficient(row, exists, KEPT_HISTORY + j) != 0
    if STATISTICS == 2:
        sums = partials + item * (1 + COUNT)
        tl.store(sums, tl.sum(tl.where(ok, m * m, 0.0).to(tl.float64), 0))
    for j in tl.static_range(COUNT):
        of_slot = _coefficient(row, exists, HISTORY + j)
        reads_slot = of_slot != 0
        if kept is not None:
            kept_slot = _coefficient(row, exists, KEPT_HISTORY + j)
            reads_slot |= kept_slot != 0
        if STATISTICS == 2:
            reads_slot |= True
        value = _read(history, j * slot_size + at, _mask(ok, reads_slot))
        fresh += _term(of_slot, value)
        if kept is not None:
            keep += _term(kept_slot, value)
        if STATISTICS == 2:
            tl.store(sums + 1 + j, tl.sum(tl.where(ok, m * value, 0.0).to(tl.float64), 0))
    if (noise is not None) | (keys is not None):
        deviation = _coefficient(row, exists, NOISE)
        if deviation != 0:
            if noise is not None:
                z = _read(noise, at, ok)
            else:
                z = _drawn(keys, number, tl.load(step), start, 4 * BLOCK_L)
            if LEARNED:
                variance = _read(output, number * output_stride + size + column, ok)
                small = _coefficient(row, exists, LOG_SMALL)
                z *= tl.exp(small + (variance + 1.0) * 0.5 * (_coefficient(row, exists, LOG_LARGE) - small))
            fresh += deviation * z

    tl.debug_barrier()
    tl.store(out + at, fresh, mask=ok)
    if preview is not None:
        tl.store(preview + at, x0, mask=ok)
    if kept is not None:
        keep += _term(kept_out, fresh)
        tl.store(kept + at, keep, mask=_mask(ok, writes_kept))
    if COUNT > 0:
        slot = _coefficient(row, exists, SLOT)
        written = (slot >= 0) & (slot < COUNT)
        place = tl.where(written, slot, 0.0).to(tl.int64)
        tl.store(history + place * slot_size + at, m, mask=_mask(ok, written))
    if model_input is not None:
        scaled = _coefficient(row, exists, INPUT_SCALE) * fresh
        for copy in tl.static_range(COPIES):
            tl.store(model_input + copy * slot_size + at, scaled, mask=ok)
    if STATISTICS == 1:
        tl.store(partials + 2 * item, tl.sum(tl.where(ok, fresh, 0.0).to(tl.float64), 0))
        tl.store(partials + 2 * item + 1, tl.sum(tl.where(ok, fresh * fresh, 0.0).to(tl.float64), 0))
    if faults is not None:
        infinite = float("inf")
        bad = ok & ~((tl.abs(fresh) < infinite) & (tl.abs(m) < infinite))
        if tl.max(bad.to(tl.int32), 0) != 0:
            tl.atomic_min(faults, (tl.load(step) & 0x7FFFFFFF).to(tl.int32))


@triton.jit(do_not_specialize=("pieces", "count"))
def sums_kernel(partials, statistic, pieces, count, BLOCK_P: tl.constexpr):
    """One sum of a unit from those of its pieces."""
    item = tl.program_id(0).to(tl.int64)
    unit, which = item // count, item % count
    total = tl.zeros((BLOCK_P,), tl.float64)
    for start in range(0, pieces, BLOCK_P):
        piece = start + tl.arange(0, BLOCK_P)
        total += tl.load(partials + (unit * pieces + piece) * count + which, mask=piece < pieces, other=0.0)
    tl.store(statistic + item, tl.sum(total, 0))


# ------------------------------------------------------------------------------------------------------ configurations


def _step_extents(args: dict) -> dict[str, int]:
    return {"BLOCK_L": max(args["unit_size"] // _COLUMNS, LANES.value)}


def _sum_extents(args: dict) -> dict[str, int]:
    return {}


# One tile each: another one would round sums another way.
STEP = Kernel("sampler_step", step_kernel, variants("sampler_step", ("BLOCK_L",), [(128, 4, 1)]), _step_extents)
SUMS = Kernel(
    "sampler_step_sums", sums_kernel, variants("sampler_step_sums", ("BLOCK_P",), [(128, 4, 1)]), _sum_extents
)
KERNELS = (STEP, SUMS)


# ------------------------------------------------------------------------------------------------------------ launches


def plan(
    sample: Tensor, output: Tensor | None, unconditional: Tensor | None, base: Tensor | None, history: Tensor | None,
    noise: Tensor | None, threshold: Tensor | None, table: Tensor, rows: Tensor, keys: Tensor | None, step: Tensor,
    learned_variance: bool, statistics: str, out: Tensor, kept: Tensor | None, preview: Tensor | None,
    model_input: Tensor | None, faults: Tensor | None, sums: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches of a step on a sample that is not empty; they write ``out`` and whatever else is not ``None``."""
    total, batch = sample.numel(), sample.shape[0]
    units = max(rows.shape[0], batch)
    arguments = {
        "sample": sample, "output": output, "unconditional": unconditional, "base": base, "history": history,
        "noise": noise, "threshold": threshold, "table": table, "rows": rows,
        "keys": None if noise is not None else keys, "step": step, "out": out, "kept": kept, "preview": preview,
        "model_input": model_input, "faults": faults, "size": total // batch, "unit_size": total // units,
        "units_per_sample": units // batch, "total": total, "table_rows": table.shape[0],
        "output_stride": 0 if output is None else output.stride(0),
        "other_stride": 0 if unconditional is None else unconditional.stride(0),
        "ONE_ROW": rows.shape[0] == 1, "LEARNED": learned_variance, "STATISTICS": _STATISTICS[statistics],
        "COUNT": 0 if history is None else history.shape[0],
        "COPIES": 0 if model_input is None else model_input.shape[0] // batch,
    }  # fmt: skip
    columns = _COLUMNS * STEP.default_config(arguments).kwargs["BLOCK_L"]
    before = BLOCK.value - 1 if total // units % BLOCK.value else 0  # columns of a block that are another unit's
    pieces = triton.cdiv(total // units + before, columns)
    count = sums.shape[1] if statistics != "none" else 0
    partials = sums.new_empty(units * pieces, count) if pieces > 1 and count else sums
    arguments |= {"pieces": pieces, "partials": partials if count else None}
    found = [Launch(STEP, arguments, lambda meta: (units * pieces,))]
    if partials is not sums:
        joined = {"partials": partials, "statistic": sums, "pieces": pieces, "count": count}
        found.append(Launch(SUMS, joined, lambda meta: (units * count,)))
    return found


def sampler_step(*args: object) -> None:
    """One step; arguments as the op's ``prepare`` returns them, and the sums [units, count]; not checked here."""
    sample, sums = args[0], args[-1]
    if not sample.numel():
        sums.zero_()
        return
    for launch in plan(*args):
        launch.run()
