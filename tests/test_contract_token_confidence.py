"""The contract of every registry row of token_confidence: exact tokens, torch's accuracy, at every ISA level."""

from functools import cache

import pytest
import torch

from pydenoise import functional as PF
from pydenoise.ops import registry, token_confidence
from pydenoise.reference import _philox
from pydenoise.reference import token_confidence as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.rows import device_of, poisoned_memory, variants
from pydenoise.testing.token_confidence import TOKEN_CONFIDENCE_CASES, TokenConfidenceCase

CASES = {case.name: case for case in TOKEN_CONFIDENCE_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = variants(token_confidence.OP)
CPU = variants(token_confidence.OP, "cpu")
NOISE_ERROR = 1e-5  # of a Gumbel number in float32, absolute: two logarithms of numbers rounded once

SMALLEST = 2.5e-32  # the scale at which the policy's floor is the smallest normal number: what lies below may be 0


def run(variant, args: tuple) -> tuple[torch.Tensor, ...]:
    """The row's result on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with variant.active(), poisoned_memory(), torch.no_grad():
        result = variant.row.run(*args)
    after = [a for a in args if isinstance(a, torch.Tensor)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num()), "overwritten"
    return result


def widened(args: tuple) -> tuple:
    """The arguments of the oracle: the same numbers in float64, on the CPU."""
    args = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args)
    logits, other, *rest = args
    return (logits.double(), None if other is None else other.double(), *rest)


def noised(args: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the oracle takes the argmax of, the rounding that float32 may make in it)."""
    logits, other, rows, keys, guidance, temperature, seed, step, forbidden, *_ = widened(args)
    values = reference.scores(logits, other, rows, guidance)
    rounding = torch.zeros(values.shape[0], dtype=torch.float64)
    if other is not None:
        largest = torch.maximum(*(t.nan_to_num(0, 0, 0).abs().amax() for t in (logits, other)))
        rounding += 6 * (abs(guidance) + 1) * 2.0**-24 * largest
    values[:, forbidden] = -torch.inf
    if temperature > 0:
        keys = reference.noise_keys(values.shape[0], keys, seed, values.device)
        values = values + temperature * _philox.gumbel(_philox.words(keys, step, values.shape[1]), torch.float64)
        rounding += temperature * NOISE_ERROR + 4 * 2.0**-24 * values.nan_to_num(0, 0, 0).abs().amax(1)
    return values, rounding


@cache
def expected(name: str, dtype: torch.dtype) -> tuple:
    """The exact results and torch's own in float32, once for all rows and ISA levels."""
    args = CASES[name].args(dtype)
    values, rounding = noised(args)
    p = [probabilities(args, accurate) for accurate in (torch.float64, torch.float32)]
    return reference.token_confidence(*widened(args)), reference.token_confidence(*args), values, rounding, p


def probabilities(args: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Softmax by its formula over the tokens that count."""
    logits, other, rows, _, guidance, _, _, _, forbidden, uncounted, _ = widened(args)
    values = reference.scores(logits.to(dtype), None if other is None else other.to(dtype), rows, guidance)
    values[:, list(forbidden) + list(uncounted)] = -torch.inf
    return values.softmax(1).nan_to_num(0)


def test_words_are_philox():
    """The known answers of the generator's authors (Random123, kat_vectors)."""
    answers = (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    )  # fmt: skip
    for counter, key, words in answers:
        numbers = [tuple(torch.tensor([v]) for v in part) for part in (counter, key)]
        assert tuple(int(w) for w in _philox.philox4x32(*numbers)) == words


def test_noise_is_gumbel():
    """Mean, variance and tails of the standard Gumbel distribution; neighbours do not depend on each other."""
    keys = torch.tensor([[5, 0], [5, 1], [6, 0]])
    noise = _philox.gumbel(_philox.words(keys, 3, 200_000), torch.float64)
    assert (noise.mean(1) - 0.5772156649).abs().max() < 0.012
    assert (noise.var(1) - torch.pi**2 / 6).abs().max() < 0.03
    for level in (-1.5, 0.0, 2.0, 6.0):
        below = torch.exp(-torch.exp(torch.tensor(-level)))
        share = (noise < level).double().mean(1)
        assert ((share - below) / (below * (1 - below) / 200_000).sqrt()).abs().max() < 4.5
    centred = noise - noise.mean(1, keepdim=True)
    assert torch.corrcoef(centred).triu(1).abs().max() < 0.01
    assert (centred[:, 1:] * centred[:, :-1]).mean(1).abs().max() < 0.02
    assert not torch.equal(_philox.words(keys, 3, 50), _philox.words(keys, 4, 50))


@pytest.mark.parametrize("case", TOKEN_CONFIDENCE_CASES, ids=lambda case: case.name)
def test_reference_is_the_formula(case):
    args = case.args(torch.float64)
    token, confidence, watched = reference.token_confidence(*args)
    values, _ = noised(args)
    assert torch.equal(token, values.argmax(1))
    p = probabilities(args, torch.float64)
    torch.testing.assert_close(confidence, p.gather(1, token[:, None])[:, 0], rtol=1e-12, atol=1e-15)
    if case.eos is not None:
        torch.testing.assert_close(watched, p[:, case.eos], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", TOKEN_CONFIDENCE_CASES, ids=lambda case: case.name)
def test_results(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    token, confidence, watched = (t.cpu() for t in run(variant, args))
    (best, _, exact_watched), (_, _, own_watched), values, rounding, p = expected(case.name, dtype)
    assert token.dtype == torch.int64 and confidence.dtype == torch.float32 and watched.dtype == torch.float32
    if case.temperature == 0 and case.guidance is None:
        assert torch.equal(token, best)
    assert ((token >= 0) & (token < case.vocabulary)).all()
    chosen = values.gather(1, token[:, None])[:, 0]
    assert (values.gather(1, best[:, None])[:, 0] - chosen <= 2 * rounding).all(), "not the largest"
    exact, own = (each.gather(1, token[:, None])[:, 0] for each in p)
    assert_accurate(confidence, exact, own, what=f"{case.name}, {case.why}")
    assert watched.shape == exact_watched.shape
    scale = max(exact_watched.max().item(), SMALLEST) if exact_watched.numel() else None
    assert_accurate(watched, exact_watched, own_watched, what="eos", scale=scale)


@pytest.mark.parametrize("variant", CPU, ids=str)
@pytest.mark.parametrize("name", ["words", "many", "sampled_long", "everything", "both", "rising"])
def test_threads_and_splits_do_not_change_a_bit(name, variant):
    args = CASES[name].args(torch.float32)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(variant, args))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    logits, other, rows, keys, guidance, temperature, seed, *rest = args
    keys = reference.noise_keys(results[0][0].shape[0], keys, seed, logits.device)
    for i in range(keys.shape[0]):  # each row by itself
        at = slice(i, i + 1) if rows is None else slice(None)
        own = None if rows is None else rows[i : i + 1]
        few = (logits[at], None if other is None else other[at], own, keys[i : i + 1], guidance, temperature, 0, *rest)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(run(variant, few), results[0], strict=True) if len(b))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [40, 17000])
def test_rows_without_an_answer(size, temperature, variant):
    """NaN, +inf, or nothing above -inf: -1 and NaN, in their rows only; what is forbidden does not count."""
    device = device_of(variant.row)
    x = TokenConfidenceCase("", "", 9, size).logits(torch.float32, device)
    options = {"temperature": temperature, "seed": 1, "forbidden": (7,), "uncounted": (9,), "eos_token_id": 5}
    plain = run(variant, token_confidence.prepare(x, **options))
    for row, (token, value) in enumerate(((0, torch.nan), (size - 1, torch.inf), (9, torch.nan), (9, torch.inf))):
        x[row, token] = value
    x[4] = -torch.inf
    x[5] = -torch.inf
    x[5, 7] = 3.0
    x[6, 7] = torch.nan
    x[7, 7] = torch.inf
    results = run(variant, token_confidence.prepare(x, **options))
    assert (results[0][:6] == -1).all()
    assert all(r[:6].isnan().all() for r in results[1:])
    assert all(torch.equal(r[6:], p[6:]) for r, p in zip(results, plain, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_only_an_uncounted_token_is_possible(variant):
    x = torch.full((2, 300), -torch.inf, device=device_of(variant.row))
    x[0, 4], x[1, 200] = 1.0, 2.0
    args = token_confidence.prepare(x, uncounted=(4,), eos_token_id=4)
    token, confidence, watched = (r.tolist() for r in run(variant, args))
    assert token == [4, 200] and confidence == [0.0, 1.0] and watched == [0.0, 0.0]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_large_logits(variant):
    """Exponentials are relative to the largest, whatever the order."""
    ramp = torch.linspace(-3e4, 3e4, 20_000, device=device_of(variant.row))
    x = torch.stack([ramp, ramp.flip(0), torch.full_like(ramp, 3e38)])
    token, confidence, _ = run(variant, token_confidence.prepare(x))
    assert token.tolist() == [19_999, 0, 0]
    expected = x.double().softmax(1).amax(1).float()
    torch.testing.assert_close(confidence, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_samples_are_distributed_as_the_softmax(variant):
    """Chi-square over 20 000 rows of the same logits: softmax(l / T)."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4, 0.9, -torch.inf, 0.1])
    rows = 20_000
    x = logits.expand(rows, -1).to(device_of(variant.row))
    token, _, _ = run(variant, token_confidence.prepare(x, temperature=0.6, seed=2026, step=9))
    counts = torch.bincount(token.cpu(), minlength=8).double()
    wanted = rows * (logits.double() / 0.6).softmax(0)
    assert counts[6] == 0
    keep = wanted > 0
    statistic = ((counts - wanted)[keep] ** 2 / wanted[keep]).sum()
    assert statistic < 24.3, statistic  # the 99.9 % quantile of 6 degrees of freedom is 22.5


@pytest.mark.parametrize("row", registry.rows(token_confidence.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["many", "sampled", "everything", "empty"])
def test_opcheck(name, row):
    args = CASES[name].args(torch.float32, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    torch.library.opcheck(torch.ops.pydenoise.token_confidence.default, (*args, row.name))


def test_functional():
    x = torch.randn(4, 30).requires_grad_()
    token, confidence = PF.token_confidence(x)
    expected = x.softmax(1).max(1)
    assert torch.equal(token, expected.indices) and not confidence.requires_grad
    torch.testing.assert_close(confidence, expected.values.detach())
    assert torch.equal(PF.token_confidence(x, eos_token_id=2, seed=4)[0], token), "no temperature, no noise"
    torch.manual_seed(3)
    first = PF.token_confidence(x, temperature=5.0)[0]
    torch.manual_seed(3)
    assert torch.equal(PF.token_confidence(x, temperature=5.0)[0], first)


def test_compiles():
    x = torch.randn(5, 70)
    options = {"temperature": 1.0, "seed": 5, "forbidden": (3,)}
    function = torch.compile(lambda t: PF.token_confidence(t, **options)[1] + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(x), PF.token_confidence(x, **options)[1] + 1)


X = torch.zeros(3, 10)
BAD = {
    "logits: expected a torch.Tensor": lambda: PF.token_confidence([1.0]),
    "logits: expected a floating-point": lambda: PF.token_confidence(X.int()),
    r"logits: expected \[N, V\]": lambda: PF.token_confidence(X[None]),
    "with V >= 1": lambda: PF.token_confidence(X[:, :0]),
    "unconditional: expected shape": lambda: PF.token_confidence(X, unconditional=X[:2]),
    "unconditional: expected dtype": lambda: PF.token_confidence(X, unconditional=X.half()),
    "guidance: 1.0 needs": lambda: PF.token_confidence(X, guidance=1.0),
    "guidance: expected a finite": lambda: PF.token_confidence(X, unconditional=X, guidance=torch.inf),
    "temperature: expected a number >= 0": lambda: PF.token_confidence(X, temperature=-1),
    "temperature: expected a number, got str": lambda: PF.token_confidence(X, temperature="hot"),
    "seed: expected an int of 64": lambda: PF.token_confidence(X, seed=2**64),
    "seed: expected an int, got float": lambda: PF.token_confidence(X, seed=1.0),
    r"seed: expected shape \[3, 2\]": lambda: PF.token_confidence(X, seed=torch.zeros(2, 2, dtype=torch.int64)),
    "seed: expected dtype": lambda: PF.token_confidence(X, seed=torch.zeros(3, 2)),
    "step: expected": lambda: PF.token_confidence(X, step=2**32),
    "rows: expected numbers from 0 to 2, got 3": lambda: PF.token_confidence(X, rows=torch.tensor([0, 3])),
    "rows: expected dtype": lambda: PF.token_confidence(X, rows=torch.tensor([0], dtype=torch.int32)),
    "forbidden: expected a token from 0 to 9, got 10": lambda: PF.token_confidence(X, forbidden=[10]),
    "forbidden: expected at most 4": lambda: PF.token_confidence(X, forbidden=range(5)),
    "forbidden: leaves no token": lambda: PF.token_confidence(X[:, :2], forbidden=(0, 1)),
    "forbidden: expected a sequence": lambda: PF.token_confidence(X, forbidden=3),
    "uncounted: expected an int": lambda: PF.token_confidence(X, uncounted=[1.5]),
    "eos_token_id: expected": lambda: PF.token_confidence(X, eos_token_id=-1),
    "backend: expected": lambda: PF.token_confidence(X, backend="gpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
