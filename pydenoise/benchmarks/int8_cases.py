"""The cases of the ``int8-layers`` suite: single layers of diffusion U-Nets, and the producers of their int8 inputs."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
ONEDNN = "onednn-int8"
PACKED = ("ours-cpu-packed",)
_CONV_BARS = (Bar((ONEDNN,), speedup=1.0, subjects=PACKED), Bar(of_floor=0.85, subjects=PACKED))
_NOT_SLOWER = (Bar((ONEDNN,), speedup=1.0, subjects=PACKED),)


@dataclass(frozen=True)
class Int8Conv(Case):
    """A convolution of int8 codes (affine, one scale) to float32; floats read and write their own dtype."""

    batch: int = 1
    channels: int = 128
    out_channels: int = 128
    size: int = 32
    kernel: int = 3
    stride: int = 1

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch, self.out_channels, size, size

    def operations(self) -> float:
        """A multiply-add is two; taps in the padding counted."""
        batch, channels, height, width = self.output_shape
        return 2.0 * batch * height * width * channels * self.channels * self.kernel**2

    def moved_bytes(self, precision: str) -> float:
        """Every operand read once and the result written once."""
        batch, channels, height, width = self.output_shape
        read = self.batch * self.channels * self.size**2 + self.channels * channels * self.kernel**2
        written = batch * channels * height * width * (2 if precision == "bf16" else 4)
        return read * BYTES[precision] + written

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        return peaks.floor_seconds(self.operations(), self.moved_bytes(precision), precision)

    def describe(self) -> dict:
        shape = {"input": [self.batch, self.channels, self.size, self.size], "output": list(self.output_shape)}
        return super().describe() | shape | {"kernel": self.kernel, "operations": self.operations()}


@dataclass(frozen=True)
class Int8Linear(Case):
    """A linear layer: tokens [1, L, K] times weight [O, K]."""

    tokens: int = 256
    features: int = 256
    out_features: int = 256

    def operations(self) -> float:
        return 2.0 * self.tokens * self.features * self.out_features

    def moved_bytes(self, precision: str) -> float:
        read = self.features * (self.tokens + self.out_features)
        return read * BYTES[precision] + self.tokens * self.out_features * (2 if precision == "bf16" else 4)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        return peaks.floor_seconds(self.operations(), self.moved_bytes(precision), precision)

    def describe(self) -> dict:
        shape = {"input": [1, self.tokens, self.features], "output": [1, self.tokens, self.out_features]}
        return super().describe() | shape | {"operations": self.operations()}


@dataclass(frozen=True)
class Int8Norm(Case):
    """Group normalisation of 32 groups and SiLU, then quantization; torch's part ends before the quantization."""

    batch: int = 1
    channels: int = 128
    size: int = 32

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """Movement only: float32 (or bfloat16) read once, the result written once."""
        elements = self.batch * self.channels * self.size**2
        read, written = {"int8": (4, 1), "fp32": (4, 4), "bf16": (2, 2)}[precision]
        moved = elements * (read + written)
        return moved / peaks.bandwidth(moved)

    def describe(self) -> dict:
        return super().describe() | {"input": [self.batch, self.channels, self.size, self.size], "groups": 32}


def int8_cases(quick: bool = False) -> list[Case]:
    """Suite ``int8-layers``. ``quick`` gives one tiny case per kind."""
    if quick:
        return [
            Int8Conv("3x3 32→32 8²", "conv", "smoke test", _NOT_SLOWER, 1, 32, 32, 8),
            Int8Linear("16×32→48", "linear", "smoke test", _NOT_SLOWER, 16, 32, 48),
            Int8Norm("64 8²", "norm", "smoke test", (), 1, 64, 8),
        ]
    return [*_small_unets(), *_stable_diffusion(), *_linear(), *_norms()]


def _conv(group: str, why: str, bars, channels: int, size: int, batch: int = 1, **changes: int) -> Int8Conv:
    out, kernel, stride = (changes.get(k, d) for k, d in (("out", channels), ("kernel", 3), ("stride", 1)))
    name = f"{kernel}x{kernel} {channels}→{out} {size}²" + (f" /{stride}" if stride > 1 else "")
    name += f" ×{batch}" if batch > 1 else ""
    return Int8Conv(name, group, why, bars, batch, channels, out, size, kernel, stride)


def _small_unets() -> Iterator[Case]:
    for batch in (1, 8):
        for channels, size in ((128, 32), (256, 16), (256, 8)):
            yield _conv("conv", "a level of a small U-Net", _CONV_BARS, channels, size, batch)
    yield _conv("conv", "an image network", _CONV_BARS, 64, 64)
    yield _conv("conv", "an image network: activations beyond the caches", _CONV_BARS, 64, 256)
    yield _conv("conv", "the lowest level of a small U-Net: bound by its weights", _NOT_SLOWER, 256, 4)
    yield _conv("conv", "after a skip connection", _NOT_SLOWER, 512, 16, out=256)
    yield _conv("conv", "a shortcut after a skip connection", _NOT_SLOWER, 384, 32, out=128, kernel=1)
    yield _conv("conv", "downsampling", _NOT_SLOWER, 128, 32, stride=2)


def _stable_diffusion() -> Iterator[Case]:
    for name, levels in (
        ("SD 1.5", ((320, 64), (640, 32), (1280, 16), (1280, 8))),
        ("SDXL", ((320, 128), (640, 64), (1280, 32))),
    ):
        for channels, size in levels:
            yield _conv(f"conv {name}", f"a level of {name}", _NOT_SLOWER, channels, size)
    yield _conv("conv SD 1.5", "guidance: conditional and unconditional at once", _NOT_SLOWER, 640, 32, 2)


def _linear() -> Iterator[Case]:
    shapes = (
        (256, 256, 256, "attention of a small U-Net"),
        (1024, 128, 1024, "GEGLU of a small conditional U-Net"),
        (256, 1024, 256, "the way back from GEGLU"),
        (77, 256, 512, "keys of a text"),
        (4096, 320, 320, "SD 1.5, first level"),
        (4096, 320, 2560, "SD 1.5, GEGLU"),
        (1024, 640, 640, "SD 1.5, second level"),
        (256, 1280, 1280, "SD 1.5, third level"),
        (4096, 640, 5120, "SDXL, GEGLU"),
        (1024, 1280, 10240, "SDXL, GEGLU of the lowest level"),
        (1024, 5120, 1280, "SDXL, the way back"),
    )
    for tokens, features, out, why in shapes:
        yield Int8Linear(f"{tokens}×{features}→{out}", "linear", why, _NOT_SLOWER, tokens, features, out)


def _norms() -> Iterator[Case]:
    bars = (Bar(("torch", "torch-channels-last"), speedup=1.0, subjects=("ours-cpu",)),)
    for channels, size, batch in (
        (128, 32, 1), (256, 16, 1), (256, 8, 1), (128, 32, 8), (256, 16, 8), (320, 64, 1), (640, 32, 1), (1280, 16, 1),
    ):  # fmt: skip
        name = f"{channels} {size}²" + (f" ×{batch}" if batch > 1 else "")
        yield Int8Norm(name, "norm", "the producer of a layer's input", bars, batch, channels, size)
