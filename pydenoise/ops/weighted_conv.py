"""Weighted convolution: argument checks, the torch op with its fake kernel and autograd, and the backend rows.

``y = act(conv(x, W * density) + b) + residual`` in 1, 2 or 3 spatial dimensions. Source: Cammarasana and Patane,
"Optimal Weighted Convolution for Classification and Denoising" (2025).
"""

import math
import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice, check_tensor, int_tuple
from pydenoise.ops.registry import Backend
from pydenoise.reference import weighted_conv as reference
from pydenoise.reference.activations import CONV_ACTIVATIONS

OP = "weighted_conv"
OP_BACKWARD = "weighted_conv_backward"
ALGORITHMS = ("auto", "direct")
_BY_PRECISION = "by_precision"  # in compiled graphs, which cannot read torch's setting: it is read when the op runs

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "weighted_conv(Tensor input, Tensor weight, Tensor? density, Tensor? bias, Tensor? residual, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, str algorithm, str backend) -> Tensor"
)
_library.define(
    "weighted_conv_backward(Tensor grad, Tensor input, Tensor weight, Tensor? density, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str algorithm, bool[] mask, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


# ---------------------------------------------------------------------------------------------- public functions


def weighted_conv1d(
    input: Tensor,
    weight: Tensor,
    density: Tensor | None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """1-D weighted convolution over ``input`` [N, C_in, L]; see :func:`weighted_conv2d` for every argument."""
    return _weighted_conv(
        1, input, weight, density, bias, stride, padding, dilation, groups, activation, residual, backend
    )


def weighted_conv2d(
    input: Tensor,
    weight: Tensor,
    density: Tensor | None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``activation(conv2d(input, weight * density) + bias) + residual`` without writing ``weight * density`` to memory.

    Args:
        input: [N, C_in, H, W] (or [C_in, H, W]), any strides; float32, bfloat16, float16 or float64. N may be 0.
        weight: [C_out, C_in / groups, K_h, K_w], dtype and device of ``input``.
        density: [K_h, K_w], finite, dtype and device of ``input``; ``None`` is a density of ones. Finiteness is checked
            here for CPU tensors outside ``torch.compile`` (a check on a GPU would have to wait for it).
        bias: [C_out] or ``None``.
        stride, dilation: positive ints. padding: non-negative ints, ``"valid"``, or ``"same"`` (stride 1 only).
        groups: divides C_in and C_out.
        activation: "none", "relu", "silu", "gelu" (exact), "gelu_tanh", "leaky_relu_0.01", "leaky_relu_0.1",
            "leaky_relu_0.2" (slopes below zero) or "softplus", applied before the residual is added.
        residual: a tensor of the output's shape, dtype and device, or ``None``.
        backend: "auto" or one of "cpu", "triton", "cuda", "reference"; see :func:`pydenoise.explain`.

    Returns:
        [N, C_out, H_out, W_out] of ``input``'s dtype, in channels_last memory on the compiled backends. Differentiable
        in input, weight, density, bias and residual. Under autocast, floating arguments are cast as for ``conv2d``.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    The Winograd algorithm (3x3, stride 1; relative error up to 2e-5 in float32) is used only when
    ``torch.get_float32_matmul_precision()`` is not "highest". On CPU, depthwise kernels of 8 and more taps along an
    axis (stride and dilation 1) are computed by Karatsuba products, with the rounding error of the direct sum;
    non-finite values are felt up to 3 pixels beyond the kernel's reach.

    Source: Cammarasana and Patane (2025), eq. 3.
    """
    return _weighted_conv(
        2, input, weight, density, bias, stride, padding, dilation, groups, activation, residual, backend
    )


def weighted_conv3d(
    input: Tensor,
    weight: Tensor,
    density: Tensor | None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """3-D weighted convolution over ``input`` [N, C_in, D, H, W]; see :func:`weighted_conv2d` for every argument."""
    return _weighted_conv(
        3, input, weight, density, bias, stride, padding, dilation, groups, activation, residual, backend
    )


def _weighted_conv(
    dims, input, weight, density, bias, stride, padding, dilation, groups, activation, residual, backend
):
    check_tensor("input", input)
    batched = input.dim() == dims + 2
    if not batched and input.dim() == dims + 1:
        residual = residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
        arguments = (weight, density, bias, stride, padding, dilation, groups, activation, residual, backend)
        return _weighted_conv(dims, input.unsqueeze(0), *arguments).squeeze(0)
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):
        input, weight, density, bias, residual = _autocast(input, weight, density, bias, residual)
    args = prepare(dims, input, weight, density, bias, residual, stride, padding, dilation, groups, activation)
    if torch.compiler.is_compiling() or type(input) not in _PLAIN_TENSORS or input.is_meta:
        return _through_dispatcher(args, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return _through_dispatcher(args, backend)
    return registry.select(OP, backend, args).run(*args)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _through_dispatcher(args: tuple, backend: str) -> Tensor:
    """Call the torch op. With gradients, the activation is a torch op of its own: its backward needs what it saw."""
    *head, activation, algorithm = args
    if activation != "none" and torch.is_grad_enabled():
        residual, head[4] = head[4], None
        y = reference.activate(torch.ops.pydenoise.weighted_conv(*head, "none", algorithm, backend), activation)
        return y if residual is None else y + residual
    return torch.ops.pydenoise.weighted_conv(*head, activation, algorithm, backend)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors]


# ------------------------------------------------------------------------------------------------ argument checks


def prepare(
    dims: int,
    input: Tensor,
    weight: Tensor,
    density: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    activation: str,
) -> tuple:
    """Check everything and return the positional arguments of the backend rows.

    (input, weight, density, bias, residual, stride, padding as (low, high) per axis, dilation, groups, activation,
    algorithm), with tuples of ints.
    """
    _check_shapes(dims, input, weight, density, bias, groups)
    options = (_hashable(stride), _hashable(padding), _hashable(dilation))
    geometry = _geometry if torch.compiler.is_compiling() else _cached_geometry
    stride, padding, dilation = geometry(dims, *options, tuple(weight.shape[2:]))
    if activation not in CONV_ACTIVATIONS:
        check_choice("activation", activation, CONV_ACTIVATIONS)
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if residual is not None:
        check_tensor("residual", residual, like=input)
        shape = (input.shape[0], weight.shape[0], *size)
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual: expected the output's shape {shape}, got {tuple(residual.shape)}")
    algorithm = _BY_PRECISION if torch.compiler.is_compiling() else _algorithm(_BY_PRECISION)
    return input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm


def _algorithm(name: str) -> str:
    """The algorithm the rows are told to use: torch's precision setting decides unless one is named."""
    return algorithm_by_precision() if name == _BY_PRECISION else name


def algorithm_by_precision() -> str:
    """ "direct" where torch is told to keep float32 products exact ("highest", the default), else "auto"."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses the question once its newer per-backend settings were used: those decide
        exact = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    return "direct" if exact else "auto"


def _hashable(option):
    return tuple(option) if isinstance(option, Sequence) and not isinstance(option, str) else option


def _geometry(dims: int, stride, padding, dilation, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """stride, padding as (low, high) per axis, and dilation as tuples: the same few for every call of a model."""
    stride = int_tuple("stride", stride, dims, minimum=1)
    dilation = int_tuple("dilation", dilation, dims, minimum=1)
    return stride, explicit_padding(padding, kernel, stride, dilation), dilation


_cached_geometry = lru_cache(maxsize=1024, typed=True)(_geometry)


def _check_shapes(dims, input, weight, density, bias, groups) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating-point tensor, got {input.dtype}")
    if input.dim() != dims + 2:
        raise ValueError(
            f"input: expected {dims + 2} dimensions [N, C, {'spatial, ' * dims}] (or one less, without N), "
            f"got shape {tuple(input.shape)}"
        )
    check_tensor("weight", weight, like=input)
    if weight.dim() != dims + 2 or 0 in weight.shape:
        raise ValueError(
            f"weight: expected a non-empty [C_out, C_in / groups, *kernel] with {dims} kernel axes, "
            f"got shape {tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a positive divisor of C_out = {weight.shape[0]}, got {groups}")
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input: expected {weight.shape[1] * groups} channels (weight {tuple(weight.shape)} with groups={groups}), "
            f"got {input.shape[1]} in shape {tuple(input.shape)}"
        )
    if density is not None:
        check_tensor("density", density, like=input)
        if density.shape != weight.shape[2:]:
            raise ValueError(
                f"density: expected the kernel's shape {tuple(weight.shape[2:])}, got {tuple(density.shape)}"
            )
        if not torch.compiler.is_compiling() and density.device.type == "cpu" and type(density) in _PLAIN_TENSORS:
            check_finite_density(density)
    if bias is not None:
        check_tensor("bias", bias, like=input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


_last_finite: tuple = (lambda: None, -1)  # a reference to the density that was found finite last, and its version


def check_finite_density(density: Tensor) -> None:
    """Raise ``ValueError`` if any entry of ``density`` is NaN or infinite (waits for the device that holds it)."""
    global _last_finite
    version = -1 if density.is_inference() else density._version  # inference tensors count no versions
    known, known_version = _last_finite
    if known() is density and version == known_version and version >= 0:
        return
    plain = density.detach()
    # a finite sum means finite entries, and costs a third of the exact test; an infinite one may be an overflow
    if not math.isfinite(plain.sum().item()) and not torch.isfinite(plain).all():
        raise ValueError("density: every entry must be finite, got NaN or infinity")
    _last_finite = (weakref.ref(density), version)


def explicit_padding(
    padding: int | str | Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Padding as (low, high) per axis, outermost axis first; "same" puts the odd element at the high end, as torch."""
    dims = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return (0,) * (2 * dims)
        if padding != "same":
            raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
        if any(s != 1 for s in stride):
            raise ValueError(f"padding: 'same' needs stride 1, got stride {tuple(stride)}")
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(extent for total in totals for extent in (total // 2, total - total // 2))
    if isinstance(padding, Sequence) and len(padding) == 2 * dims and dims > 1:
        raise ValueError(f"padding: expected {dims} ints (the same at both ends of an axis), got {tuple(padding)}")
    return tuple(p for pad in int_tuple("padding", padding, dims, minimum=0) for p in (pad, pad))


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of the output; raises ``ValueError`` where the kernel does not fit the padded input."""
    result = []
    for axis, (extent, k, s, d) in enumerate(zip(size, kernel, stride, dilation, strict=True)):
        padded = extent + padding[2 * axis] + padding[2 * axis + 1]
        span = d * (k - 1) + 1
        if padded < span:
            raise ValueError(
                f"input: the kernel spans {span} along spatial axis {axis}, but the padded input has only {padded} "
                f"(size {tuple(size)}, kernel {tuple(kernel)}, dilation {tuple(dilation)})"
            )
        result.append((padded - span) // s + 1)
    return tuple(result)


# ---------------------------------------------------------------------------- torch op: kernel, fake kernel, autograd


# Every row returns images with adjacent channels, 1-D ones too, so that the fake kernels need not know which row runs.


def channels_last(tensor: Tensor) -> Tensor:
    """``tensor`` [N, C, *spatial] with adjacent channels in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised [N, C, *spatial] with adjacent channels in memory."""
    return like.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


@torch.library.impl(_library, "weighted_conv", "CompositeExplicitAutograd")
def _run(*args):
    *args, algorithm, backend = args
    args = (*args, _algorithm(algorithm))
    return registry.select(OP, backend, args).run(*args)


@torch.library.impl(_library, "weighted_conv_backward", "CompositeExplicitAutograd")
def _run_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask, backend):
    args = (grad, input, weight, density, stride, padding, dilation, groups, _algorithm(algorithm), mask)
    grads = registry.select(OP_BACKWARD, backend, args).run(*args)
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("pydenoise::weighted_conv", lib=_library)
def _fake(input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm, backend):
    size = [
        (n + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i, n in enumerate(input.shape[2:])
    ]
    shape = (input.shape[0], weight.shape[0], *size)
    return empty_channels_last(input, shape)


@torch.library.register_fake("pydenoise::weighted_conv_backward", lib=_library)
def _fake_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask, backend):
    empty = grad.new_empty(0)
    dx = empty_channels_last(input, input.shape) if mask[0] else empty
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if mask[1] else empty
    ddensity = torch.empty_like(density) if mask[2] and density is not None else empty
    return dx, dweight, ddensity


def _setup_context(ctx, inputs, output):
    input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm, backend = inputs
    if activation != "none":
        raise RuntimeError(
            "weighted_conv: gradients are defined for activation='none'; call pydenoise.functional instead"
        )
    ctx.save_for_backward(input, weight, density)
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.algorithm, ctx.backend = algorithm, backend
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None


def _backward(ctx, grad):
    input, weight, density = ctx.saved_tensors
    need = ctx.needs_input_grad
    mask = [need[0], need[1], need[2] and density is not None]
    if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted, and the reference is differentiable
        grads = reference.weighted_conv_backward(grad, input, weight, density, *ctx.geometry, mask)
    else:
        grads = torch.ops.pydenoise.weighted_conv_backward(
            grad, input, weight, density, *ctx.geometry, ctx.algorithm, mask, ctx.backend
        )
    dx, dweight, ddensity = (g if wanted else None for g, wanted in zip(grads, mask, strict=True))
    axes = [0, *range(2, grad.dim())]
    dbias = grad.sum(axes) if ctx.has_bias and need[3] else None
    dresidual = grad if ctx.has_residual and need[4] else None
    return dx, dweight, ddensity, dbias, dresidual, None, None, None, None, None, None, None


torch.library.register_autograd("pydenoise::weighted_conv", _backward, setup_context=_setup_context, lib=_library)


# --------------------------------------------------------------------------------------------------- backend rows
# Positional arguments of every row, in the order that `prepare` returns them.


def _reference_run(input, weight, density, bias, residual, stride, padding, dilation, groups, activation, algorithm):
    y = reference.weighted_conv(input, weight, density, bias, residual, stride, padding, dilation, groups, activation)
    return channels_last(y)


def _reference_backward(grad, input, weight, density, stride, padding, dilation, groups, algorithm, mask):
    dx, dweight, ddensity = reference.weighted_conv_backward(
        grad, input, weight, density, stride, padding, dilation, groups, mask
    )
    if dx is not None:
        dx = empty_channels_last(input, input.shape).copy_(dx)  # dx may be a part of the padded gradient
    return dx, (None if dweight is None else dweight.contiguous()), ddensity


def _never(*args) -> None:
    return None


registry.register(Backend(OP, "reference", 0, _never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, _never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import weighted_conv_cpu, weighted_conv_cuda, weighted_conv_triton  # noqa: E402

for _module in (weighted_conv_cpu, weighted_conv_triton, weighted_conv_cuda):
    for _row in _module.ROWS:
        registry.register(_row)

PackedWeight = weighted_conv_cpu.PackedWeight
pack = weighted_conv_cpu.pack


def weighted_conv_packed(
    input: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
    activation: str,
) -> Tensor:
    """Run a convolution whose weight was packed once: the inference path of the modules. Not differentiable.

    Args:
        input: [N, C_in, *spatial] on the CPU, of the packed weight's dtype.
        packed: from :func:`pack`.
        bias: [C_out] or ``None``. residual: of the output's shape, or ``None``; both of ``input``'s dtype.
        padding: (low, high) per axis, outermost axis first: see :func:`explicit_padding`.
        activation: one of ``CONV_ACTIVATIONS``.

    Raises:
        TypeError, ValueError: ``input`` does not fit the packed weight, or ``residual`` does not fit the output.
    """
    for name, tensor in (("input", input), ("bias", bias), ("residual", residual)):
        if tensor is not None and (tensor.dtype != packed.dtype or not tensor.is_cpu):
            raise TypeError(
                f"{name}: expected a CPU tensor of dtype {packed.dtype} (that of the packed weight), "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if input.dim() != len(packed.stride) + 2 or input.shape[1] != packed.in_channels:
        raise ValueError(
            f"input: expected [N, {packed.in_channels}, {'spatial, ' * len(packed.stride)}], "
            f"got shape {tuple(input.shape)}"
        )
    size = output_size(input.shape[2:], packed.kernel_size, packed.stride, padding, packed.dilation)
    if residual is not None and residual.shape != (input.shape[0], packed.out_channels, *size):
        raise ValueError(
            f"residual: expected the output's shape {(input.shape[0], packed.out_channels, *size)}, "
            f"got {tuple(residual.shape)}"
        )
    return weighted_conv_cpu.run_packed(input, packed, bias, residual, padding, activation)
