"""The cases of the ``unet`` suite: whole networks that int8 is meant for."""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from pydenoise.benchmarks.cases import Bar, Case
from pydenoise.benchmarks.peaks import Peaks
from pydenoise.benchmarks.providers import Skip
from pydenoise.benchmarks.workloads import build_workload


@dataclass(frozen=True)
class UnetBench(Case):
    """A network of ``pydenoise.benchmarks.workloads`` at one batch size."""

    workload: str = ""
    batch: int = 1

    def floor_seconds(self, peaks: Peaks, precision: str) -> float | None:
        """Arithmetic only, at the peak of ``precision``: activations are expected to stay in the caches."""
        work = operations(self.workload, self.batch)
        return None if work is None else work / peaks.flops(precision)

    def describe(self) -> dict:
        work = operations(self.workload, self.batch)
        return super().describe() | {"workload": self.workload, "batch": self.batch, "operations": work}


@lru_cache
def operations(name: str, batch: int) -> float | None:
    """Of the Conv2d and Linear modules, a multiply-add counted as two; attention's own products are not in it.

    ``None`` where the network cannot be built here.
    """
    try:
        workload = build_workload(name, batch)
    except Skip:
        return None
    work = 0.0

    def add(module: nn.Module, _, output: Tensor) -> None:
        nonlocal work
        work += 2.0 * output.numel() * module.weight[0].numel()

    network = workload.network.to("meta")
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    network(*(tensor.to("meta") for tensor in workload.inputs))
    return work


def _bars(int8: float, fp32: float | None = None) -> tuple[Bar, ...]:
    bars = [Bar(("openvino-int8",), speedup=int8, subjects=("ours-int8",))]
    if fp32 is not None:
        bars.append(Bar(("openvino",), speedup=fp32, subjects=("ours-fp32",)))
    return tuple(bars)


def unet_cases(quick: bool = False) -> list[Case]:
    """Suite ``unet``. ``quick`` gives tiny networks of the same kinds, for a smoke test."""
    if quick:
        rows = [("tiny-unet", 1), ("tiny-conditional", 1), ("tiny-dncnn", 1)]
        return [UnetBench(name, "unet", "smoke test", (), name, batch) for name, batch in rows]
    ddpm, image = "DDPM CIFAR-10 U-Net, 35.7 M parameters", "an image network at full size"
    real = "a network that people run"
    return [
        UnetBench("A1", "unet", f"{ddpm}: small maps, weights dominate", _bars(1.25), "ddpm-cifar10", 1),
        UnetBench("A8", "unet", f"{ddpm}: a batch", _bars(1.25), "ddpm-cifar10", 8),
        UnetBench("B", "unet", "text-conditional U-Net: transformer blocks", _bars(1.25), "conditional", 1),
        UnetBench("C", "unet", "DnCNN, 17 layers of 64 channels at 256²", _bars(1.05, 1.2), "dncnn", 1),
        UnetBench("FFDNet", "unet", f"{image}: 12 layers of 96 channels", _bars(1.0), "ffdnet", 1),
        UnetBench("cunet", "unet", f"{real}: waifu2x, two cascaded U-Nets", _bars(1.0), "cunet", 1),
        UnetBench("terrain", "unet", f"{real}: consistency U-Net for heightfields", _bars(1.0), "terrain", 1),
    ]
