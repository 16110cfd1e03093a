"""Task routing in the ``blocks`` suite: what a transformer block does beside its products, and whole blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    images,
)
from pydenoise.nn import RoutedDiTBlock, TaskRouting

OURS, EAGER, COMPILED = "ours-routing", "eager-routing", "compiled-routing"
TIMESTEP = 900
BOUNDS = {"fp32": 1e-4}
NAMES = ("attention's input", "feed-forward's input", "result")


@dataclass(frozen=True)
class RoutingBench(Case):
    """One route for tokens [batch, tokens, channels]; ``heads``: a whole block, else all but its products."""

    batch: int = 8
    tokens: int = 256
    channels: int = 1024
    heads: int | None = None

    @property
    def window(self) -> slice:
        """The channels of the route."""
        route = TaskRouting(self.channels).route(TIMESTEP)
        return slice(route.start, route.start + route.width)

    def flops(self) -> float:
        """Of a block's products: q, k and v from the route's channels, attention, the feed-forward part. Else 0."""
        if self.heads is None:
            return 0.0
        window, rows = self.window, self.batch * self.tokens
        weights = self.channels * (3 * (window.stop - window.start) + 9 * self.channels)
        return rows * (2.0 * weights + 4.0 * self.tokens * self.channels)

    def moved_bytes(self) -> float:
        """Of what is beside the products: 8 tensors, and the route's channels of one.

        Norm 1 reads the tokens and writes the route's; norm 2 reads two and writes two; the end reads two, writes one.
        """
        window = self.window
        return 4.0 * self.batch * self.tokens * (8 * self.channels + window.stop - window.start)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float:
        """Of a block its products alone, else bytes alone."""
        if self.heads is not None:
            return self.flops() / peaks.flops(precision)
        return self.moved_bytes() / peaks.bandwidth(int(self.moved_bytes()))

    def describe(self) -> dict:
        shape = [self.batch, self.tokens, self.channels]
        return super().describe() | {"input": shape, "heads": self.heads, "flops": self.flops()}

    def draw(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], Tensor]:
        """(tokens and two updates [B, T, C], shift, scale and gate of both parts [B, C])."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.tokens, self.channels)
        tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
        modulation = torch.randn(6, self.batch, self.channels, generator=generator)
        return tuple(tensors), modulation.to(device, dtype)

    def block(self, restrict: bool = False) -> RoutedDiTBlock:
        """The block with the same random weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return fill_zeros(RoutedDiTBlock(self.channels, self.heads, restrict=restrict)).eval()


def routing_cases(quick: bool = False) -> list[RoutingBench]:
    """Sizes of DiT-S and DiT-L; ``quick``: tiny ones."""
    parts = (Bar((EAGER,), speedup=3.0, subjects=(OURS,)),)
    whole = (Bar((EAGER,), speedup=1.1, subjects=(OURS,)), Bar((COMPILED,), speedup=1.03, subjects=(OURS,)))
    if quick:
        return [
            RoutingBench("2x4x32", "routing parts", "does it run", parts, 2, 4, 32),
            RoutingBench("2x4x32", "routing block", "does it run", whole, 2, 4, 32, 2),
        ]
    return [
        RoutingBench("8x256x1024", "routing parts", "bytes from memory", parts, 8, 256, 1024),
        RoutingBench("2x256x384", "routing parts", "stays in the caches", parts, 2, 256, 384),
        RoutingBench("2x256x1024", "routing block", "DiT-L", whole, 2, 256, 1024, 16),
        RoutingBench("2x256x384", "routing block", "DiT-S", whole, 2, 256, 384, 6),
    ]


# ----------------------------------------------------------------------------------------- what is beside the products


def _our_parts(case: RoutingBench, setting: Setting) -> Contender:
    (x, a, b), (shift1, scale1, gate1, shift2, scale2, gate2) = case.draw(setting.device)
    route = TaskRouting(case.channels).route(TIMESTEP)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        first = PF.routed_norm(x, shift1, scale1, compact=True, **route.options())
        second = PF.routed_norm(x, shift2, scale2, update=a, gate=gate1, **route.options())
        return first.output, second.output, torch.addcmul(second.carried, gate2[:, None], b)

    return _parts(call)


def _eager_parts(case: RoutingBench, setting: Setting, dtype: torch.dtype = torch.float32) -> Contender:
    (x, a, b), (shift1, scale1, gate1, shift2, scale2, gate2) = case.draw(setting.device, dtype)
    mask = TaskRouting(case.channels).mask(TIMESTEP)[:, None].to(x)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        r = mask * x
        first = modulated(r, shift1, scale1)
        r = r + gate1[:, None] * a
        second = modulated(r, shift2, scale2)
        r = r + gate2[:, None] * b
        return first, second, r + (1 - mask) * x

    return _parts(call, case.window)


def _parts(call: Callable[[], tuple[Tensor, ...]], window: slice = slice(None)) -> Contender:
    """``window``: the channels of the first result that are compared; ours has no others."""
    run = torch.no_grad()(call)

    def outputs() -> dict[str, Tensor]:
        first, *others = run()
        return dict(zip(NAMES, map(images, (first[..., window], *others)), strict=True))

    return Contender(run, outputs)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The norm without weights of tokens [B, T, C], times 1 + scale, plus shift, both [B, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


# -------------------------------------------------------------------------------------------------------- whole blocks


class EagerBlock(nn.Module):
    """The published block in torch's operations, on the weights of one of ours."""

    def __init__(self, block: RoutedDiTBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        """``x`` [B, T, C], ``c`` [B, C], ``mask`` [B, C]; [B, T, C]."""
        block = self.block
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, 1)
        m = mask[:, None].to(x.dtype)
        r = m * x
        h = modulated(r, shift1, scale1)
        q, k, v = (p.unflatten(-1, (block.heads, -1)).transpose(1, 2) for p in block.attn.qkv(h).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        r = r + gate1[:, None] * block.attn.proj(h)
        h = block.mlp.fc1(modulated(r, shift2, scale2))
        r = r + gate2[:, None] * block.mlp.fc2(F.gelu(h, approximate="tanh"))
        return r + (1 - m) * x


def _our_block(case: RoutingBench, setting: Setting, restrict: bool = False) -> Contender:
    (x, *_), (c, *_) = case.draw(setting.device)
    block, route = case.block(restrict).to(setting.device), TaskRouting(case.channels).route(TIMESTEP)
    return contender_of(lambda: block(x, c, route))


def _eager_block(
    case: RoutingBench, setting: Setting, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> Contender:
    (x, *_), (c, *_) = case.draw(setting.device, dtype)
    mask = TaskRouting(case.channels).mask(TIMESTEP).expand(case.batch, -1).to(setting.device)
    block = EagerBlock(case.block()).to(setting.device, dtype).eval()
    call = torch.compile(block) if compiled else block
    return contender_of(lambda: call(x, c, mask))


# ----------------------------------------------------------------------------------------------------------- providers


def _of(parts: Callable[..., Contender], block: Callable[..., Contender]):
    """Prepares parts or a block, as the case is."""

    def prepare(case: RoutingBench, setting: Setting) -> Contender:
        return (parts if case.heads is None else block)(case, setting)

    return prepare


def _no_part(case: RoutingBench, setting: Setting) -> Contender:
    raise Skip(NO_PART)


def _restricted(case: RoutingBench, setting: Setting) -> Contender:
    """Another network, so its result is not compared."""
    return Contender(_our_block(case, setting, restrict=True).run, note="another network: only the route's channels")


def _compiled(case: RoutingBench, setting: Setting) -> Contender:
    return _eager_block(case, setting, compiled=True)


PROVIDERS = (
    Provider(OURS, "ours", _of(_our_parts, _our_block), ours=True),
    Provider("restricted-routing", "ours, restricted", _of(_no_part, _restricted), ours=True),
    Provider(EAGER, "eager", _of(_eager_parts, _eager_block)),
    Provider(COMPILED, "inductor", _of(_no_part, _compiled), default=False),
)


def expected_results(case: RoutingBench, setting: Setting) -> Expected:
    """The published operations in float64."""
    eager = _eager_parts if case.heads is None else _eager_block
    return expected_of(eager(case, Setting(setting.threads), torch.float64))
