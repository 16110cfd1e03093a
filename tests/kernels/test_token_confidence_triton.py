"""The Triton kernels of token_confidence against the reference; run as test_weighted_conv_triton.py says."""

import os

import pytest
import torch

import pydenoise.functional as PF
from pydenoise.ops import registry, token_confidence
from pydenoise.reference import _philox
from pydenoise.reference import token_confidence as reference
from pydenoise.testing.token_confidence import TOKEN_CONFIDENCE_CASES, TokenConfidenceCase

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from pydenoise.kernels import _philox as kernels_philox  # noqa: E402
from pydenoise.kernels import _tiles  # noqa: E402
from pydenoise.kernels import token_confidence as kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cpu" if _tiles.interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16) if _tiles.interpreting() else (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def noise_kernel(keys, numbers, out, step, COUNT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    counter = tl.arange(0, COUNT)
    w0, w1, w2, w3 = kernels_philox.words(tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1), step, counter)
    column = counter // 32 * 128 + counter % 32 + row * 4 * COUNT
    tl.store(numbers + column, w0.to(tl.int64))
    tl.store(numbers + column + 32, w1.to(tl.int64))
    tl.store(numbers + column + 64, w2.to(tl.int64))
    tl.store(numbers + column + 96, w3.to(tl.int64))
    tl.store(out + column, kernels_philox.gumbel(w0))
    tl.store(out + column + 32, kernels_philox.gumbel(w1))
    tl.store(out + column + 64, kernels_philox.gumbel(w2))
    tl.store(out + column + 96, kernels_philox.gumbel(w3))


def test_words_bit_for_bit():
    keys = torch.tensor([[5, 0], [-3, 2**40 + 7], [2**62 + 1, -1]])
    numbers = torch.empty(3, 4096, dtype=torch.int64).to(DEVICE)
    noise = torch.empty(3, 4096).to(DEVICE)
    for step in (0, 2**32 - 1):
        noise_kernel[(3,)](keys.to(DEVICE), numbers, noise, step, COUNT=1024)
        words = _philox.words(keys, step, 4096)
        assert torch.equal(numbers.cpu(), words)
        assert (noise.cpu().double() - _philox.gumbel(words, torch.float64)).abs().max() < 3e-6


def check(actual, args) -> None:
    """Tokens of the reference, or ties within rounding; probabilities to float32."""
    wide = [a.cpu().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    wide = tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in wide)
    token, confidence, watched = (t.cpu() for t in actual)
    expected, sure, eos = reference.token_confidence(*wide)
    apart = token != expected
    assert apart.sum() <= (0 if args[5] == 0 and args[1] is None else 1)
    torch.testing.assert_close(confidence[~apart], sure[~apart].float(), rtol=1e-5, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(watched, eos.float(), rtol=1e-5, atol=1e-30, equal_nan=True)
    assert token.dtype == torch.int64


@pytest.mark.parametrize("case", TOKEN_CONFIDENCE_CASES, ids=lambda case: case.name)
def test_cases(case):
    args = case.args(torch.float32, DEVICE)
    check(kernels.token_confidence(*args), args)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["characters", "sliced", "guided", "sampled_left_out", "everything"])
def test_other_dtypes(name, dtype):
    case = next(case for case in TOKEN_CONFIDENCE_CASES if case.name == name)
    args = case.args(dtype, DEVICE)
    check(kernels.token_confidence(*args), args)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [40, 9000])
def test_rows_without_an_answer(size, temperature):
    x = TokenConfidenceCase("", "", 8, size).logits(torch.float32)
    for row, (token, value) in enumerate(((0, torch.nan), (size - 1, torch.inf), (9, torch.nan), (9, torch.inf))):
        x[row, token] = value
    x[4] = -torch.inf
    x[5, 7] = torch.nan
    options = {"temperature": temperature, "seed": 1, "forbidden": (7,), "uncounted": (9,), "eos_token_id": 5}
    args = token_confidence.prepare(x.to(DEVICE), **options)
    results = kernels.token_confidence(*args)
    check(results, args)
    assert (results[0][:5] == -1).all() and (results[0][5:] >= 0).all()


def test_rows_out_of_range():
    """Values of tensors on a GPU are not looked at beforehand."""
    args = list(token_confidence.prepare(torch.randn(3, 50).to(DEVICE), eos_token_id=1))
    args[2] = torch.tensor([1, 3, -1]).to(DEVICE)
    token, confidence, watched = kernels.token_confidence(*args)
    assert (token >= 0).tolist() == [True, False, False]
    assert confidence.isnan().tolist() == watched.isnan().tolist() == [False, True, True]


def test_functional_and_reasons():
    x = torch.randn(5, 300)
    token, confidence = PF.token_confidence(x.to(DEVICE), temperature=0.5, seed=3, backend="triton")
    expected = PF.token_confidence(x, temperature=0.5, seed=3, backend="reference")
    assert torch.equal(token.cpu(), expected[0])
    torch.testing.assert_close(confidence.cpu(), expected[1], rtol=1e-5, atol=0)
    row = next(row for row in registry.rows("token_confidence") if row.name == "triton")
    assert "float64" in row.unsupported(x.double()) and "meta" in row.unsupported(x.to("meta"))
