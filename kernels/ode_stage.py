"""Stages of Runge-Kutta steps in two launches: (1) the combination of state and slopes, with the mean and the sum of
squared deviations of every channel over a part of the pixels; (2) those joined (Chan, Golub, LeVeque: updating formulas
for variances) by every program for its channels, and the normalised point written. The gradient likewise: sums, then
the gradient of the point. No atomic operations: results do not change from run to run.

Every tensor is dense [n, pixel, channel].
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, multiprocessors, variants
from torch import Tensor

_SIZES = ("pixels", "per_part", "parts", "tune")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _place(channels, pixels, size, BLOCK_C: tl.constexpr):
    """(channels of this program, its number among the parts of the image, the image); ``size``: pixels of a part."""
    tiles = tl.cdiv(channels, BLOCK_C)
    parts = tl.cdiv(pixels, size)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, tl.program_id(0) // tiles % parts, (tl.program_id(0) // tiles // parts).to(tl.int64)


@triton.jit
def _tile(base, n, p, c, pixels, stride):
    """Addresses [pixels, channels] of image ``n``."""
    return base + (n * pixels + p.to(tl.int64))[:, None] * stride + c[None, :]


@triton.jit
def _with_slope(v, slope, w, q, n, p, c, mask, pixels, channels, stride, SECOND: tl.constexpr):
    if slope is not None:
        if SECOND:
            position = c < channels // 2
            by = tl.where(position, q, w)[None, :]
            column = tl.where(position, c, c - channels // 2)
            v += by * tl.load(_tile(slope, n, p, column, pixels, stride), mask=mask, other=0.0).to(tl.float32)
        else:
            v += w * tl.load(_tile(slope, n, p, c, pixels, stride), mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _point(state, k0, k1, k2, k3, n, p, c, mask, pixels, channels, slope_stride, drift, w0, w1, w2, w3, q0, q1, q2, q3,
           SECOND: tl.constexpr, DRIFT: tl.constexpr):  # fmt: skip
    """State and slopes combined: [pixels, channels]."""
    v = tl.load(_tile(state, n, p, c, pixels, channels), mask=mask, other=0.0).to(tl.float32)
    if DRIFT:
        moved = mask & (c < channels // 2)[None, :]
        at = _tile(state, n, p, c + channels // 2, pixels, channels)
        v += drift * tl.load(at, mask=moved, other=0.0).to(tl.float32)
    v = _with_slope(v, k0, w0, q0, n, p, c, mask, pixels, channels, slope_stride, SECOND)
    v = _with_slope(v, k1, w1, q1, n, p, c, mask, pixels, channels, slope_stride, SECOND)
    v = _with_slope(v, k2, w2, q2, n, p, c, mask, pixels, channels, slope_stride, SECOND)
    return _with_slope(v, k3, w3, q3, n, p, c, mask, pixels, channels, slope_stride, SECOND)


@triton.jit(do_not_specialize=_SIZES)
def combine_kernel(
    state, k0, k1, k2, k3, point, shifts, means, squares,
    pixels, per_part, channels, slope_stride, point_stride, drift, w0, w1, w2, w3, q0, q1, q2, q3, tune,
    SECOND: tl.constexpr, DRIFT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The point of one part of an image, written where there is a place for it.

    Its moments likewise, relative to the image's first pixel: a mean far from 0 would cost digits.
    """
    c, part, n = _place(channels, pixels, per_part, BLOCK_C)
    parts = tl.cdiv(pixels, per_part)
    end = tl.minimum((part + 1) * per_part, pixels)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    if means is not None:
        row = tl.arange(0, 1)
        first = (row < 1)[:, None] & (c < channels)[None, :]
        shift = tl.sum(
            _point(state, k0, k1, k2, k3, n, row, c, first, pixels, channels, slope_stride, drift, w0, w1, w2, w3,
                   q0, q1, q2, q3, SECOND, DRIFT), 0,
        )  # fmt: skip
    for start in range(part * per_part, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (c < channels)[None, :]
        v = _point(state, k0, k1, k2, k3, n, p, c, mask, pixels, channels, slope_stride, drift, w0, w1, w2, w3,
                   q0, q1, q2, q3, SECOND, DRIFT)  # fmt: skip
        if point is not None:
            kept = v.to(point.dtype.element_ty)
            tl.store(_tile(point, n, p, c, pixels, point_stride), kept, mask=mask)
            v = kept.to(tl.float32)
        if means is not None:
            more = tl.minimum(end - start, BLOCK_P).to(tl.float32)
            v = tl.where(mask, v - shift[None, :], 0.0)
            own = tl.sum(v, 0) / more
            d = tl.where(mask, v - own[None, :], 0.0)
            delta = own - mean
            share = more / (count + more)
            mean += delta * share
            square += tl.sum(d * d, 0) + delta * delta * (count * share)
            count += more
    if means is not None:
        at = (n * parts + part) * channels + c
        tl.store(means + at, mean, mask=c < channels)
        tl.store(squares + at, square, mask=c < channels)
        if part == 0:
            tl.store(shifts + n * channels + c, shift, mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def normalise_kernel(
    point, shifts, means, squares, film, moments, y,
    pixels, per_part, parts, channels, point_stride, y_stride, plane, eps, tune,
    PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, block, n = _place(channels, pixels, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for part in range(parts):
        at = (n * parts + part) * channels + c
        more = tl.minimum(pixels - part * per_part, per_part).to(tl.float32)
        delta = tl.load(means + at, mask=c_ok, other=0.0) - mean
        share = more / (count + more)
        mean += delta * share
        square += tl.load(squares + at, mask=c_ok, other=0.0) + delta * delta * (count * share)
        count += more
    inverse = 1.0 / tl.sqrt_rn(square / count + eps)
    shift = tl.load(shifts + n * channels + c, mask=c_ok, other=0.0)
    if block == 0:
        tl.store(moments + n * 2 * channels + c, shift + mean, mask=c_ok)
        tl.store(moments + (n * 2 + 1) * channels + c, inverse, mask=c_ok)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < pixels)[:, None] & c_ok[None, :]
    v = tl.load(_tile(point, n, p, c, pixels, point_stride), mask=mask, other=0.0).to(tl.float32)
    v = ((v - shift[None, :]) - mean[None, :]) * inverse[None, :]
    if film is not None:
        scale = 1.0 + tl.load(film + n * 2 * channels + c, mask=c_ok, other=0.0)
        v = v * scale[None, :] + tl.load(film + (n * 2 + 1) * channels + c, mask=c_ok, other=0.0)[None, :]
    tl.store(_tile(y, n, p, c, pixels, y_stride), v.to(y.dtype.element_ty), mask=mask)
    if PLANE:
        row = y + (n * pixels + p.to(tl.int64)) * y_stride + channels
        value = tl.zeros((BLOCK_P,), tl.float32) + plane
        if tl.program_id(0) % tl.cdiv(channels, BLOCK_C) == 0:
            tl.store(row, value.to(y.dtype.element_ty), mask=p < pixels)


@triton.jit
def _normalised(point, moments, n, p, c, mask, pixels, channels):
    """The normalised point [pixels, channels], and 1 / deviation."""
    c_ok = c < channels
    mean = tl.load(moments + n * 2 * channels + c, mask=c_ok, other=0.0)
    inverse = tl.load(moments + (n * 2 + 1) * channels + c, mask=c_ok, other=0.0)
    x = tl.load(_tile(point, n, p, c, pixels, channels), mask=mask, other=0.0).to(tl.float32)
    return (x - mean[None, :]) * inverse[None, :], inverse


@triton.jit(do_not_specialize=_SIZES)
def grad_sums_kernel(
    grad, point, moments, sums, products, pixels, per_part, channels, grad_stride, tune,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over one part of the pixels: the sums of the gradient, and of its products with the normalised point."""
    c, part, n = _place(channels, pixels, per_part, BLOCK_C)
    parts = tl.cdiv(pixels, per_part)
    end = tl.minimum((part + 1) * per_part, pixels)
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(part * per_part, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & (c < channels)[None, :]
        g = tl.load(_tile(grad, n, p, c, pixels, grad_stride), mask=mask, other=0.0).to(tl.float32)
        x, _ = _normalised(point, moments, n, p, c, mask, pixels, channels)
        total += tl.sum(g, 0)
        product += tl.sum(g * x, 0)
    at = (n * parts + part) * channels + c
    tl.store(sums + at, total, mask=c < channels)
    tl.store(products + at, product, mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def grad_kernel(
    grad, point, moments, film, beside, sums, products, grad_point, grad_film,
    pixels, parts, channels, grad_stride, tune,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c, block, n = _place(channels, pixels, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(parts):
        at = (n * parts + part) * channels + c
        total += tl.load(sums + at, mask=c_ok, other=0.0)
        product += tl.load(products + at, mask=c_ok, other=0.0)
    if grad_film is not None:
        if block == 0:
            tl.store(grad_film + n * 2 * channels + c, product, mask=c_ok)
            tl.store(grad_film + (n * 2 + 1) * channels + c, total, mask=c_ok)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < pixels)[:, None] & c_ok[None, :]
    g = tl.load(_tile(grad, n, p, c, pixels, grad_stride), mask=mask, other=0.0).to(tl.float32)
    x, gain = _normalised(point, moments, n, p, c, mask, pixels, channels)
    if film is not None:
        gain *= 1.0 + tl.load(film + n * 2 * channels + c, mask=c_ok, other=0.0)
    g = (g - (total / pixels)[None, :] - x * (product / pixels)[None, :]) * gain[None, :]
    if beside is not None:
        g += tl.load(_tile(beside, n, p, c, pixels, channels), mask=mask, other=0.0).to(tl.float32)
    tl.store(_tile(grad_point, n, p, c, pixels, channels), g.to(grad_point.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_P", "BLOCK_C")
_TILES = [(32, 64, 4, 1), (64, 32, 4, 1), (16, 128, 4, 1), (128, 16, 4, 1), (32, 128, 8, 1)]
_PART = 256  # pixels below which the sums of an image are not split further
_MOST_PARTS = 64  # every program of the second launch joins them


def _rows_of_part(args: dict) -> dict[str, int]:
    return {"BLOCK_P": args["per_part"], "BLOCK_C": args["channels"]}


def _rows_of_image(args: dict) -> dict[str, int]:
    return {"BLOCK_P": args["pixels"], "BLOCK_C": args["channels"]}


def _kernel(name, function, extents, keys=("tune", "channels")) -> Kernel:
    return Kernel(name, function, variants(name, _NAMES, _TILES), extents, keys)


COMBINE = _kernel("ode_combine", combine_kernel, _rows_of_part)
NORMALISE = _kernel("ode_normalise", normalise_kernel, _rows_of_image, ())  # may write what it reads: never run twice
GRAD_SUMS = _kernel("ode_grad_sums", grad_sums_kernel, _rows_of_part)
GRAD = _kernel("ode_grad", grad_kernel, _rows_of_image)

KERNELS = (COMBINE, NORMALISE, GRAD_SUMS, GRAD)


# ------------------------------------------------------------------------------------------------------------ launches


def _per_part(n: int, channels: int, pixels: int, device: torch.device) -> tuple[int, int]:
    """(pixels of a part, parts of an image): enough programs to fill the device twice, none too short."""
    programs = n * -(-channels // 64)
    parts = max(1, min(-(-2 * multiprocessors(device) // programs), pixels // _PART, _MOST_PARTS))
    per_part = -(-pixels // parts)
    return per_part, -(-pixels // per_part)


def _grid(n: int, extent: int, channels: int, block: str | None = None):
    """Programs: images x parts x tiles of channels; ``block`` names the tile whose count the parts are."""

    def grid(meta):
        parts = triton.cdiv(extent, meta[block]) if block else extent
        return (n * parts * triton.cdiv(channels, meta["BLOCK_C"]),)

    return grid


def plan_stage(
    state: Tensor, slopes: tuple[Tensor, ...], weights: tuple[float, ...], position_weights: tuple[float, ...],
    drift: float, second: bool, film: Tensor | None, plane: float | None, eps: float, y: Tensor | None,
    point: Tensor | None, moments: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """The launches of one stage; tensors dense [N, H, W, C], ``film`` float32, none of them empty.

    ``y`` and ``moments``, or ``point``, may be ``None``: not wanted.
    """
    n, height, width, channels = state.shape
    pixels, device = height * width, state.device
    combines = len(slopes) > 0 or drift != 0
    per_part, parts = _per_part(n, channels, pixels, device)
    shifts = means = squares = None
    if y is not None:
        shifts = torch.empty((n, channels), dtype=torch.float32, device=device)
        means, squares = torch.empty((2, n, parts, channels), dtype=torch.float32, device=device)
    kept = point if point is not None else y if combines else None  # in place: the second launch reads what it writes
    common = {"pixels": pixels, "per_part": per_part, "channels": channels, "tune": (n * pixels).bit_length()}
    padding = 4 - len(slopes)
    named = {f"k{i}": slope for i, slope in enumerate((*slopes, *(None,) * padding))}
    named |= {f"w{i}": float(value) for i, value in enumerate((*weights, *(0.0,) * padding))}
    by = position_weights if second else ()
    named |= {f"q{i}": float(value) for i, value in enumerate((*by, *(0.0,) * (4 - len(by))))}
    stride = channels if kept is None else kept.shape[-1]
    launches = [
        Launch(
            COMBINE,
            {
                **common, **named, "state": state, "point": kept, "shifts": shifts, "means": means, "squares": squares,
                "slope_stride": channels // 2 if second else channels, "point_stride": stride, "drift": float(drift),
                "SECOND": second, "DRIFT": drift != 0,
            },
            _grid(n, parts, channels),
        )
    ]  # fmt: skip
    if y is not None:
        written = {
            **common, "point": state if kept is None else kept, "shifts": shifts, "means": means,
            "squares": squares, "film": film, "moments": moments, "y": y, "parts": parts, "point_stride": stride,
            "y_stride": y.shape[-1], "plane": float(plane or 0.0), "eps": float(eps), "PLANE": plane is not None,
        }  # fmt: skip
        launches.append(Launch(NORMALISE, written, _grid(n, pixels, channels, "BLOCK_P")))
    return launches


def plan_gradient(
    grad: Tensor, point: Tensor, moments: Tensor, film: Tensor | None, beside: Tensor | None, grad_point: Tensor,
    grad_film: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """The launches of the gradient; tensors dense [N, H, W, C], ``film`` float32, none of them empty."""
    n, height, width, channels = point.shape
    pixels, device = height * width, point.device
    per_part, parts = _per_part(n, channels, pixels, device)
    sums, products = torch.empty((2, n, parts, channels), dtype=torch.float32, device=device)
    common = {
        "grad": grad, "point": point, "moments": moments, "sums": sums, "products": products, "pixels": pixels,
        "channels": channels, "grad_stride": grad.shape[-1], "tune": (n * pixels).bit_length(),
    }  # fmt: skip
    written = {
        **common, "film": film, "beside": beside, "grad_point": grad_point, "grad_film": grad_film, "parts": parts
    }  # fmt: skip
    return [
        Launch(GRAD_SUMS, {**common, "per_part": per_part}, _grid(n, parts, channels)),
        Launch(GRAD, written, _grid(n, pixels, channels, "BLOCK_P")),
    ]


# ---------------------------------------------------------------------------------------------------------- public API
# Arguments as the functions of ``pydenoise.ops.ode_stage`` give them to the rows, not checked here.


def _rows(image: Tensor) -> Tensor:
    """Dense [N, H, W, C]."""
    return image.permute(0, 2, 3, 1).contiguous()


def _float32(film: Tensor | None) -> Tensor | None:
    return None if film is None else film.float().contiguous()


def ode_stage(
    state: Tensor, slopes: tuple[Tensor, ...], weights: tuple[float, ...], position_weights: tuple[float, ...],
    drift: float, second: bool, film: Tensor | None, plane: float | None, eps: float, normalise: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(normalised point, point, moments), images in channels_last memory; empty where not wanted."""
    n, channels, height, width = state.shape
    device, nothing = state.device, state.new_empty(0)
    y = point = moments = None
    if normalise:
        y = torch.empty((n, height, width, channels + (plane is not None)), dtype=state.dtype, device=device)
        moments = torch.empty((n, 2, channels), dtype=torch.float32, device=device)
    if keep:
        point = torch.empty((n, height, width, channels), dtype=state.dtype, device=device)
    if state.numel() > 0:
        rows = tuple(map(_rows, slopes))
        launches = plan_stage(
            _rows(state), rows, weights, position_weights, drift, second, _float32(film), plane, eps, y, point, moments
        )
        for launch in launches:
            launch.run()
    images = (nothing if image is None else image.permute(0, 3, 1, 2) for image in (y, point))
    return *images, (state.new_empty(0, dtype=torch.float32) if moments is None else moments)


def ode_stage_backward(
    grad: Tensor, point: Tensor, moments: Tensor, film: Tensor | None, beside: Tensor | None, eps: float,
    need_film: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of the point in channels_last memory, that of film [N, 2 C] in float32 or empty)."""
    n, channels, height, width = point.shape
    grad_point = torch.empty((n, height, width, channels), dtype=point.dtype, device=point.device)
    grad_film = torch.empty((n, 2 * channels) if need_film else 0, dtype=torch.float32, device=point.device)
    if point.numel() > 0:
        launches = plan_gradient(
            _rows(grad), _rows(point), moments, _float32(film), None if beside is None else _rows(beside), grad_point,
            grad_film if need_film else None,
        )  # fmt: skip
        for launch in launches:
            launch.run()
    return grad_point.permute(0, 3, 1, 2), grad_film
