"""Gated Haar wavelets that halve or double images: argument checks, the torch ops with autograd, the backend rows.

Source: Yang, Zhou, Feng, Wang, "Diffusion Probabilistic Model Made Slim" (CVPR 2023), the wavelet gating of its blocks.
"""

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_choice, check_tensor, int_tuple
from pydenoise.ops._quantized import check_floats, never
from pydenoise.ops.registry import Backend
from pydenoise.reference import wavelet_gate as reference

OP = "wavelet_gate"
OP_BACKWARD = "wavelet_gate_backward"
OP_POOL = "wavelet_gate_pool"
ODD = ("replicate", "refuse")
BANDS = 4

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define("wavelet_gate(Tensor input, Tensor gate, bool up, SymInt[] size, str backend) -> Tensor")
_library.define(
    "wavelet_gate_backward(Tensor grad, Tensor input, Tensor gate, Tensor? pool_grad, bool up, SymInt[] size, "
    "bool[] mask, str backend) -> (Tensor, Tensor)"
)
_library.define("wavelet_gate_pool(Tensor input, str backend) -> Tensor")


# ---------------------------------------------------------------------------------------------- public functions


def wavelet_gate_down(input: Tensor, gate: Tensor, *, odd: str = "replicate", backend: str = "auto") -> Tensor:
    """Half the resolution: the four Haar bands of ``input``, each times its gate, added up. One pass over memory.

    With a, b over c, d the pixels of a block of 2 x 2: LL = (a + b + c + d) / 2, B1 = (a - b + c - d) / 2 (difference
    of columns), B2 = (a + b - c - d) / 2 (of rows), HH = (a - b - c + d) / 2. Libraries disagree on which of B1 and B2
    is called LH. Gates (0.5, 0, 0, 0) give the average pool, (1, 1, 1, 1) give 2 a.

    Args:
        input: [B, C, H, W], row-major or channels_last (other strides are copied); float32, bfloat16 or float16;
            float64 runs on the reference. Arithmetic is in float32. B may be 0.
        gate: [B, 4], the gates of LL, B1, B2 and HH of each sample, or [B, 4, C], of each channel; any floating dtype,
            any values. Used as float32 (float64 for float64 inputs).
        odd: what happens to a last row or column without partner: "replicate" takes it twice, so that the result is
            [B, C, ceil(H / 2), ceil(W / 2)]; "refuse" raises ``ValueError``.
        backend: "auto" or one of "cpu", "triton", "reference".

    Returns:
        [B, C, ceil(H / 2), ceil(W / 2)] in ``input``'s dtype and memory format. Differentiable in input and gate.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Yang et al., Diffusion Probabilistic Model Made Slim (CVPR 2023), WG-Down.
    """
    return run(prepare_down(input, gate, odd=odd), backend)


def wavelet_gate_up(
    input: Tensor, gate: Tensor, *, size: tuple[int, int] | None = None, backend: str = "auto"
) -> Tensor:
    """Double the resolution: ``input`` holds the four Haar bands, each times its gate, transformed back. One pass.

    With unit gates this undoes the Haar transform that :func:`wavelet_gate_down` is a sum of.

    Args:
        input: [B, 4 C, h, w]: C channels of LL, then of B1, B2 and HH; otherwise as in :func:`wavelet_gate_down`.
        gate: [B, 4] or [B, 4, C].
        size: (H, W) of the result, each 2 h (2 w) or one less: what was odd before it was halved. ``None``: (2 h, 2 w).
        backend: "auto" or one of "cpu", "triton", "reference".

    Returns:
        [B, C, H, W] in ``input``'s dtype and memory format. Differentiable in input and gate.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Yang et al., Diffusion Probabilistic Model Made Slim (CVPR 2023), WG-Up.
    """
    return run(prepare_up(input, gate, size=size), backend)


def wavelet_gate_pool(input: Tensor, *, backend: str = "auto") -> Tensor:
    """The mean over the pixels, from which gates are made: [B, C] of [B, C, H, W], sums in float32 or wider.

    Takes the inputs of :func:`wavelet_gate_down`, with gradients, and raises what it raises.
    """
    (input,) = prepare_pool(input)
    if _wants_dispatcher(input):
        return torch.ops.pydenoise.wavelet_gate_pool(input, backend)
    return registry.select(OP_POOL, backend, (input,)).run(input)


def run(args: tuple, backend: str = "auto") -> Tensor:
    """The op on what ``prepare`` returned: straight to the row, or through the torch op where a graph is made."""
    if _wants_dispatcher(*args[:2]):
        return torch.ops.pydenoise.wavelet_gate(*args, backend)
    return registry.select(OP, backend, args).run(*args)


def _wants_dispatcher(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or any(type(t) not in _PLAIN_TENSORS or t.is_meta for t in tensors):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ------------------------------------------------------------------------------------------------ argument checks


def prepare_down(input: Tensor, gate: Tensor, *, odd: str = "replicate") -> tuple:
    """Check everything and return the rows' arguments: (input, gate, up, (H, W) of the image)."""
    _check_image(input)
    check_choice("odd", odd, ODD)
    size = tuple(input.shape[2:])
    if odd == "refuse" and (size[0] % 2 or size[1] % 2):
        raise ValueError(
            f"input: expected even height and width, got {size[0]} x {size[1]}; odd='replicate' takes the last row or "
            "column twice"
        )
    _check_gate(gate, input, input.shape[1])
    return input, gate, False, size


def prepare_up(input: Tensor, gate: Tensor, *, size: tuple[int, int] | None = None) -> tuple:
    """Check everything and return the rows' arguments, as :func:`prepare_down` does."""
    _check_image(input)
    if input.shape[1] % BANDS:
        raise ValueError(f"input: expected channels divisible by 4, those of four bands, got {input.shape[1]}")
    height, width = (2 * extent for extent in input.shape[2:])
    if size is not None:
        wanted = int_tuple("size", size, 2, minimum=1)
        if not (height - 1 <= wanted[0] <= height and width - 1 <= wanted[1] <= width):
            raise ValueError(
                f"size: expected {height - 1} or {height} rows and {width - 1} or {width} columns, twice those of "
                f"input or one less, got {wanted[0]} x {wanted[1]}"
            )
        height, width = wanted
    _check_gate(gate, input, input.shape[1] // BANDS)
    return input, gate, True, (height, width)


def prepare_pool(input: Tensor) -> tuple:
    """Check ``input`` and return the rows' arguments."""
    _check_image(input)
    return (input,)


def _check_image(input: object) -> None:
    check_floats("input", input)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(f"input: expected [B, C, H, W] with C, H and W at least 1, got shape {tuple(input.shape)}")


def _check_gate(gate: object, input: Tensor, channels: int) -> None:
    check_tensor("gate", gate)
    if not gate.is_floating_point():
        raise TypeError(f"gate: expected a floating-point tensor, got {gate.dtype}")
    if gate.device != input.device:
        raise ValueError(f"gate: expected device {input.device} (that of input), got {gate.device}")
    batch = input.shape[0]
    if tuple(gate.shape) not in ((batch, BANDS), (batch, BANDS, channels)):
        raise ValueError(
            f"gate: expected shape {(batch, BANDS)} or {(batch, BANDS, channels)}, got {tuple(gate.shape)}"
        )


# ---------------------------------------------------------------------------- torch op: kernel, fake kernel, autograd


def has_adjacent_channels(input: Tensor) -> bool:
    """Whether results for ``input`` are in channels_last memory; every row and the fake kernels go by this."""
    return input.shape[1] > 1 and input.stride(1) == 1 and input.stride(3) != 1


def empty_like_input(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised [B, C, H, W] in the memory format of results for ``input``."""
    if not has_adjacent_channels(input):
        return input.new_empty(shape)
    batch, channels, height, width = shape
    return input.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def output_shape(input: Tensor, up: bool, size: tuple[int, int]) -> tuple[int, ...]:
    if up:
        return (input.shape[0], input.shape[1] // BANDS, *size)
    return (*input.shape[:2], *reference.coarse_size(size))


@torch.library.impl(_library, "wavelet_gate", "CompositeExplicitAutograd")
def _run(input, gate, up, size, backend):
    args = (input, gate, up, tuple(size))
    return registry.select(OP, backend, args).run(*args)


@torch.library.impl(_library, "wavelet_gate_backward", "CompositeExplicitAutograd")
def _run_backward(grad, input, gate, pool_grad, up, size, mask, backend):
    args = (grad, input, gate, pool_grad, up, tuple(size), list(mask))
    grads = registry.select(OP_BACKWARD, backend, args).run(*args)
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


@torch.library.impl(_library, "wavelet_gate_pool", "CompositeExplicitAutograd")
def _run_pool(input, backend):
    return registry.select(OP_POOL, backend, (input,)).run(input)


@torch.library.register_fake("pydenoise::wavelet_gate", lib=_library)
def _fake(input, gate, up, size, backend):
    return empty_like_input(input, output_shape(input, up, size))


@torch.library.register_fake("pydenoise::wavelet_gate_backward", lib=_library)
def _fake_backward(grad, input, gate, pool_grad, up, size, mask, backend):
    of_input = empty_like_input(input, input.shape) if mask[0] else grad.new_empty(0)
    return of_input, gate.new_empty(gate.shape) if mask[1] else grad.new_empty(0)


@torch.library.register_fake("pydenoise::wavelet_gate_pool", lib=_library)
def _fake_pool(input, backend):
    return input.new_empty(input.shape[:2])


def _setup_context(ctx, inputs, output):
    input, gate, ctx.up, ctx.size, ctx.backend = inputs
    ctx.save_for_backward(input, gate)


def _backward(ctx, grad):
    input, gate = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    return *gradients(grad, input, gate, None, ctx.up, ctx.size, mask, ctx.backend), None, None, None


def gradients(
    grad: Tensor, input: Tensor, gate: Tensor, pool_grad: Tensor | None, up: bool, size: tuple[int, int],
    mask: list[bool], backend: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of input and gate, ``None`` for what ``mask`` does not want; arguments as those of the reference.

    Where a graph of the gradients is wanted (``create_graph=True``), they come from the reference, which has
    derivatives.
    """
    if torch.is_grad_enabled():
        return reference.wavelet_gate_backward(grad, input, gate, pool_grad, up, size, mask)
    grads = torch.ops.pydenoise.wavelet_gate_backward(grad, input, gate, pool_grad, up, size, mask, backend)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


def _setup_pool(ctx, inputs, output):
    ctx.shape = inputs[0].shape


def _backward_pool(ctx, grad):
    return (grad / (ctx.shape[2] * ctx.shape[3]))[..., None, None].expand(ctx.shape), None


torch.library.register_autograd("pydenoise::wavelet_gate", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("pydenoise::wavelet_gate_pool", _backward_pool, setup_context=_setup_pool, lib=_library)


# --------------------------------------------------------------------------------------------------- backend rows


def _arranged(result: Tensor, input: Tensor) -> Tensor:
    """``result`` in the memory format that is promised."""
    return empty_like_input(input, result.shape).copy_(result)


def _reference_run(input, gate, up, size):
    return _arranged(reference.wavelet_gate(input, gate, up, size), input)


def _reference_backward(grad, input, gate, pool_grad, up, size, mask):
    of_input, of_gate = reference.wavelet_gate_backward(grad, input, gate, pool_grad, up, size, mask)
    return None if of_input is None else _arranged(of_input, input), of_gate


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))
registry.register(Backend(OP_POOL, "reference", 0, never, reference.wavelet_gate_pool, "the fallback: always last"))

from pydenoise.ops._rows import wavelet_gate_cpu, wavelet_gate_triton  # noqa: E402

for _module in (wavelet_gate_cpu, wavelet_gate_triton):
    for _row in _module.ROWS:
        registry.register(_row)
