"""Masked, modulated layer norm with the residual sum in front of it: a program holds whole tokens, and reads them once.

The way back goes token by token over a chunk of a sample, whose gradients of the coefficients stay in registers; the
chunks are added up afterwards, always in the same order.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, multiprocessors, variants
from torch import Tensor

LONGEST, LONGEST_BACK = 8192, 2048  # channels that a program holds
_SCALARS = ("tokens", "channels", "total", "rows", "per_chunk", "chunks", "tune")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _sum(x, update, mask, gate, c, ok):
    """(input, r, gate, update) of one token, 0 where there is no channel."""
    own = tl.load(x + c, mask=ok, other=0.0).to(tl.float32)
    r = own
    if mask is not None:
        r = tl.where(tl.load(mask + c, mask=ok, other=0.0) != 0.0, own, 0.0)
    g = tl.zeros_like(own)
    u = tl.zeros_like(own)
    if update is not None:
        g = tl.load(gate + c, mask=ok, other=0.0)
        u = tl.load(update + c, mask=ok, other=0.0).to(tl.float32)
        r += g * u
    return own, r, g, u


@triton.jit(do_not_specialize=_SCALARS)
def routed_norm_kernel(
    x, mask, update, gate, scale, shift, output, carried, stats,
    tokens, channels, total, eps, x_b, x_t, u_b, u_t, m_b, tune, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    c = tl.arange(0, BLOCK_C)
    ok = c < channels
    if update is not None:
        u_at = update + b * u_b + t * u_t
        g_at = gate + b * channels
    else:
        u_at = None
        g_at = None
    if mask is not None:
        m_at = mask + b * m_b
    else:
        m_at = None
    own, r, g, u = _sum(x + b * x_b + t * x_t, u_at, m_at, g_at, c, ok)
    if update is not None:
        tl.store(carried + row * channels + c, (own + g * u).to(carried.dtype.element_ty), mask=ok)
    mean = tl.sum(r, 0) / total
    d = tl.where(ok, r - mean, 0.0)
    variance = (tl.sum(d * d, 0) + (total - channels) * mean * mean) / total
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    y = d * rstd * (1.0 + tl.load(scale + b * channels + c, mask=ok, other=0.0))
    y += tl.load(shift + b * channels + c, mask=ok, other=0.0)
    tl.store(output + row * channels + c, y.to(output.dtype.element_ty), mask=ok)
    tl.store(stats + row * 2, -mean * rstd)
    tl.store(stats + row * 2 + 1, rstd)


@triton.jit(do_not_specialize=_SCALARS)
def backward_kernel(
    grad, grad_carried, grad_constant, x, mask, update, gate, scale, stats, grad_input, grad_update, partials,
    tokens, channels, total, per_chunk, chunks, x_b, x_t, u_b, u_t, m_b, tune, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [B, chunks, 3, C]: gradients of shift, scale and gate by chunk of ``per_chunk`` tokens."""
    item = tl.program_id(0).to(tl.int64)
    b, chunk = item // chunks, (item % chunks).to(tl.int32)
    c = tl.arange(0, BLOCK_C)
    ok = c < channels
    factor = 1.0 + tl.load(scale + b * channels + c, mask=ok, other=0.0)
    if mask is not None:
        m_at = mask + b * m_b
    else:
        m_at = None
    shifts = tl.zeros((BLOCK_C,), tl.float32)
    scales = tl.zeros((BLOCK_C,), tl.float32)
    gates = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, tokens)):
        row = b * tokens + t
        if update is not None:
            u_at = update + b * u_b + t * u_t
            g_at = gate + b * channels
        else:
            u_at = None
            g_at = None
        own, r, g, u = _sum(x + b * x_b + t * x_t, u_at, m_at, g_at, c, ok)
        constant, rstd = tl.load(stats + row * 2), tl.load(stats + row * 2 + 1)
        dy = tl.load(grad + row * channels + c, mask=ok, other=0.0).to(tl.float32)
        normed = r * rstd + constant
        shifts += dy
        scales += dy * normed
        pushed = dy * factor
        plain, product = tl.sum(pushed, 0), tl.sum(pushed * normed, 0)
        if grad_constant is not None:
            more = tl.load(grad_constant + row)
            plain += more
            product += more * constant
        d = rstd * (pushed - plain / total - normed * (product / total))
        both = d
        if mask is not None:
            d = tl.where(tl.load(m_at + c, mask=ok, other=0.0) != 0.0, d, 0.0)
        if grad_carried is not None:
            through = tl.load(grad_carried + row * channels + c, mask=ok, other=0.0).to(tl.float32)
            d += through
            both += through
        tl.store(grad_input + row * channels + c, d.to(grad_input.dtype.element_ty), mask=ok)
        if update is not None:
            tl.store(grad_update + row * channels + c, (g * both).to(grad_update.dtype.element_ty), mask=ok)
            gates += u * both
    at = partials + item * 3 * channels + c
    tl.store(at, shifts, mask=ok)
    tl.store(at + channels, scales, mask=ok)
    tl.store(at + 2 * channels, gates, mask=ok)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_C",)
_TILES = [(512, 4, 1), (1024, 4, 1), (2048, 8, 1), (4096, 8, 1), (8192, 16, 1)]
_BACK_TILES = [(512, 8, 1), (1024, 4, 1), (2048, 8, 1)]  # sums stay in registers: more channels would spill


def _extents(args: dict) -> dict[str, int]:
    return {"BLOCK_C": args["channels"]}


FORWARD = Kernel(
    "routed_norm", routed_norm_kernel, variants("routed_norm", _NAMES, _TILES), _extents, whole="BLOCK_C"
)  # fmt: skip
BACKWARD = Kernel(
    "routed_norm_backward", backward_kernel, variants("routed_norm_backward", _NAMES, _BACK_TILES), _extents,
    whole="BLOCK_C",
)  # fmt: skip
KERNELS = (FORWARD, BACKWARD)


# ------------------------------------------------------------------------------------------------------------ launches


def _common(input: Tensor, mask: Tensor | None, update: Tensor | None, total: int) -> dict[str, object]:
    batch, tokens, channels = input.shape
    return {
        "x": input, "mask": mask, "update": update, "tokens": tokens, "channels": channels, "total": total,
        "x_b": input.stride(0), "x_t": input.stride(1), "u_b": 0 if update is None else update.stride(0),
        "u_t": 0 if update is None else update.stride(1),
        "m_b": channels if mask is not None and mask.shape[0] == batch else 0, "tune": (batch * tokens).bit_length(),
    }  # fmt: skip


def plan(
    input: Tensor, mask: Tensor | None, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
    total: int, eps: float, output: Tensor, carried: Tensor | None, stats: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes ``output``, ``carried`` and ``stats``, non-empty."""
    arguments = {
        **_common(input, mask, update, total), "gate": gate, "scale": scale, "shift": shift, "eps": eps,
        "output": output, "carried": carried, "stats": stats,
    }  # fmt: skip
    return Launch(FORWARD, arguments, lambda meta: (input.shape[0] * input.shape[1],))


def chunks_of(input: Tensor) -> tuple[int, int]:
    """(chunks, tokens of a chunk) of a sample: enough programs for the device, and few partial sums."""
    batch, tokens, _ = input.shape
    wanted = max(1, 4 * multiprocessors(input.device) // max(1, batch))
    per_chunk = max(4, triton.cdiv(tokens, wanted))
    return triton.cdiv(tokens, per_chunk), per_chunk


def plan_backward(
    grad: Tensor, grad_carried: Tensor | None, grad_constant: Tensor | None, input: Tensor, mask: Tensor | None,
    update: Tensor | None, gate: Tensor | None, scale: Tensor, stats: Tensor, total: int, grad_input: Tensor,
    grad_update: Tensor | None, partials: Tensor,
) -> Launch:  # fmt: skip
    """The launch that writes the last three, non-empty."""
    chunks, per_chunk = chunks_of(input)
    arguments = {
        **_common(input, mask, update, total), "grad": grad, "grad_carried": grad_carried,
        "grad_constant": grad_constant, "gate": gate, "scale": scale, "stats": stats, "grad_input": grad_input,
        "grad_update": grad_update, "partials": partials, "per_chunk": per_chunk, "chunks": chunks,
    }  # fmt: skip
    return Launch(BACKWARD, arguments, lambda meta: (input.shape[0] * chunks,))


# ---------------------------------------------------------------------------------------------------------- public API
# Arguments as the rows give them, not checked here: adjacent channels, coefficients dense in float32.


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def routed_norm(
    input: Tensor, mask: Tensor | None, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor,
    total: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, carried or an empty tensor, stats [B, T, 2])."""
    output = _like(input)
    carried = None if update is None else _like(input)
    stats = torch.empty((*input.shape[:2], 2), dtype=torch.float32, device=input.device)
    if input.numel():
        plan(input, mask, update, gate, scale, shift, total, eps, output, carried, stats).run()
    return output, input.new_empty(0) if carried is None else carried, stats


def routed_norm_backward(
    grad: Tensor, grad_carried: Tensor | None, grad_constant: Tensor | None, input: Tensor, mask: Tensor | None,
    update: Tensor | None, gate: Tensor | None, scale: Tensor, stats: Tensor, total: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of input, of update or an empty tensor, of shift, scale and gate by sample [B, 3, C])."""
    batch, _, channels = input.shape
    grad_input = _like(input)
    grad_update = None if update is None else _like(input)
    partials = torch.empty((batch, chunks_of(input)[0], 3, channels), dtype=torch.float32, device=input.device)
    if input.numel():
        plan_backward(
            grad, grad_carried, grad_constant, input, mask, update, gate, scale, stats, total, grad_input, grad_update,
            partials,
        ).run()  # fmt: skip
    return grad_input, input.new_empty(0) if grad_update is None else grad_update, partials.sum(1)
