"""Feature maps added up under a softmax over them. A program takes a block of pixels of one sample: logits, softmax,
and the maps once, some channels at a time.

Tensors are [batch, maps, channels, pixels] with any strides; a dimension of MAPS, a power of two, holds the maps.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, multiprocessors, variants
from torch import Tensor

_DEPTH = tl.constexpr(16)  # channels of hidden at a time
_SCALARS = ("pixels", "maps", "channels", "depth", "per_split", "tune")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _logits(hidden, weight, n, p, n_ok, p_ok, maps, depth, h_c, h_p, MAPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """float32 [MAPS, BLOCK_P], -inf where there is no map; ``hidden`` points at the sample."""
    if weight is None:
        at = n.to(tl.int64)[:, None] * h_c + p[None, :] * h_p
        logits = tl.load(hidden + at, mask=n_ok[:, None] & p_ok[None, :], other=0.0).to(tl.float32)
    else:
        logits = tl.zeros((MAPS, BLOCK_P), tl.float32)
        for start in range(0, depth, _DEPTH):
            k = start + tl.arange(0, _DEPTH)
            at = k.to(tl.int64)[:, None] * h_c + p[None, :] * h_p
            h = tl.load(hidden + at, mask=(k < depth)[:, None] & p_ok[None, :], other=0.0).to(tl.float32)
            w = tl.load(weight + n[:, None] * depth + k[None, :], mask=n_ok[:, None] & (k < depth)[None, :], other=0.0)
            logits += tl.sum(w[:, :, None] * h[None, :, :], 1)
    return tl.where(n_ok[:, None], logits, float("-inf"))


@triton.jit(do_not_specialize=_SCALARS)
def aggregate_kernel(
    features, hidden, weight, out, shares,
    pixels, maps, channels, depth, per_split, f_b, f_n, f_c, f_p, h_b, h_c, h_p, o_b, o_c, o_p, tune,
    MAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``per_split`` channels of out at a block of pixels; the first split also writes the shares."""
    blocks, splits = tl.cdiv(pixels, BLOCK_P), tl.cdiv(channels, per_split)
    first = (tl.program_id(0) % splits) * per_split
    b = (tl.program_id(0) // splits // blocks).to(tl.int64)
    p = ((tl.program_id(0) // splits % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, MAPS)
    n_ok, p_ok = n < maps, p < pixels
    logits = _logits(hidden + b * h_b, weight, n, p, n_ok, p_ok, maps, depth, h_c, h_p, MAPS, BLOCK_P)
    # max skips NaN, which the sum finds again; a pixel with nothing above -inf is NaN
    e = tl.exp(logits - tl.max(logits, 0)[None, :])
    share = tl.where(n_ok[:, None], e / tl.sum(e, 0)[None, :], 0.0)
    if first == 0:
        at = (b * maps + n)[:, None] * pixels + p[None, :]
        tl.store(shares + at, share, mask=n_ok[:, None] & p_ok[None, :])
    for start in range(first, tl.minimum(first + per_split, channels), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < channels
        at = n.to(tl.int64)[:, None, None] * f_n + c.to(tl.int64)[None, :, None] * f_c + p[None, None, :] * f_p
        mask = n_ok[:, None, None] & c_ok[None, :, None] & p_ok[None, None, :]
        v = tl.load(features + b * f_b + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(v * share[:, None, :], 0)
        at = c.to(tl.int64)[:, None] * o_c + p[None, :] * o_p
        tl.store(out + b * o_b + at, total.to(out.dtype.element_ty), mask=c_ok[:, None] & p_ok[None, :])


@triton.jit(do_not_specialize=_SCALARS)
def backward_kernel(
    grad, grad_shares, features, shares, grad_features, grad_logits,
    pixels, maps, channels, f_b, f_n, f_c, f_p, g_b, g_c, g_p, d_b, d_n, d_c, d_p, tune,
    MAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_logits and, if it is not None, grad_features (strides d_*) at a block of pixels."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = ((tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, MAPS)
    n_ok, p_ok = n < maps, p < pixels
    own = (b * maps + n)[:, None] * pixels + p[None, :]
    own_ok = n_ok[:, None] & p_ok[None, :]
    share = tl.load(shares + own, mask=own_ok, other=0.0)
    dots = tl.zeros((MAPS, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_ok = c < channels
        column = c.to(tl.int64)
        g = tl.load(
            grad + b * g_b + column[:, None] * g_c + p[None, :] * g_p, mask=c_ok[:, None] & p_ok[None, :], other=0.0
        ).to(tl.float32)
        at = n.to(tl.int64)[:, None, None] * f_n + column[None, :, None] * f_c + p[None, None, :] * f_p
        mask = n_ok[:, None, None] & c_ok[None, :, None] & p_ok[None, None, :]
        v = tl.load(features + b * f_b + at, mask=mask, other=0.0).to(tl.float32)
        dots += tl.sum(v * g[None, :, :], 1)
        if grad_features is not None:
            at = n.to(tl.int64)[:, None, None] * d_n + column[None, :, None] * d_c + p[None, None, :] * d_p
            d = (share[:, None, :] * g[None, :, :]).to(grad_features.dtype.element_ty)
            tl.store(grad_features + b * d_b + at, d, mask=mask)
    if grad_shares is not None:
        dots += tl.load(grad_shares + own, mask=own_ok, other=0.0)
    tl.store(grad_logits + own, share * (dots - tl.sum(share * dots, 0)[None, :]), mask=own_ok)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_P", "BLOCK_C")
_TILES = [(64, 8, 4, 2), (32, 16, 4, 2), (128, 4, 4, 2), (16, 32, 4, 2), (8, 64, 4, 2)]


def _extents(args: dict) -> dict[str, int]:
    return {"BLOCK_P": args["pixels"], "BLOCK_C": args["channels"]}


AGGREGATE = Kernel(
    "softmax_aggregate", aggregate_kernel, variants("softmax_aggregate", _NAMES, _TILES), _extents,
    ("tune", "channels", "f_p", "MAPS"),
)  # fmt: skip
BACKWARD = Kernel(
    "softmax_aggregate_backward", backward_kernel, variants("softmax_aggregate_backward", _NAMES, _TILES), _extents,
    ("tune", "channels", "f_p", "MAPS"),
)  # fmt: skip
KERNELS = (AGGREGATE, BACKWARD)


# ------------------------------------------------------------------------------------------------------------ launches


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    names = ("b", "n", "c", "p") if tensor.dim() == 4 else ("b", "c", "p")
    return {f"{prefix}_{name}": stride for name, stride in zip(names, tensor.stride(), strict=True)}


def _sizes(features: Tensor) -> dict[str, int]:
    batch, maps, channels, pixels = features.shape
    return {
        "pixels": pixels, "maps": maps, "channels": channels, "MAPS": max(2, triton.next_power_of_2(maps)),
        "tune": (batch * pixels).bit_length(),
    }  # fmt: skip


def _per_split(features: Tensor) -> int:
    """Channels of a program: all of them where there are pixels enough to keep the device busy."""
    batch, _, channels, pixels = features.shape
    wanted = 2 * multiprocessors(features.device) // max(1, batch * triton.cdiv(pixels, 64))
    splits = max(1, min(wanted, triton.cdiv(channels, 64)))
    return triton.cdiv(triton.cdiv(channels, splits), 64) * 64


def plan(features: Tensor, hidden: Tensor, weight: Tensor | None, out: Tensor, shares: Tensor) -> Launch:
    """The launch that writes ``out`` and ``shares``, non-empty."""
    batch, _, channels, pixels = features.shape
    per_split = _per_split(features)
    arguments = {
        "features": features, "hidden": hidden, "weight": weight, "out": out, "shares": shares, **_sizes(features),
        "depth": hidden.shape[1], "per_split": per_split, **_strides("f", features), **_strides("h", hidden),
        **_strides("o", out),
    }  # fmt: skip
    splits = triton.cdiv(channels, per_split)
    return Launch(AGGREGATE, arguments, lambda meta: (batch * triton.cdiv(pixels, meta["BLOCK_P"]) * splits,))


def plan_backward(
    grad: Tensor, grad_shares: Tensor | None, features: Tensor, shares: Tensor, grad_features: Tensor | None,
    grad_logits: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes ``grad_logits`` and, if given, ``grad_features``; non-empty."""
    batch, _, _, pixels = features.shape
    arguments = {
        "grad": grad, "grad_shares": grad_shares, "features": features, "shares": shares,
        "grad_features": grad_features, "grad_logits": grad_logits, **_sizes(features), **_strides("f", features),
        **_strides("g", grad), **_strides("d", features if grad_features is None else grad_features),
    }  # fmt: skip
    return Launch(BACKWARD, arguments, lambda meta: (batch * triton.cdiv(pixels, meta["BLOCK_P"]),))


# ---------------------------------------------------------------------------------------------------------- public API


def _empty(like: Tensor, shape: tuple[int, ...], planes: bool) -> Tensor:
    if planes:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    *lead, channels, pixels = shape
    return torch.empty((*lead, pixels, channels), dtype=like.dtype, device=like.device).transpose(-1, -2)


def aggregate(features: Tensor, hidden: Tensor, weight: Tensor | None, planes: bool) -> tuple[Tensor, Tensor]:
    """(out [B, C, P], shares [B, N, P]) of features [B, N, C, P], hidden [B, K, P] and float32 weight [N, K].

    ``planes``: whether results lie plane by plane, or pixel by pixel. Nothing is checked here.
    """
    batch, maps, channels, pixels = features.shape
    out = _empty(features, (batch, channels, pixels), planes)
    shares = torch.empty((batch, maps, pixels), dtype=torch.float32, device=features.device)
    if features.numel():
        plan(features, hidden, weight, out, shares).run()
    return out, shares


def aggregate_backward(
    grad: Tensor, grad_shares: Tensor | None, features: Tensor, shares: Tensor, planes: bool, wants_features: bool
) -> tuple[Tensor | None, Tensor]:
    """(gradient of features or None, that of the logits), from those of out and of the shares."""
    batch, maps, channels, pixels = features.shape
    grad_features = _empty(features, (batch, maps, channels, pixels), planes) if wants_features else None
    grad_logits = torch.empty((batch, maps, pixels), dtype=torch.float32, device=features.device)
    if features.numel():
        plan_backward(grad, grad_shares, features, shares, grad_features, grad_logits).run()
    return grad_features, grad_logits
