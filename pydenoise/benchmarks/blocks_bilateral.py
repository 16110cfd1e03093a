"""Cases and providers of the adaptive bilateral filter: time against its naive form, and peaks of memory."""

import json
import subprocess
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.attention_inputs import of_ours
from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import NO_PART, Contender, Provider, Setting, Skip, images
from pydenoise.reference import adaptive_bilateral_filter as reference
from pydenoise.testing.memory import resident_bytes, unsupported

OURS = ("ours-bilateral", "ours-bilateral-triton")
BARS = {False: 25.0, True: 15.0}  # over the naive form: forward, forward and backward
MEMORY_BAR = 50.0
SLOW_TAPS = 20e6  # the naive form takes seconds
# For each tap and channel, and for each tap: what occupies the multiply-add unit (distance, exponent, exp2, sums), two
# operations each. Other additions run beside it.
FORWARD_FLOPS, BACKWARD_FLOPS = (4, 14), (14, 39)


@dataclass(frozen=True)
class BilateralBench(Case):
    """One picture; the widest sigma is ``radius`` pixels. ``training``: forward and backward to image and sigma."""

    size: int = 512
    channels: int = 1
    radius: int = 2
    tile: int = 8
    training: bool = False

    @property
    def taps(self) -> int:
        return self.size**2 * (2 * self.radius + 1) ** 2

    def flops(self) -> float:
        passes = (FORWARD_FLOPS, BACKWARD_FLOPS) if self.training else (FORWARD_FLOPS,)
        return float(self.taps * sum(each * self.channels + once for each, once in passes))

    def moved_bytes(self) -> float:
        """The picture read and written once in each pass."""
        return 4.0 * self.channels * self.size**2 * (5 if self.training else 2)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        return peaks.floor_seconds(self.flops(), self.moved_bytes(), precision)

    def describe(self) -> dict:
        return super().describe() | {
            "input": [1, self.channels, self.size, self.size],
            "radius": self.radius,
            "tile": self.tile,
            "training": self.training,
            "flops": self.flops(),
        }

    def draw(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """(picture, sigmas, incoming gradient)."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.channels, self.size, self.size)
        x, grad = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
        tiles = self.size // self.tile
        sigma = torch.rand(1, tiles, tiles, 3, generator=generator) * 0.5 + 0.4
        sigma[..., :2] *= self.radius
        sigma[0, 0, 0, 0] = self.radius  # read from sigma, the radius is this
        return x.to(device), sigma.to(device), grad.to(device)


def bilateral_cases(quick: bool) -> list[Case]:
    """Forward and training at the radii that occur (1 to 7), gray and colour, and a sigma for every pixel."""
    size = 64 if quick else 512
    rows = [
        ("r2", "the window of a mild filter: least to gain in memory", 1, 2, 8),
        ("r6", "the window of strong noise", 1, 6, 8),
        ("r7", "the largest window of the published model", 1, 7, 8),
        ("rgb r3", "colour", 3, 3, 8),
        ("pixels r3", "a sigma for every pixel", 1, 3, 1),
    ]
    cases: list[Case] = []
    for training in (False, True):
        group = "bilateral training" if training else "bilateral"
        for name, why, channels, radius, tile in rows:
            bars = (Bar(("naive-bilateral",), speedup=BARS[training], subjects=OURS),)
            case = BilateralBench(name, group, why, bars, size, channels, radius, tile, training)
            cases.append(case if case.taps < SLOW_TAPS else _slow(case))
    return cases


def _slow(case: BilateralBench) -> BilateralBench:
    return BilateralBench(
        case.name, case.group, case.why, case.bars, case.size, case.channels, case.radius, case.tile, case.training,
        rounds=3,
    )  # fmt: skip


def naive(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """The filter as one writes it with unfold: every neighbour of every pixel in memory."""
    batch, channels, height, width = x.shape
    side = 2 * radius + 1
    sigma = sigma.repeat_interleave(height // sigma.shape[1], 1).repeat_interleave(width // sigma.shape[2], 2)
    of_x, of_y, of_range = sigma.permute(0, 3, 1, 2).unsqueeze(2).unbind(1)
    patches = F.unfold(F.pad(x, (radius,) * 4, mode="reflect"), side).view(batch, channels, side * side, height, width)
    distance = (patches - x.unsqueeze(2)).square().sum(1)
    place = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype).square()
    rows, columns = place.repeat_interleave(side), place.repeat(side)
    spatial = rows[:, None, None] / (2 * of_y.square()) + columns[:, None, None] / (2 * of_x.square())
    weight = torch.exp(-(distance / (2 * of_range.square()) + spatial))
    weight = weight / (weight.sum(1, keepdim=True) + 1e-8)
    return (weight.unsqueeze(1) * patches).sum(2)


def _prepare(case: Case, setting: Setting, call) -> Contender:
    if not isinstance(case, BilateralBench):
        raise Skip(NO_PART)
    x, sigma, grad = case.draw(setting.device)
    leaves = [t.requires_grad_(case.training) for t in (x, sigma)]

    def run() -> tuple[Tensor, ...]:
        if not case.training:
            with torch.no_grad():
                return (call(*leaves),)
        y = call(*leaves)
        return (y, *torch.autograd.grad(y, leaves, grad))

    names = ("output", "input gradient", "sigma gradient")
    return Contender(run, lambda: dict(zip(names, map(images, run()), strict=False)))


def _ours(backend: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        contender = _prepare(case, setting, lambda x, s: PF.adaptive_bilateral_filter(x, s, backend=backend))
        return of_ours(contender, setting, backend)

    return prepare


def _naive(case: Case, setting: Setting) -> Contender:
    return _prepare(case, setting, lambda x, s: naive(x, s, case.radius))


PROVIDERS = (
    Provider("ours-bilateral", "ours", _ours("cpu"), ours=True),
    Provider("ours-bilateral-triton", "triton", _ours("triton"), ours=True),
    Provider("naive-bilateral", "unfold", _naive),
)
BOUNDS = {"fp32": 2e-5}


def expected_results(case: Case, setting: Setting) -> dict:
    """The float64 results, from the formulas that keep no neighbours."""
    x, sigma, grad = (t.double() for t in case.draw())
    y, norm = reference.adaptive_bilateral_filter(x, sigma, case.radius, True)
    results = {"output": [((Ellipsis,), y)]}
    if case.training:
        grads = reference.adaptive_bilateral_filter_backward(grad, x, sigma, case.radius, y, norm, [True, True])
        results |= {
            name: [((Ellipsis,), g)] for name, g in zip(("input gradient", "sigma gradient"), grads, strict=True)
        }
    return results


# -------------------------------------------------------------------------------------------------- peaks of memory

_CHILD = "import sys; from pydenoise.benchmarks.blocks_bilateral import print_peak; print_peak(*sys.argv[1:])"


def measure_peak(case: BilateralBench, which: str, threads: int = 1) -> int:
    """Bytes that a call of "ours" or "naive" needs beyond its inputs, measured in a fresh process."""
    words = [which, *(str(v) for v in (case.size, case.channels, case.radius, case.tile, int(case.training), threads))]
    done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(which: str, *numbers: str) -> None:
    """What the child does: a small call first, which loads what there is to load, then the peak over what was there."""
    if (reason := unsupported()) is not None:
        raise RuntimeError(reason)
    size, channels, radius, tile, training, threads = map(int, numbers)
    torch.set_num_threads(threads)
    small = BilateralBench("", "", "", (), 32, channels, radius, tile, bool(training))
    large = BilateralBench("", "", "", (), size, channels, radius, tile, bool(training))
    provider = next(p for p in PROVIDERS if p.name == f"{which}-bilateral")
    provider.prepare(small, Setting(threads)).run()
    x, sigma, grad = large.draw()
    leaves = [t.requires_grad_(large.training) for t in (x, sigma)]
    call = PF.adaptive_bilateral_filter if which == "ours" else lambda a, b: naive(a, b, radius)
    before = resident_bytes("VmRSS")
    y = call(*leaves)
    if large.training:
        torch.autograd.grad(y, leaves, grad)
    print(json.dumps(resident_bytes("VmHWM") - before))
