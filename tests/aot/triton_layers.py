"""The typical layers on which the Triton kernels are compiled ahead of time, family by family."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from pydenoise.kernels import (
    _tiles,
    adaptive_bilateral_filter,
    block_importance,
    block_sparse_attention,
    dcls_kernel,
    int8_conv2d,
    int8_linear,
    norm_quantize,
    ode_stage,
    quantize,
    routed_norm,
    sampler_step,
    softmax_aggregate,
    token_confidence,
    wavelet_gate,
)
from pydenoise.kernels import weighted_conv as wc
from torch import Tensor

# A problem of a variant: the layer's name and the dtype of its floats, or of its codes.
Problem = tuple[str, torch.dtype]


@dataclass(frozen=True)
class Family:
    """Kernels that are compiled by the same rules.

    ``problems(variant, arch)`` names the layers, ``arguments(variant, problem)`` makes the arguments of the launch,
    tensors on the meta device. ``products(variant)`` is the dtype that the variant multiplies on tensor cores, ``None``
    if none; ``rows(variant)`` are the rows of its product's tile.
    """

    functions: Mapping[str, Callable]
    variants: tuple
    problems: Callable[[object, int], tuple[Problem, ...]]
    arguments: Callable[[object, Problem], dict]
    products: Callable[[object], str | None] = lambda variant: None
    rows: Callable[[object], int] = lambda variant: 0

    @classmethod
    def of(cls, kernels: Iterable[_tiles.Kernel], *rules: Callable) -> "Family":
        """Of kernels that list their variants; ``rules`` are the other fields in their order."""
        kernels = tuple(kernels)
        variants = tuple(variant for kernel in kernels for variant in kernel.variants)
        return cls({kernel.name: kernel.function for kernel in kernels}, variants, *rules)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def image(*shape: int, dtype: torch.dtype) -> Tensor:
    """[N, C, *spatial] in channels_last memory."""
    n, channels, *spatial = shape
    return empty(n, *spatial, channels, dtype=dtype).movedim(-1, 1)


# ------------------------------------------------------------------------------------------------ weighted convolution


def _is_first(variant: wc.Variant) -> bool:
    return variant is next(v for v in wc.VARIANTS if (v.kernel, v.precision) == (variant.kernel, variant.precision))


def _weighted_problems(variant: wc.Variant, arch: int) -> tuple[Problem, ...]:
    """The first tile of each kernel takes the rarer paths too. bfloat16 stands for both half formats, but for it."""
    kind = {"conv_unfold": "skinny"}.get(variant.kernel, "depthwise" if "depthwise" in variant.kernel else "plain")
    found = [f"{kind}-2d"]
    if _is_first(variant) and variant.kernel == "conv":
        found.append("strided-2d")
    if _is_first(variant) and variant.kernel != "reduce" and arch == 90:
        found += [f"{kind}-{form}" for form in ("1d", "3d", "wide", *(["large"] if kind == "depthwise" else []))]
    return tuple(
        (problem, dtype)
        for problem in found
        for dtype in variant.dtypes
        if dtype != torch.float16 or (_is_first(variant) and problem.endswith("2d"))
    )


def _weighted_arguments(variant: wc.Variant, problem: Problem) -> dict:
    torch.set_float32_matmul_precision({"tf32": "high"}.get(variant.precision, "highest"))
    (kind, form), dtype = problem[0].split("-"), problem[1]
    channels, outputs = {"skinny": (3, 64), "depthwise": (96, 96)}.get(kind, (128, 128))
    groups = channels if kind == "depthwise" else 1
    stride = 2 if kind == "strided" else 1
    dims, size = {"1d": (1, 4096), "2d": (2, 64), "3d": (3, 32), "wide": (2, 40000), "large": (2, 64)}[form]
    kernel = 31 if form == "large" else 3
    activation = {"1d": "gelu", "2d": "silu", "3d": "gelu_tanh", "wide": "leaky_relu_0.1", "large": "relu"}[form]

    def picture(count: int, size: int) -> Tensor:
        return image(4, count, *(size,) * dims, dtype=dtype)

    x, y = picture(channels, size), picture(outputs, size // stride)
    weight = empty(outputs, channels // groups, *(kernel,) * dims, dtype=dtype)
    density, bias = torch.empty_like(weight[0, 0]), torch.empty_like(weight[:, 0].flatten(1)[:, 0])
    geometry = ((stride,) * dims, (kernel // 2,) * 2 * dims, (1,) * dims, groups)
    if variant.kernel in ("weight_gradient", "depthwise_weight_gradient", "reduce"):
        parts = empty(wc.density_parts(weight), density.numel(), dtype=torch.float64)
        found = wc.plan_weight_gradient(y, x, weight, density, torch.empty_like(weight), parts, *geometry)
    elif kind == "strided":
        found = wc.plan_input_gradient(y, weight, density, x, *geometry)[:1]
    else:
        found = wc.plan_forward(x, weight, density, bias, picture(outputs, size), y, *geometry, activation)
    return next(launch.arguments for launch in found if launch.kernel == variant.kernel)


def _weighted_products(variant: wc.Variant) -> str | None:
    return "float" if variant.kernel in wc.MATRIX_KERNELS and variant.precision != "fp32" else None


def _weighted_rows(variant: wc.Variant) -> int:
    blocks = dict(variant.meta)
    return blocks["BLOCK_O"] if variant.kernel == "weight_gradient" or blocks["WEIGHT_LEFT"] else blocks["BLOCK_M"]


WEIGHTED_CONV = Family(
    wc.KERNELS, wc.VARIANTS, _weighted_problems, _weighted_arguments, _weighted_products, _weighted_rows
)


# ---------------------------------------------------------------------------------------------------------------- int8

_MODULES = (int8_conv2d, int8_linear, quantize, norm_quantize)
_KERNELS = {kernel.name: kernel for module in _MODULES for kernel in module.KERNELS}
# What the first tile of each kernel is compiled on besides the plain layer, for one architecture.
_RARER = {
    "int8_conv": ("requantized", "upsampled", "raw", "unpadded", "symmetric", "long", "wide"),
    "int8_conv_gather": ("requantized", "upsampled", "raw"),
    "int8_conv_pixel": ("requantized", "upsampled", "symmetric", "wide"),
    "int8_depthwise": ("requantized", "upsampled", "raw", "pixel", "wide"),
    "int8_linear": ("requantized", "raw", "token", "few", "symmetric"),
    "quantize": ("geglu", "pixel", "symmetric"),
    "quantize_dynamic": ("geglu", "long", "symmetric"),
    "dequantize": ("pixel",),
    "channel_statistics": ("skip",),
    "group_statistics": ("film",),
    "group_norm": ("skip",),
    "group_norm_dynamic": ("skip", "long"),
    "layer_norm": ("static", "film", "long"),
}


def _int8_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """Kernels without matrix products differ little between architectures: all their tiles for one of them only."""
    kernel = _KERNELS[variant.kernel]
    first = variant is kernel.variants[0]
    if arch < variant.least:
        return ()
    if not kernel.matrix and not first and arch != 90:
        return ()
    names = ("plain", *(_RARER.get(kernel.name, ()) if first and arch == 90 else ()))
    floats = (torch.bfloat16, torch.float32) if first and arch == 90 and not kernel.matrix else (torch.bfloat16,)
    return tuple((name, dtype) for name in names for dtype in (floats if name == "plain" else floats[:1]))


def _scales(name: str, *positions: int) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point), per position if any are given."""
    return empty(*positions), None if name == "symmetric" else empty(*positions, dtype=torch.int32)


def _conv_launches(kernel: str, name: str, dtype: torch.dtype) -> list[_tiles.Launch]:
    n, size = (1, 40000) if name == "wide" else (2, 64)
    channels, groups = {"int8_conv_gather": (4, 1), "int8_depthwise": (96, 96)}.get(kernel, (320, 1))
    if name == "long":
        channels = 8192  # times 9 taps: sums that could saturate
    per_pixel = kernel == "int8_conv_pixel" or name == "pixel"
    outputs = 96 if groups > 1 else 320
    scale, zero_point = _scales(name, *((n, 1, size, size) if per_pixel else ()))
    enlarged = 2 if name == "upsampled" else 1
    padding = 0 if name == "unpadded" else 1
    out = size * enlarged + 2 * padding - 2
    to_int8, raw = name == "requantized", name == "raw"
    return int8_conv2d.plan(
        image(n, channels, size, size, dtype=torch.int8),
        empty(outputs, channels // groups, 3, 3, dtype=torch.int8).contiguous(memory_format=torch.channels_last),
        scale,
        empty(outputs),
        zero_point,
        None if raw else empty(outputs),
        (1, 1),
        (padding,) * 4,
        (1, 1),
        groups,
        None if raw else empty(n, outputs),
        empty(n, 2 * outputs) if to_int8 else None,
        None if raw or to_int8 else image(n, outputs, out, out, dtype=dtype),
        "none" if raw else "silu",
        empty() if to_int8 else None,
        empty(dtype=torch.int32) if to_int8 else None,
        enlarged,
        image(n, outputs, out, out, dtype=torch.int8 if to_int8 else torch.int32 if raw else dtype),
    )


def _linear_launches(name: str, dtype: torch.dtype) -> list[_tiles.Launch]:
    rows, depth, channels = 16 if name == "few" else 4096, 640, 1280
    scale, zero_point = _scales(name, *((rows, 1) if name == "token" else ()))
    to_int8, raw = name == "requantized", name == "raw"
    return int8_linear.plan(
        empty(rows, depth, dtype=torch.int8),
        empty(channels, depth, dtype=torch.int8),
        scale,
        empty(channels),
        zero_point,
        None if raw else empty(channels),
        None if raw else empty(rows, channels, dtype=dtype),
        "none" if raw else "gelu",
        empty() if to_int8 else None,
        empty(dtype=torch.int32) if to_int8 else None,
        empty(rows, channels, dtype=torch.int8 if to_int8 else torch.int32 if raw else dtype),
    )


def _quantize_launch(variant: _tiles.Variant, name: str, dtype: torch.dtype) -> _tiles.Launch:
    columns = _columns(variant, name)
    geglu = name == "geglu"
    x = image(4, columns * (2 if geglu else 1), 64, 64, dtype=dtype)
    y = image(4, columns, 64, 64, dtype=torch.int8)
    activation = "geglu" if geglu else "silu"
    positions = (4, 1, 64, 64)
    if variant.kernel == "quantize_dynamic":
        scale, zero_point = empty(*positions), empty(*positions, dtype=torch.int32)
        factors = empty(columns) if geglu else None
        return quantize.plan_dynamic(x, "pixel", activation, factors, name == "symmetric", y, scale, zero_point)
    scale, zero_point = _scales(name, *(positions if name == "pixel" else ()))
    if variant.kernel == "dequantize":
        return quantize.plan_dequantize(y, scale, zero_point, x)
    return quantize.plan_quantize(x, scale, zero_point, activation, empty(columns) if geglu else None, y)


def _columns(variant: _tiles.Variant, name: str) -> int:
    """Channels that the variant's block of columns is made for; ``long`` ones do not fit any block."""
    block = dict(variant.meta)["BLOCK_C"]
    return 6000 if name == "long" else block if block < 64 else block * 3 // 4


def _group_norm_launches(variant: _tiles.Variant, name: str, dtype: torch.dtype) -> list[_tiles.Launch]:
    columns = _columns(variant, name)
    x = image(4, columns, 64, 64, dtype=dtype)
    skip = image(4, columns, 64, 64, dtype=dtype) if name == "skip" else None
    channels = columns * (2 if name == "skip" else 1)
    film = empty(4, 2 * channels) if name == "film" else None
    dynamic = variant.kernel == "group_norm_dynamic"
    scale, zero_point = _scales(name, *((4, 1, 64, 64) if dynamic else ()))
    y = image(4, channels, 64, 64, dtype=torch.int8)
    weight, bias = empty(channels), empty(channels)
    return norm_quantize.plan_group_norm(
        x, skip, 8, weight, bias, 1e-5, film, "silu", None, scale, zero_point, y, dynamic
    )  # fmt: skip


def _layer_norm_launch(variant: _tiles.Variant, name: str, dtype: torch.dtype) -> _tiles.Launch:
    columns = _columns(variant, name)
    film = empty(4, 2 * columns) if name == "film" else None
    dynamic = name != "static"
    scale, zero_point = _scales(name, *((4, 1024, 1) if dynamic else ()))
    return norm_quantize.plan_layer_norm(
        empty(4, 1024, columns, dtype=dtype), empty(columns), empty(columns), 1e-5, film, None, scale, zero_point,
        empty(4, 1024, columns, dtype=torch.int8), dynamic,
    )  # fmt: skip


def _int8_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    kernel = variant.kernel
    if kernel == "int8_linear":
        found = _linear_launches(name, dtype)
    elif kernel.startswith("int8_"):
        found = _conv_launches(kernel, name, dtype)
    elif kernel == "weight_sums":
        found = _linear_launches(name, dtype)
    elif kernel == "layer_norm":
        found = [_layer_norm_launch(variant, name, dtype)]
    elif "quantize" in kernel:
        found = [_quantize_launch(variant, name, dtype)]
    else:
        found = _group_norm_launches(variant, name, dtype)
    return next(launch.arguments for launch in found if launch.kernel.name == kernel)


def _int8_products(variant: _tiles.Variant) -> str | None:
    return "int8" if _KERNELS[variant.kernel].matrix else None


INT8 = Family.of(
    _KERNELS.values(),
    _int8_problems,
    _int8_arguments,
    _int8_products,
    lambda variant: dict(variant.meta)["BLOCK_M"],
)

# ------------------------------------------------------------------------------------------------ tokens, confidences


def _token_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """The common call of a sampler; at 90 also what is rarer: noise, guidance, tokens that are left out."""
    names = ("plain", "sampled", "everything") if arch == 90 else ("sampled",)
    dtypes = {"plain": (torch.bfloat16, torch.float32), "sampled": (torch.bfloat16,), "everything": (torch.float16,)}
    return tuple((name, dtype) for name in names for dtype in dtypes[name])


def _token_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    logits, rows, count = empty(4096, 126464, dtype=dtype), empty(128, dtype=torch.int64), 128
    results = empty(count, dtype=torch.int64), empty(count), empty(count) if name == "everything" else None
    keys = empty(count, 2, dtype=torch.int64) if name != "plain" else None
    temperature = 0.0 if name == "plain" else 0.7
    full = name == "everything"
    found = token_confidence.plan(
        logits, logits if full else None, rows, keys, 1.5 if full else 0.0, temperature, 2**40, 3,
        [5, 7, 9, 11] if full else [126336], [1, 2, 3, 4] if full else [], 5 if full else -1, *results,
    )  # fmt: skip
    return next(launch.arguments for launch in found if launch.kernel.name == variant.kernel)


TOKENS = Family.of(token_confidence.KERNELS, _token_problems, _token_arguments)

# --------------------------------------------------------------------------------------------------- bilateral filter


def _bilateral_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """Pictures: gray ones with tiles and with a sigma for every pixel, colour ones; or features of many channels."""
    if not variant.least <= arch <= variant.most:
        return ()
    if variant.kernel == "bilateral_factors":
        return (("tiles", torch.float32), ("fixed", torch.float32))
    if variant.kernel.endswith("_many"):
        return (("channels8", torch.float32), ("channels64", torch.bfloat16))
    return (("tiles", torch.float32), ("colour", torch.float32), ("pixels", torch.bfloat16), ("tiles", torch.float16))


def _bilateral_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    channels = {"colour": 3, "channels8": 8, "channels64": 64}.get(name, 1)
    x = empty(2, channels, 512, 512, dtype=dtype)
    side = 512 if name == "pixels" else 64
    sigma, norm, radius = empty(2, side, side, 3), empty(2, 512, 512), 3 if name == "fixed" else -2
    launch, factors, each = adaptive_bilateral_filter.plan_factors(sigma, radius)
    quotients, e, shift = adaptive_bilateral_filter.plan_quotients(x, x, x, norm)
    rest = (x, sigma, factors, each, radius)
    found = [launch, quotients, adaptive_bilateral_filter.plan_filter(*rest, x, norm)]
    found.append(adaptive_bilateral_filter.plan_gradients(*rest, e, shift, x, True)[0])
    return next(launch.arguments for launch in found if launch.kernel.name == variant.kernel)


BILATERAL = Family.of(adaptive_bilateral_filter.KERNELS, _bilateral_problems, _bilateral_arguments)


# ------------------------------------------------------------------------------------------------------ sampler steps


def _step_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """Latents of a text-to-image model: the usual step, noise and its moments, every option; at 90 also frames."""
    if variant.kernel == "sampler_step_sums":
        return (("moments", torch.float32),)
    found = [("usual", torch.bfloat16), ("moments", torch.float32), ("everything", torch.float16)]
    if arch == 90:
        found += [("usual", torch.float32), ("learned", torch.float32), ("frames", torch.bfloat16)]
    return tuple(found)


def _step_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    full, learned = name == "everything", name == "learned"
    batch, channels = 8, 4
    shape = (batch, channels, 16, 64, 64) if name == "frames" else (batch, channels, 128, 128)
    x = empty(*shape, dtype=dtype)
    doubled = empty(batch, 2 * channels, 128, 128, dtype=dtype) if learned or full else x
    groups = {"frames": batch * channels * 16, "everything": batch * channels}.get(name, 1)
    statistics = {"moments": "moments", "everything": "dots"}.get(name, "none")
    count = {"none": 0, "moments": 2, "dots": 7}[statistics]
    found = sampler_step.plan(
        x, doubled, doubled if full or name == "usual" else None, x if full else None,
        empty(6 if full else 2, *shape, dtype=dtype) if full or name == "usual" else None, x if learned else None,
        empty(batch) if full else None, empty(50, 32), empty(groups, dtype=torch.int64),
        None if name == "usual" else empty(batch, 2, dtype=torch.int64), empty(1, dtype=torch.int64), learned or full,
        statistics, x, x if full else None, x if full or learned else None,
        empty(2 * batch, *shape[1:], dtype=torch.bfloat16) if full or name == "usual" else None,
        empty(1, dtype=torch.int32), empty(max(groups, batch), count, dtype=torch.float64),
    )  # fmt: skip
    return next(launch.arguments for launch in found if launch.kernel.name == variant.kernel)


STEPS = Family.of(sampler_step.KERNELS, _step_problems, _step_arguments)

# --------------------------------------------------------------------------------------------------------- DCLS kernels

_DCLS_SIZES = {"plane": (17, 17), "line": (301,), "volume": (7, 7, 7), "small": (7, 7), "hats": (17, 17)}


def _dcls_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """The published layer; at 90 also the rarer ones."""
    found = [("plane", torch.float32)]
    if arch == 90:
        found += [(name, torch.float32) for name in ("line", "volume", "small")] + [("hats", torch.bfloat16)]
    return tuple(found)


def _dcls_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    size, shape = _DCLS_SIZES[name], (384, 1, 34)
    dims = len(size)
    weight, P = empty(*shape, dtype=dtype), empty(dims, *shape, dtype=dtype)
    widths = None if name == "hats" else P
    rest = (size, tuple(range(dims)), tuple(n // 2 for n in size), name != "hats", True, 0.27)
    kernel = empty(*shape[:2], *size, dtype=dtype)
    if variant.kernel == "dcls_kernel":
        return dcls_kernel.plan_forward(weight, P, widths, *rest, kernel).arguments
    return dcls_kernel.plan_backward(kernel, weight, P, widths, *rest, weight, P, widths).arguments


DCLS = Family.of(dcls_kernel.KERNELS, _dcls_problems, _dcls_arguments)

# ------------------------------------------------------------------------------------------------ feature aggregation


def _aggregate_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """Three networks; at 90 also channels_last maps, as many maps as a program holds, and ready logits."""
    found = [("planes", torch.bfloat16)]
    if arch == 90:
        found += [("planes", torch.float32), ("rows", torch.float16)]
        found += [("many", torch.float32), ("logits", torch.float32)]
    return tuple(found)


def _aggregate_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    batch, maps, channels, depth, pixels = 4, 8 if name == "many" else 3, 320, 128, 4096

    def flat(*shape: int) -> Tensor:
        if name != "rows":
            return empty(*shape, dtype=dtype)
        return empty(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)

    features, out = flat(batch, maps, channels, pixels), flat(batch, channels, pixels)
    shares = empty(batch, maps, pixels)
    if variant.kernel == "softmax_aggregate":
        weight = None if name == "logits" else empty(maps, depth)
        hidden = flat(batch, maps if name == "logits" else depth, pixels)
        return softmax_aggregate.plan(features, hidden, weight, out, shares).arguments
    first = name == "logits"  # the call without gradients of features, but with some of shares
    given = softmax_aggregate.plan_backward(
        out, shares if first else None, features, shares, None if first else torch.empty_like(features), shares
    )
    return given.arguments


AGGREGATES = Family.of(softmax_aggregate.KERNELS, _aggregate_problems, _aggregate_arguments)

# ------------------------------------------------------------------------------------------------------- wavelet gates

_WAVELETS = {kernel.name: kernel for kernel in wavelet_gate.KERNELS}


def _wavelet_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """A level of a U-Net; at 90 all tiles, the first also on odd sizes, a gate per channel, and for one gradient."""
    first = variant is _WAVELETS[variant.kernel].variants[0]
    if arch != 90:
        return (("shared", torch.bfloat16),) if first else ()
    found = [("shared", torch.bfloat16)]
    if first:
        found += [("odd", torch.float32), ("per_channel", torch.float16)]
        found += [("input", torch.bfloat16), ("gate", torch.bfloat16)] if "backward" in variant.kernel else []
    return tuple(found)


def _wavelet_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    batch, channels, side = 8, 256, 63 if name == "odd" else 64
    coarse, up = (side + 1) // 2, "up" in variant.kernel
    make = image if variant.kernel.endswith("_last") else empty
    fine, band = make(batch, channels, side, side, dtype=dtype), make(batch, channels, coarse, coarse, dtype=dtype)
    gate = empty(batch, 4, channels) if name == "per_channel" else empty(batch, 4)
    x, y = (make(batch, 4 * channels, coarse, coarse, dtype=dtype), fine) if up else (fine, band)
    result, of_gate = (None if name == "gate" else x), (None if name == "input" else gate)
    offset = None if name == "gate" else empty(batch, x.shape[1])
    found = [
        wavelet_gate.plan_forward(x, gate, up, (side, side), y),
        *wavelet_gate.plan_backward(y, x, gate, offset, up, (side, side), result, of_gate),
        *wavelet_gate.plan_pool(x, empty(batch, channels, dtype=dtype)),
    ]
    return next(launch.arguments for launch in found if launch.kernel.name == variant.kernel)


WAVELETS = Family.of(_WAVELETS.values(), _wavelet_problems, _wavelet_arguments)

# -------------------------------------------------------------------------------------------------------- task routing


def _routed_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """The second norm of a block; at 90 also the first, whose window is compact."""
    found = [("updated", torch.bfloat16)]
    if arch == 90:
        found += [("updated", torch.float32), ("first", torch.float16)]
    return tuple(found)


def _routed_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    block = dict(variant.meta)["BLOCK_C"]
    batch, tokens, channels = 8, 256, block * 3 // 4
    x, stats = empty(batch, tokens, channels, dtype=dtype), empty(batch, tokens, 2)
    coefficients = empty(batch, channels)
    updated = name == "updated"
    update, gate, mask = (x, coefficients, empty(batch, channels)) if updated else (None, None, None)
    total = channels if updated else block
    if variant.kernel == "routed_norm":
        found = routed_norm.plan(
            x, mask, update, gate, coefficients, coefficients, total, 1e-6, x, x if updated else None, stats
        )
    else:
        partials = empty(batch, routed_norm.chunks_of(x)[0], 3, channels)
        found = routed_norm.plan_backward(
            x, x if updated else None, None if updated else empty(batch, tokens), x, mask, update, gate, coefficients,
            stats, total, x, x if updated else None, partials,
        )  # fmt: skip
    return found.arguments


ROUTED = Family.of(routed_norm.KERNELS, _routed_problems, _routed_arguments)

# ---------------------------------------------------------------------------------------------------------- ODE stages


def _stage_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """The last stage of a step; of the first tile also order second with everything, and the end of a step."""
    found: list[Problem] = [("plain", torch.float32)]
    if variant is variant_of(variant.kernel, ode_stage.KERNELS) and arch == 90:
        found += [("plain", torch.bfloat16), ("second", torch.float32), ("second", torch.float16)]
        if variant.kernel == "ode_combine":
            found.append(("end", torch.float32))
    return tuple(found)


def variant_of(kernel: str, kernels: tuple[_tiles.Kernel, ...]) -> _tiles.Variant:
    """The first tile of the kernel of this name."""
    return next(k for k in kernels if k.name == kernel).variants[0]


def _stage_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    n, size, channels = 8, 64, 64
    second = name == "second"
    state = empty(n, size, size, channels, dtype=dtype)
    slope = empty(n, size, size, channels // 2 if second else channels, dtype=dtype)
    film, moments = (empty(n, 2 * channels) if second else None), empty(n, 2, channels)
    y = empty(n, size, size, channels + second, dtype=dtype)
    weights = (0.5, -1.0, 1.0, 0.25)[: 4 if second else 3]
    slopes = (slope,) * len(weights)
    stage = ode_stage.plan_stage(
        state, slopes, weights, weights if second else (), 0.5 if second else 0.0, second, film,
        0.5 if second else None, 1e-5, None if name == "end" else y, state if name == "end" or second else None,
        moments,
    )  # fmt: skip
    gradient = ode_stage.plan_gradient(
        y, state, moments, film, state if second else None, state, empty(n, 2 * channels) if second else None
    )
    return next(launch.arguments for launch in (*stage, *gradient) if launch.kernel.name == variant.kernel)


STAGES = Family.of(ode_stage.KERNELS, _stage_problems, _stage_arguments)

# ----------------------------------------------------------------------------------------------------------- attention

_ATTENTION = {kernel.name: kernel for module in (block_sparse_attention, block_importance) for kernel in module.KERNELS}
_INT8_ATTENTION = ("attention_key_sums", "attention_key_mean", "attention_codes", "block_sparse_attention_int8")
_RARER_ATTENTION = ("lengths", "padded")  # what the first tile of each kernel is compiled on too, for one architecture


def _own_rows(variant: _tiles.Variant) -> int:
    """Rows of the program's own block: of keys in the keys' gradients, of queries elsewhere."""
    return dict(variant.meta).get("BLOCK_N" if "key_gradient" in variant.kernel else "BLOCK_M", 128)


def _attention_problems(variant: _tiles.Variant, arch: int) -> tuple[Problem, ...]:
    """bfloat16 stands for both half formats, but for the first tile of each kernel."""
    kernel = _ATTENTION[variant.kernel]
    first = variant is kernel.variants[0]
    if not variant.least <= arch <= variant.most or (not kernel.matrix and arch != 90):
        return ()
    dtype = torch.float32 if variant.kernel.endswith("_fp32") else torch.bfloat16
    found = [("plain", dtype)]
    if first and arch == 90:
        found += [(name, dtype) for name in _RARER_ATTENTION]
        if dtype != torch.float32:
            found.append(("plain", torch.float16))
    return tuple(found)


def _attention_arguments(variant: _tiles.Variant, problem: Problem) -> dict:
    name, dtype = problem
    blocks = dict(variant.meta)
    block_size = 128 if _own_rows(variant) >= 64 else _own_rows(variant)
    heads, key_heads, tokens, width = 32, 8, 65536, blocks.get("BLOCK_D", 128)
    size = width * 3 // 4 if name == "padded" else width
    rows = tokens // block_size
    query, key = (empty(1, h, tokens, size, dtype=dtype) for h in (heads, key_heads))
    numbers = empty(1, heads, tokens)
    lengths = empty(1, dtype=torch.int32) if name == "lengths" else None
    if variant.kernel in {kernel.name for kernel in block_importance.KERNELS}:
        results = empty(1, heads, rows, rows), empty(1, heads, rows, rows // 2)
        found = block_importance.plan(query, key, block_size, rows // 2, 0.1, None, lengths, *results)
    else:
        lists = empty(1, heads, rows, dtype=torch.int32), empty(1, heads, rows, 200, dtype=torch.int16)
        common = (*lists, block_size, 0.1, lengths)
        tensors = (query, query, key, key, numbers, numbers)
        found = [
            *block_sparse_attention.plan_forward(
                query, key, key, *common, variant.kernel in _INT8_ATTENTION, query, numbers
            ),
            block_sparse_attention.plan_query_gradient(*tensors, *common, query),
            block_sparse_attention.plan_key_gradients(*tensors, *common, key, key),
        ]  # fmt: skip
    return next(launch.arguments for launch in found if launch.kernel.name == variant.kernel)


def _attention_products(variant: _tiles.Variant) -> str | None:
    if not _ATTENTION[variant.kernel].matrix:
        return None
    return "int8" if variant.kernel.endswith("_int8") else "float"


ATTENTION = Family.of(
    _ATTENTION.values(),
    _attention_problems,
    _attention_arguments,
    _attention_products,
    _own_rows,
)

FAMILIES = (WEIGHTED_CONV, INT8, TOKENS, BILATERAL, STEPS, ATTENTION, DCLS, WAVELETS, AGGREGATES, ROUTED, STAGES)
