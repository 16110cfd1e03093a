"""Tokens and confidences from logits: a program takes a piece of a row, in one pass; a second kernel joins the pieces.

A piece is always as long, so a row's result does not depend on how many rows come with it.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._philox import BLOCK, LANES, gumbel, words
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

PIECE = 8192  # columns
_NONE = tl.constexpr(2**31 - 1)  # no column
_SCALARS = ("source_rows", "vocabulary", "stride", "other_stride", "pieces", "seed", "step", "guidance", "temperature",
            "f0", "f1", "f2", "f3", "u0", "u1", "u2", "u3", "eos")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _guided(conditional, other, guidance):
    value = other + (guidance + 1.0) * (conditional - other)
    return tl.where(conditional == float("-inf"), conditional, value)


@triton.jit
def _among(column, a, b, c, d, COUNT: tl.constexpr):
    """Whether a column is one of the first COUNT tokens."""
    found = column < 0
    if COUNT > 0:
        found |= column == a
    if COUNT > 1:
        found |= column == b
    if COUNT > 2:
        found |= column == c
    if COUNT > 3:
        found |= column == d
    return found


@triton.jit
def _source(index, row, source_rows):
    """The row of the logits, and whether there is such a row; else the first one, which is there to be read."""
    if index is not None:
        source = tl.load(index + row)
    else:
        source = row
    exists = (source >= 0) & (source < source_rows)
    return tl.where(exists, source, 0), exists


@triton.jit
def _logits(x, u, column, ok, guidance):
    """float32 logits at ``column``, -inf where there are none."""
    value = tl.load(x + column, mask=ok, other=float("-inf")).to(tl.float32)
    if u is not None:
        value = _guided(value, tl.load(u + column, mask=ok, other=0.0).to(tl.float32), guidance)
    return value


@triton.jit
def _weight(value, top):
    """exp(value - top), 0 where the value is -inf."""
    return tl.where(value == float("-inf"), 0.0, tl.exp(value - top))


@triton.jit(do_not_specialize=_SCALARS)
def piece_kernel(
    logits, unconditional, index, keys, numbers, places,
    source_rows, vocabulary, stride, other_stride, pieces, seed, step, guidance, temperature,
    f0, f1, f2, f3, u0, u1, u2, u3,
    FORBIDDEN: tl.constexpr, UNCOUNTED: tl.constexpr, NOISE: tl.constexpr, PIECE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """numbers[item] = (top, sum, best, chosen) and places[item] = column of the best, of one piece of one row."""
    item = tl.program_id(0).to(tl.int64)
    row, first = item // pieces, (item % pieces).to(tl.int32) * PIECE
    source, exists = _source(index, row, source_rows)
    x = logits + source * stride
    if unconditional is not None:
        u = unconditional + source * other_stride
    else:
        u = None
    lane = tl.arange(0, BLOCK_L)
    nothing = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    top, best, chosen = nothing, nothing, nothing
    total = tl.zeros((BLOCK_L,), tl.float32)
    place = tl.full((BLOCK_L,), _NONE, tl.int32)
    for start in range(0, tl.minimum(vocabulary - first, PIECE), 4 * BLOCK_L):
        counter = (first + start) // 4 + lane
        column = counter // LANES * BLOCK + counter % LANES
        l0 = _logits(x, u, column, column < vocabulary, guidance)
        l1 = _logits(x, u, column + LANES, column + LANES < vocabulary, guidance)
        l2 = _logits(x, u, column + 2 * LANES, column + 2 * LANES < vocabulary, guidance)
        l3 = _logits(x, u, column + 3 * LANES, column + 3 * LANES < vocabulary, guidance)
        if FORBIDDEN > 0:
            l0 = tl.where(_among(column, f0, f1, f2, f3, FORBIDDEN), float("-inf"), l0)
            l1 = tl.where(_among(column + LANES, f0, f1, f2, f3, FORBIDDEN), float("-inf"), l1)
            l2 = tl.where(_among(column + 2 * LANES, f0, f1, f2, f3, FORBIDDEN), float("-inf"), l2)
            l3 = tl.where(_among(column + 3 * LANES, f0, f1, f2, f3, FORBIDDEN), float("-inf"), l3)
        r0, r1, r2, r3 = l0, l1, l2, l3
        if NOISE:
            if keys is not None:
                w0, w1, w2, w3 = words(tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1), step, counter)
            else:
                w0, w1, w2, w3 = words(seed.to(tl.int64), row, step, counter)
            r0 += temperature * gumbel(w0)
            r1 += temperature * gumbel(w1)
            r2 += temperature * gumbel(w2)
            r3 += temperature * gumbel(w3)
        better = r0 > best  # a NaN never is
        best, chosen, place = tl.where(better, r0, best), tl.where(better, l0, chosen), tl.where(better, column, place)
        better = r1 > best
        best, chosen = tl.where(better, r1, best), tl.where(better, l1, chosen)
        place = tl.where(better, column + LANES, place)
        better = r2 > best
        best, chosen = tl.where(better, r2, best), tl.where(better, l2, chosen)
        place = tl.where(better, column + 2 * LANES, place)
        better = r3 > best
        best, chosen = tl.where(better, r3, best), tl.where(better, l3, chosen)
        place = tl.where(better, column + 3 * LANES, place)
        if UNCOUNTED > 0:  # a NaN among them still leaves no answer
            out0 = _among(column, u0, u1, u2, u3, UNCOUNTED)
            out1 = _among(column + LANES, u0, u1, u2, u3, UNCOUNTED)
            out2 = _among(column + 2 * LANES, u0, u1, u2, u3, UNCOUNTED)
            out3 = _among(column + 3 * LANES, u0, u1, u2, u3, UNCOUNTED)
            wrong = (out0 & (l0 != l0)) | (out1 & (l1 != l1)) | (out2 & (l2 != l2)) | (out3 & (l3 != l3))
            total = tl.where(wrong, float("nan"), total)
            l0, l1 = tl.where(out0, float("-inf"), l0), tl.where(out1, float("-inf"), l1)
            l2, l3 = tl.where(out2, float("-inf"), l2), tl.where(out3, float("-inf"), l3)
        above = tl.where(l0 > top, l0, top)
        above = tl.where(l1 > above, l1, above)
        above = tl.where(l2 > above, l2, above)
        above = tl.where(l3 > above, l3, above)
        total = total * _weight(top, above)
        total += (_weight(l0, above) + _weight(l1, above)) + (_weight(l2, above) + _weight(l3, above))
        top = above
    total = tl.where(exists, total, float("nan"))
    highest = tl.max(top, 0)
    winner = tl.max(best, 0)
    at = tl.min(tl.where((best == winner) & (place != _NONE), place, _NONE), 0)
    tl.store(numbers + item * 4, highest)
    tl.store(numbers + item * 4 + 1, tl.sum(total * _weight(top, highest), 0))
    tl.store(numbers + item * 4 + 2, winner)
    tl.store(numbers + item * 4 + 3, tl.max(tl.where(place == at, chosen, float("-inf")), 0))
    tl.store(places + item, at)


@triton.jit(do_not_specialize=_SCALARS)
def join_kernel(
    numbers, places, logits, unconditional, index, token, confidence, probability,
    source_rows, vocabulary, stride, other_stride, pieces, guidance, f0, f1, f2, f3, u0, u1, u2, u3, eos,
    FORBIDDEN: tl.constexpr, UNCOUNTED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Results of one row from those of its pieces; ``probability`` is that of ``eos``, or None."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, BLOCK_P)
    ok = piece < pieces
    item = row * pieces + piece
    top = tl.load(numbers + item * 4, mask=ok, other=float("-inf"))
    total = tl.load(numbers + item * 4 + 1, mask=ok, other=0.0)
    best = tl.load(numbers + item * 4 + 2, mask=ok, other=float("-inf"))
    chosen = tl.load(numbers + item * 4 + 3, mask=ok, other=float("-inf"))
    place = tl.load(places + item, mask=ok, other=_NONE)
    highest = tl.max(top, 0)
    total = tl.sum(total * _weight(top, highest), 0)
    winner = tl.max(best, 0)
    at = tl.min(tl.where(best == winner, place, _NONE), 0)
    value = tl.max(tl.where(place == at, chosen, float("-inf")), 0)
    answer = (total == total) & (winner < float("inf")) & (at != _NONE)
    tl.store(token + row, tl.where(answer, at, -1).to(tl.int64))
    counts = (total > 0) & (_among(at, u0, u1, u2, u3, UNCOUNTED) == 0)
    sure = tl.where(counts, _weight(value, highest) / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(confidence + row, tl.where(answer, sure, float("nan")))
    if probability is not None:
        source, _ = _source(index, row, source_rows)
        value = tl.load(logits + source * stride + eos).to(tl.float32)
        if unconditional is not None:
            other = tl.load(unconditional + source * other_stride + eos).to(tl.float32)
            value = _guided(value, other, guidance)
        out = _among(eos, u0, u1, u2, u3, UNCOUNTED) | _among(eos, f0, f1, f2, f3, FORBIDDEN)
        counts = (total > 0) & (out == 0)
        sure = tl.where(counts, _weight(value, highest) / tl.where(total > 0, total, 1.0), 0.0)
        tl.store(probability + row, tl.where(answer, sure, float("nan")))


# ------------------------------------------------------------------------------------------------------ configurations


def _extents(args: dict) -> dict[str, int]:
    return {}


# One tile each: another one would round sums another way.
PIECES = Kernel("token_confidence", piece_kernel, variants("token_confidence", ("BLOCK_L",), [(256, 4, 1)]), _extents)
JOIN = Kernel("token_confidence_join", join_kernel, variants("token_confidence_join", (), [(1, 1)]), _extents)
KERNELS = (PIECES, JOIN)


# ------------------------------------------------------------------------------------------------------------ launches


def _tokens(prefix: str, tokens: list[int]) -> dict[str, int]:
    return {f"{prefix}{i}": tokens[i] if i < len(tokens) else -1 for i in range(4)}


def plan(
    logits: Tensor, unconditional: Tensor | None, rows: Tensor | None, keys: Tensor | None, guidance: float,
    temperature: float, seed: int, step: int, forbidden: list[int], uncounted: list[int], eos: int, token: Tensor,
    confidence: Tensor, probability: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """The launches that write ``token``, ``confidence`` and ``probability``, which are not empty."""
    count, pieces = token.shape[0], triton.cdiv(logits.shape[1], PIECE)
    numbers = torch.empty((count * pieces, 4), dtype=torch.float32, device=logits.device)
    places = torch.empty((count * pieces,), dtype=torch.int32, device=logits.device)
    shared = {
        "logits": logits, "unconditional": unconditional, "index": rows, "numbers": numbers, "places": places,
        "source_rows": logits.shape[0], "vocabulary": logits.shape[1], "stride": logits.stride(0),
        "other_stride": 0 if unconditional is None else unconditional.stride(0), "pieces": pieces,
        "guidance": float(guidance), **_tokens("f", forbidden), **_tokens("u", uncounted),
        "FORBIDDEN": len(forbidden), "UNCOUNTED": len(uncounted),
    }  # fmt: skip
    own = {"keys": keys, "seed": seed, "step": step, "temperature": float(temperature), "NOISE": temperature > 0}
    results = {"token": token, "confidence": confidence, "probability": probability, "eos": max(eos, 0)}
    block = triton.next_power_of_2(pieces)
    return [
        Launch(PIECES, {**shared, **own, "PIECE": PIECE}, lambda meta: (count * pieces,)),
        Launch(JOIN, {**shared, **results, "BLOCK_P": block}, lambda meta: (count,)),
    ]


def token_confidence(
    logits: Tensor, unconditional: Tensor | None, rows: Tensor | None, keys: Tensor | None, guidance: float,
    temperature: float, seed: int, step: int, forbidden: list[int], uncounted: list[int], eos: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(token, confidence, probability of ``eos``); arguments as the op's ``prepare`` returns them, not checked here."""
    count = logits.shape[0] if rows is None else rows.shape[0]
    token = torch.empty((count,), dtype=torch.int64, device=logits.device)
    confidence = torch.empty((count,), dtype=torch.float32, device=logits.device)
    probability = torch.empty((count if eos >= 0 else 0,), dtype=torch.float32, device=logits.device)
    if not logits.shape[0]:  # rows of nothing: none has an answer
        return token.fill_(-1), confidence.fill_(torch.nan), probability.fill_(torch.nan)
    if count:
        watched = probability if eos >= 0 else None
        for launch in plan(
            logits, unconditional, rows, keys, guidance, temperature, seed, step, forbidden, uncounted, eos, token,
            confidence, watched,
        ):  # fmt: skip
            launch.run()
    return token, confidence, probability
