"""Two denoisers that know different digits, joined: aggregators trained between their blocks, in minutes on two cores.

Run: python examples/ensemble_digits.py [--steps 300] [--method stacked]

Both networks begin as the one that is shipped with pydenoise. One is trained further on the digits 0 to 4 only, the
other on 5 to 9, until each has forgotten the rest. Then both are frozen, and the aggregators learn which network to
listen to, pixel by pixel, from all digits. Printed is the denoising loss on all of them (lower is better).
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.models.digits import load_digits
from pydenoise.models.digits_quality import real_digits
from pydenoise.nn import Ensemble

TIMESTEPS = 1000
BETAS = (1e-4, 0.02)  # first and last, linear between
HALVES = ((0, 5), (5, 10))  # the digits of each network


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    images, labels = real_digits()
    networks = []
    for first, last in HALVES:
        own = (labels >= first) & (labels < last)
        network = load_digits().train()
        train(network, list(network.parameters()), images[own], labels[own], args.specialise, args)
        networks.append(network.eval())
    ensemble = Ensemble(networks, hidden=args.hidden, heads=4, method=args.method)
    trained = list(ensemble.aggregators.parameters())
    print(f"{ensemble.method}: {len(ensemble.aggregators)} aggregators, {sum(p.numel() for p in trained)} parameters")
    parts = {f"network of {first} to {last - 1}": network for (first, last), network in zip(HALVES, networks)}  # noqa: B905
    parts["mean of both outputs"] = Ensemble(networks, aggregate="output", hidden=args.hidden, heads=4)
    parts["aggregators, untrained"] = ensemble
    for name, network in parts.items():
        print(f"{name:>24}: loss {evaluate(network, images, labels):.4f}")
    start = time.perf_counter()
    train(ensemble.train(), trained, images, labels, args.steps, args)
    loss = evaluate(ensemble.eval(), images, labels)
    print(f"{'aggregators, trained':>24}: loss {loss:.4f} ({time.perf_counter() - start:.0f} s)")


def schedule() -> tuple[Tensor, Tensor]:
    """Shares of image and noise at every timestep."""
    kept = torch.linspace(*BETAS, TIMESTEPS, dtype=torch.float64).neg().add(1).cumprod(0)
    return kept.sqrt().float(), (1 - kept).sqrt().float()


def loss_of(network: nn.Module, images: Tensor, labels: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    alphas, sigmas = (part[times, None, None, None] for part in schedule())
    return F.mse_loss(network(alphas * images + sigmas * noise, times, labels), noise)


def train(network: nn.Module, weights: list, images: Tensor, labels: Tensor, steps: int, args) -> None:
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.01)
    for step in range(steps):
        chosen = torch.randint(0, len(images), (args.batch,))
        times, noise = torch.randint(0, TIMESTEPS, (args.batch,)), torch.randn(args.batch, *images.shape[1:])
        loss = loss_of(network, images[chosen], labels[chosen], times, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / steps)
        optimizer.step()


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean loss over all digits, each with one noise and one timestep that are the same for every network."""
    generator = torch.Generator().manual_seed(1)
    times = torch.randint(0, TIMESTEPS, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return loss_of(network, images, labels, times, noise).item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the aggregators' training")
    parser.add_argument("--specialise", type=int, default=150, help="steps that each network is trained further")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=32, help="channels inside the aggregators")
    parser.add_argument("--method", choices=("stacked", "sequence"), default="stacked")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("steps", "specialise", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.hidden < 4 or args.hidden % 4:
        parser.error(f"--hidden: expected a multiple of 4, got {args.hidden}")
    return args


if __name__ == "__main__":
    main()
