"""Entries of ``pydenoise gallery``: streams, frames, chains with ideal networks, and gradients through sampling."""

import math
from typing import TYPE_CHECKING

from pydenoise.cli.gallery_entries import Panel, entry, photograph, strip, texture_denoiser, to_pixels

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS = ("sklearn.datasets", "scikit-learn")


def _posterior(x: "Tensor", alpha: "Tensor", sigma: "Tensor", real: "Tensor") -> "Tensor":
    """Logits [B, N] of which digit of ``real`` [N, D] a noisy x [B, D] was made from: what an ideal network knows."""
    return -(x[:, None] - alpha[:, None, None] * real).square().sum(-1) / (2 * sigma[:, None] ** 2)


@entry("stream", "Stream: a noisy camera panned over a photograph, one call of the model for each frame, few at rest",
       ("skimage.data", "scikit-image"))  # fmt: skip
def stream(seed: int) -> list[Panel]:
    import torch

    from pydenoise.samplers import NoiseSchedule, OverlappedWindows, SimilarityFilter, Stream

    image, side, noise = photograph(), 64, 0.1
    texture = texture_denoiser([image], 16, NoiseSchedule.linear())
    sigmas = NoiseSchedule.linear()
    ratio = (sigmas.sigmas / sigmas.alphas).float()

    def clean(x: "Tensor", t: "Tensor") -> "Tensor":  # told standard deviations
        nearest = torch.searchsorted(ratio, t.float()).clamp(max=len(ratio) - 1)
        alpha = sigmas.alphas.float()[nearest].view(-1, 1, 1, 1)
        epsilon = texture(alpha * x, nearest)
        return x - t.float().view(-1, 1, 1, 1) * epsilon

    denoiser = OverlappedWindows(clean, (16, 16), overlap=8)
    places = [2 * i for i in range(16)] + [30] * 24
    frames = torch.stack([image[:, 20 : 20 + side, place : place + side] for place in places])
    camera = frames + noise * torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
    with Stream(
        denoiser, NoiseSchedule.karras(sigma_min=0.02, sigma_max=1.0), (3, side, side), timesteps=[noise, noise / 4],
        prediction_type="sample", renoise="predicted", noisy_frames=True,
        similarity=SimilarityFilter(threshold=0.96, seed=seed), seed=seed,
    ) as line:  # fmt: skip
        results = [result.sample for result in line.feed(camera)]
        stats = line.stats
    shown = (0, 8, 15, len(frames) - 1)
    panels = []
    for pictures, caption in ((camera, "frames of the camera"), (results, "results")):
        row = torch.cat([torch.nn.functional.pad(pictures[i], (0, 2), value=1.0) for i in shown], -1)
        truth = sum(float((pictures[i] - frames[i]).square().mean()) for i in shown) / len(shown)
        panels.append(Panel(to_pixels(row), f"{caption}: {10 * math.log10(4 / truth):.1f} dB", scale=2))
    panels[-1] = Panel(
        panels[-1].picture, f"{panels[-1].caption}; {stats.frames} frames, {stats.evaluations} calls of the model", 2
    )  # fmt: skip
    return panels


@entry("frames", "Vector times: ten frames, a digit in each, every one two calls behind the one before it", _DIGITS)
def frames(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.models.digits_quality import real_digits
    from pydenoise.samplers import DDIM, NoiseSchedule, Sampler, VectorTimes

    model, labels = load_digits(), torch.arange(10)

    def clip(x: "Tensor", t: "Tensor") -> "Tensor":  # x [1, 1, F, 8, 8], t [1, F]
        return model(x[0].transpose(0, 1), t[0], labels).transpose(0, 1)[None]

    video = VectorTimes(Sampler(clip, NoiseSchedule.linear(), DDIM(), 12))
    states: list[Tensor] = []
    images, classes = real_digits()
    first = images[(classes == 0).nonzero()[seed % 100, 0]]
    known = torch.arange(10) == 0
    start = torch.zeros(1, 1, 10, 8, 8)
    start[0, :, 0] = first
    noise = torch.randn(1, 1, 10, 8, 8, generator=torch.Generator().manual_seed(seed))
    done = video.sample(
        noise, known=known, video=start, times=video.staggered(10, 2), seed=seed,
        callback=lambda info: states.append(info.sample.clone()),
    )  # fmt: skip
    panels = [
        strip(states[call][0].transpose(0, 1), f"after call {call + 1} of {len(states)}")
        for call in (len(states) // 3, 2 * len(states) // 3)
    ]
    return [*panels, strip(done[0].transpose(0, 1), "all frames finished; the first one was known, a real digit")]


@entry(
    "gan", "Denoising diffusion GAN: four calls, with an ideal generator, which draws one of the real digits", _DIGITS
)
def gan(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models.digits_quality import real_digits
    from pydenoise.samplers import DenoisingGAN

    real = real_digits()[0]
    flat = real.flatten(1)
    levels: list = []

    def generator(x: "Tensor", t: "Tensor", z: "Tensor") -> "Tensor":
        level = levels[int(t[0])]
        alpha, sigma = (torch.full((len(x),), value) for value in (level.alpha, level.sigma))
        weights = torch.softmax(_posterior(x.flatten(1), alpha, sigma, flat), 1).cumsum(1)
        place = torch.special.ndtr(z[:, 0]) * weights[:, -1]  # the latent chooses
        return real[torch.searchsorted(weights, place[:, None])[:, 0].clamp(max=len(real) - 1)]

    chain = DenoisingGAN(generator, 4, latent_size=1)
    levels += [chain.schedule.level(t) for t in range(4)]
    found = chain.sample(shape=(20, 1, 8, 8), seed=seed, return_trajectory=True)
    return [strip(found.states[call][:10].clamp(-1.5, 1.5), f"after {call} of 4 calls") for call in (0, 2, 3)] + [
        strip(found.sample[:10], "after 4 of 4 calls"),
        strip(found.sample[10:], "others"),
    ]


@entry(
    "dmcmc", "Denoising MCMC: one chain near the data, integrated from its least noisy states; ideal networks", _DIGITS
)
def dmcmc(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models.digits_quality import real_digits
    from pydenoise.samplers import DMCMC, Heun, NoiseSchedule, Sampler

    real = real_digits()[0].flatten(1)
    sigmas = torch.logspace(0.5, -1.5, 60)

    def clean(x: "Tensor", t: "Tensor") -> "Tensor":
        logits = _posterior(x.flatten(1), torch.ones(len(x)), t.float(), real)
        return (torch.softmax(logits, 1) @ real).view_as(x)

    def classifier(x: "Tensor") -> "Tensor":
        distances = torch.cdist(x.flatten(1), real).square()[:, :, None] / (2 * sigmas**2)
        return torch.logsumexp(-distances, 1) - real.shape[1] * sigmas.log()

    schedule = NoiseSchedule.karras(sigma_min=0.03, sigma_max=3.0)
    sampler = Sampler(clean, schedule, Heun(), 8, prediction_type="sample")
    chain = DMCMC(sampler, classifier, sigmas=sigmas, step=0.3, skip=6, num_steps=4, sigma_min=0.03)
    found = chain.sample(10, shape=(2, 1, 8, 8), seed=seed)
    return [strip(found[:, number], f"chain {number + 1}, ten results") for number in range(2)]


@entry("gradient", "Gradients through all steps: noise whose digits are mirror images of themselves")
def gradient(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.samplers import DPMSolverPP, NoiseSchedule, Sampler

    model = load_digits().requires_grad_(False)
    told = {"labels": torch.arange(10)}
    sampler = Sampler(model, NoiseSchedule.linear(), DPMSolverPP(2), 10)
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=0.05)
    seen: list[tuple[Tensor, float]] = []
    for _ in range(13):
        x = noise * (8 / noise.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)  # as long as noise is
        images = sampler.sample(x, conditioning=told, differentiable="checkpoint")
        loss = (images - images.flip(-1)).square().mean((1, 2, 3))
        seen.append((images.detach(), float(loss.detach().mean())))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return [
        strip(seen[step][0], f"step {step}: mean square of the difference {seen[step][1]:.2f}") for step in (0, 4, 12)
    ]


@entry("inversion", "Fixed points: the noise that a run of DDIM takes to real digits, and back", _DIGITS)
def inversion(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.models.digits_quality import real_digits
    from pydenoise.samplers import DDIM, FixedPointInversion, NoiseSchedule, Sampler

    images, labels = real_digits()
    chosen = torch.stack([(labels == label).nonzero()[seed % 100, 0] for label in range(10)])
    images, told = images[chosen], {"labels": torch.arange(10)}
    sampler = Sampler(load_digits(), NoiseSchedule.linear(), DDIM(), 100)
    found = FixedPointInversion(sampler, tolerance=1e-4).invert(images, conditioning=told)
    again = sampler.sample(found.start, conditioning=told)
    error = float((again - images).abs().max())
    return [
        strip(images, "scikit-learn's"),
        strip(found.start.clamp(-2, 2) / 2, f"the start of a run of 100 steps, in {sum(found.calls)} calls"),
        strip(again, f"sampled from there: at most {error:.1g} away"),
    ]
