"""Dynamic blocks of continuous U-Nets: fused stages against the same block in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, images
from pydenoise.nn import DynamicBlock
from pydenoise.nn._tableaus import TABLEAUS

OURS = ("ours", "ours-winograd")
BOUNDS = {"fp32": 1e-4}  # of results of eight convolutions in a row, each within what Winograd may be off
CL, NCHW = torch.channels_last, torch.contiguous_format


class PlainDynamicBlock(nn.Module):
    """The block written with torch's modules, one operation after the other: what an eager implementation runs.

    Weights, method and order are those of ``block``, which has no FiLM; gradients flow to its own copies.
    """

    def __init__(self, block: DynamicBlock):
        super().__init__()
        self.tableau, self.n_steps, self.second = TABLEAUS[block.method], block.n_steps, block.order == "second"
        self.residual, self.time_dependent = block.residual, block.time_dependent
        self.norm = nn.InstanceNorm2d(block.channels, eps=block.eps)
        self.activation = nn.Softplus()
        for name in ("conv1", "conv2"):
            own = getattr(block, name)
            size, padding = own.kernel_size, own.kernel_size[0] // 2
            conv = nn.Conv2d(own.in_channels, own.out_channels, size, padding=padding).to(own.weight)
            conv.load_state_dict(own.state_dict())
            setattr(self, name, conv)

    def _with_time(self, x: Tensor, time: float) -> Tensor:
        return torch.cat((x, torch.full_like(x[:, :1], time)), dim=1) if self.time_dependent else x

    def derivative(self, h: Tensor, time: float) -> Tensor:
        x = self.activation(self.conv1(self._with_time(self.norm(h), time)))
        x = self.activation(self.conv2(self._with_time(self.norm(x), time)))
        velocity = h.chunk(2, dim=1)[1]
        if self.residual:
            x = x + (velocity if self.second else h)
        return torch.cat((velocity, x), dim=1) if self.second else x

    def forward(self, h: Tensor) -> Tensor:
        length = 1 / self.n_steps
        for step in range(self.n_steps):
            slopes: list[Tensor] = []
            for row, at in zip(self.tableau.a, self.tableau.c, strict=True):
                point = h
                for weight, slope in zip(row, slopes, strict=False):
                    point = point + length * weight * slope if weight else point
                slopes.append(self.derivative(point, (step + at) * length))
            for weight, slope in zip(self.tableau.b, slopes, strict=True):
                h = h + length * weight * slope if weight else h
        return h


@dataclass(frozen=True)
class DynamicBlockBench(Case):
    """One block on images [batch, channels, size, size]: inference, or forward and backward to input and weights."""

    channels: int = 32
    size: int = 64
    batch: int = 1
    training: bool = False
    order: str = "augmented"

    def flops(self) -> float:
        """Of the convolutions of four evaluations, taps in the padding counted; a backward pass is two more."""
        outputs = self.channels // 2 if self.order == "second" else self.channels
        products = 9 * self.channels * (self.channels + outputs) * self.batch * self.size**2
        return 4 * 2.0 * products * (3 if self.training else 1)

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """Arithmetic of the direct convolutions: everything else is meant to stay in the caches."""
        return self.flops() / peaks.flops(precision)

    def describe(self) -> dict:
        shape = [self.batch, self.channels, self.size, self.size]
        return super().describe() | {
            "input": shape, "training": self.training, "order": self.order, "flops": self.flops()
        }  # fmt: skip


_LEVELS = ((32, 64), (64, 32))  # channels and size of the two finest levels at n_features = 16


def cases(quick: bool = False) -> list[DynamicBlockBench]:
    """Levels of the default network on images of 64 x 64; ``quick``: a tiny block."""
    bar = (Bar(("torch", "torch-channels-last"), speedup=1.5, subjects=OURS),)
    if quick:
        return [DynamicBlockBench("tiny", "dynamic block", "a check that it runs", (), 8, 8, 1)]
    found = [
        DynamicBlockBench(f"{c}x{size}x{size}, batch {batch}", "dynamic block", "a level", bar, c, size, batch)
        for c, size in _LEVELS
        for batch in (1, 4, 8)
    ]
    found.append(
        DynamicBlockBench("second order", "dynamic block", "half of conv2", (), 32, 64, 1, order="second")
    )  # fmt: skip
    for c, size in _LEVELS:
        name = f"{c}x{size}x{size}, batch 4"
        found.append(DynamicBlockBench(name, "dynamic block training", "gradients", (), c, size, 4, True))
    return found


def build_block(case: DynamicBlockBench, dtype: torch.dtype = torch.float32, **options: object) -> DynamicBlock:
    """The block of ``case`` with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = DynamicBlock(case.channels, order=case.order, **options)
    return block.to(dtype).train(case.training)


def block_input(case: DynamicBlockBench, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, case.channels, case.size, case.size, generator=generator).to(dtype)


def _results(module: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    if not training:
        with torch.inference_mode():
            return {"output": module(x)}
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().mean().backward()
    found = {"output": y.detach(), "dx": x.grad}
    for name in ("conv1", "conv2"):
        found[name] = getattr(module, name).weight.grad
    module.zero_grad()
    return found


def _contender(module: nn.Module, x: Tensor, case: DynamicBlockBench, precision: str = "highest") -> Contender:
    def run() -> dict[str, Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return _results(module, x, case.training)
        finally:
            torch.set_float32_matmul_precision(before)

    return Contender(run, lambda: {name: images(value) for name, value in run().items()})


def _ours(precision: str, **options: object) -> Callable[[DynamicBlockBench, Setting], Contender]:
    def prepare(case: DynamicBlockBench, setting: Setting) -> Contender:
        if options and not case.training:
            raise Skip("recomputation is a choice of training")
        x = block_input(case).to(setting.device, memory_format=CL)
        return _contender(build_block(case, **options).to(setting.device), x, case, precision)

    return prepare


def _plain(memory_format: torch.memory_format, compiled: bool = False):
    def prepare(case: DynamicBlockBench, setting: Setting) -> Contender:
        module = PlainDynamicBlock(build_block(case)).to(setting.device, memory_format=memory_format)
        x = block_input(case).to(setting.device, memory_format=memory_format)
        if compiled:
            module.forward = torch.compile(module.forward)
        return _contender(module, x, case)

    return prepare


PROVIDERS = (
    Provider("ours", "ours", _ours("highest"), ours=True),
    Provider("ours-winograd", "ours, Winograd allowed", _ours("high"), ours=True),
    Provider("ours-kept", "ours, nothing recomputed", _ours("highest", recompute=False), ours=True),
    Provider("torch", "torch", _plain(NCHW)),
    Provider("torch-channels-last", "torch CL", _plain(CL)),
    Provider("inductor", "inductor", _plain(CL, compiled=True), default=False),
)


def expected_results(case: DynamicBlockBench, setting: Setting) -> dict:
    """Plain torch in float64."""
    module = PlainDynamicBlock(build_block(case, torch.float64))
    found = _results(module, block_input(case, torch.float64), case.training)
    return {name: [((Ellipsis,), value)] for name, value in found.items()}
