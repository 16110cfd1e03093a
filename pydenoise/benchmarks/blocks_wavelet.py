"""Gated wavelets in the ``blocks`` suite: beside grouped convolutions and slices in torch, and beside a copy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.convolution import Expected
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import (
    NO_PART,
    Contender,
    Provider,
    Setting,
    Skip,
    contender_of,
    expected_of,
    fill_zeros,
)
from pydenoise.nn import WaveletGateDown
from pydenoise.reference import wavelet_gate as reference

OURS, CONVOLUTION = "ours-wavelet", "convolution-wavelet"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Gated = Callable[[bool, Tensor, Tensor], Tensor]  # (up, input, gate)


@dataclass(frozen=True)
class WaveletBench(Case):
    """One call on images of ``shape`` [B, C, H, W]; ``training``: forward and backward.

    ``direction``: "down", "up" (the input has the bands) or "block" (mean, gates and wavelets of a module).
    """

    shape: tuple[int, int, int, int] = (8, 256, 64, 64)
    direction: str = "down"
    training: bool = False
    precision: str = "fp32"
    channels_last: bool = False

    @property
    def up(self) -> bool:
        return self.direction == "up"

    def moved_bytes(self) -> float:
        """What has to be read and written.

        Backward: gradient of the result and input are read, that of the input is written. The mean reads the input too.
        """
        image = torch.Size(self.shape).numel()
        read, written = image, image if self.up else image / 4
        if self.direction == "block":
            read += image
        training = written + 2 * image if self.training else 0
        return DTYPES[self.precision].itemsize * (read + written + training)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float:
        """Bytes alone, at the rate of a copy of as many bytes; provider "copy-wavelet" copies this very input."""
        moved = self.moved_bytes()
        return moved / peaks.bandwidth(int(moved))

    def describe(self) -> dict:
        return super().describe() | {
            "image": list(self.shape),
            "direction": self.direction,
            "training": self.training,
            "dtype": self.precision,
            "channels_last": self.channels_last,
        }

    def draw(self, device: str = "cpu") -> tuple[dict[str, Tensor], WaveletGateDown | None, Tensor | None]:
        """(input and gates or the module's parameters by name, the module of a "block", gradient of the result).

        Input [B, C, H, W], or where ``up`` its bands [B, 4 C, H / 2, W / 2]; gates [B, 4].
        """
        batch, channels, height, width = self.shape
        generator = torch.Generator().manual_seed(0)
        coarse, fine = (height // 2, width // 2), (height, width)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format

        def image(channels: int, size: tuple[int, int]) -> Tensor:
            drawn = torch.randn(batch, channels, *size, generator=generator)
            return drawn.to(device, DTYPES[self.precision], memory_format=layout)

        x = image(4 * channels, coarse) if self.up else image(channels, fine)
        grad = image(channels, fine if self.up else coarse) if self.training else None
        if self.direction != "block":
            return {"input": x, "gate": torch.rand(batch, 4, generator=generator).to(device)}, None, grad
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = fill_zeros(WaveletGateDown(channels)).to(device)
        return {"input": x, **dict(module.named_parameters())}, module, grad


def wavelet_cases(quick: bool = False) -> list[WaveletBench]:
    """Down, up and a whole block. Bars of forward calls in float32: over the convolution, and of the copy's rate."""
    forward = (Bar((CONVOLUTION,), speedup=8.0, subjects=(OURS,)), Bar(of_floor=0.8, subjects=(OURS,)))
    shape = (2, 16, 16, 16) if quick else (8, 256, 64, 64)
    cases = []
    for way in ("down", "up"):
        last = f"{way} channels_last"
        cases += [
            WaveletBench(way, "wavelet", "nothing but bytes", forward, shape, way),
            WaveletBench(last, "wavelet", "adjacent channels", forward, shape, way, channels_last=True),
            WaveletBench(way, "wavelet bf16", "half the bytes", (), shape, way, precision="bf16"),
            WaveletBench(way, "wavelet training", "two passes", (), shape, way, training=True),
        ]
    why = "the mean reads the image once more"
    cases.append(WaveletBench("forward", "wavelet block", why, (), shape, "block"))
    cases.append(WaveletBench("training", "wavelet block", "its gradient joins the image's", (), shape, "block", True))
    return sorted(cases, key=lambda case: case.group)


# --------------------------------------------------------------------------------------------------------- contenders


def _gated(up: bool, x: Tensor, gate: Tensor) -> Tensor:
    return PF.wavelet_gate_up(x, gate) if up else PF.wavelet_gate_down(x, gate)


def _filters(x: Tensor, channels: int) -> Tensor:
    """Haar filters [4 channels, 1, 2, 2], the four of each channel one after the other."""
    signs = torch.tensor(reference.SIGNS, dtype=x.dtype, device=x.device)
    return signs.view(4, 1, 2, 2).mul(0.5).repeat(channels, 1, 1, 1)


def _convolution(up: bool, x: Tensor, gate: Tensor) -> Tensor:
    """A grouped convolution to all bands, times the gates, added up; or the transposed one of gated bands."""
    if not up:
        channels = x.shape[1]
        bands = F.conv2d(x, _filters(x, channels), stride=2, groups=channels).unflatten(1, (channels, 4))
        return (bands * gate[:, None, :, None, None].to(x.dtype)).sum(2)
    channels = x.shape[1] // 4
    gated = (x.unflatten(1, (4, channels)) * gate[:, :, None, None, None].to(x.dtype)).transpose(1, 2).flatten(1, 2)
    return F.conv_transpose2d(gated, _filters(x, channels), stride=2, groups=channels)


def _slices(up: bool, x: Tensor, gate: Tensor) -> Tensor:
    """The bands folded into one factor for each pixel of a block; or pixel_shuffle of mixed bands."""
    if not up:
        factors = gate @ torch.tensor(reference.SIGNS, dtype=gate.dtype, device=gate.device) / 2
        f = factors[..., None, None, None].to(x.dtype)
        upper, lower = x[..., ::2, :], x[..., 1::2, :]
        above = f[:, 0] * upper[..., ::2] + f[:, 1] * upper[..., 1::2]
        return above + f[:, 2] * lower[..., ::2] + f[:, 3] * lower[..., 1::2]
    bands = (x.unflatten(1, (4, -1)) * gate[:, :, None, None, None].to(x.dtype) / 2).unbind(1)
    pixels = [sum(s * b for s, b in zip(column, bands, strict=True)) for column in zip(*reference.SIGNS, strict=True)]
    return F.pixel_shuffle(torch.stack(pixels, 2).flatten(1, 2), 2)


def _result(case: WaveletBench, leaves: Mapping[str, Tensor], module: WaveletGateDown | None, gated: Gated) -> Tensor:
    """Of the call, or of a block from operations of torch, to which autograd adds the mean's gradient on its own."""
    x = leaves["input"]
    return gated(case.up, x, leaves["gate"] if module is None else module.gates(x.mean((2, 3))))


def _case_of(case: Case, precision: str) -> WaveletBench:
    if not isinstance(case, WaveletBench) or case.precision != precision:
        raise Skip(NO_PART)
    return case


def _ours(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        leaves, module, grad = _case_of(case, precision).draw(setting.device)
        if module is None:
            return contender_of(lambda: _gated(case.up, leaves["input"], leaves["gate"]), leaves, grad)
        return contender_of(lambda: module(leaves["input"]), leaves, grad)

    return prepare


def _composed(precision: str, gated: Gated, blocks_only: bool = False):
    def prepare(case: Case, setting: Setting) -> Contender:
        leaves, module, grad = _case_of(case, precision).draw(setting.device)
        if blocks_only and module is None:
            raise Skip(NO_PART)
        return contender_of(lambda: _result(case, leaves, module, gated), leaves, grad)

    return prepare


def _copy(precision: str):
    """A copy of the input to memory that is there already; it computes nothing, so nothing is checked."""

    def prepare(case: Case, setting: Setting) -> Contender:
        source = _case_of(case, precision).draw(setting.device)[0]["input"]
        target = torch.empty_like(source)
        return Contender(lambda: target.copy_(source), note="reads and writes as many bytes as the input has")

    return prepare


def _providers() -> tuple[Provider, ...]:
    found = []
    for precision, end in (("fp32", ""), ("bf16", "-bf16")):
        label = end.replace("-", " ")
        found += [
            Provider(OURS + end, "ours" + label, _ours(precision), precision, ours=True),
            Provider(CONVOLUTION + end, "convolution" + label, _composed(precision, _convolution), precision),
            Provider("slices-wavelet" + end, "slices" + label, _composed(precision, _slices), precision),
            Provider("copy-wavelet" + end, "copy of the input" + label, _copy(precision), precision),
        ]
    return (*found, Provider("apart-wavelet", "mean's gradient apart", _composed("fp32", _gated, blocks_only=True)))


PROVIDERS = _providers()


def expected_results(case: WaveletBench, setting: Setting) -> Expected:
    """The float64 results of plain torch, from the same input."""
    leaves, module, grad = case.draw()
    if module is not None:
        module.double()
    leaves = {name: tensor.double() for name, tensor in leaves.items()}  # a module's parameters are so already

    def gated(up: bool, x: Tensor, gate: Tensor) -> Tensor:
        return reference.wavelet_gate(x, gate, up, case.shape[2:])

    grad = None if grad is None else grad.double()
    return expected_of(contender_of(lambda: _result(case, leaves, module, gated), leaves, grad))
