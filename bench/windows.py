"""Memory of windows: the peak of tensors that live at once, for panoramas of growing width.

Run: python bench/windows.py

The digits denoiser on panoramas [1, 1, 64, W], whole and in windows of 32 x 32, four in a batch. Counted are the bytes
of all storages that operations of torch make and that are still alive, without what kernels take for themselves.
"""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pydenoise.models import load_digits
from pydenoise.samplers import DDIM, NoiseSchedule, OverlappedWindows, Sampler, ShiftedWindows

WIDTHS, WHOLE = (64, 256, 1024, 4096), 256
STEPS = 2
MIB = 2**20


class Peak(TorchDispatchMode):
    """``most`` bytes at once of what operations make within the with-block."""

    def __init__(self):
        super().__init__()
        self.most = self._now = 0
        self._alive: set[int] = set()

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._alive:
            return
        self._alive.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self._count(made)
        return result


def main() -> None:
    """One line for each width and way."""
    model, schedule = load_digits(), NoiseSchedule.linear()
    print(f"{'width':>6} {'sample':>10} {'whole':>10} {'shifted':>10} {'mixed':>10} {'overlapped':>10}   MiB")
    for width in WIDTHS:
        x, peaks = torch.randn(1, 1, 64, width), []
        options = {"wrap": (-1,), "max_batch": 4}
        ways = {
            "whole": model,
            "shifted": ShiftedWindows(model, (32, 32), mix=0.0, **options),
            "mixed": ShiftedWindows(model, (32, 32), mix=1.0, **options),
            "overlapped": OverlappedWindows(model, (32, 32), overlap=16, **options),
        }
        for name, denoiser in ways.items():
            if name == "whole" and width > WHOLE:
                peaks.append("-")
                continue
            watched = [denoiser] if isinstance(denoiser, ShiftedWindows) else []
            sampler = Sampler(denoiser, schedule, DDIM(), STEPS, observers=watched)
            with Peak() as peak:
                sampler.sample(x, seed=0)
            peaks.append(f"{peak.most / MIB:.2f}")
        print(f"{width:>6} {x.nbytes / MIB:>10.2f}", *(f"{value:>10}" for value in peaks), flush=True)


if __name__ == "__main__":
    main()
