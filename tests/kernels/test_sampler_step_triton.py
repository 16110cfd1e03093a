"""The Triton kernels of sampler_step against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
from pydenoise import step_row
from pydenoise.ops import registry, sampler_step
from pydenoise.ops._rows.sampler_step_cuda import too_large
from pydenoise.reference import _philox
from pydenoise.reference import sampler_step as reference
from pydenoise.testing.sampler_step import SAMPLER_STEP_CASES, WRITTEN

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from pydenoise.kernels import _philox as kernels_philox  # noqa: E402
from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import sampler_step as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
CASES = {case.name: case for case in SAMPLER_STEP_CASES}
ROW = next(row for row in registry.rows(sampler_step.OP) if row.name == "triton")
EACH_DTYPE = ("multistep", "learned_guided", "kept_in_place", "input_thrice", "dots", "everything", "noise_alone")
ALLOWED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest term of a result


def refused(args: tuple) -> bool:
    """Whether the interpreter would compute wrongly: it does with bfloat16."""
    return DEVICE == "cpu" and any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in args)


def check(name: str, dtype: torch.dtype) -> None:
    args = CASES[name].args(dtype, DEVICE)
    if refused(args):
        assert "bfloat16" in ROW.unsupported(*args)
        return
    assert ROW.unsupported(*args) is None
    wide = CASES[name].args(dtype, exact=True)
    sums, exact_sums = ROW.run(*args), reference.sampler_step(*wide)
    for place, what in WRITTEN.items():
        actual, exact = args[place], wide[place]
        if exact is None or what == "faults":
            assert (actual is None) == (exact is None) and (actual is None or torch.equal(actual.cpu(), exact)), what
            continue
        actual = actual.cpu().double()
        assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN elsewhere"
        if exact.numel():
            error, size = (actual - exact).nan_to_num().abs().max(), exact.nan_to_num().abs().max().clamp(1)
            assert error <= ALLOWED[torch.promote_types(args[place].dtype, torch.float16)] * size, (what, error, size)
    if exact_sums.numel():
        assert sums.dtype == torch.float64 and sums.shape == exact_sums.shape
        torch.testing.assert_close(sums.cpu(), exact_sums, rtol=1e-5, atol=1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    check(name, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EACH_DTYPE)
def test_other_dtypes(name, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    check(name, dtype)


@triton.jit
def normal_kernel(given, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    w0, w1, w2, w3 = (
        tl.load(given + i).to(tl.uint32),
        tl.load(given + COUNT + i).to(tl.uint32),
        tl.load(given + 2 * COUNT + i).to(tl.uint32),
        tl.load(given + 3 * COUNT + i).to(tl.uint32),
    )
    z0, z1, z2, z3 = kernels_philox.normals(w0, w1, w2, w3)
    tl.store(out + i, z0)
    tl.store(out + COUNT + i, z1)
    tl.store(out + 2 * COUNT + i, z2)
    tl.store(out + 3 * COUNT + i, z3)


def test_normals_of_every_kind_of_word():
    """Small and large radii, all quarters of a turn and their borders."""
    edges = [0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29 - 1, 3 * 2**29, 2**31 - 1, 2**31, 2**31 + 1, 5 * 2**29]
    edges += [3 * 2**30, 7 * 2**29 - 1, 7 * 2**29, 2**32 - 2, 2**32 - 1]
    pairs = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges))
    more = torch.randint(2**32, (4096 - len(pairs), 2), generator=torch.Generator().manual_seed(1))
    even, odd = torch.cat([pairs, more]).T
    given = torch.stack([even, odd, odd, even])
    out = torch.empty(4, 4096).to(DEVICE)
    normal_kernel[(1,)](given.to(DEVICE), out, COUNT=4096)
    lanes = given.view(4, 128, 32).transpose(0, 1).reshape(1, -1)  # as _philox.words lays words out
    exact = reference.normal(lanes, torch.float64).view(128, 4, 32).transpose(0, 1).reshape(4, -1)
    assert ((out.cpu() - exact).abs() / exact.abs().clamp(1)).max() < 1e-6


def noise_table(**columns: float) -> torch.Tensor:
    table = torch.zeros(1, step_row.WIDTH)
    table[:, step_row.SLOT], table[:, step_row.CLIP] = -1, torch.inf
    for name, value in columns.items():
        table[:, getattr(step_row, name)] = value
    return table.to(DEVICE)


def test_noise_is_that_of_the_words():
    keys = torch.tensor([[5, 0], [-3, 2**40 + 7], [2**62 + 1, -1]])
    for step in (0, 2**32 - 1, 2**32 + 5):
        x = torch.full((3, 2000), torch.nan, device=DEVICE)
        PF.sampler_step(x, None, noise_table(NOISE=1.0), seed=keys.to(DEVICE), step=step, out=x, backend="triton")
        exact = reference.normal(_philox.words(keys, step & 0xFFFFFFFF, 2048), torch.float64)[:, :2000]
        assert (x.cpu() - exact).abs().max() < 2e-6


def test_a_row_that_is_not_there_gives_nan():
    """Values of tensors on a GPU are not looked at beforehand."""
    for number in (-1, 5):
        args = list(CASES["kept"].args(torch.float32, DEVICE))
        history = args[4].clone()
        args[8] = torch.tensor([number], device=DEVICE)
        args[10] = torch.tensor([9], device=DEVICE)
        ROW.run(*args)
        assert args[13].isnan().all() and args[14].isnan().all() and int(args[17]) == 9
        assert torch.equal(args[4], history)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_faults_keep_the_first_step(bad):
    args = list(CASES["ddim"].args(torch.float32, DEVICE))
    args[1].view(-1)[4321] = bad
    args[10] = torch.full_like(args[10], 6)
    ROW.run(*args)
    assert int(args[17]) == 6
    args[17].fill_(2)
    ROW.run(*args)
    assert int(args[17]) == 2


def test_columns_are_those_of_the_op():
    names = [name for name in vars(step_row) if name.isupper()]
    assert {name: getattr(kernels, name).value for name in names} == {name: getattr(step_row, name) for name in names}


def test_reasons():
    args = list(CASES["ddim"].args(torch.float32, DEVICE))
    assert "float64" in ROW.unsupported(args[0].double(), *args[1:])
    assert "meta" in ROW.unsupported(args[0].to("meta"), *args[1:])
    big = torch.empty(2, 2**30, device="meta")
    assert "elements of a sample are more than 2^30" in too_large(big, torch.zeros(1))
    assert "groups are too many" in too_large(torch.empty(2**31, 1, device="meta"), torch.zeros(1))
