"""Masked, modulated layer norm with the residual sum in front of it: argument checks, the torch op, the backend rows.

Source: Park et al., "Denoising Task Routing for Diffusion Models", ICLR 2024, https://arxiv.org/abs/2310.07138; Peebles
and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (adaLN).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._quantized import check_floats, never, values_are_known
from pydenoise.ops.registry import Backend
from pydenoise.reference import routed_norm as reference

OP = "routed_norm"
OP_BACKWARD = "routed_norm_backward"
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "routed_norm(Tensor input, Tensor? mask, Tensor? update, Tensor? gate, Tensor scale, Tensor shift, SymInt total, "
    "float eps, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "routed_norm_backward(Tensor grad, Tensor? grad_carried, Tensor? grad_constant, Tensor input, Tensor? mask, "
    "Tensor? update, Tensor? gate, Tensor scale, Tensor stats, SymInt total, str backend) -> (Tensor, Tensor, Tensor)"
)


class RoutedNorm(NamedTuple):
    """What :func:`routed_norm` returns.

    ``output``: the modulated norm. ``carried``: ``input + gate * update``, or ``None`` without an update.
    ``constant`` [B, T], float32: what the norm makes of a channel that is left out, ``-mean / std``.
    """

    output: Tensor
    carried: Tensor | None
    constant: Tensor


def routed_norm(
    input: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    start: int | Tensor | None = None,
    width: int | None = None,
    mask: Tensor | None = None,
    compact: bool = False,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> RoutedNorm:
    """``layer_norm(m * input + gate * update) * (1 + scale) + shift``, and the residual stream, in one pass.

    The norm has no weights and runs over all C channels, those that the mask m leaves out counting as 0. With a window,
    m is 1 for channels ``start`` to ``start + width - 1``.

    The end of a block needs no mask: ``m * x + g1 * a + g2 * b + (1 - m) * x = x + g1 * a + g2 * b``, which is
    ``carried + g2 * b``.

    Args:
        input: [B, T, C]: float32, bfloat16, float16 or float64 (which runs on the reference); tokens of any stride.
        shift, scale: [B, C], of any floating dtype; arithmetic is in float32.
        start, width: the window; ``start`` an int for all samples, or integers [B]. ``None``: all channels.
        mask: instead of a window: bool [C] or [B, C].
        compact: give the channels of the window only, [B, T, width]; ``start`` is an int and there is no update.
        update: [B, T, C], such as the output of an attention; gate: [B, C].
        eps: added to the variance.
        backend: "auto" or one of "cpu", "triton", "reference".

    Returns:
        :class:`RoutedNorm`: output and carried in the dtype of ``input``, row-major. Gradients of every order reach all
        floating tensors.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Park et al. (2024), sec. 4; the modulation is that of Peebles and Xie (2023).
    """
    args = prepare(
        input, shift, scale, start=start, width=width, mask=mask, compact=compact, update=update, gate=gate, eps=eps
    )
    output, carried, stats = _call(args, backend)
    return RoutedNorm(output, None if update is None else carried, stats[..., 0])


def prepare(input, shift, scale, *, start=None, width=None, mask=None, compact=False, update=None, gate=None,
            eps=1e-6) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows.

    (input, mask [B or 1, C] in the accurate dtype or None, update, gate, scale, shift, total, eps)
    """
    check_floats("input", input)
    if input.dim() != 3 or input.shape[2] < 1:
        raise ValueError(f"input: expected [B, T, C] with C >= 1, got shape {tuple(input.shape)}")
    total = input.shape[2]
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    shift, scale = _coefficient("shift", shift, input), _coefficient("scale", scale, input)
    if (update is None) != (gate is None):
        raise ValueError(f"{'update' if update is None else 'gate'}: update and gate go together, got only one")
    if update is not None:
        update, gate = _update_of(update, input), _coefficient("gate", gate, input)
    mask = _mask_of(mask, start, width, input)
    if compact:
        if update is not None or not isinstance(start, int):
            raise ValueError("compact: expected a window with one start (an int), and no update")
        window = slice(start, start + width)
        return input[..., window], None, None, None, scale[:, window], shift[:, window], total, float(eps)
    return input, mask, update, gate, scale, shift, total, float(eps)


def _coefficient(name: str, value: object, input: Tensor) -> Tensor:
    check_floats(name, value)
    _check_device(name, value, input)
    if tuple(value.shape) != (input.shape[0], input.shape[2]):
        raise ValueError(f"{name}: expected shape {(input.shape[0], input.shape[2])}, got {tuple(value.shape)}")
    return value.to(reference.accurate(input.dtype))


def _check_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} (that of input), got {value.device}")


def _update_of(update: object, input: Tensor) -> Tensor:
    check_tensor("update", update, like=input)
    if update.shape != input.shape:
        raise ValueError(f"update: expected shape {tuple(input.shape)} (that of input), got {tuple(update.shape)}")
    return update


def _mask_of(mask: object, start: object, width: object, input: Tensor) -> Tensor | None:
    """[B or 1, C] of zeros and ones, or ``None`` where no channel is left out."""
    batch, _, channels = input.shape
    dtype = reference.accurate(input.dtype)
    if mask is not None:
        if start is not None or width is not None:
            raise ValueError("mask: expected either a mask or a window (start and width)")
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
        _check_device("mask", mask, input)
        if tuple(mask.shape) not in ((channels,), (batch, channels), (1, channels)):
            raise ValueError(f"mask: expected [{channels}] or [{batch}, {channels}], got shape {tuple(mask.shape)}")
        return mask.reshape(-1, channels).to(dtype)
    if start is None and width is None:
        return None
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width: expected an int beside start, got {type(width).__name__}")
    if not 1 <= width <= channels:
        raise ValueError(f"width: expected 1 to {channels} channels, got {width}")
    first = _start_of(start, width, input)
    if isinstance(first, int):
        window = torch.zeros((1, channels), dtype=dtype, device=input.device)
        window[:, first : first + width] = 1
        return window
    column = torch.arange(channels, device=input.device)
    return ((column >= first) & (column < first + width)).to(dtype)


def _start_of(start: object, width: int, input: Tensor) -> Tensor | int:
    """[B, 1], or an int."""
    batch, _, channels = input.shape
    most = channels - width
    if isinstance(start, Tensor):
        if start.is_floating_point() or start.is_complex() or start.dtype == torch.bool:
            raise TypeError(f"start: expected integers, got {start.dtype}")
        _check_device("start", start, input)
        if tuple(start.shape) != (batch,):
            raise ValueError(f"start: expected an int or shape ({batch},), got {tuple(start.shape)}")
        if start.numel() and values_are_known(start):
            low, high = (v.item() for v in torch.aminmax(start))
            if low < 0 or high > most:
                raise ValueError(f"start: expected 0 to {most}, got {low if low < 0 else high}")
        return start[:, None]
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"start: expected an int or a tensor beside width, got {type(start).__name__}")
    if not 0 <= start <= most:
        raise ValueError(f"start: expected 0 to {most}, got {start}")
    return start


def _call(args: tuple, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Through the torch op where a graph is being made, else straight to the row."""
    first = args[0]
    plain = not torch.compiler.is_compiling() and type(first) in _PLAIN_TENSORS and not first.is_meta
    needs_graph = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    if plain and not needs_graph:
        return registry.select(OP, backend, args).run(*args)
    return torch.ops.pydenoise.routed_norm(*args, backend)


# ----------------------------------------------------------------------------------- torch op, fake kernel, autograd


@torch.library.impl(_library, "routed_norm", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.impl(_library, "routed_norm_backward", "CompositeExplicitAutograd")
def _run_backward(*args):
    *args, backend = args
    return registry.select(OP_BACKWARD, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::routed_norm", lib=_library)
def _fake(input, mask, update, gate, scale, shift, total, eps, backend):
    stats = input.new_empty((*input.shape[:2], 2), dtype=reference.accurate(input.dtype))
    carried = input.new_empty(0) if update is None else input.new_empty(input.shape)
    return input.new_empty(input.shape), carried, stats


@torch.library.register_fake("pydenoise::routed_norm_backward", lib=_library)
def _fake_backward(
    grad, grad_carried, grad_constant, input, mask, update, gate, scale, stats, total, backend
):  # fmt: skip
    batch, _, channels = input.shape
    grad_update = input.new_empty(0) if update is None else input.new_empty(input.shape)
    return input.new_empty(input.shape), grad_update, stats.new_empty((batch, 3, channels))


def _setup_context(ctx, inputs, output):
    input, mask, update, gate, scale, shift, total, eps, backend = inputs
    ctx.save_for_backward(input, mask, update, gate, scale, shift, output[2])
    ctx.total, ctx.eps, ctx.backend = total, eps, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_carried, grad_stats):
    input, mask, update, gate, scale, shift, stats = ctx.saved_tensors
    if grad is None and grad_carried is None and grad_stats is None:
        return (None,) * 9
    if grad is None:
        grad = torch.zeros_like(input)
    if update is None:
        grad_carried = None  # of nothing
    constant = None if grad_stats is None else grad_stats[..., 0].contiguous()
    if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted, and the reference is differentiable
        stats = reference.routed_norm(input, mask, update, gate, scale, shift, ctx.total, ctx.eps)[2]
        grad_input, grad_update, coefficients = reference.routed_norm_backward(
            grad, grad_carried, constant, input, mask, update, gate, scale, stats, ctx.total
        )
    else:
        grad_input, grad_update, coefficients = torch.ops.pydenoise.routed_norm_backward(
            grad, grad_carried, constant, input, mask, update, gate, scale, stats, ctx.total, ctx.backend
        )
    grad_shift, grad_scale, grad_gate = coefficients.unbind(1)
    none = update is None
    return (
        grad_input, None, None if none else grad_update, None if none else grad_gate, grad_scale, grad_shift, None,
        None, None,
    )  # fmt: skip


torch.library.register_autograd("pydenoise::routed_norm", _backward, setup_context=_setup_context, lib=_library)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_run(*args):
    return tuple(t.contiguous() for t in reference.routed_norm(*args))


def _reference_backward(*args):
    return tuple(t.contiguous() for t in reference.routed_norm_backward(*args))


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import routed_norm_cpu, routed_norm_triton  # noqa: E402

for _module in (routed_norm_cpu, routed_norm_triton):
    for _row in _module.ROWS:
        registry.register(_row)
