"""Gated wavelets beside what torch offers for them: cases, contenders, and the table of both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.measure import interleave, paired_ratio
from pydenoise.nn import WaveletGateDown
from pydenoise.reference.wavelet_gate import SIGNS

SHAPE = (8, 256, 64, 64)  # of the image
OVER_CONVOLUTION, OF_COPY = 8.0, 0.8  # what forward calls in float32 are meant to reach


@dataclass(frozen=True)
class WaveletCase:
    """One call: ``direction`` "down", "up" or "block" (mean, gates and wavelets of a module); with gradients or not."""

    name: str
    direction: str
    training: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def moved(self, image: int) -> float:
        """Elements that have to be read and written, where the image has so many.

        Backward: gradient of the result and input are read, that of the input is written. The mean reads the input too.
        """
        read, written = (image, image) if self.direction == "up" else (image, image / 4)
        if self.direction == "block":
            read += image
        return read + written + (written + 2 * image if self.training else 0)


CASES = (
    WaveletCase("down fp32", "down"),
    WaveletCase("up fp32", "up"),
    WaveletCase("down fp32 channels_last", "down", channels_last=True),
    WaveletCase("up fp32 channels_last", "up", channels_last=True),
    WaveletCase("down bf16", "down", dtype=torch.bfloat16),
    WaveletCase("up bf16", "up", dtype=torch.bfloat16),
    WaveletCase("down fp32, with backward", "down", training=True),
    WaveletCase("up fp32, with backward", "up", training=True),
    WaveletCase("block fp32", "block"),
    WaveletCase("block fp32, with backward", "block", training=True),
)


# ------------------------------------------------------------------------------------------------------ contenders


def _ours(up: bool, x: Tensor, gate: Tensor) -> Tensor:
    return PF.wavelet_gate_up(x, gate) if up else PF.wavelet_gate_down(x, gate)


def _filters(x: Tensor, channels: int) -> Tensor:
    """Haar filters [4 channels, 1, 2, 2], the four of each channel one after the other."""
    return torch.tensor(SIGNS, dtype=x.dtype).view(4, 1, 2, 2).mul(0.5).repeat(channels, 1, 1, 1)


def _convolution(up: bool, x: Tensor, gate: Tensor) -> Tensor:
    """A grouped convolution to all bands, times the gates, added up; or the transposed one of gated bands."""
    if not up:
        channels = x.shape[1]
        bands = F.conv2d(x, _filters(x, channels), stride=2, groups=channels).unflatten(1, (channels, 4))
        return (bands * gate[:, None, :, None, None].to(x.dtype)).sum(2)
    channels = x.shape[1] // 4
    gated = (x.unflatten(1, (4, channels)) * gate[:, :, None, None, None].to(x.dtype)).transpose(1, 2).flatten(1, 2)
    return F.conv_transpose2d(gated, _filters(x, channels), stride=2, groups=channels)


def _factors(gate: Tensor) -> Tensor:
    return gate @ torch.tensor(SIGNS, dtype=gate.dtype) / 2


def _slices(up: bool, x: Tensor, gate: Tensor) -> Tensor:
    """The bands folded into one factor for each pixel of a block; or pixel_shuffle of mixed bands."""
    if not up:
        f = _factors(gate)[..., None, None, None].to(x.dtype)
        upper, lower = x[..., ::2, :], x[..., 1::2, :]
        return (
            f[:, 0] * upper[..., ::2]
            + f[:, 1] * upper[..., 1::2]
            + f[:, 2] * lower[..., ::2]
            + f[:, 3] * lower[..., 1::2]
        )
    bands = (x.unflatten(1, (4, -1)) * gate[:, :, None, None, None].to(x.dtype) / 2).unbind(1)
    pixels = [sum(s * b for s, b in zip(column, bands, strict=True)) for column in zip(*SIGNS, strict=True)]
    return F.pixel_shuffle(torch.stack(pixels, 2).flatten(1, 2), 2)


def _copy_of(x: Tensor) -> Callable[[], object]:
    """A copy to memory that is there already."""
    source, target = x.detach(), torch.empty_like(x.detach())
    return lambda: target.copy_(source)


COMPUTING: dict[str, Callable[[bool, Tensor, Tensor], Tensor]] = {
    "pydenoise": _ours,
    "convolution": _convolution,
    "slices": _slices,
}
PROVIDERS = (*COMPUTING, "apart", "copy")


def calls(case: WaveletCase, shape: tuple[int, ...] = SHAPE) -> dict[str, Callable[[], object]]:
    """What computes ``case`` on an image of ``shape`` [B, C, H, W], by name; "copy" only moves the input."""
    batch, channels, height, width = shape
    up = case.direction == "up"
    generator = torch.Generator().manual_seed(0)
    size = (batch, 4 * channels, height // 2, width // 2) if up else shape
    x = torch.randn(size, generator=generator).to(case.dtype)
    x = x.contiguous(memory_format=torch.channels_last) if case.channels_last else x
    gate = torch.rand(batch, 4, generator=generator)
    if case.direction == "block":
        return _block_calls(case, x)
    x.requires_grad_(case.training), gate.requires_grad_(case.training)
    grad = torch.randn_like(_ours(up, x, gate)) if case.training else None

    def call(function: Callable) -> Callable[[], object]:
        def run() -> object:
            y = function(up, x, gate)
            return torch.autograd.grad(y, (x, gate), grad) if case.training else y

        return run

    return {name: call(function) for name, function in COMPUTING.items()} | {"copy": _copy_of(x)}


def _block_calls(case: WaveletCase, x: Tensor) -> dict[str, Callable[[], object]]:
    """The module, and the same from torch's operations, with the mean's gradient added in a pass of its own."""
    module = WaveletGateDown(x.shape[1]).requires_grad_(case.training)
    x.requires_grad_(case.training)
    grad = torch.randn_like(module(x).detach())

    def call(function: Callable) -> Callable[[], object]:
        def run() -> object:
            y = function()
            return torch.autograd.grad(y, (x, *module.parameters()), grad) if case.training else y

        return run

    def composed(function: Callable) -> Callable[[], object]:
        return call(lambda: function(False, x, module.gates(x.mean((2, 3)))))

    found = {"pydenoise": call(lambda: module(x)), "apart": composed(_ours)}
    found |= {name: composed(COMPUTING[name]) for name in ("convolution", "slices")}
    return found | {"copy": _copy_of(x)}


# ----------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class WaveletRow:
    """Best seconds of each contender on a case, how many times faster ours is, and its rate over that of a copy."""

    case: WaveletCase
    seconds: dict[str, float]
    faster: dict[str, float]
    of_copy: float

    @property
    def bars_met(self) -> dict[str, bool]:
        """What the case is meant to reach; empty for those without bars."""
        if self.case.training or self.case.direction == "block" or self.case.dtype != torch.float32:
            return {}
        return {"convolution": self.faster["convolution"] >= OVER_CONVOLUTION, "copy": self.of_copy >= OF_COPY}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self.seconds.items())
        ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in self.faster.items() if name != "copy")
        return f"{self.case.name:>26}: {times}; {ratios}; {self.of_copy:.0%} of a copy's rate"


def rows(
    shape: tuple[int, ...] = SHAPE, seconds: float = 6.0, cases: tuple[WaveletCase, ...] = CASES
) -> Iterator[WaveletRow]:
    """Time ``cases`` one after the other, contenders interleaved, about ``seconds`` each."""
    image = torch.Size(shape).numel()
    for case in cases:
        timings = interleave(calls(case, shape), rounds=200, budget_seconds=seconds)
        best = {name: timing.minimum for name, timing in timings.items()}
        ratios = {
            name: paired_ratio(timings["pydenoise"], timing).median
            for name, timing in timings.items() if name != "pydenoise"
        }  # fmt: skip
        rate = case.moved(image) / (2 * image) * ratios["copy"]
        yield WaveletRow(case, best, ratios, rate)
