"""What the machine can do, measured in the same run as the cases: the floors are made of these numbers.

Arithmetic comes from the compiled extension's register-only loops where it is built; otherwise a large matrix product
of torch stands in for it (and is labelled so), which understates the peak and so flatters the fraction of the floor.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from pydenoise._native import extension

COPY_SET_BYTES = (1 << 20, 12 << 20, 192 << 20)  # source plus destination: about L2, L3 and memory of common machines
GPU_COPY_SET_BYTES = (1 << 30,)
ARITHMETIC = {"fma_f32": torch.float32, "bf16_dot": torch.bfloat16, "vnni_dot": torch.int8}


@dataclass
class Peaks:
    """FLOP/s in float32 and bfloat16, bytes/s (read plus written) of a copy by working-set size in bytes, int8 op/s.

    An int8 multiply-add counts as two operations.
    """

    fma_f32: float
    bf16_dot: float
    copy: dict[int, float]
    source: dict[str, str] = field(default_factory=dict)
    vnni_dot: float = 0.0

    def flops(self, precision: str) -> float:
        return {"fp32": self.fma_f32, "bf16": self.bf16_dot, "int8": self.vnni_dot}[precision]

    def bandwidth(self, working_set: int) -> float:
        """Bytes/s of the smallest measured set that is at least as large as ``working_set`` (else of the largest).

        A larger set that was copied faster counts too: only a busy machine makes a small set slower.
        """
        fitting = [rate for size, rate in self.copy.items() if size >= working_set]
        return max(fitting, default=self.copy[max(self.copy)])

    def floor_seconds(self, flops: float, moved_bytes: float, precision: str) -> float:
        """The larger of arithmetic at the peak and data movement at the bandwidth of that working set."""
        return max(flops / self.flops(precision), moved_bytes / self.bandwidth(int(moved_bytes)))

    def merged(self, other: "Peaks") -> "Peaks":
        """The better of two measurements: noise only ever lowers a peak."""
        copy = {size: max(rate, other.copy[size]) for size, rate in self.copy.items()}
        best = {kind: max(getattr(self, kind), getattr(other, kind)) for kind in ARITHMETIC}
        return Peaks(**best, copy=copy, source=self.source)

    def to_dict(self) -> dict:
        fields = asdict(self)
        fields["copy"] = {str(size): rate for size, rate in self.copy.items()}
        return fields


def measure_peaks(threads: int, device: str = "cpu", seconds: float = 0.3) -> Peaks:
    """Measure all peaks, about ``seconds`` each."""
    source = {"copy": "torch copy_, bytes read plus bytes written"}
    native = extension().module if device == "cpu" and extension().loaded else None
    rates = {}
    for kind, dtype in ARITHMETIC.items():
        if native is not None:
            rates[kind] = float(native.measure_peak(kind, seconds, threads))
            source[kind] = "pydenoise._C.measure_peak: multiply-adds on registers, all threads"
        if not rates.get(kind):  # not built, or the processor has no such instruction
            rates[kind] = _matmul_rate(dtype, device, seconds)
            source[kind] = f"torch {dtype} matrix product (stand-in, below the peak)".replace("torch.", "")
    sizes = COPY_SET_BYTES if device == "cpu" else GPU_COPY_SET_BYTES
    return Peaks(**rates, copy={n: _copy_rate(n, device, seconds) for n in sizes}, source=source)


def _matmul_rate(dtype: torch.dtype, device: str, seconds: float) -> float:
    n = 1024 if device == "cpu" else 8192
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, (n, n), device=device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / _best_seconds(lambda: torch._int_mm(a, b), device, seconds)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def _copy_rate(working_set: int, device: str, seconds: float) -> float:
    source = torch.ones(working_set // 8, device=device)
    target = torch.empty_like(source)
    return working_set / _best_seconds(lambda: target.copy_(source), device, seconds)


def _best_seconds(call, device: str, seconds: float) -> float:
    """Best seconds per call over ``seconds``, in samples so short that some escape the neighbours."""
    best, inner = float("inf"), 1
    call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        if device != "cpu":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        best = min(best, taken / inner)
        if taken < 1e-4:
            inner *= 2
    return best
