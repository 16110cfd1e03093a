"""Construction of DCLS kernels: argument checks, the torch op with fake kernel and autograd, and the backend rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice, check_tensor, int_tuple
from pydenoise.ops._quantized import never
from pydenoise.ops.registry import Backend
from pydenoise.reference import dcls_kernel as reference

OP = "dcls_kernel"
OP_BACKWARD = "dcls_kernel_backward"
VERSIONS = ("gauss", "max", "v1", "v0")
COMPAT = (None, "reference")
GAUSS_SPREAD = 0.27  # least standard deviation: |SIG| is added to it
HAT_SPREAD = 1.0  # half the base of a hat where |SIG| is 0
MOST_DIMS = 3
_V0_AXES = {1: (0,), 2: (0, 1), 3: (0, 2, 1)}  # of the published package

_library = torch.library.Library("pydenoise", "FRAGMENT")
_GEOMETRY = "int[] size, int[] axes, int[] centres, bool gauss, bool normalized, float spread, str backend"
_library.define(f"dcls_kernel(Tensor weight, Tensor P, Tensor? SIG, {_GEOMETRY}) -> Tensor")
_library.define(
    f"dcls_kernel_backward(Tensor grad, Tensor weight, Tensor P, Tensor? SIG, {_GEOMETRY}) -> (Tensor, Tensor, Tensor)"
)


def dcls_kernel(
    weight: Tensor,
    P: Tensor,
    SIG: Tensor | None,
    dilated_kernel_size: int | Sequence[int],
    *,
    version: str = "gauss",
    compat: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The dense kernel of a dilated convolution with learnable spacings, for ``torch.nn.functional.conv{1,2,3}d``.

    ``K[o, i, x...] = sum over c of W_c / n_c * product over the axes of u_c(x)``, with u(x) the interpolation's weight
    at the distance x - L // 2 - P_c, and n_c the sum of that product over the kernel, plus 1e-7 (n_c = 1 for "v0").

    Args:
        weight: [O, I, C], the weights of C components for each pair of channels (I = in_channels / groups); float32,
            bfloat16, float16 or float64.
        P: [D, O, I, C] with D = 1, 2 or 3: positions in taps, 0 in the centre; dtype and device of ``weight``. P[a]
            moves along axis a. Positions are not clamped: what lies outside of the kernel is lost ("v0"), or shifted
            onto its border by the division by n.
        SIG: [D, O, I, C], of which the absolute value counts, for "gauss" and "max"; ``None`` for "v0" and "v1".
        dilated_kernel_size: L, a positive int or one for each axis; even ones have their centre at tap L // 2.
        version: "gauss": exp(-d^2 / 2 s^2) with s = |SIG| + 0.27; "max": max(0, |SIG| + 1 - |d|); "v1": linear
            interpolation, max(0, 1 - |d|); "v0": the same without the division by n.
        compat: ``None``, or "reference" for the axes of the published package: there P[0] moves along the last axis
            ("v0" in 3-D: P[1] along the last and P[2] along the middle one; in 2-D as here), and an axis is centred by
            the size of the axis that its P was made for, which shows where the sizes differ.
        backend: "auto" or one of "cpu", "triton", "reference"; see :func:`pydenoise.explain`.

    Returns:
        [O, I, *dilated_kernel_size], row-major, of ``weight``'s dtype. Differentiable in weight, P and SIG. 16-bit
        parameters are computed in float32.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Khalfaoui-Hassani, Pellegrini and Masquelier, https://arxiv.org/abs/2112.03740 ("v0", "v1") and
    https://arxiv.org/abs/2306.00817 ("max", "gauss").
    """
    return call(prepare(weight, P, SIG, dilated_kernel_size, version=version, compat=compat), backend)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def call(args: tuple, backend: str = "auto") -> Tensor:
    """Run what :func:`prepare` returned; through the torch op where a graph is being made."""
    tensors = args[:3]
    if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TENSORS or args[0].is_meta:
        return torch.ops.pydenoise.dcls_kernel(*args, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return torch.ops.pydenoise.dcls_kernel(*args, backend)
    return registry.select(OP, backend, args).run(*args)


# ------------------------------------------------------------------------------------------------ argument checks


def prepare(
    weight: Tensor, P: Tensor, SIG: Tensor | None, dilated_kernel_size: int | Sequence[int], *, version: str = "gauss",
    compat: str | None = None, spread: float | None = None,
) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows.

    (weight, P, SIG, size, axes, centres, gauss, normalized, spread). ``spread`` replaces the least standard deviation
    of Gaussians: one layer of the published package has another.
    """
    check_choice("version", version, VERSIONS)
    check_compat(compat)
    check_tensor("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor, got {weight.dtype}")
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty [O, I, C], got shape {tuple(weight.shape)}")
    check_tensor("P", P)
    if P.dim() != 4 or not 1 <= P.shape[0] <= MOST_DIMS:
        raise ValueError(f"P: expected [D, O, I, C] with D from 1 to {MOST_DIMS}, got shape {tuple(P.shape)}")
    dims = P.shape[0]
    _check_like("P", P, weight, dims)
    if (SIG is not None) != has_widths(version):
        wanted = "a tensor" if SIG is None else "None"
        raise ValueError(f"SIG: expected {wanted} for version {version!r}, got {type(SIG).__name__}")
    if SIG is not None:
        check_tensor("SIG", SIG)
        _check_like("SIG", SIG, weight, dims)
    size = int_tuple("dilated_kernel_size", dilated_kernel_size, dims, minimum=1)
    axes, centres = axes_and_centres(size, version, compat)
    gauss = version == "gauss"
    if spread is None:
        spread = GAUSS_SPREAD if gauss else HAT_SPREAD
    return weight, P, SIG, size, axes, centres, gauss, version != "v0", spread


def check_compat(compat: object) -> None:
    """``compat`` is ``None`` or "reference"."""
    if compat not in COMPAT:
        raise ValueError(f"compat: expected None or 'reference', got {compat!r}")


def _check_like(name: str, value: Tensor, weight: Tensor, dims: int) -> None:
    if value.dtype != weight.dtype:
        raise TypeError(f"{name}: expected dtype {weight.dtype} (that of weight), got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name}: expected device {weight.device} (that of weight), got {value.device}")
    if tuple(value.shape) != (dims, *weight.shape):
        raise ValueError(f"{name}: expected shape {(dims, *weight.shape)}, got {tuple(value.shape)}")


def has_widths(version: str) -> bool:
    """Whether components of ``version`` have a SIG."""
    return version in ("gauss", "max")


def axes_and_centres(size: Sequence[int], version: str, compat: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each axis of the kernel: which P moves along it, and the tap where that P is 0."""
    dims = len(size)
    if compat is None:
        axes = tuple(range(dims))
    else:
        axes = _V0_AXES[dims] if version == "v0" else tuple(reversed(range(dims)))
    return axes, tuple(size[m] // 2 for m in axes)


# ---------------------------------------------------------------------------- torch op: kernel, fake kernel, autograd


@torch.library.impl(_library, "dcls_kernel", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.impl(_library, "dcls_kernel_backward", "CompositeExplicitAutograd")
def _run_backward(*args):
    *args, backend = args
    dweight, dP, dSIG = registry.select(OP_BACKWARD, backend, tuple(args)).run(*args)
    return dweight, dP, args[0].new_empty(0) if dSIG is None else dSIG


@torch.library.register_fake("pydenoise::dcls_kernel", lib=_library)
def _fake(weight, P, SIG, size, axes, centres, gauss, normalized, spread, backend):
    return weight.new_empty((*weight.shape[:2], *size))


@torch.library.register_fake("pydenoise::dcls_kernel_backward", lib=_library)
def _fake_backward(grad, weight, P, SIG, size, axes, centres, gauss, normalized, spread, backend):
    dSIG = grad.new_empty(0) if SIG is None else grad.new_empty(SIG.shape)
    return grad.new_empty(weight.shape), grad.new_empty(P.shape), dSIG


def _setup_context(ctx, inputs, output):
    weight, P, SIG, *rest, backend = inputs
    ctx.save_for_backward(weight, P, SIG)
    ctx.rest, ctx.backend = rest, backend


def _backward(ctx, grad):
    weight, P, SIG = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted, and the reference is differentiable
        grads = reference.dcls_kernel_backward(grad, weight, P, SIG, *ctx.rest)
    else:
        grads = torch.ops.pydenoise.dcls_kernel_backward(grad, weight, P, SIG, *ctx.rest, ctx.backend)
    wanted = ctx.needs_input_grad[:3]
    return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), *(None,) * 7)


torch.library.register_autograd("pydenoise::dcls_kernel", _backward, setup_context=_setup_context, lib=_library)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_run(*args) -> Tensor:
    return reference.dcls_kernel(*args).contiguous()


def _reference_backward(*args) -> tuple:
    return tuple(None if g is None else g.contiguous() for g in reference.dcls_kernel_backward(*args))


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import dcls_kernel_cpu, dcls_kernel_triton  # noqa: E402

for _module in (dcls_kernel_cpu, dcls_kernel_triton):
    for _row in _module.ROWS:
        registry.register(_row)
