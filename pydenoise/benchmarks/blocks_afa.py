"""Joined feature maps, ensembles and task routing beside what torch offers: cases, contenders, and their table."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.benchmarks.measure import Timing, interleave, paired_ratio
from pydenoise.models.digits import DigitsUNet
from pydenoise.nn import Ensemble, RoutedDiTBlock, TaskRouting

HIDDEN = 128  # channels that an aggregator's logits are made of
OURS = "pydenoise"


@dataclass(frozen=True)
class BlockCase:
    """One comparison: its name, what makes the calls by name (ours first), and the ratio over ``against`` to reach."""

    name: str
    make: Callable[[], dict[str, Callable[[], object]]]
    against: str
    bar: float | None = None


# ------------------------------------------------------------------------------------------------- feature aggregation


def naive_aggregate(features: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """As it is written down: a convolution, a softmax, a product and a sum."""
    shares = F.conv2d(hidden, weight[:, :, None, None]).softmax(1)
    return (features * shares[:, :, None]).sum(1)


def einsum_aggregate(features: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    shares = F.conv2d(hidden, weight[:, :, None, None]).softmax(1)
    return torch.einsum("bnchw,bnhw->bchw", features, shares)


def aggregate(shape: tuple[int, ...], training: bool, channels_last: bool) -> dict[str, Callable[[], object]]:
    """``shape``: [B, N, C, h, w]."""
    generator = torch.Generator().manual_seed(0)
    batch, maps, channels, *size = shape
    features = torch.randn(shape, generator=generator)
    hidden, grad = torch.randn(batch, HIDDEN, *size, generator=generator), torch.randn(batch, channels, *size)
    weight = torch.randn(maps, HIDDEN, generator=generator) / HIDDEN**0.5
    if channels_last:
        features = features.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        hidden, grad = (t.contiguous(memory_format=torch.channels_last) for t in (hidden, grad))
    leaves = [t.requires_grad_(training) for t in (features, hidden, weight)]

    def call(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad) if training else function(*leaves)

    functions = {OURS: PF.softmax_aggregate, "naive": naive_aggregate, "einsum": einsum_aggregate}
    return {name: call(function) for name, function in functions.items()}


# ------------------------------------------------------------------------------------------------------------ ensembles


def unet(channels: tuple[int, ...]) -> nn.Module:
    """A U-Net of diffusers."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * (len(channels) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(channels) - 1),
    )  # fmt: skip


def ensemble(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> dict[str, Callable[[], object]]:
    """All networks, without aggregators: stacked, in turns inside an ensemble, and called one after the other."""
    torch.manual_seed(0)
    models = [make().eval() for _ in range(count)]
    x, t = torch.randn(shape), torch.full((shape[0],), 500)
    stacked, turns = (Ensemble(models, aggregate="none", method=method) for method in ("stacked", "sequence"))

    def calls() -> list:
        return [model(x, t) for model in models]

    found = {OURS: lambda: stacked(x, t), "turns": lambda: turns(x, t), "calls": calls}
    return {name: _without_gradients(call) for name, call in found.items()}


# --------------------------------------------------------------------------------------------------------- task routing


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def routed_parts(batch: int, tokens: int, channels: int) -> dict[str, Callable[[], object]]:
    """What a block does beside its products: masks, norms, modulation, gates and residual sums."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(batch, tokens, channels, generator=generator) for _ in range(3))
    shift1, scale1, gate1, shift2, scale2, gate2 = torch.randn(6, batch, channels, generator=generator).unbind()
    route, mask = TaskRouting(channels).route(900), TaskRouting(channels).mask(900)[:, None].float()

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        first = PF.routed_norm(x, shift1, scale1, compact=True, **route.options())
        second = PF.routed_norm(x, shift2, scale2, update=a, gate=gate1, **route.options())
        return first.output, second.output, torch.addcmul(second.carried, gate2[:, None], b)

    def modulated(r: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(r, (channels,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        r = mask * x
        first = modulated(r, shift1, scale1)
        r = r + gate1[:, None] * a
        second = modulated(r, shift2, scale2)
        r = r + gate2[:, None] * b
        return first, second, r + (1 - mask) * x

    return {OURS: _without_gradients(ours), "eager": _without_gradients(eager)}


class EagerBlock(nn.Module):
    """The published block in torch's operations, on the weights of one of ours."""

    def __init__(self, block: RoutedDiTBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        block, channels = self.block, x.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, 1)
        m = mask[:, None].to(x.dtype)
        r = m * x
        h = F.layer_norm(r, (channels,), eps=1e-6) * (1 + scale1[:, None]) + shift1[:, None]
        q, k, v = (p.unflatten(-1, (block.heads, -1)).transpose(1, 2) for p in block.attn.qkv(h).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        r = r + gate1[:, None] * block.attn.proj(h)
        h = F.layer_norm(r, (channels,), eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
        r = r + gate2[:, None] * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
        return r + (1 - m) * x


def routed_block(
    batch: int, tokens: int, channels: int, heads: int, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """A whole block, exact and restricted, beside eager torch and, if asked for, torch.compile."""
    torch.manual_seed(0)
    block, narrow = (RoutedDiTBlock(channels, heads, restrict=restrict).eval() for restrict in (False, True))
    narrow.load_state_dict(block.state_dict())
    x, c = torch.randn(batch, tokens, channels), torch.randn(batch, channels)
    routing = TaskRouting(channels)
    route, mask = routing.route(900), routing.mask(900).expand(batch, -1)
    eager = EagerBlock(block).eval()
    found = {
        OURS: lambda: block(x, c, route), "restricted": lambda: narrow(x, c, route), "eager": lambda: eager(x, c, mask)
    }  # fmt: skip
    if compiled:
        fast = torch.compile(eager)
        found["compiled"] = lambda: fast(x, c, mask)
    return {name: _without_gradients(call) for name, call in found.items()}


# ---------------------------------------------------------------------------------------------------------------- table


def _aggregates() -> Iterator[BlockCase]:
    shapes = ((2, 3, 320, 64, 64), (1, 3, 640, 32, 32), (2, 3, 1280, 16, 16), (2, 3, 1280, 8, 8))
    for shape in shapes:
        for training in (False, True):
            for channels_last in (False, True):
                name = f"aggregate {'x'.join(map(str, shape))}" + (" channels_last" if channels_last else "")
                name += ", with backward" if training else ""

                def make(shape=shape, training=training, channels_last=channels_last):
                    return aggregate(shape, training, channels_last)

                yield BlockCase(name, make, "naive", 2.5)


CASES = (
    *_aggregates(),
    BlockCase("digits, 4 networks, batch 1", lambda: ensemble(DigitsUNet, (1, 1, 8, 8), 4), "calls"),
    BlockCase("digits, 4 networks, batch 16", lambda: ensemble(DigitsUNet, (16, 1, 8, 8), 4), "calls"),
    BlockCase("diffusers 32-64, 3 networks", lambda: ensemble(lambda: unet((32, 64)), (1, 3, 32, 32), 3), "calls"),
    BlockCase("diffusers 128-256, 3 networks", lambda: ensemble(lambda: unet((128, 256)), (1, 3, 32, 32), 3), "calls"),
    BlockCase("routing, elementwise 8x256x1024", lambda: routed_parts(8, 256, 1024), "eager", 3.0),
    BlockCase("routing, elementwise 2x256x384", lambda: routed_parts(2, 256, 384), "eager", 3.0),
    BlockCase("routed block 2x256x1024", lambda: routed_block(2, 256, 1024, 16), "eager", 1.1),
    BlockCase("routed block 2x256x384", lambda: routed_block(2, 256, 384, 6), "eager", 1.1),
    BlockCase("routed block, compiled", lambda: routed_block(2, 256, 1024, 16, compiled=True), "compiled", 1.03),
)


@dataclass(frozen=True)
class BlockRow:
    """Best seconds of each contender on a case (of the processor's own time if ``cpu_time``), and ours over theirs."""

    case: BlockCase
    seconds: dict[str, float]
    faster: dict[str, float]

    @property
    def bar_met(self) -> bool | None:
        """``None`` for a case without a bar."""
        return None if self.case.bar is None else self.faster[self.case.against] >= self.case.bar

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in self.seconds.items())
        return f"{self.case.name:>48}: {times}; " + ", ".join(f"{r:.2f}x {name}" for name, r in self.faster.items())


def rows(seconds: float = 4.0, cases: tuple[BlockCase, ...] = CASES, cpu_time: bool = False) -> Iterator[BlockRow]:
    """Time ``cases`` one after the other, contenders interleaved, about ``seconds`` each.

    ``cpu_time``: of the processor's own time, the minima and their ratios; it is what tells something of one thread on
    a machine that others keep busy. Else times are the best, ratios the medians of the rounds' ratios.
    """
    for case in cases:
        timings = interleave(case.make(), rounds=60, budget_seconds=seconds)

        def best(timing: Timing) -> float:
            return min(timing.cpu_seconds) if cpu_time else timing.minimum

        found = {name: best(timing) for name, timing in timings.items()}
        faster = {
            name: found[name] / found[OURS] if cpu_time else paired_ratio(timings[OURS], timing).median
            for name, timing in timings.items() if name != OURS
        }  # fmt: skip
        yield BlockRow(case, found, faster)
