"""Feature maps added up under a softmax over them: argument checks, the torch op with autograd, and the backend rows.

Source: the spatial aware block-wise (SABW) aggregator of "Ensembling Diffusion Models via Adaptive Feature Aggregation"
(Wang et al., ICLR 2025, https://arxiv.org/abs/2405.17082).
"""

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._quantized import check_floats, never
from pydenoise.ops._rows._maps import has_adjacent_channels
from pydenoise.ops.registry import Backend
from pydenoise.reference import softmax_aggregate as reference

OP = "softmax_aggregate"
OP_BACKWARD = "softmax_aggregate_backward"
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define("softmax_aggregate(Tensor features, Tensor hidden, Tensor? weight, str backend) -> (Tensor, Tensor)")
_library.define(
    "softmax_aggregate_backward(Tensor grad, Tensor? grad_shares, Tensor features, Tensor shares, bool wants_features, "
    "str backend) -> (Tensor, Tensor)"
)


def softmax_aggregate(
    features: Tensor,
    hidden: Tensor,
    weight: Tensor | None = None,
    *,
    return_shares: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """N feature maps added up with weights that a softmax gives each pixel: every map is read once.

    ``out[b, :, p] = sum over n of softmax_n(weight @ hidden[b, :, p]) * features[b, n, :, p]``.

    Args:
        features: [B, N, C, h, w], N >= 1: float32, bfloat16, float16 or float64 (which runs on the reference). Read
            where they lie if their pixels (NCHW) or their channels (channels_last) are adjacent, B and N in any order.
        hidden: [B, K, h, w], of the same dtype; without ``weight`` the logits themselves, K = N.
        weight: [N, K] or, as a 1x1 convolution has it, [N, K, 1, 1]; ``None``: ``hidden`` are the logits.
        return_shares: also return the softmax.
        backend: "auto" or one of "cpu", "triton", "reference".

    Returns:
        [B, C, h, w] in the dtype and memory format of ``features``; with ``return_shares`` also [B, N, h, w] in float32
        (float64 for float64). Arithmetic is in float32. Gradients of every order reach all tensors.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Wang et al., Ensembling Diffusion Models via Adaptive Feature Aggregation (2025), the last step of a SABW
    aggregator.
    """
    args = prepare(features, hidden, weight)
    out, shares = _call(args, backend)
    return (out, shares) if return_shares else out


def prepare(features: Tensor, hidden: Tensor, weight: Tensor | None = None) -> tuple:
    """Check everything and return the positional arguments of the rows: (features, hidden, weight [N, K] or None)."""
    check_floats("features", features)
    if features.dim() != 5 or features.shape[1] < 1:
        raise ValueError(f"features: expected [B, N, C, h, w] with N >= 1, got shape {tuple(features.shape)}")
    batch, maps, _, height, width = features.shape
    _check_like("hidden", hidden, features)
    if hidden.dim() != 4 or (hidden.shape[0], *hidden.shape[2:]) != (batch, height, width):
        raise ValueError(f"hidden: expected [{batch}, K, {height}, {width}], got shape {tuple(hidden.shape)}")
    depth = hidden.shape[1]
    if weight is None:
        if depth != maps:
            raise ValueError(f"hidden: without weight they are the logits of {maps} maps, got {depth} channels")
        return features, hidden, None
    _check_like("weight", weight, features)
    if tuple(weight.shape) not in ((maps, depth), (maps, depth, 1, 1)) or depth < 1:
        raise ValueError(
            f"weight: expected [{maps}, {depth}] (maps of features, channels of hidden) or a 1x1 convolution's, "
            f"got shape {tuple(weight.shape)}"
        )
    return features, hidden, weight.reshape(maps, depth)


def _check_like(name: str, value: object, features: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype != features.dtype:
        raise TypeError(f"{name}: expected dtype {features.dtype} (that of features), got {value.dtype}")
    if value.device != features.device:
        raise ValueError(f"{name}: expected device {features.device} (that of features), got {value.device}")


def _call(args: tuple, backend: str) -> tuple[Tensor, Tensor]:
    """Through the torch op where a graph is being made, else straight to the row."""
    first = args[0]
    plain = not torch.compiler.is_compiling() and type(first) in _PLAIN_TENSORS and not first.is_meta
    needs_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args)
    if plain and not needs_graph:
        return registry.select(OP, backend, args).run(*args)
    return torch.ops.pydenoise.softmax_aggregate(*args, backend)


# ----------------------------------------------------------------------------------- torch op, fake kernel, autograd


def laid_out(tensor: Tensor, adjacent_channels: bool) -> Tensor:
    """``tensor`` [..., C, h, w] dense: pixel by pixel, or row-major."""
    if adjacent_channels:
        return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)
    return tensor.contiguous()


def _empty(like: Tensor, shape: tuple[int, ...], adjacent_channels: bool) -> Tensor:
    if not adjacent_channels:
        return like.new_empty(shape)
    *lead, channels, height, width = shape
    return like.new_empty((*lead, height, width, channels)).movedim(-1, -3)


def _empty_shares(features: Tensor) -> Tensor:
    batch, maps, _, height, width = features.shape
    return features.new_empty((batch, maps, height, width), dtype=reference.accurate(features.dtype))


@torch.library.impl(_library, "softmax_aggregate", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.impl(_library, "softmax_aggregate_backward", "CompositeExplicitAutograd")
def _run_backward(*args):
    *args, backend = args
    grad_features, grad_logits = registry.select(OP_BACKWARD, backend, tuple(args)).run(*args)
    return (args[0].new_empty(0) if grad_features is None else grad_features), grad_logits


@torch.library.register_fake("pydenoise::softmax_aggregate", lib=_library)
def _fake(features, hidden, weight, backend):
    shape = (features.shape[0], *features.shape[2:])
    return _empty(features, shape, has_adjacent_channels(features)), _empty_shares(features)


@torch.library.register_fake("pydenoise::softmax_aggregate_backward", lib=_library)
def _fake_backward(grad, grad_shares, features, shares, wants_features, backend):
    empty = grad.new_empty(0)
    grad_features = _empty(features, features.shape, has_adjacent_channels(features)) if wants_features else empty
    return grad_features, _empty_shares(features)


def _setup_context(ctx, inputs, output):
    features, hidden, weight, ctx.backend = inputs
    ctx.save_for_backward(features, hidden, weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_shares):
    features, hidden, weight, shares = ctx.saved_tensors
    if grad is None and grad_shares is None:
        return None, None, None, None
    if grad is None:
        grad = features.new_zeros(()).expand(features.shape[0], *features.shape[2:])
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted, and the reference is differentiable
        shares = reference.logits_of(hidden, weight).softmax(1)
        grad_features, grad_logits = reference.softmax_aggregate_backward(grad, grad_shares, features, shares, needs[0])
    else:
        grad_features, grad_logits = torch.ops.pydenoise.softmax_aggregate_backward(
            grad, grad_shares, features, shares, needs[0], ctx.backend
        )
    grad_hidden, grad_weight = _through_weight(grad_logits, hidden, weight, needs[1], needs[2])
    return grad_features if needs[0] else None, grad_hidden, grad_weight, None


def _through_weight(grad_logits: Tensor, hidden: Tensor, weight: Tensor | None, wants_hidden: bool, wants_weight: bool):
    """Gradients of ``hidden`` and ``weight`` from those of the logits: thin matrix products, which are torch's."""
    if weight is None:
        return grad_logits.to(hidden.dtype) if wants_hidden else None, None
    grad_hidden = grad_weight = None
    flat = grad_logits.flatten(2)
    if wants_hidden:  # laid out as hidden is; batched products, as torch copies what it folds into a single one
        wide = weight.to(flat.dtype).expand(len(flat), *weight.shape)
        if has_adjacent_channels(hidden):
            product = torch.bmm(flat.transpose(1, 2), wide).transpose(1, 2)
        else:
            product = torch.bmm(wide.transpose(1, 2), flat)
        grad_hidden = product.unflatten(2, hidden.shape[2:]).to(hidden.dtype)
    if wants_weight:
        grad_weight = torch.bmm(flat, hidden.to(flat.dtype).flatten(2).transpose(1, 2)).sum(0).to(weight.dtype)
    return grad_hidden, grad_weight


torch.library.register_autograd("pydenoise::softmax_aggregate", _backward, setup_context=_setup_context, lib=_library)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_run(features, hidden, weight):
    out, shares = reference.softmax_aggregate(features, hidden, weight)
    return laid_out(out, has_adjacent_channels(features)), shares.contiguous()


def _reference_backward(grad, grad_shares, features, shares, wants_features):
    grad_features, grad_logits = reference.softmax_aggregate_backward(
        grad, grad_shares, features, shares, wants_features
    )
    if grad_features is not None:
        grad_features = laid_out(grad_features, has_adjacent_channels(features))
    return grad_features, grad_logits.contiguous()


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import softmax_aggregate_cpu, softmax_aggregate_triton  # noqa: E402

for _module in (softmax_aggregate_cpu, softmax_aggregate_triton):
    for _row in _module.ROWS:
        registry.register(_row)
