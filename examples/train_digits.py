"""Train a class-conditional denoiser of handwritten digits: minutes on two cores.

Run: python examples/train_digits.py OUT.safetensors

The digits are scikit-learn's (8 x 8). The model that pydenoise.models.load_digits() gives was made by this; what
another one samples is shown by `pydenoise sample --weights OUT.safetensors`.
"""

import argparse
import copy
import math
import platform
import shlex
import sys
import time

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from pydenoise.models.digits import DigitsUNet, save_digits
from pydenoise.models.digits_quality import real_digits

TIMESTEPS = 1000
BETAS = (1e-4, 0.02)  # first and last, linear between
WARMUP = 0.03  # share of the steps
PRINT_EVERY = 100


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    images, labels = real_digits()
    model = DigitsUNet(args.base, args.multipliers, args.blocks, args.attention_levels)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{len(images)} digits, {millions:.2f} million parameters")
    start = time.perf_counter()
    average, loss = train(model, images, labels, args)
    minutes = (time.perf_counter() - start) / 60
    print(f"trained in {minutes:.1f} minutes")
    notes = {
        "command": shlex.join(["python", *sys.argv]),
        "arguments": vars(args),
        "minutes": round(minutes, 1),
        "loss": round(loss, 4),
        "data": "scikit-learn's digits, all 1797",
        "schedule": {"timesteps": TIMESTEPS, "betas": BETAS},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    save_digits(average, args.out, notes=notes, dtype=torch.float16)
    print(f"wrote {args.out}")


def train(model: DigitsUNet, images: Tensor, labels: Tensor, args: argparse.Namespace) -> tuple[DigitsUNet, float]:
    """Returns the moving average of the weights, and the mean loss of the last PRINT_EVERY steps."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    kept = torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64).neg().add(1).cumprod(0)  # share of the image's energy
    alphas, sigmas = kept.sqrt().float(), (1 - kept).sqrt().float()
    losses: list[float] = []
    with Progress() as progress:
        task = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            chosen = torch.randint(0, len(images), (args.batch,))
            clean, noise = images[chosen], torch.randn(args.batch, *images.shape[1:])
            classes = labels[chosen].masked_fill(torch.rand(args.batch) < args.drop, model.null_class)
            times = spread_timesteps(args.batch)
            noisy = alphas[times, None, None, None] * clean + sigmas[times, None, None, None] * noise
            loss = F.mse_loss(model(noisy, times, classes), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = args.lr * rate((step + 1) / args.steps)
            optimizer.step()
            follow(average, model, min(args.ema, (step + 1) / (step + 10)))
            losses.append(loss.item())
            progress.advance(task)
            if (step + 1) % PRINT_EVERY == 0:
                seconds = progress.tasks[task].elapsed
                progress.console.print(f"step {step + 1:4d}: loss {mean(losses):.4f}, {seconds:.0f} s")
    return average, mean(losses)


def spread_timesteps(count: int) -> Tensor:
    """[count] timesteps, each uniform, together spread evenly: the loss varies less."""
    return ((torch.arange(count) + torch.rand(count)) * (TIMESTEPS / count)).long().clamp(max=TIMESTEPS - 1)


def rate(share: float) -> float:
    """The learning rate after this share of the steps, between 0 and 1: up, then down along a cosine."""
    return min(1.0, share / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * share))


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) model."""
    for own, weight in zip(average.parameters(), model.parameters(), strict=True):
        own.lerp_(weight, 1 - decay)


def mean(losses: list[float]) -> float:
    """Of the last PRINT_EVERY."""
    last = losses[-PRINT_EVERY:]
    return sum(last) / len(last)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the safetensors file to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the weights' moving average, which is saved")
    parser.add_argument("--drop", type=float, default=0.1, help="share of the images whose class is hidden (guidance)")
    parser.add_argument("--base", type=int, default=32, help="channels of the finest level")
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2], help="of base, for each level")
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks a level")
    parser.add_argument("--attention-levels", type=int, nargs="*", default=[1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args()
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    for name in ("ema", "drop"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name}: expected 0 or more and less than 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
