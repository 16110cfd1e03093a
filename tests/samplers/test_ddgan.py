"""Denoising Diffusion GAN: the public code's posterior and samples, latents, seeds, guidance."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import convergence as cv  # noqa: E402

from pydenoise import step_row as C  # noqa: E402
from pydenoise.samplers.ddgan import DenoisingGAN  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference
GOLDEN = "repo_ddgan_T2_"
FLOAT32 = {"rtol": 0, "atol": 5e-7}  # the public code's tables


def generator(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The golden file's: what the public code was run with."""
    return torch.tanh(x + (z.mean(1) - 0.1 * t).view(-1, 1, 1, 1))


def test_golden_posterior():
    table = DenoisingGAN(generator, 2).sampler.plan.table.flip(0)  # the public code counts from the clean end
    got = table[:, C.OUTPUT], table[:, C.SAMPLE], 2 * table[1:, C.NOISE].log()
    names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
    for value, name in zip(got, names, strict=True):
        wanted = cv.tensor(GOLDEN + name)
        torch.testing.assert_close(value, wanted if len(value) == 2 else wanted[1:], **FLOAT32)
    assert table[0, C.NOISE] == 0, "no noise in the last step"


def test_golden_sample():
    gan = DenoisingGAN(generator, 2, latent_size=6)
    latents = torch.stack([cv.tensor(GOLDEN + "noise0"), cv.tensor(GOLDEN + "noise2")])
    got = gan.sample(cv.start(), latents=latents, noise=[cv.tensor(GOLDEN + "noise1")])
    torch.testing.assert_close(got, cv.tensor(GOLDEN + "out"), **FLOAT32)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_posterior_keeps_the_marginals(num_steps):
    """x' given x0 has the moments of its level: coef1 + coef2 alpha = alpha', coef2^2 sigma^2 + var = sigma'^2."""
    plan = DenoisingGAN(generator, num_steps).sampler.plan
    for call, level in enumerate(plan.levels):
        alpha, sigma = plan.levels[call + 1] if call + 1 < plan.calls else (1.0, 0.0)
        on_x0, on_x, std = (float(plan.table[call, c]) for c in (C.OUTPUT, C.SAMPLE, C.NOISE))
        assert on_x0 + on_x * level.alpha == pytest.approx(alpha, abs=1e-12)
        assert on_x**2 * level.sigma**2 + std**2 == pytest.approx(sigma**2, abs=1e-12)


def test_every_call_has_a_latent_of_its_own():
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(x, t, z):
        seen.append((t, z))
        return torch.zeros_like(x)

    gan = DenoisingGAN(recorded, 4)
    gan.sample(shape=(64, 3, 4, 4), seed=0)
    assert [t[0].item() for t, _ in seen] == [3, 2, 1, 0] and seen[0][0].dtype == torch.int64
    z = torch.stack([z for _, z in seen])
    assert z.shape == (4, 64, 100)
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03
    products = torch.corrcoef(z.flatten(1))
    assert float((products - torch.eye(4)).abs().max()) < 0.05


def test_seeds_and_pieces():
    gan = DenoisingGAN(generator, 3, latent_size=5)
    seeds = [4, 5, 6]
    whole = gan.sample(shape=(3, 2, 4, 4), seed=seeds)
    assert torch.equal(whole, gan.sample(shape=(3, 2, 4, 4), seed=seeds, max_batch=2))
    assert torch.equal(whole[1:2], gan.sample(shape=(1, 2, 4, 4), seed=[5]))
    assert torch.equal(whole[0], gan.sample(shape=(1, 2, 4, 4), seed=4)[0])
    again = [gan.sample(shape=(2, 2, 4, 4), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    start = torch.zeros(2, 2, 4, 4, dtype=torch.bfloat16)
    assert gan.sample(start, seed=0).dtype == torch.bfloat16


def test_conditioning_and_guidance():
    def conditional(x, t, z, shift):
        return generator(x, t, z) + shift.view(-1, 1, 1, 1)

    given, none = {"shift": torch.full((3,), 0.5)}, {"shift": torch.zeros(3)}
    options = {"latent_size": 4}
    latents = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    noise = [torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))]
    x = cv.start().float()
    plain = DenoisingGAN(conditional, 2, **options).sample(x, latents=latents, noise=noise, conditioning=given)
    guided = DenoisingGAN(conditional, 2, guidance_scale=1.0, **options).sample(
        x, latents=latents, noise=noise, conditioning=given, unconditional=none
    )
    torch.testing.assert_close(guided, plain)
    more = DenoisingGAN(conditional, 2, guidance_scale=3.0, **options).sample(
        x, latents=latents, noise=noise, conditioning=given, unconditional=none
    )
    assert float((more - plain).mean()) > 0.8


@pytest.mark.parametrize("make, error, message", [
    (lambda: DenoisingGAN(3), TypeError, "generator: expected a callable"),
    (lambda: DenoisingGAN(generator, 0), ValueError, "num_steps: expected at least 1"),
    (lambda: DenoisingGAN(generator, 2.0), TypeError, "num_steps: expected an int"),
    (lambda: DenoisingGAN(generator, latent_size=0), ValueError, "latent_size: expected at least 1"),
    (lambda: DenoisingGAN(generator, beta_min=30.0), ValueError, "beta_min: expected 0 < beta_min < beta_max"),
    (lambda: DenoisingGAN(generator, epsilon=1.0), ValueError, "epsilon: expected"),
    (lambda: DenoisingGAN(generator).sample(), ValueError, "x: expected either x or shape"),
    (lambda: DenoisingGAN(generator).sample(3), TypeError, "x: expected a tensor"),
    (lambda: DenoisingGAN(generator).sample(torch.ones(2, 2, dtype=torch.int64)), TypeError, "dtype: expected a float"),
    (lambda: DenoisingGAN(generator).sample(shape=(1, 2, 4, 4), latents=torch.ones(4, 2, 100)), ValueError, "latents"),
    (lambda: DenoisingGAN(generator).sample(shape=(1, 2, 4, 4), latents=[1.0]), TypeError, "latents: expected a float"),
    (lambda: DenoisingGAN(generator).sample(shape=(1, 2), conditioning={"latents": 1}), ValueError, "conditioning"),
    (lambda: DenoisingGAN(generator).sample(shape=(1, 2), conditioning=[1]), TypeError, "conditioning: expected"),
])  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
