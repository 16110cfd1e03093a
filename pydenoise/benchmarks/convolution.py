"""Providers of the ``weighted_conv`` suite, and its float64 reference."""

import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.benchmarks.cases import Case, ConvBench, ImportBench
from pydenoise.benchmarks.engines import compile_inductor, export_onnx, onnxruntime_call, openvino_call
from pydenoise.benchmarks.providers import Contender, Provider, Setting, Skip, cpu_only, gpu_only, images
from pydenoise.densities import density as build_density
from pydenoise.ops.registry import BackendUnavailable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCE_FLOPS = 6e9  # a forward reference of more than this is computed on bands of rows only
BAND_ROWS = 8


class Problem:
    """The tensors of a case in one dtype and memory format, and the layer as a function of them.

    ``coefficients`` (trainable density) and the values of all tensors are the same for every provider.
    """

    def __init__(self, case: ConvBench, setting: Setting, dtype: torch.dtype, memory_format: torch.memory_format):
        self.case, self.conv = case, case.conv
        tensors = self.conv.tensors(torch.float32, setting.device)
        self.coefficients = torch.linspace(0.5, 0.9, self.conv.kernel[0] // 2, device=setting.device)
        if case.training:
            tensors["density"] = build_density(self.coefficients.double(), self.conv.kernel).float()
        tensors["grad"] = self._grad(setting) if case.training else None
        self.coefficients = self.coefficients.to(dtype)
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.to(dtype)
                tensor = tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor
            setattr(self, name, tensor)
        self.padding, self.groups = self.conv.padding, self.conv.groups

    def _grad(self, setting: Setting) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.case.output_shape, generator=generator).to(setting.device)

    def fold(self) -> None:
        """Put the density into the weight: what a plain convolution takes."""
        self.weight = (self.weight.double() * self.density.double()).to(self.weight)

    def epilogue(self, y: Tensor) -> Tensor:
        """In place where it may be, which is torch's fastest."""
        if self.conv.activation != "none":
            y = F.relu_(y) if self.conv.activation == "relu" else getattr(F, self.conv.activation)(y)
        return y if self.residual is None else y.add_(self.residual)

    def plain(self) -> Tensor:
        return self.epilogue(F.conv2d(self.input, self.weight, self.bias, 1, self.padding, 1, self.groups))


def _problem(case: Case, setting: Setting, precision: str, memory_format: torch.memory_format) -> Problem:
    if not isinstance(case, ConvBench):
        raise Skip("no part of this case")
    return Problem(case, setting, DTYPES[precision], memory_format)


# --------------------------------------------------------------------------------------------------- training step


def _training_step(problem: Problem, forward: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Contender:
    """A contender for forward and backward to every leaf, as in the middle of a network: dx is wanted as well."""
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    inputs = list(leaves.values())
    grad = problem.grad

    def step():
        y = forward()
        return y, torch.autograd.grad(y, inputs, grad)

    def outputs():
        y, grads = step()
        named = {"output": y, **{f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}}
        return {name: images(value) for name, value in named.items()}

    return Contender(step, outputs)


def _inference(call: Callable[[], Tensor]) -> Contender:
    """A contender without autograd."""

    def run() -> Tensor:
        with torch.inference_mode():
            return call()

    return Contender(run, lambda: {"output": images(run())})


# ------------------------------------------------------------------------------------------------------------ ours


def _ours(backend: str, precision: str = "fp32"):
    """The functional, which packs the weight at every call; at torch's default precision, the direct algorithm."""

    def prepare(case: Case, setting: Setting) -> Contender:
        (cpu_only if backend == "cpu" else gpu_only if backend in ("triton", "cuda") else lambda _: None)(setting)
        p = _problem(case, setting, precision, torch.channels_last)
        rest = {"activation": p.conv.activation, "residual": p.residual, "backend": backend}

        def forward() -> Tensor:
            density = build_density(p.coefficients, p.conv.kernel) if case.trainable else p.density
            return PF.weighted_conv2d(p.input, p.weight, density, p.bias, 1, p.padding, 1, p.groups, **rest)

        contender = _training_step(p, forward, _leaves(p)) if case.training else _inference(forward)
        try:
            contender.run()
        except BackendUnavailable as error:
            raise Skip(str(error)) from error
        return contender

    return prepare


def _ours_packed(precision: str = "fp32", algorithm: str = "direct"):
    """The fused layer, which keeps its weight packed; "auto" lets it take the Winograd algorithm."""

    def prepare(case: Case, setting: Setting) -> Contender:
        cpu_only(setting)
        p = _problem(case, setting, precision, torch.channels_last)
        if case.training:
            raise Skip("a packed weight is for inference")
        from pydenoise.nn.fused_conv import FusedConv2d

        layer = FusedConv2d.from_float(_torch_module(p, folded=True), activation=p.conv.activation, algorithm=algorithm)
        if algorithm == "auto" and layer.kernel != "winograd":
            raise Skip(f"Winograd is not used here: the layer runs as {layer.kernel!r}")
        contender = _inference(lambda: layer(p.input, p.residual))
        contender.note = layer.kernel
        return contender

    return prepare


def _ours_module(case: Case, setting: Setting) -> Contender:
    """The drop-in module in eval mode, which caches its folded weight."""
    p = _problem(case, setting, "fp32", torch.channels_last)
    if case.training or p.conv.activation != "none" or p.residual is not None:
        raise Skip("measured for inference without an epilogue")
    from pydenoise.nn import WeightedConv2d

    module = WeightedConv2d.from_float(_torch_module(p), density=p.density).eval()
    return _inference(lambda: module(p.input))


def _leaves(p: Problem, *, density: bool = True) -> dict[str, Tensor]:
    leaves = {"input": p.input, "weight": p.weight, "bias": p.bias}
    if density and p.case.trainable:
        leaves["coefficients"] = p.coefficients
    return leaves


# ----------------------------------------------------------------------------------------------------------- torch


def _torch(precision: str = "fp32", memory_format: torch.memory_format = torch.channels_last):
    """nn.Conv2d of the same shape, the density folded in beforehand: it does less work than a weighted convolution."""

    def prepare(case: Case, setting: Setting) -> Contender:
        p = _problem(case, setting, precision, memory_format)
        p.fold()
        if case.training:
            leaves = {"input": p.input, "folded weight": p.weight, "bias": p.bias}
            return _training_step(p, p.plain, leaves)
        return _inference(p.plain)

    return prepare


def _published(case: Case, setting: Setting) -> Contender:
    """The formulation of the paper's code: the product W * density is a tensor, written anew in every forward pass.

    A trainable density is rebuilt from its coefficients by torch operations, through which autograd differentiates.
    """
    p = _problem(case, setting, "fp32", torch.channels_last)

    def forward() -> Tensor:
        density = p.density
        if case.trainable:
            one = p.coefficients.new_ones(1)
            alpha = torch.cat([p.coefficients, one, p.coefficients.flip(0)])
            density = torch.outer(alpha, alpha)
        y = F.conv2d(p.input, p.weight * density, p.bias, 1, p.padding, 1, p.groups)
        return p.epilogue(y)

    return _training_step(p, forward, _leaves(p)) if case.training else _inference(forward)


class _Layer(nn.Module):
    """Convolution, activation and residual as a module, for compilers and exporters."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.conv = _torch_module(problem, folded=True)
        self.activation = problem.conv.activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.conv(input)
        y = y if self.activation == "none" else getattr(F, self.activation)(y)
        return y if residual is None else y + residual


def _torch_module(p: Problem, folded: bool = False) -> nn.Conv2d:
    conv = nn.Conv2d(p.conv.in_channels, p.conv.out_channels, p.conv.kernel, 1, p.padding, 1, p.groups)
    weight = p.weight.double() * p.density.double() if folded else p.weight
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(p.bias)
    return conv.to(device=p.input.device, dtype=p.input.dtype, memory_format=torch.channels_last).eval()


def _layer(case: Case, setting: Setting, memory_format: torch.memory_format) -> tuple[Problem, _Layer, tuple]:
    p = _problem(case, setting, "fp32", memory_format)
    if case.training:
        raise Skip("inference only")
    return p, _Layer(p).eval(), (p.input,) if p.residual is None else (p.input, p.residual)


def _inductor(case: Case, setting: Setting) -> Contender:
    _, layer, inputs = _layer(case, setting, torch.channels_last)
    call = compile_inductor(layer)
    return _inference(lambda: call(*inputs))


def _onnxruntime(case: Case, setting: Setting) -> Contender:
    cpu_only(setting)
    _, layer, inputs = _layer(case, setting, torch.contiguous_format)
    call = onnxruntime_call(export_onnx(layer, inputs), inputs, setting)
    return Contender(call, lambda: {"output": images(call.result())})


def _openvino(precision: str):
    def prepare(case: Case, setting: Setting) -> Contender:
        cpu_only(setting)
        _, layer, inputs = _layer(case, setting, torch.contiguous_format)
        call = openvino_call(export_onnx(layer, inputs), inputs, setting, precision=precision, channels_last=True)
        return Contender(call, lambda: {"output": images(call.result())})

    return prepare


# ---------------------------------------------------------------------------------------------------------- import

_IMPORT = "import time, torch; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def _import_time(case: Case, setting: Setting) -> Contender:
    if not isinstance(case, ImportBench):
        raise Skip("no part of this case")
    command = [sys.executable, "-c", _IMPORT.format(case.module)]

    def sample() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    return Contender(sample=sample)


CL, NCHW = torch.channels_last, torch.contiguous_format

PROVIDERS = (
    Provider("ours-cpu", "ours cpu", _ours("cpu"), ours=True),
    Provider("ours-cpu-packed", "ours cpu, packed", _ours_packed(), ours=True),
    Provider("ours-cpu-winograd", "ours cpu winograd", _ours_packed(algorithm="auto"), ours=True),
    Provider("ours-cpu-bf16", "ours cpu bf16", _ours("cpu", "bf16"), "bf16", ours=True),
    Provider("ours-cpu-bf16-packed", "ours cpu bf16, packed", _ours_packed("bf16"), "bf16", ours=True),
    Provider("ours-module", "ours WeightedConv2d", _ours_module, ours=True, default=False),
    Provider("ours-triton", "ours triton", _ours("triton"), ours=True),
    Provider("ours-triton-bf16", "ours triton bf16", _ours("triton", "bf16"), "bf16", ours=True),
    Provider("ours-cuda", "ours cuda", _ours("cuda"), ours=True),
    Provider("ours-reference", "ours reference", _ours("reference"), ours=True, default=False),
    Provider("torch", "torch", _torch(memory_format=NCHW)),
    Provider("torch-channels-last", "torch CL", _torch()),
    Provider("torch-bf16", "torch bf16 CL", _torch("bf16"), "bf16"),
    Provider("published", "published", _published),
    Provider("inductor", "inductor", _inductor, default=False),
    Provider("onnxruntime", "ORT", _onnxruntime),
    Provider("openvino", "OpenVINO", _openvino("f32")),
    Provider("openvino-bf16", "OpenVINO bf16", _openvino("bf16"), "bf16", default=False),
    Provider("import", "import", _import_time, ours=True),
)


# ------------------------------------------------------------------------------------------------------- reference

Expected = dict[str, list[tuple[tuple, Tensor]]]


def expected_results(case: Case, setting: Setting) -> Expected:
    """The float64 reference by result name: (index into the result, values there).

    Large forward results are checked on bands of rows at the top, in the middle and at the bottom.
    """
    if not isinstance(case, ConvBench):
        return {}
    p = Problem(case, Setting(setting.threads), torch.float32, torch.contiguous_format)
    for name in ("input", "weight", "density", "bias", "residual", "grad"):
        tensor = getattr(p, name)
        setattr(p, name, None if tensor is None else tensor.double())
    return _expected_gradients(p) if case.training else _expected_forward(p)


def _expected_forward(p: Problem) -> Expected:
    height = p.case.output_shape[2]
    bands = [(0, height)]
    if p.case.flops() > REFERENCE_FLOPS and height > 3 * BAND_ROWS:
        bands = [(top, top + BAND_ROWS) for top in (0, height // 2, height - BAND_ROWS)]
    weight, pad, results = p.weight * p.density, p.padding, []
    for top, bottom in bands:  # stride and dilation are 1 in every bench case
        first, last = top - pad, bottom + p.conv.kernel[0] - 1 - pad
        rows = p.input[:, :, max(first, 0) : min(last, p.conv.size[0])]
        rows = F.pad(rows, (pad, pad, max(0, -first), max(0, last - p.conv.size[0])))
        y = F.conv2d(rows, weight, p.bias, groups=p.groups)
        y = y if p.conv.activation == "none" else getattr(F, p.conv.activation)(y)
        index = (slice(None), slice(None), slice(top, bottom))
        results.append((index, y if p.residual is None else y + p.residual[index]))
    return {"output": results}


def _expected_gradients(p: Problem) -> Expected:
    coefficients = p.coefficients.double().requires_grad_(True)
    alpha = torch.cat([coefficients, coefficients.new_ones(1), coefficients.flip(0)])
    density = torch.outer(alpha, alpha)
    folded = (p.weight * density).detach().requires_grad_(True)
    leaves = [p.input.requires_grad_(True), folded, p.bias.requires_grad_(True)]
    y = F.conv2d(p.input, folded, p.bias, padding=p.padding, groups=p.groups)
    dx, dfolded, dbias = torch.autograd.grad(y, leaves, p.grad)
    (dcoefficients,) = torch.autograd.grad(density, coefficients, (p.weight * dfolded).sum((0, 1)))
    values = {
        "output": y.detach(),
        "grad input": dx,
        "grad weight": dfolded * density.detach(),
        "grad folded weight": dfolded,
        "grad bias": dbias,
        "grad coefficients": dcoefficients,
    }
    return {name: [((Ellipsis,), value)] for name, value in values.items()}
