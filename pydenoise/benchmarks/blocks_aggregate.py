"""Feature aggregation in the ``blocks`` suite: feature maps added up under a softmax over them, beside torch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Contender, Provider, Setting, contender_of, expected_of
from pydenoise.reference import softmax_aggregate as reference

OURS, NAIVE = "ours-aggregate", "naive-aggregate"
HIDDEN = 128  # channels that the logits are made of


@dataclass(frozen=True)
class AggregateBench(Case):
    """Maps of ``shape`` [B, N, C, h, w] joined to [B, C, h, w]; ``training``: forward and backward."""

    shape: tuple[int, int, int, int, int] = (2, 3, 320, 64, 64)
    training: bool = False
    channels_last: bool = False

    def moved_bytes(self) -> float:
        """Maps and hidden channels read once, the result written once.

        Backward: the gradient and the maps are read and their gradient is written; hidden channels both again.
        """
        batch, maps, channels, height, width = self.shape
        elements = maps * channels + HIDDEN + channels
        if self.training:
            elements += 2 * maps * channels + channels + 2 * HIDDEN
        return 4.0 * batch * height * width * elements

    def floor_seconds(self, peaks: Peaks, precision: str) -> float:
        """Bytes alone: arithmetic is a tenth of that."""
        moved = self.moved_bytes()
        return moved / peaks.bandwidth(int(moved))

    def describe(self) -> dict:
        return super().describe() | {
            "input": list(self.shape),
            "training": self.training,
            "channels_last": self.channels_last,
        }

    def draw(self, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor | None]:
        """(features [B, N, C, h, w], hidden [B, K, h, w] and weight [N, K] by name, gradient of the result)."""
        batch, maps, channels, *size = self.shape
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.shape, generator=generator)
        hidden = torch.randn(batch, HIDDEN, *size, generator=generator)
        weight = torch.randn(maps, HIDDEN, generator=generator) / HIDDEN**0.5
        grad = torch.randn(batch, channels, *size, generator=generator)
        if self.channels_last:
            features = features.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
            hidden, grad = (t.contiguous(memory_format=torch.channels_last) for t in (hidden, grad))
        leaves = {"features": features, "hidden": hidden, "weight": weight}
        return {name: t.to(device) for name, t in leaves.items()}, grad.to(device) if self.training else None


def aggregate_cases(quick: bool = False) -> list[AggregateBench]:
    """The levels of a Stable Diffusion U-Net, in both memory formats."""
    bars = (Bar((NAIVE,), speedup=2.5, subjects=(OURS,)),)
    shapes = ((2, 3, 320, 64, 64), (1, 3, 640, 32, 32), (2, 3, 1280, 16, 16), (2, 3, 1280, 8, 8))
    cases = []
    for training in (False, True):
        group = "aggregate training" if training else "aggregate"
        for shape in ((2, 3, 8, 6, 6),) if quick else shapes:
            for channels_last in (False, True):
                name = "x".join(map(str, shape)) + (" channels_last" if channels_last else "")
                cases.append(AggregateBench(name, group, "a level", bars, shape, training, channels_last))
    return cases


def naive_aggregate(features: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """As it is written down: a convolution, a softmax, a product and a sum; [B, C, h, w]."""
    shares = F.conv2d(hidden, weight[:, :, None, None]).softmax(1)
    return (features * shares[:, :, None]).sum(1)


def einsum_aggregate(features: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """The same with the product and the sum in one einsum."""
    shares = F.conv2d(hidden, weight[:, :, None, None]).softmax(1)
    return torch.einsum("bnchw,bnhw->bchw", features, shares)


def _of(function: Callable[..., Tensor]):
    def prepare(case: AggregateBench, setting: Setting) -> Contender:
        leaves, grad = case.draw(setting.device)
        return contender_of(lambda: function(*leaves.values()), leaves, grad)

    return prepare


PROVIDERS = (
    Provider(OURS, "ours", _of(PF.softmax_aggregate), ours=True),
    Provider(NAIVE, "naive", _of(naive_aggregate)),
    Provider("einsum-aggregate", "einsum", _of(einsum_aggregate)),
)


def expected_results(case: AggregateBench, setting: Setting) -> Expected:
    """The float64 results of plain torch."""
    leaves, grad = case.draw()
    leaves = {name: t.double() for name, t in leaves.items()}
    grad = None if grad is None else grad.double()
    return expected_of(contender_of(lambda: reference.softmax_aggregate(*leaves.values())[0], leaves, grad))
