"""The bench cases: one table per suite. Shapes derive from the correctness cases of ``pydenoise.testing``.

A bar says how much faster than a baseline a case is meant to be. Reports show whether it was met; nothing fails on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pydenoise.benchmarks.peaks import Peaks
from pydenoise.ops._arguments import int_tuple
from pydenoise.ops.weighted_conv import explicit_padding, output_size
from pydenoise.testing import CONV_CASES, ConvCase

CONTIGUOUS, CHANNELS_LAST, PUBLISHED = "torch", "torch-channels-last", "published"
ENGINES = ("inductor", "onnxruntime", "openvino")
FP32_OURS = ("ours-module", "ours-cpu", "ours-cpu-packed", "ours-triton", "ours-cuda", "ours-cpu-winograd", "ours-fp32")


@dataclass(frozen=True)
class Bar:
    """What the ``subjects`` (providers of ours) should reach: a speed-up over each of ``against``, or a time.

    ``extra_seconds``: at most so much more than the baseline. ``seconds``: at most so long, whatever the others take.
    ``of_floor``: at least this fraction of the machine's floor. ``peak_bytes``: at most so much memory.
    """

    against: tuple[str, ...] = ()
    speedup: float | None = None
    extra_seconds: float | None = None
    seconds: float | None = None
    of_floor: float | None = None
    peak_bytes: int | None = None
    subjects: tuple[str, ...] = FP32_OURS


@dataclass(frozen=True)
class Case:
    """What every case has: a name, the group that a table shows together, why it is measured, and its bars.

    ``optional``: runs only when a pattern names it and nothing else. ``rounds``: at most so many, where a sample takes
    seconds.
    """

    name: str
    group: str
    why: str
    bars: tuple[Bar, ...] = ()
    optional: bool = field(default=False, kw_only=True)
    rounds: int | None = field(default=None, kw_only=True)

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """The least time that the machine allows, or ``None`` where no arithmetic is meant to be done."""
        return None

    def describe(self) -> dict:
        return {"name": self.name, "group": self.group, "why": self.why}


@dataclass(frozen=True)
class ConvBench(Case):
    """One weighted convolution: inference (forward) or training (forward, backward to every input)."""

    conv: ConvCase | None = None
    training: bool = False
    trainable: bool = False  # the density comes from coefficients that are trained too

    @property
    def output_shape(self) -> tuple[int, ...]:
        conv = self.conv
        stride = int_tuple("stride", conv.stride, conv.dims, minimum=1)
        dilation = int_tuple("dilation", conv.dilation, conv.dims, minimum=1)
        padding = explicit_padding(conv.padding, conv.kernel, stride, dilation)
        size = output_size(conv.size, conv.kernel, stride, padding, dilation)
        return (conv.batch, conv.out_channels, *size)

    def flops(self) -> float:
        """Of the direct algorithm, taps in the padding counted; a backward pass is two more convolutions."""
        conv = self.conv
        taps = _product(conv.kernel) * conv.in_channels // conv.groups
        return 2.0 * _product(self.output_shape) * taps * (3 if self.training else 1)

    def moved_bytes(self, precision: str) -> float:
        """Every operand read once and every result written once per pass."""
        conv = self.conv
        x = conv.batch * conv.in_channels * _product(conv.size)
        y = _product(self.output_shape)
        weight = conv.out_channels * conv.in_channels // conv.groups * _product(conv.kernel)
        elements = x + weight + y * (2 if conv.residual else 1)
        if self.training:  # dx from dy and W; dW from dy and x
            elements += (y + weight + x) + (y + x + weight)
        return elements * (2.0 if precision == "bf16" else 4.0)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        if self.group == "overhead":
            return None
        return peaks.floor_seconds(self.flops(), self.moved_bytes(precision), precision)

    def describe(self) -> dict:
        conv = self.conv
        return super().describe() | {
            "input": [conv.batch, conv.in_channels, *conv.size],
            "output": list(self.output_shape),
            "kernel": list(conv.kernel),
            "groups": conv.groups,
            "activation": conv.activation,
            "residual": conv.residual,
            "training": self.training,
            "trainable_density": self.trainable,
            "flops": self.flops(),
            "bytes_fp32": self.moved_bytes("fp32"),
        }


@dataclass(frozen=True)
class ImportBench(Case):
    """Time of an import in a fresh interpreter that has imported torch already."""

    module: str = "pydenoise"


@dataclass(frozen=True)
class NetworkBench(Case):
    """A whole network on one image: ``build`` names a class of ``pydenoise.models`` and its arguments."""

    model: str = ""
    arguments: tuple[tuple[str, int], ...] = ()
    channels: int = 1
    size: int = 256
    sigma: float | None = None
    layers: tuple[tuple[int, int], ...] = ()  # channels in and out of its 3x3 convolutions
    scale: int = 1  # they work at 1/scale of the picture's resolution

    def flops(self) -> float:
        """Of its convolutions, by the direct algorithm."""
        return 2.0 * (self.size / self.scale) ** 2 * 9 * sum(a * b for a, b in self.layers)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """Arithmetic only: in a network that keeps its activations in the caches, it is what remains."""
        return self.flops() / peaks.flops(precision)

    def describe(self) -> dict:
        return super().describe() | {
            "flops": self.flops(),
            "model": self.model,
            "arguments": dict(self.arguments),
            "input": [1, self.channels, self.size, self.size],
        }


def _product(values) -> int:
    result = 1
    for value in values:
        result *= int(value)
    return result


# -------------------------------------------------------------------------------------------- weighted convolution

_CORRECTNESS = {case.name: case for case in CONV_CASES}


def _conv(like: str, name: str, **changes) -> ConvCase:
    """A bench shape from the correctness case ``like``: no epilogue and channels_last unless ``changes`` say else."""
    defaults = {"strides": "channels_last", "activation": "none", "residual": False, "batch": 1}
    return replace(_CORRECTNESS[like], name=name, **(defaults | changes))


def _square(kernel: int, channels: int, size: int, **changes) -> ConvCase:
    like = {3: "plain", 5: "kernel5", 7: "kernel7"}[kernel]
    batch = changes.get("batch", 1)
    name = f"{kernel}x{kernel} {channels}→{channels} {size}²" + (f" ×{batch}" if batch > 1 else "")
    shape = {"size": (size, size), "in_channels": channels, "out_channels": channels, "padding": kernel // 2}
    return _conv(like, changes.pop("name", name), **shape, **changes)


_NOT_SLOWER = (Bar((CONTIGUOUS, CHANNELS_LAST), speedup=1.0),)


def _inference() -> Iterator[ConvBench]:
    for kernel in (3, 5, 7):
        for channels in (64, 128):
            for size in (64, 128):
                conv = _square(kernel, channels, size)
                yield ConvBench(conv.name, "inference", "a layer at image resolution", _NOT_SLOWER, conv)
    large = _square(3, 64, 256)
    yield ConvBench(large.name, "inference", "activations larger than the caches", _NOT_SLOWER, large)
    for size, channels in ((32, 128), (16, 256), (8, 256)):
        conv = _square(3, channels, size)
        yield ConvBench(conv.name, "inference", "an inner level of a U-Net: weights dominate", _NOT_SLOWER, conv)
    for size, channels in ((32, 128), (16, 256)):
        conv = _square(3, channels, size, batch=8)
        yield ConvBench(conv.name, "inference", "a batch of inner levels", _NOT_SLOWER, conv)


def _training() -> Iterator[ConvBench]:
    bars = (Bar((CONTIGUOUS, CHANNELS_LAST), speedup=1 / 1.05), Bar((PUBLISHED,), speedup=1.0))
    for kernel in (3, 5, 7):
        for channels in (64, 128):
            for trainable in (False, True):
                conv = _square(kernel, channels, 32, batch=8)
                density = "trainable" if trainable else "fixed"
                why = f"forward and backward, {density} density"
                yield ConvBench(f"{conv.name} {density}", "training", why, bars, conv, True, trainable)


def _skinny() -> Iterator[ConvBench]:
    bars = (Bar((CONTIGUOUS, CHANNELS_LAST), speedup=1.5),)
    for like in ("first_rgb", "last_rgb", "first_gray", "last_gray"):
        shape = _CORRECTNESS[like]
        for size in (256, 512):
            name = f"{shape.in_channels}→{shape.out_channels} {size}²"
            yield ConvBench(name, "skinny", shape.why, bars, _conv(like, name, size=(size, size)))


def _winograd() -> Iterator[ConvBench]:
    bars = (Bar((CONTIGUOUS, CHANNELS_LAST), speedup=1.6, subjects=("ours-cpu-winograd",)),)
    for channels, size in ((64, 128), (64, 256), (128, 64), (256, 32)):
        conv = _square(3, channels, size)
        yield ConvBench(conv.name, "winograd", "3x3 with fewer multiplications", bars, conv)


def _epilogue() -> Iterator[ConvBench]:
    for channels, size in ((64, 128), (128, 64)):
        conv = _square(3, channels, size, activation="relu", residual=True)
        yield ConvBench(conv.name, "epilogue", "relu and residual in the same pass", _NOT_SLOWER, conv)


def _depthwise() -> Iterator[ConvBench]:
    for kernel, like in ((3, "depthwise"), (7, "depthwise7")):
        for channels, size in ((64, 128), (128, 64)):
            conv = _square(kernel, channels, size, groups=channels, name=f"{kernel}x{kernel} {channels} {size}²")
            conv = replace(conv, why=_CORRECTNESS[like].why)
            yield ConvBench(conv.name, "depthwise", "one filter per channel: bound by memory", _NOT_SLOWER, conv)


def _large_depthwise() -> Iterator[ConvBench]:
    shapes = {(8, 96, 56): (7, 9, 13, 17, 31), (8, 384, 14): (7, 17, 31), (1, 96, 256): (7, 17, 31)}
    bars = {17: (Bar((CONTIGUOUS, CHANNELS_LAST), speedup=1.3),)}
    why = "large kernels, as learned spacings and ConvNets of large kernels have them"
    for (batch, channels, size), kernels in shapes.items():
        for kernel in kernels:
            name = f"{kernel}x{kernel} {channels} {size}²" + (f" ×{batch}" if batch > 1 else "")
            shape = {"size": (size, size), "kernel": (kernel, kernel), "padding": kernel // 2}
            count = {"batch": batch, "in_channels": channels, "out_channels": channels, "groups": channels}
            conv = _conv("depthwise17", name, **count, **shape)
            yield ConvBench(name, "large-depthwise", why, bars.get(kernel, _NOT_SLOWER), conv)
            if size == 56:
                yield ConvBench(f"{name} trained", "large-depthwise", why, _NOT_SLOWER, conv, True)


def _overhead() -> Iterator[Case]:
    tiny = _square(3, 4, 4, name="1×4×4×4", bias=True)
    bars = (Bar((CONTIGUOUS,), extra_seconds=15e-6),)
    yield ConvBench(tiny.name, "overhead", "the cost of a call beside torch's conv2d", bars, tiny)


def _imports() -> Iterator[Case]:
    bars = (Bar(seconds=0.050, subjects=("import",)),)
    yield ImportBench("pydenoise", "import", "what `import pydenoise` adds to `import torch`", bars, "pydenoise")
    why = "the first use of an op: kernels and op registry"
    yield ImportBench("pydenoise.functional", "import", why, (), "pydenoise.functional")


def weighted_conv_cases(quick: bool = False) -> list[Case]:
    """Suite ``weighted_conv``. ``quick`` gives one tiny case per kind, for a smoke test of the harness."""
    if quick:
        return list(_quick())
    makers = (_inference, _training, _skinny, _winograd, _epilogue, _depthwise, _large_depthwise, _overhead, _imports)
    return [case for maker in makers for case in maker()]


def _quick() -> Iterator[Case]:
    small, training = _square(3, 16, 16), _square(3, 16, 8, batch=2)
    fused = _square(3, 16, 16, activation="relu", residual=True)
    yield ConvBench(small.name, "inference", "smoke test", _NOT_SLOWER, small)
    yield ConvBench(f"{training.name} fixed", "training", "smoke test", _NOT_SLOWER, training, True)
    yield ConvBench(f"{training.name} trainable", "training", "smoke test", _NOT_SLOWER, training, True, True)
    yield ConvBench("3→64 32²", "skinny", "smoke test", (), _conv("first_rgb", "3→64 32²", size=(32, 32)))
    yield ConvBench(fused.name, "epilogue", "smoke test", (), fused)
    yield from _overhead()


# -------------------------------------------------------------------------------------------------------- networks

_NETWORK_BARS = (
    Bar((CHANNELS_LAST,), speedup=1.3, subjects=("ours-fp32",)),
    Bar(ENGINES, speedup=1.0, subjects=("ours-fp32",)),
)


def _chain(*widths: int) -> tuple[tuple[int, int], ...]:
    return tuple(zip(widths[:-1], widths[1:], strict=True))


def network_cases(quick: bool = False) -> list[Case]:
    """Suite ``networks``: image denoisers with random weights (the weights do not change the time)."""
    sizes = (32,) if quick else (256, 512)
    dncnn = (("channels", 1), ("features", 64), ("depth", 17))
    cases: list[Case] = []
    for size in sizes:
        name, why = f"DnCNN gray {size}²", "17 layers of 64 channels at full resolution"
        widths = _chain(1, *[64] * 16, 1)
        cases.append(NetworkBench(name, "networks", why, _NETWORK_BARS, "DnCNN", dncnn, 1, size, layers=widths))
        name, why = f"FFDNet RGB {size}²", "12 layers of 96 channels at half resolution"
        ffdnet = (("channels", 3),)
        widths = _chain(13, *[96] * 11, 12)
        cases.append(
            NetworkBench(name, "networks", why, _NETWORK_BARS, "FFDNet", ffdnet, 3, size, 25 / 255, widths, scale=2)
        )
    return cases
