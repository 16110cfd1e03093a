"""The int8 part of bench/gpu.py: every CUDA and Triton row against the reference, then layers of diffusion U-Nets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BACKENDS = ("cuda", "triton")
FLOATS = ("float32", "float16", "bfloat16")


# --------------------------------------------------------------------------------------------------------- correctness


def _products(dtype) -> Iterator[tuple[str, object, Callable, float]]:
    """(op, case, reference, error allowed) of convolutions and matrix products with results of ``dtype``."""
    from pydenoise.reference import int8_conv2d, int8_linear
    from pydenoise.testing import int8 as table

    for case in table.INT8_CONV_CASES:
        error = table.PER_PIXEL_ERROR if case.per_pixel else table.FLOAT_ERROR
        yield "int8_conv2d", case, int8_conv2d.int8_conv2d, error
    for case in table.INT8_LINEAR_CASES:
        yield "int8_linear", case, int8_linear.int8_linear, table.FLOAT_ERROR


def _producers() -> Iterator[tuple[str, object, Callable, bool]]:
    """(op, case, reference, whether codes are exact) of what writes int8."""
    from pydenoise.reference import norm_quantize, quantize
    from pydenoise.testing import int8 as table

    for case in table.QUANTIZE_CASES:
        yield "quantize", case, quantize.quantize, case.activation in ("none", "relu")
    for op, cases in (
        ("group_norm_quantize", table.GROUP_NORM_CASES),
        ("layer_norm_quantize", table.LAYER_NORM_CASES),
    ):
        for case in cases:
            if not case.dynamic and not case.offset:
                yield op, case, lambda *args, op=op: getattr(norm_quantize, op)(*args)[0], False


def _on_cpu(args: tuple, widen: bool) -> list:
    """``args`` on the CPU; float outputs, or the float input where ``widen``, in float64."""
    import torch

    moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    if widen:
        return [moved[0].double(), *(t.double() if i == 0 and _is_float(t) else t for i, t in enumerate(moved[1:]))]
    return [torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in moved]


def _is_float(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def checks(wanted: str) -> Iterator[tuple[str, str | None]]:
    """(name of one check, what is wrong or ``None``); "skipped: ..." where a row cannot take a case."""
    import torch

    from pydenoise.ops import registry
    from pydenoise.testing import int8 as table

    def row_of(op: str, backend: str):
        return next((row for row in registry.rows(op) if row.name == backend), None)

    def attempt(op: str, backend: str, args: tuple, judge: Callable) -> str | None:
        row = row_of(op, backend)
        reason = "no such row" if row is None else row.unsupported(*args)
        if reason is not None:
            return f"skipped: {reason}"
        try:
            result = row.run(*args)
            torch.cuda.synchronize()
            judge(result)
        except Exception as error:  # noqa: BLE001  (the other checks still count)
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return None

    for backend in BACKENDS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32):
            for op, case, reference, error in _products(dtype):
                if wanted in case.name:
                    args = case.args(dtype, "cuda")

                    def judge(y, args=args, reference=reference, error=error):
                        table.assert_output(y, reference(*_on_cpu(args, False)), error=error, what="output")

                    yield f"{op} {case.name} {dtype} {backend}", attempt(op, backend, args, judge)
        for name in FLOATS:
            for op, case, reference, exact in _producers():
                if wanted in case.name:
                    args = case.args(getattr(torch, name), "cuda")

                    def judge(y, args=args, reference=reference, exact=exact, op=op):
                        codes = y[0] if isinstance(y, tuple) else y
                        cpu = _on_cpu(args, not exact)
                        table.assert_codes(codes, reference(*cpu), exact=exact, what="codes")

                    yield f"{op} {case.name} {name} {backend}", attempt(op, backend, args, judge)


# ------------------------------------------------------------------------------------------------------------- timings


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of Stable Diffusion's or SDXL's U-Net, on int8 codes, to bfloat16."""

    name: str
    batch: int
    channels: int
    out_channels: int
    size: int

    def operations(self) -> float:
        """A multiply-add is two."""
        return 2.0 * self.batch * self.size**2 * self.out_channels * self.channels * 9


def layers() -> list[Layer]:
    """The shapes of the specification's bars."""
    shapes = [("SD1.5", c, c, s) for c, s in ((320, 64), (640, 32), (1280, 16), (1280, 8))]
    shapes += [("SDXL", c, c, s) for c, s in ((320, 128), (640, 64), (1280, 32))]
    shapes += [("SD1.5 up", 2560, 1280, 16), ("SDXL up", 1280, 640, 64)]
    return [Layer(f"{n} {c}->{o} {s}x{s} batch {b}", b, c, o, s) for n, c, o, s in shapes for b in (1, 8)]


def providers(layer: Layer, with_compile: bool) -> dict[str, Callable]:
    """Callables that run the layer once: cuDNN in bfloat16, compiled, and our rows on int8 with per-tensor scales."""
    import torch
    import torch.nn.functional as F

    import pydenoise.functional as PF

    last = torch.channels_last
    x = torch.randn(layer.batch, layer.channels, layer.size, layer.size, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=last)
    shape = (layer.out_channels, layer.channels, 3, 3)
    weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02).contiguous(memory_format=last)
    bias = torch.randn(layer.out_channels, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(-128, 128, x.shape, device="cuda", dtype=torch.int8).contiguous(memory_format=last)
    weight_codes = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8).contiguous(memory_format=last)
    scale = torch.full((), 0.02, device="cuda")
    weight_scale = torch.full((layer.out_channels,), 1e-3, device="cuda")
    zero_point = torch.full((), 3, device="cuda", dtype=torch.int32)

    def float_conv():
        return F.conv2d(x, weight, bias, padding=1)

    def ours(backend: str):
        return PF.int8_conv2d(
            codes, weight_codes, scale, weight_scale, input_zero_point=zero_point, bias=bias, padding=1,
            out_dtype=torch.bfloat16, backend=backend,
        )  # fmt: skip

    result = {"cudnn bf16": float_conv}
    if with_compile:
        compiled = torch.compile(lambda x, w, b: F.conv2d(x, w, b, padding=1), mode="max-autotune-no-cudagraphs")
        result["compile bf16"] = lambda: compiled(x, weight, bias)
    return result | {backend: (lambda backend=backend: ours(backend)) for backend in BACKENDS}


def int8_peak(interleaved: Callable, flush) -> float:
    """TOP/s of a large int8 matrix product of torch."""
    import torch

    a = torch.randint(-128, 128, (8192, 8192), device="cuda", dtype=torch.int8)
    b = torch.randint(-128, 128, (8192, 8192), device="cuda", dtype=torch.int8).t()
    ms = interleaved({"int_mm": lambda: torch._int_mm(a, b)}, 10, flush)["int_mm"]
    return 2 * 8192**3 / ms / 1e9


def time_layer(layer: Layer, rounds: int, with_compile: bool, peak: float, interleaved: Callable, flush) -> dict:
    """Milliseconds of every provider that runs, speed-up over the faster bfloat16 one, share of the int8 peak."""
    import torch

    calls, failed = {}, {}
    for name, call in providers(layer, with_compile).items():
        try:
            call()
            torch.cuda.synchronize()
            calls[name] = call
        except Exception as error:  # noqa: BLE001  (one provider's failure must not end the run)
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    ms = interleaved(calls, rounds, flush)
    rival = min(value for name, value in ms.items() if "bf16" in name)
    return {
        "layer": layer.name,
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "speedup_over_bf16": {n: round(rival / v, 3) for n, v in ms.items() if n in BACKENDS},
        "of_int8_peak": {n: round(layer.operations() / v / 1e9 / peak, 3) for n, v in ms.items() if n in BACKENDS},
        "not_run": failed,
    }
