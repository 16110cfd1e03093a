"""UDPM: golden data, its operator, the posterior, an exact network, bad input."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise.samplers.udpm import UDPM, HalfSize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def enlarged(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def network(x, t):
    """What the public code was run with."""
    return enlarged(x).tanh()


def golden_start(udpm):
    """White images of the full size, made with seed 9, are what the public code begins at."""
    white = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(9)).double()
    for _ in range(3):
        white = udpm.operator(white)
    return udpm.levels[-1].alpha * white + udpm.levels[-1].sigma * cv.tensor("repo_udpm_eps0")


def test_golden():
    """The public code runs in float32."""
    udpm = UDPM(network)
    got = udpm.sample(golden_start(udpm), noise=[cv.tensor("repo_udpm_eps1"), cv.tensor("repo_udpm_eps2")])
    torch.testing.assert_close(got, cv.tensor("repo_udpm_out"), rtol=0, atol=1e-6)


def test_operator():
    half = HalfSize()
    x = cv.tensor("repo_udpm_in")
    torch.testing.assert_close(half(x), cv.tensor("repo_udpm_H"), rtol=0, atol=1e-6)
    torch.testing.assert_close(half.adjoint(x), cv.tensor("repo_udpm_HT"), rtol=0, atol=1e-6)
    torch.testing.assert_close(half(half.adjoint(x)), x, rtol=0, atol=1e-15)  # H H^T = I
    torch.testing.assert_close(half.pinv(x), half.adjoint(x))
    half.check_adjoint((2, 3, 4, 6))


def test_levels_are_the_published_ones():
    udpm = UDPM(network)
    alphas, sigmas = torch.tensor(udpm.levels).unbind(1)
    torch.testing.assert_close(alphas, torch.tensor([0.5, 0.1, 1e-4]))
    torch.testing.assert_close(sigmas, torch.tensor([0.1, math.sqrt(0.0404), 0.30000007]))
    variances = [row[12] ** 2 for row in udpm._rows]
    assert variances == pytest.approx([0.0404, 0.0099], rel=1e-3)


def test_steps_sample_the_posterior():
    """For one known x0 the levels of the reverse process are those of the forward one."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 1, 32, 32, generator=generator, dtype=torch.float64).expand(4000, 1, 32, 32)
    seen = {}

    def knowing(x, t):
        level = round(float(t[0]) * 3 + 0.5)
        seen[level] = x
        y = x0[: len(x)]
        for _ in range(level - 1):
            y = HalfSize()(y)
        return y

    udpm = UDPM(knowing, posterior="exact")
    begin = udpm.add_noise(x0, torch.randn(4000, 1, 4, 4, generator=generator, dtype=torch.float64), 3)
    assert torch.equal(udpm.sample(begin, seed=0), x0)
    for level in (1, 2, 3):
        y = x0[:1]
        for _ in range(level):
            y = HalfSize()(y)
        alpha, sigma = udpm.levels[level - 1]
        mean, std = seen[level].mean(0), seen[level].std(0)
        assert (mean - alpha * y[0]).abs().max() < 5 * sigma / math.sqrt(4000)
        assert (std / sigma - 1).abs().max() < 0.06


def test_both_posteriors_agree_on_means_of_blocks():
    """They differ in the rest, by one part in a hundred at the last step."""
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half, results = HalfSize(), []
    for posterior in ("published", "exact"):
        seen = []

        def watched(x, t, seen=seen):
            seen.append(x)
            return network(x, t)

        UDPM(watched, [0.5, 0.2], [0.1, 0.2], posterior=posterior).sample(half(z), noise=[z])
        results.append(seen[1])  # what the second call sees: the first step's result
    torch.testing.assert_close(half(results[0]), half(results[1]), rtol=0, atol=1e-12)
    assert 1e-4 < (results[0] - results[1]).abs().max() < 1e-2


def test_seeds_pieces_conditions_and_dtypes():
    def conditioned(x, t, gain):
        return enlarged(x) * gain.view(-1, 1, 1, 1).to(x)

    udpm = UDPM(conditioned)
    given = {"shape": (3, 1, 32, 40), "conditioning": {"gain": torch.tensor([1.0, 0.5, 0.2])}}
    whole = udpm.sample(**given, seed=[1, 2, 3])
    assert whole.shape == (3, 1, 32, 40) and whole.dtype == torch.float32
    assert torch.equal(whole, udpm.sample(**given, seed=[1, 2, 3], max_batch=1))
    assert torch.equal(udpm.sample(**given, seed=4), udpm.sample(**given, seed=4, max_batch=2))
    assert not torch.equal(whole, udpm.sample(**given, seed=[1, 2, 4]))
    generated = [udpm.sample(**given, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*generated)
    exact = udpm.sample(**given, seed=[1, 2, 3], dtype=torch.float64)
    torch.testing.assert_close(exact.float(), whole, rtol=1e-4, atol=1e-5)
    assert udpm.sample(**given, seed=0, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert udpm.sample(shape=(0, 1, 32, 32), conditioning={"gain": torch.ones(1)}).shape == (0, 1, 32, 32)


def test_another_number_of_levels():
    assert UDPM(network, [0.5], [0.1]).sample(shape=(1, 1, 8, 8), seed=0).shape == (1, 1, 8, 8)
    assert UDPM(network, [0.5] * 4, [0.1] * 4).sample(shape=(1, 1, 64, 64), seed=0).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("make, error, message", [
    (lambda: UDPM(3), TypeError, "network"),
    (lambda: UDPM(network, [0.5], [0.1, 0.2]), ValueError, "sigmas"),
    (lambda: UDPM(network, [0.5, 0.0, 1.0]), ValueError, "alphas"),
    (lambda: UDPM(network, "abc"), TypeError, "alphas"),
    (lambda: UDPM(network, posterior="right"), ValueError, "posterior: expected one of 'published', 'exact'"),
    (lambda: UDPM(network).sample(), ValueError, "x: expected either"),
    (lambda: UDPM(network).sample(3), TypeError, "x:"),
    (lambda: UDPM(network).sample(torch.zeros(1, 1, 8)), ValueError, "x:"),
    (lambda: UDPM(network).sample(shape=(1, 1, 36, 32)), ValueError, "shape: expected .* multiples of 8"),
    (lambda: UDPM(network).sample(shape=(1, 1, 16, 16)), ValueError, "shape: expected at least 32 x 32"),
    (lambda: UDPM(network).sample(torch.zeros(1, 1, 2, 2)), ValueError, "x: expected at least 4 x 4"),
    (lambda: UDPM(network).sample(shape=(1, 1, 32, 32), dtype=torch.int64), TypeError, "dtype"),
    (lambda: UDPM(network).sample(shape=(1, 1, 32, 32), max_batch=0), ValueError, "max_batch"),
    (lambda: UDPM(network).sample(shape=(1, 1, 32, 32), noise=[]), ValueError, "noise: expected one"),
    (lambda: UDPM(network).sample(shape=(1, 1, 32, 32), noise=[torch.zeros(1), torch.zeros(1)]), ValueError,
     r"noise\[0\]"),
    (lambda: UDPM(lambda x, t: x).sample(shape=(1, 1, 32, 32)), ValueError, "network: expected shape .* at level 3"),
    (lambda: UDPM(lambda x, t: None).sample(shape=(1, 1, 32, 32)), TypeError, "network: expected a tensor"),
    (lambda: UDPM(lambda x, t: enlarged(x) / 0).sample(shape=(1, 1, 32, 32)), ValueError, "network: NaN"),
    (lambda: UDPM(network).add_noise(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4), 4), ValueError, "t: expected"),
    (lambda: UDPM(network).add_noise(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4), 1.0), TypeError, "t: expected"),
    (lambda: UDPM(network).add_noise(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4), 2), ValueError, "noise"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
