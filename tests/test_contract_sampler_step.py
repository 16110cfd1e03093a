"""The contract of every registry row of sampler_step: torch's accuracy, poisoned outputs, at every ISA level."""

import math
from functools import cache

import pytest
import torch

from pydenoise import _native, step_row
from pydenoise import functional as PF
from pydenoise.ops import registry, sampler_step
from pydenoise.reference import _philox
from pydenoise.reference import sampler_step as reference
from pydenoise.testing import assert_accurate
from pydenoise.testing.rows import device_of, poisoned_memory, variants
from pydenoise.testing.sampler_step import SAMPLER_STEP_CASES, WRITTEN

CASES = {case.name: case for case in SAMPLER_STEP_CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = variants(sampler_step.OP)
CPU = variants(sampler_step.OP, "cpu")
NORMAL_ERROR = 2e-6  # of a normal number from its words, absolute: a logarithm, a root and a cosine in float32
SUM_ERROR = 4e-6  # of a sum, relative to the sum of its terms' magnitudes


def results(run, args: tuple) -> dict[str, torch.Tensor]:
    """What a call returns and writes, on the CPU."""
    sums = run(*args)
    written = {name: args[place] for place, name in WRITTEN.items() if args[place] is not None}
    return {"statistics": sums, **written}


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """(the float64 oracle, torch's own result), once for all rows and ISA levels."""
    case = CASES[name]
    return (
        results(reference.sampler_step, case.args(dtype, exact=True)),
        results(reference.sampler_step, case.args(dtype)),
    )


def sum_of_magnitudes(case, dtype) -> torch.Tensor:
    """What rounding in ``statistics`` is relative to."""
    captured = {}

    def keep(kind, new, m, past, groups):
        captured.update(new=new, m=m, past=past, groups=groups)
        return torch.zeros(0, 0)

    original, reference._statistics = reference._statistics, keep
    try:
        reference.sampler_step(*case.args(dtype, exact=True))
    finally:
        reference._statistics = original
    x, m, past, groups = captured["new"], captured["m"], captured["past"], captured["groups"]
    terms = [x, x * x] if case.statistics == "moments" else [m * m, *(m * slot for slot in past)]
    return torch.stack([t.abs().reshape(groups, -1).sum(1) for t in terms], 1)


def run_variant(variant, args: tuple) -> dict[str, torch.Tensor]:
    reason = variant.row.unsupported(*args)
    if reason is not None:
        pytest.skip(reason)
    with variant.active(), poisoned_memory(), torch.no_grad():
        found = results(variant.row.run, args)
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", SAMPLER_STEP_CASES, ids=lambda case: case.name)
def test_results(case, variant, dtype):
    found = run_variant(variant, case.args(dtype, device_of(variant.row)))
    exact, own = expected(case.name, dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        if name == "faults":
            assert torch.equal(value, exact[name]), "faults"
        elif name == "statistics":
            assert value.dtype == torch.float64 and value.shape == exact[name].shape
            if math.prod(case.shape) and case.statistics != "none":
                error = (value - exact[name]).abs()
                assert (error <= SUM_ERROR * sum_of_magnitudes(case, dtype) + 1e-30).all(), error
        else:
            _accurate(case, name, value, exact[name], own[name])


def _accurate(case, name, value, exact, own) -> None:
    """Under the policy; unwritten poison and NaN that was given stay."""
    assert torch.equal(value.isnan(), exact.isnan()), f"{name}: NaN where there is none, or the other way round"
    value, exact, own = (t.nan_to_num(0.0) for t in (value, exact, own))
    if case.noise in ("keys", "seed") and exact.numel():
        # torch's own noise is as good as its own logarithm and cosine: ours may be off by NORMAL_ERROR
        largest = float(case.table()[:, step_row.NOISE].abs().max()) * 2
        own = own + (torch.sign(own - exact) * NORMAL_ERROR / 2 * largest).to(own.dtype)
    assert_accurate(value, exact, own, what=name)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_noise_is_normal(variant):
    """Mean, variance, tails; neighbours, samples and steps do not depend on each other."""
    table = torch.zeros(1, step_row.WIDTH)
    table[:, step_row.NOISE], table[:, step_row.SLOT] = 1, -1
    x = torch.full((3, 100_000), torch.nan)
    args = sampler_step.prepare(x.to(device_of(variant.row)), None, table.to(device_of(variant.row)), seed=5, step=2)
    z = run_variant(variant, args)["out"].double()
    assert z.mean(1).abs().max() < 0.012 and (z.var(1) - 1).abs().max() < 0.02
    assert ((z**4).mean(1) - 3).abs().max() < 0.12
    for level in (-3.0, -1.0, 0.0, 1.5, 3.5):
        below = torch.special.ndtr(torch.tensor(level, dtype=torch.float64))
        share = (z < level).double().mean(1)
        assert ((share - below) / (below * (1 - below) / z.shape[1]).sqrt()).abs().max() < 4.5
    assert torch.corrcoef(z).triu(1).abs().max() < 0.015
    for distance in (1, 32, 64, 96, 128):
        assert (z[:, distance:] * z[:, :-distance]).mean(1).abs().max() < 0.015
        assert (z[:, distance:] ** 2 * z[:, :-distance] ** 2).mean(1).sub(1).abs().max() < 0.04


def test_normal_numbers_of_extreme_words():
    """The smallest and the largest radius are finite; every word pair gives a number."""
    words = torch.tensor([[0, 2**32 - 1, 1 << 31, (1 << 31) - 1]]).repeat_interleave(32, 1)
    z = reference.normal(words, torch.float64)
    assert z.isfinite().all() and z.abs().max() < 6.8
    assert torch.allclose(_philox.uniform(words).double(), _philox.uniform(words, torch.float64))


@pytest.mark.parametrize("variant", CPU, ids=str)
@pytest.mark.parametrize("name", ["long", "many", "everything", "everything_in_place", "noise_rows"])
def test_threads_give_the_same_bits(variant, name):
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(run_variant(variant, CASES[name].args(torch.float32)))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(value.nan_to_num(), other[key].nan_to_num()), key


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_sample_keeps_its_noise(variant):
    """Alone, in another batch, in another place."""
    table = torch.zeros(1, step_row.WIDTH, device=device_of(variant.row))
    table[:, step_row.NOISE], table[:, step_row.SLOT] = 1, -1
    x = torch.zeros(4, 3, 7, 5, device=table.device)
    keys = torch.tensor([[3, 0], [3, 1], [4, 0], [-1, 2**40]], device=table.device)
    whole = run_variant(variant, sampler_step.prepare(x, None, table, seed=keys, step=8))["out"]
    for i in (0, 3):
        alone = run_variant(variant, sampler_step.prepare(x[:1], None, table, seed=keys[i : i + 1], step=8))["out"]
        assert torch.equal(alone[0], whole[i])
    assert len({tuple(sample.flatten().tolist()) for sample in whole}) == 4
    other = run_variant(variant, sampler_step.prepare(x, None, table, seed=keys, step=9))["out"]
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_faults_name_the_first_step(variant, bad):
    case = CASES["ddim"]
    args = list(case.args(torch.float32, device_of(variant.row)))
    args[1].view(-1)[4321] = bad
    args[10] = torch.full_like(args[10], 6)
    assert int(run_variant(variant, tuple(args))["faults"]) == 6
    args[17].fill_(2)  # an earlier one stays
    assert int(run_variant(variant, tuple(args))["faults"]) == 2


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bound_step_is_the_step(variant):
    """The prepared step of a loop writes the bits of a plain call, and says whether they are finite."""
    if variant.row.name == "triton":
        pytest.skip("prepared steps are for loops on a CPU")
    device = device_of(variant.row)
    case = CASES["everything_in_place"]
    plain, own = case.args(torch.float32, device), case.args(torch.float32, device)
    reason = variant.row.unsupported(*plain)
    if reason is not None:
        pytest.skip(reason)
    with variant.active():
        whole = [*plain]
        whole[12] = "none"
        variant.row.run(*whole)
        buffers = sampler_step.Buffers(
            own[0], own[7], own[13], base=own[3], history=own[4], keys=own[9], kept=own[14], preview=own[15],
            model_input=own[16],
        )  # fmt: skip
        bound = sampler_step.bind(buffers, variant.row.name)
        assert bound.run(own[1], own[2], 0, int(own[10])) is True
        for place, name in WRITTEN.items():
            if name != "faults":
                assert torch.equal(plain[place], own[place]), name
        assert bound.run(own[1] * torch.nan, own[2], 0, 1) is False


def test_bound_checks_the_output():
    x, table = torch.zeros(2, 3, 4, 4), torch.zeros(2, step_row.WIDTH)
    table[:, step_row.SLOT] = -1
    bound = sampler_step.bind(sampler_step.Buffers(x, table, x))
    with pytest.raises(ValueError, match="output: expected shape"):
        bound.run(torch.zeros(2, 3, 4, 5), None, 0, 0)
    with pytest.raises(TypeError, match="output: expected float32"):
        bound.run(torch.zeros(2, 3, 4, 4, dtype=torch.int32), None, 0, 0)


@pytest.mark.parametrize("variant", CPU, ids=str)
def test_functional_and_torch_op_agree(variant):
    case = CASES["kept"]
    with variant.active():
        args = case.args(torch.float32)
        own = case.args(torch.float32)
        torch.ops.pydenoise.sampler_step(*args, "cpu")
        x = PF.sampler_step(own[0], own[1], own[7], base=own[3], history=own[4], kept=own[14], backend="cpu")
        assert torch.equal(x, args[13]) and torch.equal(own[14], args[14]) and torch.equal(own[4], args[4])


def test_opcheck():
    case = CASES["kept"]
    args = case.args(torch.float32)
    torch.library.opcheck(torch.ops.pydenoise.sampler_step.default, (*args, "reference"),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


def test_columns_of_the_kernels():
    """csrc, kernels and python name the same columns."""
    names = {n.lower(): v for n, v in vars(step_row).items() if n.isupper() and n not in ("SLOTS", "WIDTH")}
    library = _native.extension()
    if library.loaded:
        assert dict(library.module.sampler_step_columns()) == names


X = torch.zeros(2, 3, 4, 4)
TABLE = torch.zeros(2, step_row.WIDTH)
NOISY = TABLE.index_fill(1, torch.tensor([step_row.NOISE]), 1.0)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "sample: expected a torch.Tensor", ([1.0], X, TABLE), {}),
        (TypeError, "sample: expected float32", (X.int(), X, TABLE), {}),
        (ValueError, "sample: expected \\[B", (X[0, 0, 0, 0], None, TABLE), {}),
        (ValueError, "output: expected shape", (X, X[:, :2], TABLE), {}),
        (ValueError, "output: expected shape", (X, X, TABLE), {"learned_variance": True}),
        (TypeError, "output: expected float32", (X, X.int(), TABLE), {}),
        (TypeError, "output: expected float32", (X, X.double(), TABLE), {}),
        (ValueError, "unconditional: given without output", (X, None, TABLE), {"unconditional": X}),
        (ValueError, "learned_variance: needs an output", (X, None, TABLE), {"learned_variance": True}),
        (ValueError, "table: expected", (X, X, TABLE[:, :31]), {}),
        (TypeError, "table: expected", (X, X, TABLE.int()), {}),
        (ValueError, "rows: expected a row from 0 to 1", (X, X, TABLE, 2), {}),
        (ValueError, "rows: expected rows from 0 to 1", (X, X, TABLE, torch.tensor([0, -1])), {}),
        (ValueError, "rows: .* does not broadcast", (X, X, TABLE, torch.zeros(3, dtype=torch.int64)), {}),
        (TypeError, "rows: expected dtype torch.int64", (X, X, TABLE, torch.zeros(2)), {}),
        (TypeError, "rows: expected an int", (X, X, TABLE, 0.5), {}),
        (ValueError, "history: expected \\[K <= 6", (X, X, TABLE), {"history": torch.zeros(7, 2, 3, 4, 4)}),
        (TypeError, "history: expected dtype", (X, X, TABLE), {"history": X[None].double()}),
        (ValueError, "base: expected shape", (X, X, TABLE), {"base": X[:1]}),
        (TypeError, "noise: expected dtype", (X, X, TABLE), {"noise": X.half()}),
        (ValueError, "seed: the table has noise", (X, X, NOISY), {}),
        (ValueError, "seed: expected int64", (X, X, NOISY), {"seed": torch.zeros(3, 2, dtype=torch.int64)}),
        (TypeError, "seed: expected an int", (X, X, NOISY), {"seed": 1.5}),
        (ValueError, "seed: expected an int of 64 bits", (X, X, NOISY), {"seed": 2**64}),
        (ValueError, "step: expected an int from 0", (X, X, NOISY), {"seed": 0, "step": -1}),
        (ValueError, "threshold: expected shape", (X, X, TABLE), {"threshold": torch.ones(3)}),
        (ValueError, "statistics: expected one of", (X, X, TABLE), {"statistics": "sums"}),
        (ValueError, "model_input: expected", (X, X, TABLE), {"model_input": torch.zeros(3, 3, 4, 4)}),
        (ValueError, "kept: expected a contiguous", (X, X, TABLE), {"kept": X.transpose(2, 3)}),
        (ValueError, "preview: expected shape", (X, X, TABLE), {"preview": X[:1]}),
        (ValueError, "faults: expected int32", (X, X, TABLE), {"faults": torch.zeros(1)}),
        (ValueError, "output: sampler_step has no gradients", (X, X.clone().requires_grad_(), TABLE), {}),
    ],
)  # fmt: skip
def test_bad_input(error, message, args, options):
    with pytest.raises(error, match=message):
        PF.sampler_step(*args, **options)


def test_unknown_backend_and_reasons():
    with pytest.raises(ValueError, match="backend"):
        PF.sampler_step(X, X, TABLE, backend="tpu")
    with pytest.raises(registry.BackendUnavailable):
        PF.sampler_step(X.double(), X.double(), TABLE, backend="cpu")
