"""The contract of every registry row of sparse attention: torch's accuracy, whoever runs it, at every ISA level."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from pydenoise import functional as PF
from pydenoise.block_mask import BlockMask
from pydenoise.ops import block_importance, block_sparse_attention, registry
from pydenoise.recording import Recording, unavailable
from pydenoise.reference import block_importance as importance_reference
from pydenoise.reference import block_sparse_attention as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.rows import device_of, poisoned_memory, variants
from pydenoise.testing.sparse import SPARSE_CASES

CASES = {case.name: case for case in SPARSE_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD = variants(block_sparse_attention.OP)
BACKWARD = variants(block_sparse_attention.OP_BACKWARD)
IMPORTANCE = variants(block_importance.OP)

each_case = pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(variant, args: tuple) -> tuple[torch.Tensor, ...]:
    """The row's results on poisoned memory; the arguments stay as they were."""
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with variant.active(), poisoned_memory(), torch.no_grad():
        results = variant.row.run(*args)
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(_same(old, new) for old, new in zip(before, after, strict=True)), "overwritten"
    return results


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def kept_tokens(case) -> torch.Tensor:
    """Boolean [B, H, Lq, Lk] of what counts."""
    kept = case.mask().to_token_mask().expand(case.batch, case.heads, -1, -1)
    if case.lengths is None:
        return kept
    return kept & (torch.arange(case.keys) < torch.tensor(case.lengths)[:, None, None, None])


def heads_of(case, tensors) -> tuple[torch.Tensor, ...]:
    """Keys and values once for each query head."""
    return tuple(t.repeat_interleave(case.heads // case.kv_heads, 1) for t in tensors)


def plain(case, query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula over all tokens, in the tensors' dtype: (output, log-sum-exp)."""
    scale = case.size**-0.5 if case.scale is None else case.scale
    key, value = heads_of(case, (key, value))
    kept = kept_tokens(case)
    scores = (query @ key.mT * scale).masked_fill(~kept, -torch.inf)
    weights = torch.where(kept.any(-1, keepdim=True), scores, 0).softmax(-1) * kept
    return weights @ value, scores.logsumexp(-1)


@cache
def expected(name: str, dtype: torch.dtype):
    """(exact output, exact lse, torch's output in ``dtype``, torch's lse)."""
    case = CASES[name]
    tensors = case.tensors(dtype)
    exact = plain(case, *(t.double() for t in tensors))
    query, (key, value) = tensors[0], heads_of(case, tensors[1:])
    own = F.scaled_dot_product_attention(query, key, value, attn_mask=kept_tokens(case), scale=case.scale)
    scores = (query @ key.mT).float() * (case.size**-0.5 if case.scale is None else case.scale)
    return *exact, own.nan_to_num(), scores.masked_fill(~kept_tokens(case), -torch.inf).logsumexp(-1)


@each_case
def test_reference_is_the_formula(case):
    output, lse = plain(case, *case.tensors(torch.float64))
    actual = reference.block_sparse_attention(*case.args(torch.float64))
    torch.testing.assert_close(actual[0], output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], lse, rtol=1e-12, atol=1e-12)


def assert_same_nothing(actual: torch.Tensor, exact: torch.Tensor, own: torch.Tensor, what: str) -> None:
    """Log-sum-exps: -inf in the same places, accurate elsewhere."""
    nothing = exact == -torch.inf
    assert torch.equal(actual.cpu() == -torch.inf, nothing), what
    assert_accurate(*(t.cpu().masked_fill(nothing, 0) for t in (actual, exact, own)), what=what)


@each_dtype
@pytest.mark.parametrize("variant", FORWARD, ids=str)
@each_case
def test_forward(case, variant, dtype):
    args = case.args(dtype, device_of(variant.row))
    output, lse = run(variant, args)
    exact, exact_lse, own, own_lse = expected(case.name, dtype)
    assert output.stride() == torch.empty_like(args[0]).stride() and lse.is_contiguous()
    assert_accurate(output, exact, own, what=f"{case.name}, {case.why}")
    assert_same_nothing(lse, exact_lse, own_lse, f"lse of {case.name}")
    kept = kept_tokens(case).any(-1)
    assert not output.cpu()[~kept].any()


@pytest.mark.parametrize("variant", FORWARD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["whole", "tail", "gqa", "lengths", "block16", "holes", "size128", "fused", "sharp"])
def test_int8_scores(name, variant, dtype):
    """Near the reference's codes: one code apart here and there (means add up in another order)."""
    case = CASES[name]
    args = case.args(dtype, device_of(variant.row), int8=True)
    output, lse = run(variant, args)
    quantized, quantized_lse = reference.block_sparse_attention(*(_double(a) for a in case.args(dtype, int8=True)))
    exact, exact_lse, own, _ = expected(name, dtype)
    allowed = 0.1 * (quantized - exact).abs().max() + 4 * (own.double() - exact).abs().max()
    assert (output.cpu().double() - quantized).abs().max() <= allowed
    some = exact_lse > -torch.inf
    assert torch.equal(lse.cpu() > -torch.inf, some)
    lse_allowed = 0.1 * (quantized_lse - exact_lse)[some].abs().max() + 1e-5
    assert (lse.cpu().double() - quantized_lse)[some].abs().max() <= lse_allowed


def _double(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# ------------------------------------------------------------------------------------------------------- gradients


@cache
def expected_gradients(name: str, dtype: torch.dtype):
    """(gradients of output and lse, exact gradients, torch's own)."""
    case = CASES[name]
    args = case.args(dtype)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(args[0].shape, generator=generator, dtype=torch.float64).to(dtype)
    grad_lse = torch.randn(args[0].shape[:3], generator=generator)
    exact = _gradients(lambda *t: plain(case, *t), args[:3], grad, grad_lse, torch.float64)
    own = _gradients(lambda *t: _by_torch(case, *t), args[:3], grad, grad_lse, dtype)
    return (grad, grad_lse), exact, own


def backward_arguments(name: str, dtype: torch.dtype, variant) -> tuple:
    """The backward's arguments after the same backend's forward: the rounding of its scores is in its lse as well."""
    case, device = CASES[name], device_of(variant.row)
    args = case.args(dtype, device)
    output, lse = run(next(v for v in FORWARD if str(v) == str(variant)), args)
    grad, grad_lse = (t.to(device) for t in expected_gradients(name, dtype)[0])
    return block_sparse_attention.prepare_backward(grad, output, lse, grad_lse, args, case.mask(device).transposed())


def _by_torch(case, query, key, value):
    """Torch's fused kernel in the tensors' dtype; its log-sum-exp from scores of that dtype."""
    scale = case.size**-0.5 if case.scale is None else case.scale
    kept = kept_tokens(case)
    key, value = heads_of(case, (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=kept, scale=scale)
    scores = (query @ key.mT).float() * scale
    return output, scores.masked_fill(~kept, -torch.inf).logsumexp(-1)


def _gradients(function, tensors, grad, grad_lse, dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    output, lse = function(*tensors)
    some = lse > -torch.inf
    total = (output * grad.to(dtype)).sum().double() + (lse.double() * grad_lse)[some].sum()
    return [g.nan_to_num() for g in torch.autograd.grad(total, tensors)]


@each_dtype
@pytest.mark.parametrize("variant", BACKWARD, ids=str)
@each_case
def test_backward(case, variant, dtype):
    if 0 in (case.batch, case.queries):
        args = case.args(dtype, device_of(variant.row))
        query = args[0]
        nothing = torch.empty(query.shape[:3], device=query.device)
        arguments = block_sparse_attention.prepare_backward(query, query, nothing, None, args)
        for grad, like in zip(run(variant, arguments), args[:3], strict=True):
            assert grad.shape == like.shape and not grad.any()
        return
    _, exact, own = expected_gradients(case.name, dtype)
    grads = run(variant, backward_arguments(case.name, dtype, variant))
    for name, actual, oracle, torchs in zip(("query", "key", "value"), grads, exact, own, strict=True):
        assert actual.is_contiguous()
        assert_accurate(actual, oracle, torchs, what=f"gradient of {name}, {case.name}, {case.why}")


@pytest.mark.parametrize("name", ["gqa", "tail", "lengths", "holes"])
def test_autograd(name):
    """Gradients of the functional, through the output and the log-sum-exp, against finite differences."""
    case = CASES[name]
    query, key, value = (t[:1, :, :40].contiguous().requires_grad_() for t in case.tensors(torch.float64))
    kept = torch.rand(1, 1, -(-query.shape[2] // 16), 3, generator=torch.Generator().manual_seed(0)) < 0.6
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, 16, query.shape[2], key.shape[2])

    def function(*tensors):
        output, lse = PF.block_sparse_attention(*tensors, mask, return_lse=True, backend="reference")
        return output.sin().sum() + lse.cos().sum()

    assert torch.autograd.gradcheck(function, (query, key, value), fast_mode=True)


def test_gradients_where_only_some_are_wanted():
    query, key, value = CASES["gqa"].tensors(torch.float32)
    mask = CASES["gqa"].mask()
    full = [t.clone().requires_grad_() for t in (query, key, value)]
    PF.block_sparse_attention(*full, mask).square().sum().backward()
    alone = key.clone().requires_grad_()
    PF.block_sparse_attention(query, alone, value, mask).square().sum().backward()
    assert torch.equal(alone.grad, full[1].grad)


# ------------------------------------------------------------------------------------------------------ importance


def _importance(case, query, key, lse=None):
    """By the formula over all tokens, in float64 or float32; with ``lse``, from that."""
    scale = case.size**-0.5 if case.scale is None else case.scale
    (key,) = heads_of(case, (key,))
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if case.lengths is not None:
        beyond = torch.arange(case.keys) >= torch.tensor(case.lengths)[:, None, None, None]
        scores = scores.masked_fill(beyond, -torch.inf)
    first = block_importance.first_generated_block(case.keys, case.new_tokens, case.block)
    pooled = []
    for part in (scores, scores[..., first * case.block :]):
        weights = part.softmax(-1) if lse is None or pooled else (part - lse[..., None]).exp()
        weights = weights.nan_to_num()
        pad = (0, -part.shape[-1] % case.block, 0, -part.shape[-2] % case.block)
        tiles = F.pad(weights, pad).unflatten(-1, (-1, case.block)).unflatten(2, (-1, case.block))
        pooled.append(tiles.sum((3, 5)) / case.block**2)
    return tuple(pooled)


@each_dtype
@pytest.mark.parametrize("variant", IMPORTANCE, ids=str)
@pytest.mark.parametrize("with_lse", [False, True], ids=["two passes", "lse"])
@pytest.mark.parametrize("case", [c for c in SPARSE_CASES if c.batch and c.queries], ids=lambda case: case.name)
def test_importance(case, with_lse, variant, dtype):
    query, key, _ = case.tensors(dtype)
    args, lse = list(case.importance_args(dtype, device_of(variant.row))), None
    if with_lse:
        scores = (args[0].cpu().double() @ heads_of(case, (args[1].cpu().double(),))[0].mT) * args[4]
        if case.lengths is not None:
            beyond = torch.arange(case.keys) >= torch.tensor(case.lengths)[:, None, None, None]
            scores = scores.masked_fill(beyond, -torch.inf)
        lse = scores.logsumexp(-1).float()
        args[5] = lse.to(args[0].device)
    exact, own = _importance(case, query.double(), key.double()), _importance(case, query, key, lse)
    for name, actual, oracle, torchs in zip(("all", "generated"), run(variant, tuple(args)), exact, own, strict=True):
        assert actual.is_contiguous() and actual.dtype == torch.float32
        assert_accurate(actual, oracle, torchs, what=f"importance over {name}, {case.name}, {case.why}")


@pytest.mark.parametrize("variant", IMPORTANCE, ids=str)
@pytest.mark.parametrize("name", ["no_batch", "no_queries"])
def test_importance_of_nothing(name, variant):
    args = CASES[name].importance_args(torch.float32, device_of(variant.row))
    over_all, over_generated = run(variant, args)
    assert over_all.numel() == 0 and over_all.shape[-1] == over_generated.shape[-1] + args[3]


@pytest.mark.parametrize("variant", IMPORTANCE, ids=str)
def test_importance_of_large_scores(variant):
    """Generated keys whose mass among all keys is too small for a float still share their own softmax."""
    query = torch.full((1, 1, 32, 16), 4.0)
    key = torch.cat([torch.full((1, 1, 64, 16), 20.0), torch.full((1, 1, 64, 16), -20.0)], 2)
    key[:, :, 100:] -= 0.01
    args = block_importance.prepare(query, key, 16, new_tokens=64, scale=1.0)
    device = device_of(variant.row)
    over_all, over_generated = run(variant, tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))
    exact = importance_reference.block_importance(*(_double(a) for a in args))
    torch.testing.assert_close(over_all.cpu().double(), exact[0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(over_generated.cpu().double(), exact[1], rtol=1e-3, atol=1e-9)


# ------------------------------------------------------------------------------------- what holds for all the ops


@pytest.mark.parametrize("variant", [v for v in FORWARD if v.row.name == "cpu"], ids=str)
@pytest.mark.parametrize("name", ["whole", "tail", "gqa", "lengths", "block16"])
def test_threads_do_not_change_a_bit(name, variant):
    for dtype in (torch.float32, torch.bfloat16):
        for int8 in (False, True):
            _same_for_threads(variant, CASES[name].args(dtype, int8=int8))


@pytest.mark.parametrize("variant", [v for v in BACKWARD if v.row.name == "cpu"], ids=str)
@pytest.mark.parametrize("name", ["tail", "gqa"])
def test_threads_do_not_change_a_bit_of_gradients(name, variant):
    _same_for_threads(variant, backward_arguments(name, torch.float32, variant))


@pytest.mark.parametrize("variant", [v for v in IMPORTANCE if v.row.name == "cpu"], ids=str)
@pytest.mark.parametrize("name", ["tail", "gqa", "lengths"])
def test_threads_do_not_change_a_bit_of_importance(name, variant):
    _same_for_threads(variant, CASES[name].importance_args(torch.float32))


def _same_for_threads(variant, args):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(variant, args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("variant", FORWARD, ids=str)
def test_not_a_number_stays_where_it_is_read(variant):
    case = CASES["diagonal"]
    device = device_of(variant.row)
    for dtype in (torch.float32, torch.bfloat16):
        args = list(case.args(dtype, device))
        query, key, value = (t.clone() for t in args[:3])
        query[0, 0, 40], key[0, 1, 130, 3], value[0, 0, 290, 5] = torch.nan, torch.inf, torch.nan
        args[:3] = query, key, value
        output, _ = run(variant, tuple(args))
        bad = output.isnan().cpu()
        assert bad[0, 0, 40].all() and bad[0, 0, 256:, 5].all()
        bad[0, 0, 40], bad[0, 0, 256:, 5] = False, False
        assert not bad[0, 0].any(), "in the other queries of the head"
        readers = torch.zeros(300, dtype=torch.bool)
        readers[96:192] = True  # blocks 3, 4 and 5 read the key's block 4
        assert not bad[0, 1, ~readers].any() and bad[0, 1, readers].any()


@pytest.mark.parametrize("variant", FORWARD, ids=str)
def test_large_scores(variant):
    """Exponentials are relative to the largest score, so nothing overflows, whatever the order of the keys."""
    ramp = torch.linspace(-300, 300, 900)
    key = ramp[None, None, :, None].expand(1, 1, 900, 16).contiguous() / 16
    value = torch.arange(900.0)[None, None, :, None].expand(1, 1, 900, 16).contiguous()
    query = torch.full((1, 1, 5, 16), 20.0)
    mask = BlockMask.full(128, 5, 900)
    device = device_of(variant.row)
    for k, v in ((key, value), (key.flip(2), value.flip(2))):
        args = block_sparse_attention.prepare(*(t.to(device) for t in (query, k, v)), mask.to(device), scale=1.0)
        output, _ = run(variant, args)
        torch.testing.assert_close(output.cpu(), torch.full((1, 1, 5, 16), 899.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("row", registry.rows(block_sparse_attention.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["gqa", "fused", "lengths", "no_batch"])
def test_opcheck(name, row):
    args = CASES[name].args(torch.float32, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    op = torch.ops.pydenoise.block_sparse_attention.default
    torch.library.opcheck(op, (*args, None, None, row.name))
    query, *rest = args
    torch.library.opcheck(op, (query.clone().requires_grad_(), *rest, None, None, row.name))


@pytest.mark.parametrize("row", registry.rows(block_importance.OP), ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["gqa", "lengths", "no_queries"])
def test_opcheck_importance(name, row):
    args = CASES[name].importance_args(torch.float32, device_of(row))
    if (reason := row.unsupported(*args)) is not None:
        pytest.skip(reason)
    torch.library.opcheck(torch.ops.pydenoise.block_importance.default, (*args, row.name))


def test_compiles():
    query, key, value = CASES["gqa"].tensors(torch.float32)
    mask = CASES["gqa"].mask()

    def function(query, key, value):
        return PF.block_sparse_attention(query, key, value, mask) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), function(query, key, value))
    leaf = query.clone().requires_grad_()
    compiled(leaf, key, value).sum().backward()
    other = query.clone().requires_grad_()
    function(other, key, value).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_recorded():
    """A replay computes the same from new inputs."""
    case = CASES["gqa"]
    mask = case.mask()

    def forward(query, key, value):
        return PF.block_sparse_attention(query, key, value, mask)

    recording = Recording(forward, case.tensors(torch.float32), {})
    assert recording.torch_steps == 0
    inputs = [torch.randn_like(t) for t in case.tensors(torch.float32)]
    assert torch.equal(recording.replay(inputs), forward(*inputs))
