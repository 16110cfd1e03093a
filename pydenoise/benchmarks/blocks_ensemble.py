"""Ensembles in the ``blocks`` suite: all networks stacked, beside one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.providers import Contender, Provider, Setting, contender_of, expected_of, fill_zeros, require
from pydenoise.benchmarks.workloads import FirstOutput
from pydenoise.models.digits import DigitsUNet
from pydenoise.nn import Ensemble

BOUNDS = {"fp32": 1e-4}  # of the results of whole networks


@dataclass(frozen=True)
class EnsembleBench(Case):
    """``count`` networks without aggregators: U-Nets of diffusers with these ``channels``, or ``None``: of digits."""

    count: int = 4
    batch: int = 1
    channels: tuple[int, ...] | None = None

    def describe(self) -> dict:
        return super().describe() | {"networks": self.count, "batch": self.batch, "channels": self.channels}

    def models(self) -> list[nn.Module]:
        """The networks, each with random weights of its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make = DigitsUNet if self.channels is None else lambda: _unet(self.channels)
            return [fill_zeros(make()).eval() for _ in range(self.count)]

    def draw(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(pictures [B, C, H, W], timesteps [B])."""
        shape = (self.batch, 1, 8, 8) if self.channels is None else (self.batch, 3, 32, 32)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return x.to(device), torch.full((self.batch,), 500, device=device)


def _unet(channels: tuple[int, ...]) -> nn.Module:
    levels = len(channels) - 1
    return require("diffusers").UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * levels + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * levels,
    )  # fmt: skip


def ensemble_cases(quick: bool = False) -> list[EnsembleBench]:
    """Networks from tiny to medium; ``quick``: two that are tiny."""
    if quick:
        return [EnsembleBench("2 digits", "ensemble", "does it run", count=2)]
    small, medium = (32, 64), (128, 256)
    return [
        EnsembleBench("4 digits, batch 1", "ensemble", "calls cost more than arithmetic"),
        EnsembleBench("4 digits, batch 16", "ensemble", "small layers", batch=16),
        EnsembleBench("3 diffusers 32-64", "ensemble", "small layers", count=3, channels=small),
        EnsembleBench("3 diffusers 128-256", "ensemble", "arithmetic", count=3, channels=medium),
    ]


def _ensemble(method: str):
    def prepare(case: EnsembleBench, setting: Setting) -> Contender:
        x, t = case.draw(setting.device)
        ensemble = Ensemble(case.models(), aggregate="none", method=method).to(setting.device)
        return contender_of(lambda: ensemble(x, t))

    return prepare


def _calls(case: EnsembleBench, setting: Setting, dtype: torch.dtype = torch.float32) -> Contender:
    """The networks as they are, one after the other."""
    x, t = case.draw(setting.device)
    x, models = x.to(dtype), [FirstOutput(model).to(setting.device, dtype) for model in case.models()]
    return contender_of(lambda: torch.stack([model(x, t) for model in models], 1))


PROVIDERS = (
    Provider("ours-ensemble", "stacked", _ensemble("stacked"), ours=True),
    Provider("turns-ensemble", "in turns", _ensemble("sequence")),
    Provider("calls-ensemble", "N calls", _calls),
)


def expected_results(case: EnsembleBench, setting: Setting) -> Expected:
    """The networks in float64."""
    return expected_of(_calls(case, Setting(setting.threads), torch.float64))
