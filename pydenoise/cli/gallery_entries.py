"""What ``pydenoise gallery`` shows: entries, each a function of a seed that returns pictures.

Add one: write the function, decorate it with ``entry``; further files of entries are imported by ``gallery``. It runs
for seconds at most, on data that is at hand offline, and says in its captions what one sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Panel:
    """A picture [H, W] or [H, W, 3] of uint8, what stands below it, and how often each pixel is repeated."""

    picture: "np.ndarray"
    caption: str
    scale: int = 1


@dataclass(frozen=True)
class Entry:
    """One part of the sheet.

    Args:
        name: of the command line.
        title: its heading.
        make: called with the seed.
        packages: what it imports beside torch, as (module, name in messages).
    """

    name: str
    title: str
    make: Callable[[int], list[Panel]]
    packages: tuple[tuple[str, str], ...] = ()


ENTRIES: list[Entry] = []


def entry(name: str, title: str, *packages: tuple[str, str]) -> Callable:
    """Put the function on the list, at its end."""

    def register(make: Callable[[int], list[Panel]]) -> Callable[[int], list[Panel]]:
        ENTRIES.append(Entry(name, title, make, packages))
        return make

    return register


def to_pixels(image: "Tensor", low: float = -1.0, high: float = 1.0) -> "np.ndarray":
    """[H, W], or [C, H, W] of one or three channels, as uint8: ``low`` is black, ``high`` white."""
    pixels = ((image.detach().float() - low) / (high - low) * 255).clamp(0, 255).round().byte()
    if pixels.dim() == 3:
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
    return pixels.contiguous().cpu().numpy()


def strip(digits: "Tensor", caption: str) -> Panel:
    """Digits [N, 1, 8, 8] beside each other, ink black."""
    import torch

    padded = torch.nn.functional.pad(digits[:, 0], (1, 1, 1, 1), value=-1)
    return Panel(to_pixels(-padded.permute(1, 0, 2).flatten(1)), caption, scale=4)


# ------------------------------------------------------------------------------------------------------------- entries


@entry("digits", "DDIM: digits of each class from the denoiser that ships with pydenoise, guidance 2")
def digits(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.samplers import DDIM, NoiseSchedule, Sampler

    model, labels = load_digits(), torch.arange(10)
    told = {"conditioning": {"labels": labels}}
    told["unconditional"] = {"labels": torch.full_like(labels, model.null_class)}
    panels = []
    for steps in (5, 10, 50):
        sampler = Sampler(model, NoiseSchedule.linear(), DDIM(), steps, guidance_scale=2.0)
        images = sampler.sample(shape=(10, 1, 8, 8), seed=[seed + label for label in range(10)], **told)
        panels.append(strip(images, f"{steps} steps"))
    return panels


@entry(
    "panorama",
    "Windows: rings from a denoiser of 16 x 16 pixels, which knows the covariance of a photograph's",
    ("skimage.data", "scikit-image"),
)
def panorama(seed: int) -> list[Panel]:
    import torch

    from pydenoise.samplers import DPMSolverPP, NoiseSchedule, OverlappedWindows, Sampler, ShiftedWindows

    schedule, side = NoiseSchedule.linear(), 16
    texture, counted = texture_denoiser([photograph()], side, schedule), []

    def denoiser(x: "Tensor", t: "Tensor") -> "Tensor":
        counted.append(len(x))
        return texture(x, t)

    overlapped = OverlappedWindows(denoiser, (side, side), overlap=8, wrap=(-1,), max_batch=16)
    shifted = ShiftedWindows(denoiser, (side, side), wrap=(-1,), max_batch=16)
    apart = OverlappedWindows(denoiser, (side, side), overlap=0, max_batch=16)
    panels = []
    for windows, observers, caption in (
        (apart, [], "side by side, the same in every call"),
        (shifted, [shifted], "side by side and round, at another offset in every call"),
        (overlapped, [], "half overlapped and round"),
    ):
        sampler = Sampler(windows, schedule, DPMSolverPP(2), 25, observers=observers)
        counted.clear()
        ring = sampler.sample(shape=(1, 3, 3 * side, 12 * side), seed=seed)[0]
        turned = torch.roll(ring, 6 * side, -1)  # where the ends meet is in the middle
        work = f"{sum(counted) / sampler.plan.calls:.0f} windows a call"
        panels.append(Panel(to_pixels(turned), f"{caption}: {work}; the ends meet in the middle", scale=2))
    return panels


def photograph() -> "Tensor":
    """scikit-image's coffee, [3, 100, 150], from -1 to 1."""
    import torch
    from skimage import data

    pixels = torch.from_numpy(data.coffee().copy()).permute(2, 0, 1).float() / 127.5 - 1
    return torch.nn.functional.avg_pool2d(pixels, 4)


def texture_denoiser(images: "Sequence[Tensor]", side: int, schedule) -> Callable:
    """The best prediction of the noise for normal patches with the mean and the covariance of those of ``images``."""
    import torch

    patches = torch.cat([torch.nn.functional.unfold(image[None], side, stride=2)[0].T for image in images])
    mean = torch.stack([image.mean((1, 2)) for image in images]).mean(0).repeat_interleave(side * side)
    variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    variances, alphas_cumprod = variances.clamp(min=0), schedule.alphas_cumprod.float()

    def denoise(x: "Tensor", t: "Tensor") -> "Tensor":
        alpha, sigma = alphas_cumprod[t, None].sqrt(), (1 - alphas_cumprod[t, None]).sqrt()
        along = (x.flatten(1) - alpha * mean) @ directions
        return (sigma * along / (alpha**2 * variances + sigma**2) @ directions.T).view_as(x)

    return denoise


@entry(
    "edit",
    "Edit-friendly inversion: real digits, and the same hands writing others",
    ("sklearn.datasets", "scikit-learn"),
)
def edit(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.models.digits_quality import real_digits
    from pydenoise.samplers import DDIM, EditFriendly, NoiseSchedule, Sampler

    model, (images, labels) = load_digits(), real_digits()
    chosen = torch.stack([(labels == label).nonzero()[seed % 100, 0] for label in range(10)])
    images, labels = images[chosen], torch.arange(10)
    nothing = {"labels": torch.full_like(labels, model.null_class)}
    sampler = Sampler(model, NoiseSchedule.linear(), DDIM(eta=1.0), 25, guidance_scale=1.0)
    found = EditFriendly(sampler).invert(images, conditioning={"labels": labels}, unconditional=nothing, seed=seed)
    again = found.reconstruct({"labels": labels}, nothing)
    error = float((again - images).abs().max())
    panels = [strip(images, "scikit-learn's"), strip(again, f"reconstructed: at most {error:.1g} away")]
    for other in (3, 8):
        told = {"labels": torch.full_like(labels, other)}
        panels.append(strip(found.edit(told, nothing, skip=5, guidance_scale=3.0), f"as {other}, 20 of 25 steps"))
    return panels


@entry("reward", "SVDD: digits of a reward that needs no gradient, 8 candidates for each step")
def reward(seed: int) -> list[Panel]:
    import torch

    from pydenoise.models import load_digits
    from pydenoise.samplers import DDIM, SVDD, NoiseSchedule, Sampler

    def ink(x0: "Tensor") -> "Tensor":
        return x0.clamp(-1, 1).mean((1, 2, 3))

    sampler = Sampler(load_digits(), NoiseSchedule.linear(), DDIM(eta=1.0), 15)
    given = {"shape": (10, 1, 8, 8), "seed": seed, "conditioning": {"labels": torch.arange(10)}}
    panels = []
    for caption, images in (
        ("no reward", sampler.sample(**given)),
        ("little ink", SVDD(sampler, lambda x0: -ink(x0), candidates=8).sample(**given)),
        ("much ink", SVDD(sampler, ink, candidates=8).sample(**given)),
    ):
        panels.append(strip(images, f"{caption}: {50 * float(1 + ink(images).mean()):.0f} % of the paper"))
    return panels
