"""Entries of ``pydenoise gallery``: restoration and inverse problems, on digits and on a magnetic resonance image."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydenoise.cli.gallery_entries import Panel, entry, strip, texture_denoiser, to_pixels

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS = ("sklearn.datasets", "scikit-learn")
_SHOWN = 300  # of the real digits, the last ones: networks that an entry fits do not see them


def _decibels(image: "Tensor", truth: "Tensor", peak: float = 2.0) -> float:
    return 10 * math.log10(peak**2 / float((image - truth).square().mean()))


def _digits(seed: int) -> tuple["Tensor", "Tensor"]:
    """(digits [N, 1, 8, 8] to fit to, one of each class [10, 1, 8, 8] to show)."""
    import torch

    from pydenoise.models.digits_quality import real_digits

    images, labels = real_digits()
    seen, shown, classes = images[:-_SHOWN], images[-_SHOWN:], labels[-_SHOWN:]
    places = [(classes == label).nonzero().flatten() for label in range(10)]
    return seen, shown[torch.stack([place[seed % len(place)] for place in places])]


def _fitted(inputs: "Tensor", targets: "Tensor", features: int = 1500) -> Callable[["Tensor"], "Tensor"]:
    """A network of one hidden layer of random weights, its last layer fitted by least squares: [N, D] -> [N, E]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    mean, scale = inputs.mean(0), inputs.std(0).clamp(min=1e-3)
    hidden = torch.randn(inputs.shape[1], features, generator=generator) / math.sqrt(inputs.shape[1])
    bias = torch.randn(features, generator=generator)

    def layer(x: "Tensor") -> "Tensor":
        x = (x - mean) / scale
        return torch.cat([torch.relu(x @ hidden + bias), x, torch.ones(len(x), 1)], 1)

    seen = layer(inputs).double()
    gram = seen.T @ seen + 1e-2 * len(inputs) * torch.eye(seen.shape[1], dtype=torch.float64)
    last = torch.linalg.solve(gram, seen.T @ targets.double()).float()
    return lambda x: layer(x) @ last


def _blurred(images: "Tensor", generator) -> "Tensor":
    """Digits that were moved while they were drawn, and noise."""
    import torch

    row = torch.nn.functional.pad(images, (2, 2), value=-1.0).unfold(-1, 5, 1).mean(-1)
    return row + 0.2 * torch.randn(images.shape, generator=generator)


# ------------------------------------------------------------------------------------------------------------- entries


@entry("inpaint", "Inpainting: real digits of which the lower half is hidden, by the denoiser that never saw a mask",
       _DIGITS)  # fmt: skip
def inpaint(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.samplers import DDIM, DataConsistency, NoiseSchedule, REDDiff, Sampler
    from pydenoise.samplers.operators import Inpainting

    model, schedule, (_, images) = load_digits(), NoiseSchedule.linear(), _digits(seed)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    hidden = Inpainting(mask)
    measured, told = hidden(images), {"labels": torch.arange(10)}
    panels = [strip(images, "scikit-learn's"), strip(torch.where(mask, images, -0.4), "what is measured")]
    sampler = Sampler(DataConsistency(model, schedule, hidden), schedule, DDIM(eta=1.0), 40)
    for number in range(2):
        filled = sampler.sample(
            shape=(10, 1, 8, 8), seed=seed + number, conditioning={"measurement": measured, **told}
        )  # fmt: skip
        panels.append(strip(filled, f"data consistency in every step, seed {seed + number}"))
    solved = REDDiff(model, schedule, hidden, 200, learning_rate=0.05).solve(measured, seed=seed, conditioning=told)
    panels.append(strip(solved, "RED-diff: 200 steps of Adam"))
    return panels


@entry("mri", "Magnetic resonance: a slice of nibabel's example, of which few columns of frequencies were sampled",
       ("nibabel", "nibabel"))  # fmt: skip
def mri(seed: int) -> list[Panel]:
    import torch

    from pydenoise.samplers import DDIM, DataConsistency, NoiseSchedule, OverlappedWindows, Sampler
    from pydenoise.samplers.operators import MRI

    slices, schedule, side = _slices(), NoiseSchedule.linear(), 16
    middle = len(slices) // 2
    image, others = slices[middle], [slices[i] for i in range(len(slices)) if abs(i - middle) > 1]
    denoiser = OverlappedWindows(texture_denoiser(others, side, schedule), (side, side), overlap=8)
    width = image.shape[-1]
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed)) < 0.2
    drawn[width // 2 - width // 12 : width // 2 + width // 12] = True
    scanner = MRI(drawn, channels=1, centered=True)
    measured = scanner(image[None])
    plain = scanner.pinv(measured)[0]
    sampler = Sampler(DataConsistency(denoiser, schedule, scanner), schedule, DDIM(eta=1.0), 40, clip=1.0)
    drawings = sampler.sample(shape=(8, *image.shape), seed=seed, conditioning={"measurement": measured})
    panels = [Panel(to_pixels(image), "fully sampled", scale=2)]
    for picture, caption in (
        (plain, f"the rest zero ({float(drawn.float().mean()):.0%} sampled)"),
        (drawings[0], "data consistency: one sample"),
        (drawings.mean(0), "data consistency: mean of 8 samples"),
    ):
        panels.append(Panel(to_pixels(picture), f"{caption}: {_decibels(picture, image):.1f} dB", scale=2))
    return panels


def _slices() -> list["Tensor"]:
    """Slices of nibabel's four-dimensional example, each [1, H, W] from -1 to 1, sides multiples of 8."""
    from pathlib import Path

    import nibabel
    import torch

    found = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz")
    volume = torch.from_numpy(found.get_fdata()[..., 0]).float().permute(2, 1, 0).flip(1)
    top = volume.flatten().kthvalue(int(0.999 * volume.numel())).values
    volume = (volume / top).clamp(0, 1) * 2 - 1
    height, width = (size // 8 * 8 for size in volume.shape[1:])
    return [image[None, :height, :width].contiguous() for image in volume]


@entry("rddm", "RDDM: restoration that begins at the degraded digits; a small network fitted on the spot", _DIGITS)
def rddm(seed: int) -> list[Panel]:
    import torch

    from pydenoise.samplers import RDDM, Sampler, residual_schedule

    seen, images = _digits(seed)
    schedule, generator = residual_schedule(), torch.Generator().manual_seed(seed)
    degraded, shown = _blurred(seen, generator), _blurred(images, generator)
    times, networks = RDDM().timesteps(schedule, 5), {}
    for t in times:
        level = schedule.level(t)
        x = (
            level.alpha * seen
            + (1 - level.alpha) * degraded
            + level.sigma * torch.randn(seen.shape, generator=generator)
        )
        networks[int(t)] = _fitted(torch.cat([x, degraded], 1).flatten(1), (degraded - seen).flatten(1))

    def residual(x: "Tensor", t: "Tensor", degraded: "Tensor") -> "Tensor":
        return networks[int(t[0])](torch.cat([x, degraded], 1).flatten(1)).view_as(x)

    sampler = Sampler(residual, schedule, RDDM("residual"), 5, clip=1.0)
    restored = sampler.sample(shown, seed=seed, conditioning={"degraded": shown})
    return _before_and_after(images, shown, restored, f"5 steps of {RDDM.name}")


@entry(
    "resfusion", "Resfusion: the same, entered half-way of a diffusion whose noise takes the residual along", _DIGITS
)
def resfusion(seed: int) -> list[Panel]:
    import torch

    from pydenoise.samplers import Resfusion, Sampler, resfusion_schedule

    seen, images = _digits(seed)
    schedule, generator = resfusion_schedule(12), torch.Generator().manual_seed(seed)
    degraded, shown = _blurred(seen, generator), _blurred(images, generator)
    steps, networks = schedule.num_timesteps, {}
    for t in Resfusion("sample").timesteps(schedule, steps):
        level = schedule.level(t)
        x = level.alpha * seen + (1 - level.alpha) * (degraded - seen)
        x = x + level.sigma * torch.randn(seen.shape, generator=generator)
        networks[int(t)] = _fitted(torch.cat([x, degraded], 1).flatten(1), seen.flatten(1))

    def clean(x: "Tensor", t: "Tensor", degraded: "Tensor") -> "Tensor":
        return networks[int(t[0])](torch.cat([x, degraded], 1).flatten(1)).view_as(x)

    sampler = Sampler(clean, schedule, Resfusion("sample"), steps)
    restored = sampler.sample(shown, seed=seed, conditioning={"degraded": shown})
    return _before_and_after(images, shown, restored, f"{steps} steps")


def _before_and_after(images: "Tensor", degraded: "Tensor", restored: "Tensor", caption: str) -> list[Panel]:
    return [
        strip(images, "scikit-learn's"),
        strip(degraded, f"moved, with noise: {_decibels(degraded, images):.1f} dB"),
        strip(restored, f"{caption}: {_decibels(restored, images):.1f} dB"),
    ]


@entry("udpm", "UDPM: digits that grow in every step; small networks fitted on the spot", _DIGITS)
def udpm(seed: int) -> list[Panel]:
    import torch

    from pydenoise.samplers import UDPM

    seen, images = _digits(seed)
    seen, images = (torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear") for x in (seen, images))
    generator, alphas, sigmas = torch.Generator().manual_seed(seed), (0.5, 0.5), (0.05, 0.05)
    networks = {}

    def network(x: "Tensor", t: "Tensor") -> "Tensor":
        side = 2 * x.shape[-1]
        return networks[side](x.flatten(1)).view(-1, 1, side, side)

    chain = UDPM(network, alphas, sigmas)
    target = seen
    for t in (1, 2):
        noise = torch.randn(len(seen), 1, 16 // 2**t, 16 // 2**t, generator=generator)
        x = chain.add_noise(seen, noise, t)
        networks[2 * x.shape[-1]] = _fitted(x.flatten(1), target.flatten(1))
        target = chain.operator(target)
    small = chain.add_noise(images, torch.randn(10, 1, 4, 4, generator=generator), 2)
    grown = chain.sample(small, seed=seed)
    level = chain.levels[-1].alpha * 4  # H^2 of a constant image is 4 times it
    enlarged = (small / level).repeat_interleave(4, -1).repeat_interleave(4, -2)
    return [
        strip(images, "scikit-learn's, 16 x 16"),
        strip(enlarged, f"the last level, 4 x 4: {_decibels(enlarged, images):.1f} dB"),
        strip(grown, f"grown in two calls: {_decibels(grown, images):.1f} dB"),
    ]
