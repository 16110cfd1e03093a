"""Providers of the ``int8-layers`` suite, and their float64 reference.

All of them compute the same numbers: int8 codes with one affine scale and int8 weights with a scale per output channel;
float providers get both dequantized beforehand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise import functional as PF
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.convolution import DTYPES, Expected
from pydenoise.benchmarks.int8_cases import Int8Conv, Int8Linear, Int8Norm
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, cpu_only, gpu_only, images
from pydenoise.ops import int8_conv2d, int8_linear
from pydenoise.ops.registry import BackendUnavailable

SCALE, ZERO_POINT = 0.023, -101  # of a SiLU's output with values up to about 5
GROUPS = 32
REFERENCE_OPERATIONS = 6e9  # larger results are checked on bands of rows only
BAND_ROWS = 8


@dataclass
class Problem:
    """Codes, weight, per-channel weight scale and bias of a convolution or linear layer."""

    case: Int8Conv | Int8Linear
    codes: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    @property
    def is_conv(self) -> bool:
        return isinstance(self.case, Int8Conv)

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.case.stride, "padding": self.case.kernel // 2} if self.is_conv else {}

    def dequantized(self, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias as floats, in ``memory_format`` where they are images."""
        shape = (-1,) + (1,) * (self.weight.dim() - 1)
        x = (self.codes.float() - ZERO_POINT) * SCALE
        weight = self.weight.float() * self.weight_scale.view(shape)
        tensors = x.to(dtype), weight.to(dtype)
        if self.is_conv:
            tensors = tuple(tensor.contiguous(memory_format=memory_format) for tensor in tensors)
        return (*tensors, self.bias.to(dtype))


def _problem(case: Case, setting: Setting) -> Problem:
    generator = torch.Generator().manual_seed(0)
    if isinstance(case, Int8Conv):
        shape = (case.batch, case.channels, case.size, case.size)
        weight_shape = (case.out_channels, case.channels, case.kernel, case.kernel)
    elif isinstance(case, Int8Linear):
        shape, weight_shape = (1, case.tokens, case.features), (case.out_features, case.features)
    else:
        raise Skip("no part of this case")
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, weight_shape, generator=generator, dtype=torch.int8)
    if codes.dim() == 4:
        codes, weight = (t.contiguous(memory_format=torch.channels_last) for t in (codes, weight))
    weight_scale = torch.rand(weight_shape[0], generator=generator) * 1e-3 + 1e-4
    bias = torch.randn(weight_shape[0], generator=generator)
    return Problem(case, *(tensor.to(setting.device) for tensor in (codes, weight, weight_scale, bias)))


def _contender(call: Callable[[], Tensor], finish: Callable[[Tensor], Tensor] = lambda y: y) -> Contender:
    """``finish`` turns the result into floats for the check; it is not timed."""

    def run() -> Tensor:
        with torch.inference_mode():
            return call()

    return Contender(run, lambda: {"output": images(finish(run()))})


def _norm_input(case: Case, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(case, Int8Norm):
        raise Skip("no part of this case")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.size, case.size, generator=generator) * 3 + 1
    weight, bias = (torch.randn(case.channels, generator=generator) for _ in range(2))
    return tuple(tensor.to(setting.device) for tensor in (x, weight, bias))


# ------------------------------------------------------------------------------------------------------------ ours


def _available(setting: Setting, backend: str) -> None:
    (cpu_only if backend == "cpu" else gpu_only)(setting)


def _checked(contender: Contender) -> Contender:
    try:
        contender.run()
    except BackendUnavailable as error:
        raise Skip(str(error)) from error
    return contender


def _ours(backend: str):
    """The functionals: weights are packed at every call. Norms: codes with one scale."""

    def prepare(case: Case, setting: Setting) -> Contender:
        _available(setting, backend)
        if isinstance(case, Int8Norm):
            return _checked(_our_norm(case, setting, backend))
        p = _problem(case, setting)
        op = PF.int8_conv2d if p.is_conv else PF.int8_linear
        rest = {"input_zero_point": ZERO_POINT, "bias": p.bias, "backend": backend, **p.geometry}
        return _checked(_contender(lambda: op(p.codes, p.weight, SCALE, p.weight_scale, **rest)))

    return prepare


def _our_norm(case: Int8Norm, setting: Setting, backend: str) -> Contender:
    x, weight, bias = _norm_input(case, setting)
    x = x.contiguous(memory_format=torch.channels_last)
    scale, zero_point = _norm_quantization(x, weight, bias)

    def call() -> Tensor:
        return PF.group_norm_silu_quantize(x, GROUPS, weight, bias, scale=scale, zero_point=zero_point, backend=backend)

    return _contender(call, lambda codes: (codes.float() - zero_point) * scale)


def _norm_quantization(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, int]:
    low, high = F.silu(F.group_norm(x, GROUPS, weight, bias)).aminmax()
    scale = (high.item() - low.item()) / 255
    return scale, round(-128 - low.item() / scale)


def _ours_dynamic(backend: str):
    """Scales per pixel or token: norms that find them, convolutions that rescale every tap."""

    def prepare(case: Case, setting: Setting) -> Contender:
        _available(setting, backend)
        if isinstance(case, Int8Norm):
            x, weight, bias = _norm_input(case, setting)
            x = x.contiguous(memory_format=torch.channels_last)
            contender = _contender(
                lambda: PF.group_norm_silu_quantize(x, GROUPS, weight, bias, backend=backend),
                lambda result: (result[0].float() - result[2]) * result[1],
            )
            return _checked(contender)
        p = _problem(case, setting)
        packed = _pack(p)
        shape = (p.codes.shape[0], 1, *p.codes.shape[2:]) if p.is_conv else (*p.codes.shape[:-1], 1)
        scale = torch.full(shape, SCALE, device=setting.device)
        zero_point = torch.full(shape, ZERO_POINT, dtype=torch.int32, device=setting.device)
        return _checked(_contender(_packed_call(p, packed, scale, zero_point, torch.float32, None, None)))

    return prepare


def _ours_packed(out_dtype: torch.dtype):
    """What the modules run: the weight packed once. With int8 results the next layer's scale is known."""

    def prepare(case: Case, setting: Setting) -> Contender:
        cpu_only(setting)
        p = _problem(case, setting)
        packed = _pack(p)
        scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int32)
        if out_dtype != torch.int8:
            return _contender(_packed_call(p, packed, scale, zero_point, out_dtype, None, None))
        with torch.inference_mode():
            reach = _packed_call(p, packed, scale, zero_point, torch.float32, None, None)().abs().max() / 127
        call = _packed_call(p, packed, scale, zero_point, out_dtype, reach, None)
        return _contender(call, lambda codes: codes.float() * reach)

    return prepare


def _pack(p: Problem):
    if p.is_conv:
        packed = int8_conv2d.pack(p.weight, (p.case.stride,) * 2, (1, 1), 1)
    else:
        packed = int8_linear.pack(p.weight)
    if packed is None:
        raise Skip("nothing is packed here: the compiled CPU kernels are not available")
    return packed


def _packed_call(p: Problem, packed, scale, zero_point, out_dtype, out_scale, out_zero_point) -> Callable[[], Tensor]:
    output = (out_dtype, out_scale, out_zero_point)
    if p.is_conv:
        padding = (p.case.kernel // 2,) * 4
        rest = (scale, p.weight_scale, zero_point, p.bias, padding, None, None, None, "none", *output, 1)
        return lambda: int8_conv2d.int8_conv2d_packed(p.codes, packed, *rest)
    rest = (scale, p.weight_scale, zero_point, p.bias, None, "none", *output)
    return lambda: int8_linear.int8_linear_packed(p.codes, packed, *rest)


# ----------------------------------------------------------------------------------------------------------- torch


def _torch(precision: str, memory_format: torch.memory_format):
    """Float layers, and group_norm with SiLU: half of what a producer of ours does."""

    def prepare(case: Case, setting: Setting) -> Contender:
        if isinstance(case, Int8Norm):
            x, weight, bias = (tensor.to(DTYPES[precision]) for tensor in _norm_input(case, setting))
            x = x.contiguous(memory_format=memory_format)
            return _contender(lambda: F.silu(F.group_norm(x, GROUPS, weight, bias)))
        p = _problem(case, setting)
        if not p.is_conv and memory_format == NCHW:
            raise Skip("no part of this case")  # tokens have one memory format: measured once
        x, weight, bias = p.dequantized(DTYPES[precision], memory_format)
        if p.is_conv:
            return _contender(lambda: F.conv2d(x, weight, bias, **p.geometry))
        return _contender(lambda: F.linear(x, weight, bias))

    return prepare


def _onednn(case: Case, setting: Setting) -> Contender:
    """oneDNN's int8 layers inside torch: u8 inputs, weights packed once for this very shape, float32 results."""
    cpu_only(setting)
    p = _problem(case, setting)
    codes = (p.codes.to(torch.int16) + 128).to(torch.uint8)
    zeros = torch.zeros(p.weight.shape[0], dtype=torch.int64)
    quantization = (SCALE, ZERO_POINT + 128)
    output = (1.0, 0, torch.float32, "none", [], "")
    if p.is_conv:
        codes = codes.contiguous(memory_format=torch.channels_last)
        geometry = ([p.case.stride] * 2, [p.case.kernel // 2] * 2, [1, 1], 1)
        packed = torch.ops.onednn.qconv_prepack(p.weight, p.weight_scale, *quantization, *geometry, list(codes.shape))
        rest = (packed, p.weight_scale, zeros, p.bias, *geometry, *output)
        return _contender(lambda: torch.ops.onednn.qconv2d_pointwise(codes, *quantization, *rest))
    packed = torch.ops.onednn.qlinear_prepack(p.weight, list(codes.shape))
    rest = (packed, p.weight_scale, zeros, p.bias, *output)
    return _contender(lambda: torch.ops.onednn.qlinear_pointwise(codes, *quantization, *rest))


CL, NCHW = torch.channels_last, torch.contiguous_format

PROVIDERS = (
    Provider("ours-cpu-packed", "ours cpu, packed", _ours_packed(torch.float32), "int8", ours=True),
    Provider("ours-cpu-packed-int8", "ours cpu, packed → int8", _ours_packed(torch.int8), "int8", ours=True),
    Provider("ours-cpu", "ours cpu", _ours("cpu"), "int8", ours=True),
    Provider("ours-cpu-dynamic", "ours cpu, per pixel", _ours_dynamic("cpu"), "int8", ours=True),
    Provider("ours-triton", "ours triton", _ours("triton"), "int8", ours=True),
    Provider("ours-cuda", "ours cuda", _ours("cuda"), "int8", ours=True),
    Provider("onednn-int8", "oneDNN int8", _onednn, "int8"),
    Provider("torch", "torch", _torch("fp32", NCHW)),
    Provider("torch-channels-last", "torch CL", _torch("fp32", CL)),
    Provider("torch-bf16", "torch bf16 CL", _torch("bf16", CL), "bf16"),
)


# ------------------------------------------------------------------------------------------------------- reference


def expected_results(case: Case, setting: Setting) -> Expected:
    """The float64 reference; large convolutions on bands of rows of the first image."""
    setting = Setting(setting.threads)
    if isinstance(case, Int8Norm):
        x, weight, bias = (tensor.double() for tensor in _norm_input(case, setting))
        return {"output": [((Ellipsis,), F.silu(F.group_norm(x, GROUPS, weight, bias)))]}
    p = _problem(case, setting)
    x = (p.codes.double() - ZERO_POINT) * SCALE
    weight = p.weight.double() * p.weight_scale.double().view(-1, *[1] * (p.weight.dim() - 1))
    if not p.is_conv:
        return {"output": [((Ellipsis,), F.linear(x, weight, p.bias.double()))]}
    height = case.output_shape[2]
    bands = [(0, height)]
    if case.operations() > REFERENCE_OPERATIONS and case.stride == 1 and height > 3 * BAND_ROWS:
        bands = [(top, top + BAND_ROWS) for top in (0, height // 2, height - BAND_ROWS)]
    return {"output": [_band(x[:1], weight, p, *band) for band in bands]}


def _band(x: Tensor, weight: Tensor, p: Problem, top: int, bottom: int) -> tuple[tuple, Tensor]:
    """Rows ``top`` to ``bottom`` of the result for the first image."""
    pad, height = p.case.kernel // 2, x.shape[2]
    first = top * p.case.stride - pad
    last = (bottom - 1) * p.case.stride - pad + p.case.kernel
    rows = F.pad(x[:, :, max(first, 0) : min(last, height)], (pad, pad, max(0, -first), max(0, last - height)))
    y = F.conv2d(rows, weight, p.bias.double(), stride=p.case.stride)
    return (slice(0, 1), slice(None), slice(top, bottom)), y
