"""Bilateral filter with a width of its own at every pixel: argument checks, the torch ops, and the backend rows."""

import math

import torch
from torch import Tensor

from pydenoise.ops import registry
from pydenoise.ops._arguments import check_tensor
from pydenoise.ops._quantized import check_floats, never, values_are_known
from pydenoise.ops.registry import Backend
from pydenoise.reference import adaptive_bilateral_filter as reference
from pydenoise.reference.adaptive_bilateral_filter import BATCH, LARGEST_RADIUS, PER_IMAGE

OP = "adaptive_bilateral_filter"
OP_BACKWARD = "adaptive_bilateral_filter_backward"
RADII = {"batch": BATCH, "per_image": PER_IMAGE}
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("pydenoise", "FRAGMENT")
_library.define(
    "adaptive_bilateral_filter(Tensor input, Tensor sigma, int radius, bool save_norm, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "adaptive_bilateral_filter_backward(Tensor grad, Tensor input, Tensor sigma, int radius, Tensor output, "
    "Tensor norm, bool[] mask, str backend) -> (Tensor, Tensor)"
)


# ------------------------------------------------------------------------------------------------ public function


def adaptive_bilateral_filter(
    input: Tensor, sigma: Tensor, *, radius: str | int = "batch", backend: str = "auto"
) -> Tensor:
    """Bilateral filter whose three widths differ from pixel to pixel, in memory linear in the image.

    ``y(p) = sum_D w_D x(p + D) / (sum_D w_D + 1e-8)`` over the square window ``|dy|, |dx| <= radius``, with
    ``w_D = exp(-dx^2 / (2 sx^2) - dy^2 / (2 sy^2) - |x(p) - x(p + D)|^2 / (2 sr^2))`` and the widths of p. The squared
    difference is summed over the channels, which share the weights. The border is mirrored (the last pixel is not
    repeated), over and over where the window is larger than the image.

    Args:
        input: [B, C, H, W], any strides; float32, bfloat16, float16 or float64. Arithmetic is in float32 (float64 for
            float64, on the reference). B may be 0.
        sigma: (sx, sy, sr) in the last axis: [B, H, W, 3] for every pixel, or [B, H / ph, W / pw, 3] for tiles of
            ph x pw pixels, where ph divides H and pw divides W. sx (columns) and sy (rows) are in pixels, sr in units
            of ``input``. Any floating dtype, on the device of ``input``; positive and finite, which is checked for CPU
            tensors outside ``torch.compile`` (elsewhere the check would have to wait for the device).
        radius: "batch": the largest sx or sy of the whole batch, rounded up, is every pixel's radius, so that an image
            may get a larger window from the others; "per_image": of each image by itself; an int from 0 to 127: that.
            Both are read on the device. No gradient goes through the radius. Spatial sigmas above 127 are an error on
            the CPU; elsewhere the radius ends at 127.
        backend: "auto" or one of "cpu", "triton", "reference".

    Returns:
        [B, C, H, W] of ``input``'s dtype, row-major. Differentiable in ``input`` and ``sigma``: kept for the backward
        pass are the two, the result and the sum of weights. The same bits for any number of threads.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
        BackendUnavailable: ``backend`` cannot run this call; the message says why.

    Source: Sun et al., Filter2Noise: interpretable self-supervised single-image denoising for low-dose CT with
    attention-guided bilateral filtering (2025); Tomasi and Manduchi, Bilateral filtering for gray and color images
    (1998).
    """
    args = prepare(input, sigma, radius=radius)
    if torch.compiler.is_compiling() or type(input) not in _PLAIN_TENSORS or input.is_meta or args[-1]:
        return torch.ops.pydenoise.adaptive_bilateral_filter(*args, backend)[0]
    return registry.select(OP, backend, args).run(*args)[0]


def prepare(input: Tensor, sigma: Tensor, *, radius: str | int = "batch") -> tuple:
    """Check everything and return the rows' arguments: input, sigma, the radius as an int, whether to keep the norm."""
    check_floats("input", input)
    if input.dim() != 4 or input.shape[1] < 1:
        raise ValueError(f"input: expected [B, C, H, W] with C >= 1, got shape {tuple(input.shape)}")
    code = _radius_of(radius)
    sigma = _sigma_of(sigma, input, code)
    save_norm = torch.is_grad_enabled() and (input.requires_grad or sigma.requires_grad)
    return input, sigma, code, save_norm


def _radius_of(radius: object) -> int:
    if isinstance(radius, str):
        if radius not in RADII:
            raise ValueError(f"radius: expected 'batch', 'per_image' or an int, got {radius!r}")
        return RADII[radius]
    if isinstance(radius, (bool, Tensor)) or not hasattr(radius, "__index__"):
        raise TypeError(f"radius: expected 'batch', 'per_image' or an int, got {type(radius).__name__}")
    value = radius.__index__()
    if not 0 <= value <= LARGEST_RADIUS:
        raise ValueError(f"radius: expected an int from 0 to {LARGEST_RADIUS}, got {value}")
    return value


def _sigma_of(sigma: object, input: Tensor, code: int) -> Tensor:
    """Contiguous, float32 or for float64 inputs float64; still part of the graph of ``sigma``."""
    check_tensor("sigma", sigma)
    if not sigma.is_floating_point():
        raise TypeError(f"sigma: expected a floating-point tensor, got {sigma.dtype}")
    if sigma.device != input.device:
        raise ValueError(f"sigma: expected device {input.device} (that of input), got {sigma.device}")
    batch, _, height, width = input.shape
    if sigma.dim() != 4 or sigma.shape[0] != batch or sigma.shape[3] != 3:
        raise ValueError(
            f"sigma: expected [B, H, W, 3] or tiles [B, H / ph, W / pw, 3] for input {tuple(input.shape)}, "
            f"got shape {tuple(sigma.shape)}"
        )
    for name, tiles, size in (("rows", sigma.shape[1], height), ("columns", sigma.shape[2], width)):
        if (tiles == 0) != (size == 0) or (tiles and size % tiles):
            raise ValueError(f"sigma: expected a number of {name} of tiles that divides {size}, got {tiles}")
    sigma = sigma.to(torch.float64 if input.dtype == torch.float64 else torch.float32).contiguous()
    if sigma.numel() and values_are_known(sigma):
        _check_values(sigma.detach(), code)
    return sigma


def _check_values(sigma: Tensor, code: int) -> None:
    low, high = (value.item() for value in torch.aminmax(sigma))
    if not (low > 0 and high < math.inf):
        bad = sigma[~((sigma > 0) & (sigma < math.inf))][0].item()
        raise ValueError(f"sigma: expected positive finite values, got {bad}")
    if code < 0 and high > LARGEST_RADIUS and (widest := sigma[..., :2].amax().item()) > LARGEST_RADIUS:
        raise ValueError(f"sigma: expected spatial sigmas of at most {LARGEST_RADIUS} pixels, got {widest}")


# ---------------------------------------------------------------------------- torch ops: kernel, fake kernel, autograd


def empty_results(input: Tensor, save_norm: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (output, norm); the norm is empty unless it is to be kept."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    shape = (input.shape[0], *input.shape[2:]) if save_norm else (0,)
    return input.new_empty(input.shape), input.new_empty(shape, dtype=dtype)


@torch.library.impl(_library, "adaptive_bilateral_filter", "CompositeExplicitAutograd")
def _run(*args):
    *args, backend = args
    return registry.select(OP, backend, tuple(args)).run(*args)


@torch.library.impl(_library, "adaptive_bilateral_filter_backward", "CompositeExplicitAutograd")
def _run_backward(*args):
    *args, backend = args
    grads = registry.select(OP_BACKWARD, backend, tuple(args)).run(*args)
    return tuple(args[1].new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("pydenoise::adaptive_bilateral_filter", lib=_library)
def _fake(input, sigma, radius, save_norm, backend):
    return empty_results(input, save_norm)


@torch.library.register_fake("pydenoise::adaptive_bilateral_filter_backward", lib=_library)
def _fake_backward(grad, input, sigma, radius, output, norm, mask, backend):
    empty = input.new_empty(0)
    dinput = input.new_empty(input.shape) if mask[0] else empty
    dsigma = sigma.new_empty(sigma.shape) if mask[1] else empty
    return dinput, dsigma


def _setup_context(ctx, inputs, output):
    input, sigma, radius, save_norm, backend = inputs
    if not save_norm:
        raise RuntimeError("adaptive_bilateral_filter: gradients need save_norm; call pydenoise.functional instead")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, sigma, *output)
    ctx.radius, ctx.backend = radius, backend


def _backward(ctx, grad, grad_norm):
    input, sigma, output, norm = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:2])
    if grad_norm is not None:
        raise RuntimeError("adaptive_bilateral_filter: no gradient goes through the sum of weights")
    if grad is None:
        return None, None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True: a second derivative is wanted, and the reference is differentiable
        wide = input.to(sigma.dtype)
        result = reference.adaptive_bilateral_filter(wide, sigma, ctx.radius, False)[0].to(input.dtype)
        wanted = [tensor for tensor, want in zip((input, sigma), mask, strict=True) if want]
        found = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
        dinput, dsigma = (next(found) if want else None for want in mask)
    else:
        grads = torch.ops.pydenoise.adaptive_bilateral_filter_backward(
            grad, input, sigma, ctx.radius, output, norm, mask, ctx.backend
        )
        dinput, dsigma = (g if want else None for g, want in zip(grads, mask, strict=True))
    return dinput, dsigma, None, None, None


torch.library.register_autograd(
    "pydenoise::adaptive_bilateral_filter", _backward, setup_context=_setup_context, lib=_library
)


# --------------------------------------------------------------------------------------------------- backend rows


def _reference_run(input: Tensor, sigma: Tensor, radius: int, save_norm: bool) -> tuple[Tensor, Tensor]:
    output, norm = reference.adaptive_bilateral_filter(input.to(sigma.dtype), sigma, radius, save_norm)
    return output.to(input.dtype).contiguous(), norm


def _reference_backward(grad, input, sigma, radius, output, norm, mask) -> tuple[Tensor | None, Tensor | None]:
    wide = (tensor.to(sigma.dtype) for tensor in (grad, input))
    dinput, dsigma = reference.adaptive_bilateral_filter_backward(
        *wide, sigma, radius, output.to(sigma.dtype), norm, mask
    )
    return None if dinput is None else dinput.to(input.dtype).contiguous(), dsigma


registry.register(Backend(OP, "reference", 0, never, _reference_run, "the fallback: always last"))
registry.register(Backend(OP_BACKWARD, "reference", 0, never, _reference_backward, "the fallback: always last"))

from pydenoise.ops._rows import adaptive_bilateral_filter_cpu, adaptive_bilateral_filter_triton  # noqa: E402

for _module in (adaptive_bilateral_filter_cpu, adaptive_bilateral_filter_triton):
    for _row in _module.ROWS:
        registry.register(_row)
