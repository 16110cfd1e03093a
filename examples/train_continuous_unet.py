"""Train a continuous U-Net and a plain one on handwritten digits, and set them side by side: minutes on one core.

Run: python examples/train_continuous_unet.py [--steps 400]

Both are told time and class, predict the velocity, and are trained alike, by examples/train_digits.py. Printed are the
parameters, the operations of a call, the time of a training step and of a call, and how many sampled digits look like
their class (scikit-learn's digits, 5 nearest neighbours).
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from train_digits import train

import pydenoise as pdn
import pydenoise.functional  # defines torch.ops.pydenoise
from pydenoise.models.digits import DigitsUNet
from pydenoise.models.digits_quality import class_agreement, real_digits

SAMPLING_STEPS = 20
GUIDANCE = 2.0
SCHEDULE = pdn.samplers.NoiseSchedule.linear()


@register_flop_formula(torch.ops.pydenoise.weighted_conv)
def convolution_flops(input_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """A multiply-add counted as two: torch knows the operations of its own convolutions only."""
    positions = out_shape[0]
    for size in out_shape[2:]:
        positions *= size
    taps = 1
    for size in weight_shape:
        taps *= size
    return 2 * positions * taps


class FromVelocity(nn.Module):
    """The noise, of a ``network`` that predicts the velocity: ``alpha_t velocity + sigma_t x``.

    The norms of a continuous U-Net take the mean out of every channel of every image. So much of the noise is in the
    mean of an image of 8 x 8 that it has to come from ``x`` itself.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.null_class = network, network.null_class
        kept = SCHEDULE.alphas_cumprod.float()
        self.register_buffer("alphas", kept.sqrt())
        self.register_buffer("sigmas", (1 - kept).sqrt())

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        at = timesteps.round().long().expand(len(x))
        alpha, sigma = (table[at][:, None, None, None] for table in (self.alphas, self.sigmas))
        return alpha * self.network(x, timesteps, labels) + sigma * x


class Row:
    """One network: trained, sampled from and measured."""

    def __init__(self, name: str, model: nn.Module, args: argparse.Namespace):
        self.name, self.model, self.args = name, model, args
        self.parameters = sum(weight.numel() for weight in model.parameters())
        example = torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:  # with gradients, so that every operation is one that it sees
            model(*example)
        self.flops = counter.get_total_flops()

    def run(self, images: Tensor, labels: Tensor) -> "Row":
        start = time.perf_counter()
        average, self.loss = train(self.model, images, labels, self.args)
        self.step = (time.perf_counter() - start) / self.args.steps
        classes = torch.arange(10).repeat_interleave(self.args.samples)
        start = time.perf_counter()
        samples = sample(average.eval(), classes, self.args.seed)
        self.call = (time.perf_counter() - start) / SAMPLING_STEPS / 2 / len(classes)  # guidance calls it twice
        self.agreement = class_agreement(samples, classes, images, labels)
        self.samples = samples[:: self.args.samples]
        return self

    def __str__(self) -> str:
        return (
            f"{self.name:<24} {self.parameters / 1e6:>6.3f} {self.flops / 1e6:>8.1f} {1e3 * self.step:>10.1f} "
            f"{1e3 * self.call:>9.3f} {self.loss:>7.4f} {self.agreement:>9.1%}"
        )


HEADER = (
    f"{'':<24} {'params':>6} {'MFLOP':>8} {'ms':>10} {'ms a':>9} {'last':>7} {'like their':>10}\n"
    f"{'network':<24} {'(M)':>6} {'a call':>8} {'a step':>10} {'image':>9} {'loss':>7} {'class':>10}"
)


def sample(model: nn.Module, classes: Tensor, seed: int) -> Tensor:
    """One image [1, 8, 8] of each of the classes [N]."""
    sampler = pdn.samplers.Sampler(
        model, SCHEDULE, pdn.samplers.DPMSolverPP(order=2), num_steps=SAMPLING_STEPS,
        guidance_scale=GUIDANCE,
    )  # fmt: skip
    return sampler.sample(
        shape=(len(classes), 1, 8, 8),
        seed=seed,
        conditioning={"labels": classes},
        unconditional={"labels": torch.full_like(classes, model.null_class)},
    )


def show(images: Tensor) -> str:
    """Digits [N, 1, 8, 8] beside each other."""
    ink = " .:-=+*#%@"
    darkness = images[:, 0].clamp(-1, 1).add(1).mul(len(ink) / 2).clamp(max=len(ink) - 1).int()
    lines = darkness.permute(1, 0, 2).tolist()
    return "\n".join(" ".join("".join(ink[value] for value in line) for line in row) for row in lines)


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.winograd:
        torch.set_float32_matmul_precision("high")
    images, labels = real_digits()
    # "add" puts time and class in front of norms that take most of them out again: the classes are not learned.
    options = {"in_channels": 1, "n_features": args.n_features, "levels": 2, "classes": 10, "time_embedding": "film"}

    def continuous(**more: object) -> nn.Module:
        more |= {"method": args.method, "n_steps": args.n_steps, "attention_residual": True}
        return pdn.nn.ContinuousUNet(**options, **more)

    networks = {
        "plain U-Net": DigitsUNet,
        "continuous": continuous,
        "continuous, second order": lambda: continuous(order="second"),
    }
    rows = []
    for name, build in networks.items():
        torch.manual_seed(args.seed)
        rows.append(Row(name, FromVelocity(build()), args).run(images, labels))
    print(f"{args.steps} steps of {args.batch} digits; {args.samples * 10} samples, {SAMPLING_STEPS} steps each")
    print(HEADER)
    for row in rows:
        print(row)
    for row in rows:
        print(f"\n{row.name}\n{show(row.samples)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--samples", type=int, default=20, help="of each class")
    parser.add_argument("--n-features", type=int, default=12, help="of the continuous U-Net: half its first width")
    parser.add_argument(
        "--method", default="rk4_38", choices=pdn.nn.DynamicBlock.METHODS, help="integrator of the blocks"
    )
    parser.add_argument("--n-steps", type=int, default=1, help="steps of the integrator")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--ema", type=float, default=0.99, help="decay of the weights' moving average, which is sampled"
    )
    parser.add_argument("--drop", type=float, default=0.1, help="share of the images whose class is hidden (guidance)")
    parser.add_argument("--winograd", action="store_true", help="let 3 x 3 convolutions round more and run faster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args()
    for name in ("steps", "batch", "samples", "n_features", "n_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    for name in ("ema", "drop"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name}: expected 0 or more and less than 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
