"""The contract of every registry row of attention: torch's accuracy, whoever runs it, at every ISA level."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from pydenoise import functional as PF
from pydenoise.ops import attention, registry
from pydenoise.recording import Recording, unavailable
from pydenoise.reference import attention as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.attention import ATTENTION_CASES
from pydenoise.testing.rows import device_of, poisoned_memory, variants

CASES = {case.name: case for case in ATTENTION_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = variants(attention.OP)
CPU = variants(attention.OP, "cpu")


def run(variant, args: tuple) -> torch.Tensor:
    """The row's result on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with variant.active(), poisoned_memory(), torch.no_grad():
        result = variant.row.run(*args)
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(_same(old, new) for old, new in zip(before, after, strict=True)), "overwritten"
    return result


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def plain(query, key, value, heads, scale, mask) -> torch.Tensor:
    """Attention by its formula, in float64; a row of which nothing is kept gives 0."""
    q, k, v = (t.double().cpu().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    scores = q @ k.mT * scale
    if mask is not None:
        mask = mask.cpu()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result and torch's own in ``dtype``, once for all rows and ISA levels."""
    args = CASES[name].args(dtype)
    return plain(*args), reference.attention(*args)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_reference_is_the_formula(case):
    args = case.args(torch.float64)
    torch.testing.assert_close(reference.attention(*args), plain(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_forward(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    actual = run(variant, args)
    assert actual.is_contiguous()
    assert_accurate(actual, *expected(case.name, dtype), what=f"{case.name}, {case.why}")


@pytest.mark.parametrize("variant", CPU, ids=str)
@pytest.mark.parametrize("name", ["ddpm", "short_blocks", "size32", "size40", "many_heads", "mask_full", "odd"])
def test_threads_and_splits_do_not_change_a_bit(name, variant):
    for dtype in (torch.float32, torch.bfloat16):
        args = CASES[name].args(dtype)
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(variant, args))
        assert all(torch.equal(results[0], other) for other in results[1:]), dtype
        if args[5] is None:  # each query by itself: the same bits
            query, *rest = args
            alone = [run(variant, (query[:, i : i + 1], *rest)) for i in range(0, query.shape[1], 7)]
            assert torch.equal(torch.cat(alone, 1), results[0][:, ::7]), dtype


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [8, 40])
def test_not_a_number_stays_in_its_row_and_head(variant, size):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 19, 2 * size, generator=generator) for _ in range(3))
    q[0, 3, 1], q[1, 5, size] = torch.nan, torch.inf
    v[1, 2, 0] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        tensors = (t.to(dtype).to(device_of(variant.row)) for t in (q, k, v))
        y = run(variant, attention.prepare(*tensors, 2)).isnan().cpu()
        assert y[0, 3, :size].all() and y[1, 5, size:].all() and y[1, :, 0].all()
        y[0, 3, :size], y[1, 5, size:], y[1, :, 0] = False, False, False
        assert not y.any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_which_nothing_is_kept(variant, dtype):
    """0, as torch gives; and as before where no key is left out but all are moved far away."""
    args = list(CASES["size24"].args(dtype, device_of(variant.row)))
    args[5] = torch.zeros(1, 1, args[0].shape[1], args[1].shape[1], device=args[0].device)
    expected = run(variant, tuple(args))
    args[5][:, :, ::2] = -torch.inf
    y = run(variant, tuple(args))
    assert not y[:, ::2].any() and torch.equal(y[:, 1::2], expected[:, 1::2])
    args[5] = torch.full_like(args[5], torch.finfo(torch.float32).min)
    y = run(variant, tuple(args)).double()
    mean = args[2].double().mean(1, keepdim=True)
    torch.testing.assert_close(y, mean.expand_as(y), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_large_scores(variant):
    """Exponentials are relative to the largest score, so nothing overflows, whatever the order of the keys."""
    ramp = torch.linspace(-300, 300, 900, device=device_of(variant.row))
    k = ramp[None, :, None].expand(1, 900, 8) / 8
    v = torch.arange(900.0, device=k.device)[None, :, None].expand(1, 900, 8)
    for keys, values in ((k, v), (k.flip(1), v.flip(1))):
        y = run(variant, attention.prepare(torch.full_like(k[:, :3], 20.0), keys, values, 1, scale=1.0))
        torch.testing.assert_close(y, torch.full_like(y, 899.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("row", registry.rows(attention.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["cross", "mask_full", "mask_added", "empty"])
def test_opcheck(name, row):
    args = CASES[name].args(torch.float32, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    torch.library.opcheck(torch.ops.pydenoise.attention.default, (*args, row.name))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_functional(backend):
    """What scaled_dot_product_attention gives, in the layout of projections."""
    q, k, v = CASES["cross"].tensors(torch.float32)
    mask = torch.rand(1, 1, 64, 77) > 0.5
    heads = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.2).transpose(1, 2).flatten(2)
    torch.testing.assert_close(PF.attention(q, k, v, 4, scale=0.2, mask=mask, backend=backend), expected)
    y = PF.attention(q.requires_grad_(), k, v, 4, backend=backend)
    assert not y.requires_grad


def test_compiles():
    q, k, v = CASES["size24"].tensors(torch.float32)
    function = torch.compile(lambda *t: PF.attention(*t, 2) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(q, k, v), PF.attention(q, k, v, 2) + 1)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_recorded():
    """A replay computes the same from new inputs, also where a mask is copied on the way."""

    def forward(qkv, mask):
        return PF.attention(*qkv.chunk(3, dim=-1), 2, mask=mask)

    for size in (8, 24):
        draw = lambda: (torch.randn(2, 30, 6 * size), torch.rand(30, 1) > 0.2)  # noqa: B023, E731
        recording = Recording(forward, draw(), {})
        assert recording.torch_steps == 0
        inputs = draw()
        assert torch.equal(recording.replay(list(inputs)), forward(*inputs))
