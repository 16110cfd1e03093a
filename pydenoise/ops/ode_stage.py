"""A stage of a Runge-Kutta step over images: argument checks, the torch op with its gradients, and the backend rows.

One op forms ``state + sum(weights * slopes)`` and the moments of every channel in one pass over memory, and writes it
normalised per image and channel in a second one, over what still lies in the cache.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice, check_tensor
from pydenoise.ops._quantized import never
from pydenoise.ops.registry import Backend
from pydenoise.ops.weighted_conv import channels_last, empty_channels_last
from pydenoise.reference import ode_stage as reference

OP = "ode_stage"
OP_BACKWARD = "ode_stage_backward"
MOST_SLOPES = 4
ORDERS = ("augmented", "second")
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "ode_stage(Tensor state, Tensor[] slopes, float[] weights, float[] position_weights, float drift, bool second, "
    "Tensor? film, float? plane, float eps, bool normalise, bool keep, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "ode_stage_backward(Tensor grad, Tensor point, Tensor moments, Tensor? film, Tensor? beside, float eps, "
    "bool need_film, str backend) -> (Tensor, Tensor)"
)


# ---------------------------------------------------------------------------------------------- public functions


def ode_stage(
    state: Tensor,
    slopes: Sequence[Tensor] = (),
    weights: Sequence[float] = (),
    *,
    order: str = "augmented",
    position_weights: Sequence[float] | None = None,
    drift: float = 0.0,
    film: Tensor | None = None,
    plane: float | None = None,
    eps: float = 1e-5,
    return_point: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Instance-normalise ``state + sum(weights * slopes)``: the input of the next evaluation of an ODE's right side.

    ``y = (u - mean) / sqrt(variance + eps) * (1 + scale) + shift`` with the moments of each image's channels over its
    pixels (``torch.nn.InstanceNorm2d`` without affine parameters) and the point

    * ``u = state + sum(weights * slopes)`` of order "augmented";
    * ``u = [z + drift v + sum(position_weights * slopes); v + sum(weights * slopes)]`` of order "second", where z and v
      are the halves of the state's channels and slopes are accelerations: Nystroem's form of z'' = f(z, z').

    Args:
        state: [N, C, H, W], any strides (computed in channels_last memory); float32, bfloat16, float16 or float64;
            C even where the order is "second". N may be 0.
        slopes: at most 4 tensors, [N, C, H, W] or, of order "second", [N, C / 2, H, W], dtype and device of ``state``.
        weights: one finite number a slope, the step's length included.
        position_weights: likewise, for z; of order "second" only, and there needed with slopes.
        drift: the weight of v in z; of order "second" only.
        film: [N, 2 C], scale and shift of each image's channels; ``None``: 0. dtype and device of ``state``.
        plane: a number that fills one more channel of ``y``, behind the others (the time of the stage); no gradient.
        eps: positive.
        return_point: also return u [N, C, H, W].
        backend: "auto" or one of "cpu", "triton", "reference".

    Returns:
        y [N, C (+ 1), H, W] in channels_last memory, or (y, u). Differentiable in state, slopes and film, twice too. An
        image of one pixel gives y = shift.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Cheng et al., "The Missing U for Efficient Diffusion Models" (2023), https://arxiv.org/abs/2310.20092 (the
    dynamic block); Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", II.14 (Nystroem's methods).
    """
    args = prepare(
        state, slopes, weights, order=order, position_weights=position_weights, drift=drift, film=film, plane=plane,
        eps=eps, return_point=return_point,
    )  # fmt: skip
    y, point, _ = _call(args, backend)
    if not return_point:
        return y
    return y, (point if args[-1] else args[0])


def ode_combination(
    state: Tensor,
    slopes: Sequence[Tensor],
    weights: Sequence[float],
    *,
    order: str = "augmented",
    position_weights: Sequence[float] | None = None,
    drift: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The point u of :func:`ode_stage` alone, in one pass: the end of a Runge-Kutta step. Arguments as there."""
    args = prepare_combination(state, slopes, weights, order=order, position_weights=position_weights, drift=drift)
    return _call(args, backend)[1]


def _call(args: tuple, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    state, slopes, *rest = args
    tensors = [state, *slopes, args[6]]
    plain = all(type(t) in _PLAIN_TENSORS for t in tensors if t is not None)
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling() or not plain or state.is_meta or gradients:
        *rest, keep = rest
        keep = keep or (gradients and _combines(slopes, rest[2]))
        return torch.ops.pydenoise.ode_stage(state, list(slopes), *rest, keep, backend)
    return registry.select(OP, backend, args).run(*args)


def _combines(slopes: Sequence[Tensor], drift: float) -> bool:
    """Whether the point is something else than the state."""
    return len(slopes) > 0 or drift != 0


# ------------------------------------------------------------------------------------------------ argument checks


def prepare(state, slopes=(), weights=(), *, order="augmented", position_weights=None, drift=0.0, film=None, plane=None,
            eps=1e-5, return_point=False) -> tuple:  # fmt: skip
    """Check everything and return the positional arguments of the rows."""
    state, slopes, weights, position_weights, drift, second = _combination(
        state, slopes, weights, order, position_weights, drift
    )
    if film is not None:
        _check_like("film", film, state, (state.shape[0], 2 * state.shape[1]))
    plane = None if plane is None else _number("plane", plane)
    eps = _number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    keep = bool(return_point) and _combines(slopes, drift)  # else the point is the state
    return state, slopes, weights, position_weights, drift, second, film, plane, eps, True, keep


def prepare_combination(state, slopes, weights, *, order="augmented", position_weights=None, drift=0.0) -> tuple:
    """Check everything and return the positional arguments of the rows."""
    combination = _combination(state, slopes, weights, order, position_weights, drift)
    if not _combines(combination[1], combination[4]):
        raise ValueError("slopes: expected at least one")
    return (*combination, None, None, 1.0, False, True)


def _combination(state, slopes, weights, order, position_weights, drift) -> tuple:
    check_tensor("state", state)
    if not state.is_floating_point():
        raise TypeError(f"state: expected a floating-point tensor, got {state.dtype}")
    if state.dim() != 4 or 0 in state.shape[1:]:
        raise ValueError(f"state: expected [N, C, H, W] without an empty axis but N, got shape {tuple(state.shape)}")
    check_choice("order", order, ORDERS)
    second = order == "second"
    n, channels, *size = state.shape
    if second and channels % 2:
        raise ValueError(f"state: order 'second' needs an even number of channels, got {channels}")
    if not isinstance(slopes, (tuple, list)):
        raise TypeError(f"slopes: expected a sequence of tensors, got {type(slopes).__name__}")
    if len(slopes) > MOST_SLOPES:
        raise ValueError(f"slopes: expected at most {MOST_SLOPES}, got {len(slopes)}")
    for slope in slopes:
        _check_like("slopes", slope, state, (n, channels // 2 if second else channels, *size))
    weights = _numbers("weights", weights, len(slopes))
    drift = _number("drift", drift)
    if not second and (position_weights is not None or drift):
        raise ValueError("position_weights, drift: belong to order 'second', got order 'augmented'")
    if second and position_weights is None and slopes:
        raise ValueError("position_weights: order 'second' needs one a slope")
    position_weights = _numbers("position_weights", position_weights or (), len(slopes) if second else 0)
    return state, tuple(slopes), weights, position_weights, drift, second


def _check_like(name: str, value: object, state: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, value)
    if value.dtype != state.dtype:
        raise TypeError(f"{name}: expected dtype {state.dtype} (that of state), got {value.dtype}")
    if value.device != state.device:
        raise ValueError(f"{name}: expected device {state.device} (that of state), got {value.device}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _numbers(name: str, values: object, count: int) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers (one a slope), got {len(values)}")
    return tuple(_number(name, value) for value in values)


# ---------------------------------------------------------------------------- torch op: kernel, fake kernel, autograd
# With gradients the point is always kept: the backward reads it, and the moments.


def wide_dtype(state: Tensor) -> torch.dtype:
    """Of moments and of film's gradients as the rows return them."""
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def empty_results(state: Tensor, plane: float | None, normalise: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (normalised point, point, moments), empty where not wanted."""
    n, channels, *size = state.shape
    nothing = state.new_empty(0)
    y = empty_channels_last(state, (n, channels + (plane is not None), *size)) if normalise else nothing
    point = empty_channels_last(state, state.shape) if keep else nothing
    moments = state.new_empty((n, 2, channels) if normalise else 0, dtype=wide_dtype(state))
    return y, point, moments


@torch.library.impl(_library, "ode_stage", "CompositeExplicitAutograd")
def _run(state, slopes, *args):
    *args, backend = args
    args = (state, tuple(slopes), *args)
    return registry.select(OP, backend, args).run(*args)


@torch.library.impl(_library, "ode_stage_backward", "CompositeExplicitAutograd")
def _run_backward(*args):
    *args, backend = args
    return registry.select(OP_BACKWARD, backend, tuple(args)).run(*args)


@torch.library.register_fake("pydenoise::ode_stage", lib=_library)
def _fake(state, slopes, weights, position_weights, drift, second, film, plane, eps, normalise, keep, backend):
    return empty_results(state, plane, normalise, keep)


@torch.library.register_fake("pydenoise::ode_stage_backward", lib=_library)
def _fake_backward(grad, point, moments, film, beside, eps, need_film, backend):
    n, channels = point.shape[:2]
    return empty_channels_last(point, point.shape), moments.new_empty((n, 2 * channels) if need_film else 0)


def _setup_context(ctx, inputs, output):
    state, slopes, weights, position_weights, drift, second, film, plane, eps, normalise, keep, backend = inputs
    point = output[1]
    if normalise and not keep:  # nothing was combined: the point is the state
        if _combines(slopes, drift):
            raise RuntimeError("ode_stage: gradients need the point; call pydenoise.functional instead")
        point = state
    ctx.save_for_backward(*((point, output[2], film) if normalise else ()))
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.weights, ctx.position_weights, ctx.drift, ctx.second = weights, position_weights, drift, second
    ctx.eps, ctx.backend, ctx.normalise = eps, backend, normalise
    ctx.slopes, ctx.film_dtype = len(slopes), None if film is None else film.dtype
    ctx.shape = state.shape


def _backward(ctx, grad, grad_point, grad_moments):
    need = ctx.needs_input_grad
    need_slopes = need[1] if isinstance(need[1], (tuple, list)) else [need[1]] * ctx.slopes
    dpoint, dfilm = grad_point, None
    if ctx.normalise and grad is not None:
        point, moments, film = ctx.saved_tensors
        need_film = film is not None and need[6]
        if torch.is_grad_enabled():  # create_graph=True: the reference is differentiable
            dpoint, dfilm = reference.ode_stage_backward(grad, point, film, grad_point, ctx.eps, need_film)
        else:
            dpoint, dfilm = torch.ops.pydenoise.ode_stage_backward(
                grad, point, moments, film, grad_point, ctx.eps, need_film, ctx.backend
            )
        dfilm = dfilm.to(ctx.film_dtype) if need_film else None
    # an empty list is an empty list of tensors to torch, which wants one back
    lists = [None if values else [] for values in (ctx.weights, ctx.position_weights)]
    if dpoint is None:
        return None, [None] * ctx.slopes, *lists, *(None,) * 8
    # As results are: sums of gradients in two memory formats, which torch makes of what follows, take a multiple.
    dstate, dslopes = reference.combination_backward(
        channels_last(dpoint), ctx.weights, ctx.position_weights, ctx.drift, ctx.second, need[0], need_slopes
    )
    return dstate, list(dslopes), *lists, None, None, dfilm, None, None, None, None, None


torch.library.register_autograd("pydenoise::ode_stage", _backward, setup_context=_setup_context, lib=_library)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_run(state, slopes, weights, position_weights, drift, second, film, plane, eps, normalise, keep):
    y, point, moments = reference.ode_stage(
        state, slopes, weights, position_weights, drift, second, film, plane, eps, normalise, keep
    )
    y = channels_last(y) if normalise else y
    return y, (channels_last(point) if keep else point), moments


def _reference_backward(grad, point, moments, film, beside, eps, need_film):
    dpoint, dfilm = reference.ode_stage_backward(grad, point, film, beside, eps, need_film)
    return channels_last(dpoint), (dfilm.to(moments.dtype) if need_film else moments.new_empty(0))


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import ode_stage_cpu, ode_stage_triton  # noqa: E402

for _module in (ode_stage_cpu, ode_stage_triton):
    for _row in _module.ROWS:
        registry.register(_row)
