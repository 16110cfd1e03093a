"""The networks of the ``unet`` suite: small diffusion U-Nets and image networks with seeded random weights.

The time of a network does not depend on the values of its weights, so nothing is downloaded.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise.benchmarks.providers import require

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Workload:
    """A network in eval mode with one input, and what an int8 converter may look at.

    ``network`` is what a user has; ``inputs`` are its positional arguments, all of them tensors. ``calibration`` holds
    further inputs of the same shapes.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    calibration: list[tuple[Tensor, ...]]

    @property
    def module(self) -> nn.Module:
        """The network as a function from tensors to one tensor, which is what compilers and exporters take."""
        return FirstOutput(self.network).eval()


class FirstOutput(nn.Module):
    """Calls ``network`` and returns the tensor in its output (the ``sample`` of a diffusers model)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return first_tensor(self.network(*inputs))


def first_tensor(output: object) -> Tensor:
    """The tensor that a network's output is, or holds first."""
    return output if isinstance(output, Tensor) else output[0]


def build_workload(name: str, batch: int = 1) -> Workload:
    """The workload called ``name`` with a batch of that size; :class:`Skip` says what is missing.

    The same weights and inputs every time.
    """
    build, sample = WORKLOADS[name]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        network = build().eval().requires_grad_(False)
    batches = [sample(batch, torch.Generator().manual_seed(seed), seed) for seed in range(1 + CALIBRATION_BATCHES)]
    return Workload(network, batches[0], batches[1:])


# ------------------------------------------------------------------------------------------------ diffusion U-Nets


def _diffusers(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(require("diffusers"), name)


def _ddpm_cifar10(channels: tuple[int, ...] = (128, 256, 256, 256), size: int = 32, groups: int = 32) -> nn.Module:
    """The U-Net of DDPM for CIFAR-10 (Ho et al., 2020) in diffusers' configuration: one attention head at 16x16."""
    return _diffusers("UNet2DModel")(
        sample_size=size,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (len(channels) - 2)),
        up_block_types=(*["UpBlock2D"] * (len(channels) - 2), "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=channels[-1],
        norm_num_groups=groups,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )


def _conditional(channels: tuple[int, ...] = (128, 256, 512), size: int = 32, groups: int = 32) -> nn.Module:
    """A text-conditional U-Net in the layout of Stable Diffusion: 8 heads, cross-attention to 256 channels."""
    attention = len(channels) - 1
    return _diffusers("UNet2DConditionModel")(
        sample_size=size,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * attention, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attention),
        cross_attention_dim=256,
        norm_num_groups=groups,
    )


def _timesteps(batch: int, number: int) -> Tensor:
    """One step per batch, spread over the 1000 of the schedule (a float: compilers would specialise on an integer)."""
    return torch.full((batch,), float((500, 950, 700, 300, 20)[number % 5]))


def _noise(channels: int, size: int) -> Callable[[int, torch.Generator, int], tuple[Tensor, ...]]:
    def sample(batch: int, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, channels, size, size, generator=generator), _timesteps(batch, number)

    return sample


def _noise_and_text(size: int, tokens: int = 77) -> Callable[[int, torch.Generator, int], tuple[Tensor, ...]]:
    def sample(batch: int, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        x, timesteps = _noise(4, size)(batch, generator, number)
        return x, timesteps, torch.randn(batch, tokens, 256, generator=generator)

    return sample


# --------------------------------------------------------------------------------------------------- image networks


def _dncnn(**arguments: int) -> nn.Module:
    from pydenoise.models import DnCNN

    network = _started(DnCNN(**arguments))
    network.randomize_statistics()
    return network


def _ffdnet(**arguments: int) -> nn.Module:
    from pydenoise.models import FFDNet

    return _started(FFDNet(**arguments))


def _started(network: nn.Module) -> nn.Module:
    """Weights with which the signal keeps its size over many layers (with torch's own start it fades)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def _cunet() -> nn.Module:
    from pydenoise.models import CUNet

    return _started(CUNet())


def _terrain() -> nn.Module:
    from pydenoise.models import TerrainDenoiser

    return TerrainDenoiser()


def _heightfield(size: int):
    def sample(batch: int, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        sigma = torch.full((batch,), (2.0, 80.0, 10.0, 2.0, 0.5)[number % 5])
        noise = torch.randn(batch, 1, size, size, generator=generator)
        return noise * sigma[:, None, None, None], sigma, torch.full((batch,), 0.5)

    return sample


def _picture(channels: int, size: int, sigma: float | None = None):
    def sample(batch: int, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        image = torch.rand(batch, channels, size, size, generator=generator)
        return (image,) if sigma is None else (image, torch.full((batch, 1, 1, 1), sigma))

    return sample


Sample = Callable[[int, torch.Generator, int], tuple[Tensor, ...]]
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Sample]] = {
    "ddpm-cifar10": (_ddpm_cifar10, _noise(3, 32)),
    "conditional": (_conditional, _noise_and_text(32)),
    "dncnn": (lambda: _dncnn(channels=1, features=64, depth=17), _picture(1, 256)),
    "ffdnet": (lambda: _ffdnet(channels=3), _picture(3, 256, 25 / 255)),
    "cunet": (_cunet, _picture(3, 256 + 2 * 28)),  # it cuts off 28 pixels at every side
    "terrain": (_terrain, _heightfield(128)),
    "tiny-unet": (lambda: _ddpm_cifar10((16, 32), 8, 8), _noise(3, 8)),
    "tiny-conditional": (lambda: _conditional((16, 32), 8, 8), _noise_and_text(8, 5)),
    "tiny-dncnn": (lambda: _dncnn(channels=1, features=8, depth=3), _picture(1, 16)),
}
