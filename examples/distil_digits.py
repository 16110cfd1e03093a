"""Distil the denoiser of digits that ships with pydenoise into a smaller one with wavelet gates: minutes on one core.

Run: python examples/distil_digits.py [--steps 800]

Three students of the same size and start see the same batches: one learns to predict the noise only, one also follows
the teacher's features, and one also follows their frequencies, those the more that images have less of. The table shows
what each costs, how well it predicts the teacher's noise, and how its samples compare with real digits: whether they
look like their class, and how far their power spectrum is off, in the lower and the upper half of the frequencies.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pydenoise.models import load_digits
from pydenoise.models.digits_quality import class_agreement, real_digits
from pydenoise.models.unet import DiffusionUNet
from pydenoise.nn import SpectralDistillationLoss, WaveletGateDown, WaveletGateUp
from pydenoise.samplers import DDIM, NoiseSchedule, Sampler

SCHEDULE = NoiseSchedule.linear()
NULL_CLASS, EMBEDDING = 10, 64
STUDENTS = {  # weights of the distances in space and in frequencies
    "student": (0.0, 0.0),
    "+ features": (0.1, 0.0),
    "+ features, frequencies": (0.1, 0.1),
}


# ------------------------------------------------------------------------------------------------------------ student


class Block(nn.Module):
    """Two convolutions beside a skip connection; the embedding scales and shifts what is between them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(EMBEDDING, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Student(nn.Module):
    """A U-Net of two levels whose resolution is changed by gated wavelets; called as the teacher is."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.Embedding(NULL_CLASS + 1, EMBEDDING)
        self.register_buffer("frequencies", torch.logspace(0, -4, EMBEDDING // 2))
        self.time = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.conv_in, self.encoder = nn.Conv2d(1, width, 3, padding=1), Block(width, width)
        self.down = WaveletGateDown(width, temb_dim=EMBEDDING)
        self.middle = nn.ModuleList([Block(width, 2 * width), Block(2 * width, 2 * width)])
        self.bands = nn.Conv2d(2 * width, 4 * width, 1)
        self.up = WaveletGateUp(4 * width, temb_dim=EMBEDDING)
        self.decoder = Block(2 * width, width)
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, 1, 3, padding=1)
        self.channels = (width, 2 * width, width)  # of the features

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.features(x, timesteps, labels)[1]

    def features(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        """What encoder, middle and decoder end with, and the noise."""
        angles = timesteps.float().expand(len(x))[:, None] * self.frequencies
        embedding = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.classes(labels))
        fine = self.encoder(self.conv_in(x), embedding)
        coarse = self.down(fine, embedding)
        for block in self.middle:
            coarse = block(coarse, embedding)
        last = self.decoder(torch.cat([self.up(self.bands(coarse), embedding), fine], 1), embedding)
        return [fine, coarse, last], self.conv_out(F.silu(self.norm_out(last)))


def teacher_features(teacher: DiffusionUNet) -> list[Tensor]:
    """A list that holds, after every call, what the teacher's first level, middle and decoder end with."""
    found: list[Tensor] = [None, None, None]
    places = (teacher.encoder[0], teacher.middle, teacher.decoder[-1])
    for number, module in enumerate(places):
        module.register_forward_hook(lambda m, inputs, output, n=number: found.__setitem__(n, output))
    return found


# ----------------------------------------------------------------------------------------------------------- training


def noisy(images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    kept = SCHEDULE.alphas_cumprod.float()[times][:, None, None, None]
    return kept.sqrt() * images + (1 - kept).sqrt() * noise


def distil(weights: tuple[float, float], teacher: nn.Module, images: Tensor, labels: Tensor, args) -> Student:
    """A student trained on the noise and, where ``weights`` are not 0, on the teacher's features."""
    torch.manual_seed(args.seed)
    student, wanted = Student(args.width), teacher_features(teacher)
    # Digits of few grey levels have frequencies of exactly 0: with a smaller eps their weights would drown the rest.
    loss_of = SpectralDistillationLoss(
        student.channels, (32, 64, 32), spatial=weights[0], frequency=weights[1], norm="ortho", eps=1.0
    )
    optimizer = torch.optim.AdamW([*student.parameters(), *loss_of.parameters()], lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps)
    for _ in range(args.steps):
        chosen, times = torch.randint(len(images), (args.batch,)), torch.randint(1000, (args.batch,))
        classes = labels[chosen].masked_fill(torch.rand(args.batch) < 0.1, NULL_CLASS)
        clean, noise = images[chosen], torch.randn(args.batch, 1, 8, 8)
        x = noisy(clean, times, noise)
        features, predicted = student.features(x, times, classes)
        loss = F.mse_loss(predicted, noise)
        if any(weights):
            with torch.no_grad():
                teacher(x, times, classes)
            loss = loss_of(features, wanted, clean, base=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval()


# ------------------------------------------------------------------------------------------------------------ quality


@torch.no_grad()
def prediction_error(model: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Root mean square of what the model's noise differs from the teacher's."""
    torch.manual_seed(123)
    times = torch.linspace(0, 999, len(images)).long()
    x = noisy(images, times, torch.randn(images.shape))
    return (model(x, times, labels) - teacher(x, times, labels)).square().mean().sqrt().item()


def digits(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """``count`` samples of each class, and their classes."""
    labels = torch.arange(10).repeat(count)
    sampler = Sampler(model, SCHEDULE, DDIM(), num_steps=20, guidance_scale=2.0)
    images = sampler.sample(
        shape=(len(labels), 1, 8, 8), seed=7, conditioning={"labels": labels},
        unconditional={"labels": torch.full_like(labels, NULL_CLASS)},
    )  # fmt: skip
    return images.clamp(-1, 1), labels


def spectrum(images: Tensor) -> Tensor:
    """Mean power at every frequency, in decibels."""
    return 10 * torch.fft.rfft2(images).abs().square().mean((0, 1)).log10()


def spectrum_errors(images: Tensor, real: Tensor) -> tuple[float, float]:
    """Root mean square difference of the spectra in decibels: frequencies up to half of the highest, and above."""
    rows, columns = torch.fft.fftfreq(8)[:, None], torch.fft.rfftfreq(8)[None]
    high = torch.maximum(rows.abs(), columns.abs()) > 0.25
    difference = (spectrum(images) - spectrum(real)).square()
    return difference[~high].mean().sqrt().item(), difference[high].mean().sqrt().item()


@torch.no_grad()
def cost(model: nn.Module) -> tuple[int, float, float]:
    """(parameters, million products for one digit, milliseconds for 64 of them)."""
    inputs = torch.randn(64, 1, 8, 8), torch.full((64,), 500), torch.zeros(64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        model(*inputs)
        times.append(time.perf_counter() - start)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 64 / 2e6, 1e3 * min(times)


def main() -> None:
    args = arguments()
    images, labels = real_digits()
    teacher = load_digits()
    heads = ("parameters", "MMAC", "ms", "noise", "class", "low", "high", "trained")
    print(" " * 24, *(f"{head:>{width}}" for head, width in zip(heads, (10, 6, 6, 6, 6, 6, 6, 8), strict=True)))
    for name in ("teacher", *STUDENTS):
        start = time.perf_counter()
        model = teacher if name == "teacher" else distil(STUDENTS[name], teacher, images, labels, args)
        seconds = time.perf_counter() - start
        parameters, products, milliseconds = cost(model)
        samples, classes = digits(model, args.samples)
        agreement = class_agreement(samples, classes, images, labels)
        low, high = spectrum_errors(samples, images)
        error = prediction_error(model, teacher, images, labels)
        print(
            f"{name:>24} {parameters:>10} {products:>6.2f} {milliseconds:>6.1f} {error:>6.3f} {agreement:>6.1%} "
            f"{low:>4.1f}dB {high:>4.1f}dB {seconds:>6.0f} s",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--width", type=int, default=16, help="channels of the finest level, a multiple of 4")
    parser.add_argument("--samples", type=int, default=30, help="digits of each class that are sampled and judged")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("steps", "batch", "width", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.width % 4:
        parser.error(f"--width: expected a multiple of 4, got {args.width}")
    return args


if __name__ == "__main__":
    main()
