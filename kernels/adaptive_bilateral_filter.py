"""Bilateral filter with a width of its own at every pixel: a program takes a rectangle of one image.

Radii are read on the device. In the backward pass every pixel gathers what its readers leave there, so that nobody
writes where another one does; at the borders it does so once for each of its mirror images.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._tiles import Kernel, Launch, variants
from torch import Tensor

LARGEST_RADIUS = 127
MOST_CHANNELS = 8  # at once; with more of them distances are added up in a loop
_EPSILON = tl.constexpr(1e-8)  # added to the sum of weights
_HALF_LOG2E = tl.constexpr(0.7213475204444817)
_TWO_LN2 = tl.constexpr(1.3862943611198906)
_STEEPEST = tl.constexpr(-1e30)  # of a factor: times a difference of 0 it is still 0
_SCALARS = ("channels", "height", "width", "tile_height", "tile_width", "across", "tiles", "image_stride",
            "channel_stride", "row_stride", "column_stride", "grad_image", "grad_channel", "grad_row", "grad_column",
            "out_image", "out_channel", "out_row", "out_column", "radius_stride", "count")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _reflected(i, size):
    """The place in [0, size) where the mirrored axis has ``i``."""
    inside = tl.abs(i) % tl.maximum(2 * (size - 1), 1)
    return tl.minimum(inside, 2 * (size - 1) - inside)


@triton.jit
def _factor(sigma):
    """-log2(e) / (2 sigma^2)."""
    return tl.maximum(-_HALF_LOG2E / sigma / sigma, _STEEPEST)


@triton.jit(do_not_specialize=_SCALARS)
def factors_kernel(sigma, factors, radius, count, radius_stride, MOST: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sigmas as factors of exponents, and (with MOST > 0) the largest spatial one, rounded up, in ``radius``."""
    image = tl.program_id(1).to(tl.int64)
    item = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = item < count
    place = (image * count + item) * 3
    x = tl.load(sigma + place, mask=ok, other=1.0)
    y = tl.load(sigma + place + 1, mask=ok, other=1.0)
    spread = tl.load(sigma + place + 2, mask=ok, other=1.0)
    tl.store(factors + place, _factor(x), mask=ok)
    tl.store(factors + place + 1, _factor(y), mask=ok)
    tl.store(factors + place + 2, _factor(spread), mask=ok)
    if MOST > 0:
        widest = tl.max(tl.where(ok, tl.maximum(x, y), 0.0), 0)
        widest = tl.minimum(tl.maximum(tl.ceil(widest), 0.0), MOST)
        tl.atomic_max(radius + image * radius_stride, widest.to(tl.int32), sem="relaxed")


@triton.jit(do_not_specialize=_SCALARS)
def quotients_kernel(
    x, grad, out, norm, e, shift, channels, height, width, image_stride, channel_stride, row_stride, column_stride,
    grad_image, grad_channel, grad_row, grad_column, out_image, out_channel, out_row, out_column,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """e = grad / norm, and shift = sum over channels of e (out - x), for one piece of the pixels of an image."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = pixel < height * width
    row, column = pixel // width, pixel % width
    n = tl.load(norm + image * height * width + pixel, mask=ok, other=1.0)
    total = tl.zeros((BLOCK_P,), tl.float32)
    x += image * image_stride + row * row_stride + column * column_stride
    grad += image * grad_image + row * grad_row + column * grad_column
    out += image * out_image + row * out_row + column * out_column
    e += image * channels * height * width + pixel
    for c in range(0, channels):
        quotient = tl.load(grad + c * grad_channel, mask=ok, other=0.0).to(tl.float32) / n
        value = tl.load(x + c * channel_stride, mask=ok, other=0.0).to(tl.float32)
        result = tl.load(out + c * out_channel, mask=ok, other=0.0).to(tl.float32)
        tl.store(e + c * height * width, quotient, mask=ok)
        total += quotient * (result - value)
    tl.store(shift + image * height * width + pixel, total, mask=ok)


@triton.jit
def _distance(x, own, other, ok, channel_stride, channels, BLOCK_C: tl.constexpr):
    """Sum over all channels of the squared differences between the places ``own`` and ``other``."""
    total = tl.zeros_like(own).to(tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C))[:, None, None]
        mask = ok[None] & (c < channels)
        a = tl.load(x + c * channel_stride + own[None], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + c * channel_stride + other[None], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum((a - b) * (a - b), 0)
    return total


@triton.jit
def _product(e, x, of_e, own, other, ok, plane, channel_stride, channels, BLOCK_C: tl.constexpr):
    """Sum over all channels of e at ``of_e`` times the difference x(other) - x(own)."""
    total = tl.zeros_like(own).to(tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C))[:, None, None]
        mask = ok[None] & (c < channels)
        a = tl.load(x + c * channel_stride + own[None], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + c * channel_stride + other[None], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.load(e + c * plane + of_e[None], mask=mask, other=0.0) * (b - a), 0)
    return total


@triton.jit(do_not_specialize=_SCALARS)
def filter_kernel(
    x, factors, radius, out, norm, channels, height, width, tile_height, tile_width, across, tiles,
    image_stride, channel_stride, row_stride, column_stride, radius_stride,
    WHOLE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The filter of one rectangle, for BLOCK_C of the channels; WHOLE: for all. ``norm`` may be None."""
    image = tl.program_id(1).to(tl.int64)
    blocks_across = tl.cdiv(width, BLOCK_N)
    rows = tl.program_id(0) // blocks_across * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % blocks_across * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None, None]
    there = (rows < height)[:, None] & (columns < width)[None, :]
    ok = there[None] & (c < channels)
    tile = tl.minimum(rows, height - 1)[:, None] // tile_height * across
    tile += tl.minimum(columns, width - 1)[None, :] // tile_width
    factors += (image * tiles + tile) * 3
    of_x, of_y, of_range = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    x += image * image_stride
    centre = rows[:, None] * row_stride + columns[None, :] * column_stride
    own = tl.load(x + c * channel_stride + centre[None], mask=ok, other=0.0).to(tl.float32)
    r = tl.load(radius + image * radius_stride)
    total = tl.zeros((BLOCK_C, BLOCK_M, BLOCK_N), tl.float32)
    weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for dy in range(-r, r + 1):
        line = _reflected(rows + dy, height)[:, None] * row_stride
        down = of_y * (dy * dy)
        for dx in range(-r, r + 1):
            place = line + _reflected(columns + dx, width)[None, :] * column_stride
            value = tl.load(x + c * channel_stride + place[None], mask=ok, other=0.0).to(tl.float32)
            if WHOLE:
                distance = tl.sum((value - own) * (value - own), 0)
            else:
                distance = _distance(x, centre, place, there, channel_stride, channels, BLOCK_C)
            weight = tl.exp2(of_range * distance + (of_x * (dx * dx) + down))
            weights += weight
            total += weight[None] * value
    weights += _EPSILON
    pixel = rows[:, None] * width + columns[None, :]
    result = (total / weights[None]).to(out.dtype.element_ty)
    tl.store(out + (image * channels + c) * height * width + pixel[None], result, mask=ok)
    if norm is not None:
        if tl.program_id(2) == 0:
            tl.store(norm + image * height * width + pixel, weights, mask=there)


@triton.jit(do_not_specialize=_SCALARS)
def gradients_kernel(
    x, sigma, factors, radius, e, shift, dinput, dsigma,
    channels, height, width, tile_height, tile_width, across, tiles,
    image_stride, channel_stride, row_stride, column_stride, radius_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients in one rectangle; ``dinput`` and ``dsigma`` may be None. dsigma is summed over TILE_M x TILE_N pixels.

    First each pixel as the centre of its window (its sigmas, its own value as the one compared with), then as what
    others read.
    """
    image = tl.program_id(1).to(tl.int64)
    blocks_across = tl.cdiv(width, BLOCK_N)
    top = tl.program_id(0) // blocks_across * BLOCK_M
    left = tl.program_id(0) % blocks_across * BLOCK_N
    rows, columns = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None, None]
    there = (rows < height)[:, None] & (columns < width)[None, :]
    ok = there[None] & (c < channels)
    plane = height * width
    x += image * image_stride
    e += image * channels * plane
    shift += image * plane
    factors += image * tiles * 3
    sigma += image * tiles * 3
    tile = tl.minimum(rows, height - 1)[:, None] // tile_height * across
    tile += tl.minimum(columns, width - 1)[None, :] // tile_width
    of_x, of_y = tl.load(factors + tile * 3), tl.load(factors + tile * 3 + 1)
    of_range = tl.load(factors + tile * 3 + 2)
    centre = rows[:, None] * row_stride + columns[None, :] * column_stride
    pixel = rows[:, None] * width + columns[None, :]
    own = tl.load(x + c * channel_stride + centre[None], mask=ok, other=0.0).to(tl.float32)
    quotient = tl.load(e + c * plane + pixel[None], mask=ok, other=0.0)
    own_shift = tl.load(shift + pixel, mask=there, other=0.0)
    r = tl.load(radius + image * radius_stride)

    pull = tl.zeros((BLOCK_C, BLOCK_M, BLOCK_N), tl.float32)
    sum_x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_y, sum_range = sum_x, sum_x
    for dy in range(-r, r + 1):
        line = _reflected(rows + dy, height)[:, None] * row_stride
        down = of_y * (dy * dy)
        for dx in range(-r, r + 1):
            place = line + _reflected(columns + dx, width)[None, :] * column_stride
            difference = tl.load(x + c * channel_stride + place[None], mask=ok, other=0.0).to(tl.float32) - own
            if WHOLE:
                distance = tl.sum(difference * difference, 0)
                product = tl.sum(quotient * difference, 0)
            else:
                distance = _distance(x, centre, place, there, channel_stride, channels, BLOCK_C)
                product = _product(e, x, pixel, centre, place, there, plane, channel_stride, channels, BLOCK_C)
            a = tl.exp2(of_range * distance + (of_x * (dx * dx) + down)) * (product - own_shift)
            sum_x += a * (dx * dx)
            sum_y += a * (dy * dy)
            sum_range += a * distance
            pull += a[None] * difference

    if dsigma is not None:
        dsigma += image * (height // TILE_M) * (width // TILE_N) * 3
        tile_rows = top // TILE_M + tl.arange(0, BLOCK_M // TILE_M)
        tile_columns = left // TILE_N + tl.arange(0, BLOCK_N // TILE_N)
        to = (tile_rows[:, None] * (width // TILE_N) + tile_columns[None, :]) * 3
        inside = (tile_rows < height // TILE_M)[:, None] & (tile_columns < width // TILE_N)[None, :]
        if tl.program_id(2) == 0:
            for k in tl.static_range(3):
                width_of = tl.load(sigma + tile * 3 + k)
                part = (sum_x if k == 0 else sum_y if k == 1 else sum_range) / width_of / width_of / width_of
                part = tl.where(there, part, 0.0)
                part = tl.reshape(part, (BLOCK_M // TILE_M, TILE_M, BLOCK_N // TILE_N, TILE_N))
                tl.store(dsigma + to + k, tl.sum(tl.sum(part, 3), 1), mask=inside)

    if dinput is not None:
        total = pull * (of_range * -_TWO_LN2)[None]
        period_y, period_x = tl.maximum(2 * (height - 1), 1), tl.maximum(2 * (width - 1), 1)
        last_row = tl.minimum(top + BLOCK_M, height) - 1
        last_column = tl.minimum(left + BLOCK_N, width) - 1
        turns_y, turns_x = 1 + r // period_y, 1 + r // period_x
        for mirror_y in range(0, 4 * turns_y + 2):  # the target's places on the mirrored axis: k period +- row
            sign_y = 1 - 2 * (mirror_y % 2)
            start_y = (mirror_y // 2 - turns_y) * period_y
            target_y = start_y + sign_y * rows
            distinct_y = tl.where((rows > 0) & (rows < height - 1), 1, sign_y) > 0
            low = start_y + tl.minimum(sign_y * top, sign_y * last_row)
            high = start_y + tl.maximum(sign_y * top, sign_y * last_row)
            for dy in range(tl.maximum(-r, low - (height - 1)), tl.minimum(r, high) + 1):
                reader_y = target_y - dy
                ok_y = distinct_y & (reader_y >= 0) & (reader_y < height)
                for mirror_x in range(0, 4 * turns_x + 2):
                    sign_x = 1 - 2 * (mirror_x % 2)
                    start_x = (mirror_x // 2 - turns_x) * period_x
                    target_x = start_x + sign_x * columns
                    distinct_x = tl.where((columns > 0) & (columns < width - 1), 1, sign_x) > 0
                    left_end = start_x + tl.minimum(sign_x * left, sign_x * last_column)
                    right_end = start_x + tl.maximum(sign_x * left, sign_x * last_column)
                    for dx in range(tl.maximum(-r, left_end - (width - 1)), tl.minimum(r, right_end) + 1):
                        reader_x = target_x - dx
                        ok_x = distinct_x & (reader_x >= 0) & (reader_x < width)
                        reads = ok_y[:, None] & ok_x[None, :] & there
                        its_tile = (reader_y // tile_height)[:, None] * across + (reader_x // tile_width)[None, :]
                        place = reader_y[:, None] * row_stride + reader_x[None, :] * column_stride
                        its_pixel = reader_y[:, None] * width + reader_x[None, :]
                        mask = reads[None] & (c < channels)
                        value = tl.load(x + c * channel_stride + place[None], mask=mask, other=0.0).to(tl.float32)
                        difference = value - own
                        its_e = tl.load(e + c * plane + its_pixel[None], mask=mask, other=0.0)
                        if WHOLE:
                            distance = tl.sum(difference * difference, 0)
                            product = tl.sum(its_e * difference, 0)
                        else:
                            distance = _distance(x, centre, place, reads, channel_stride, channels, BLOCK_C)
                            product = _product(
                                e, x, its_pixel, centre, place, reads, plane, channel_stride, channels, BLOCK_C
                            )
                        product += tl.load(shift + its_pixel, mask=reads, other=0.0)
                        its_x = tl.load(factors + its_tile * 3, mask=reads, other=0.0)
                        its_y = tl.load(factors + its_tile * 3 + 1, mask=reads, other=0.0)
                        its_range = tl.load(factors + its_tile * 3 + 2, mask=reads, other=0.0)
                        spatial = its_x * (dx * dx) + its_y * (dy * dy)
                        weight = tl.where(reads, tl.exp2(its_range * distance + spatial), 0.0)
                        slope = product * its_range * _TWO_LN2
                        total += weight[None] * (slope[None] * difference + its_e)
        to = dinput + (image * channels + c) * plane + pixel[None]
        tl.store(to, total.to(dinput.dtype.element_ty), mask=ok)


# ------------------------------------------------------------------------------------------------------ configurations


def _nothing(args: dict) -> dict[str, int]:
    return {}


_BLOCK = ("BLOCK_M", "BLOCK_N")


# One rectangle for each kernel: sums of a tile's gradient depend on it. Many channels take smaller ones.
def _kernel(name: str, function, axes: tuple[str, ...], *rows: tuple) -> Kernel:
    return Kernel(name, function, variants(name, axes, rows), _nothing)


FACTORS = _kernel("bilateral_factors", factors_kernel, ("BLOCK_P",), (512, 4, 1))
QUOTIENTS = _kernel("bilateral_quotients", quotients_kernel, ("BLOCK_P",), (512, 4, 1))
FILTER = _kernel("bilateral", filter_kernel, _BLOCK, (8, 32, 4, 1))
FILTER_MANY = _kernel("bilateral_many", filter_kernel, _BLOCK, (8, 16, 4, 1))
GRADIENTS = _kernel("bilateral_gradients", gradients_kernel, _BLOCK, (8, 16, 4, 1))
GRADIENTS_MANY = _kernel("bilateral_gradients_many", gradients_kernel, _BLOCK, (4, 16, 4, 1, 80, 89), (8, 16, 4, 1, 90))
KERNELS = (FACTORS, QUOTIENTS, FILTER, FILTER_MANY, GRADIENTS, GRADIENTS_MANY)


# ------------------------------------------------------------------------------------------------------------ launches


def _strides(tensor: Tensor, prefix: str) -> dict[str, int]:
    names = ("image", "channel", "row", "column")
    ending = "_stride" if not prefix else ""
    return {f"{prefix}{name}{ending}": stride for name, stride in zip(names, tensor.stride(), strict=True)}


def _geometry(input: Tensor, sigma: Tensor, radius: int) -> dict[str, object]:
    """What the kernels of both passes are told."""
    _, channels, height, width = input.shape
    down, across = sigma.shape[1:3]
    return {
        "x": input, "channels": channels, "height": height, "width": width, "tile_height": height // down,
        "tile_width": width // across, "across": across, "tiles": down * across, **_strides(input, ""),
        "radius_stride": int(radius == -2), "WHOLE": channels <= MOST_CHANNELS,
        "BLOCK_C": triton.next_power_of_2(min(channels, MOST_CHANNELS)),
    }  # fmt: skip


def plan_factors(sigma: Tensor, radius: int) -> tuple[Launch, Tensor, Tensor]:
    """(launch, factors, int32 radii: one for each image, or a single one for all)."""
    count = sigma.shape[1] * sigma.shape[2]
    factors = torch.empty_like(sigma)
    each = torch.full((sigma.shape[0],), max(radius, 0), dtype=torch.int32, device=sigma.device)
    arguments = {
        "sigma": sigma, "factors": factors, "radius": each, "count": count, "radius_stride": int(radius == -2),
        "MOST": LARGEST_RADIUS if radius < 0 else 0,
    }  # fmt: skip
    grid = lambda meta: (triton.cdiv(count, meta["BLOCK_P"]), sigma.shape[0])  # noqa: E731
    return Launch(FACTORS, arguments, grid), factors, each


def _rectangles(batch: int, shared: dict, meta: dict) -> tuple[int, int, int]:
    rectangles = triton.cdiv(shared["height"], meta["BLOCK_M"]) * triton.cdiv(shared["width"], meta["BLOCK_N"])
    return rectangles, batch, triton.cdiv(shared["channels"], shared["BLOCK_C"])


def plan_filter(
    input: Tensor, sigma: Tensor, factors: Tensor, each: Tensor, radius: int, out: Tensor, norm: Tensor | None
) -> Launch:
    """The launch that writes ``out`` and ``norm``."""
    shared = _geometry(input, sigma, radius)
    kernel = FILTER if shared["BLOCK_C"] <= 4 else FILTER_MANY
    own = {"factors": factors, "radius": each, "out": out, "norm": norm}
    return Launch(kernel, {**shared, **own}, lambda meta: _rectangles(input.shape[0], shared, meta))


def plan_quotients(grad: Tensor, input: Tensor, out: Tensor, norm: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """(launch, grad / norm, its product with out - input summed over channels), both row-major float32."""
    batch, channels, height, width = input.shape
    e = torch.empty((batch, channels, height, width), dtype=torch.float32, device=input.device)
    shift = torch.empty((batch, height, width), dtype=torch.float32, device=input.device)
    arguments = {
        "x": input, "grad": grad, "out": out, "norm": norm, "e": e, "shift": shift, "channels": channels,
        "height": height, "width": width, **_strides(input, ""), **_strides(grad, "grad_"), **_strides(out, "out_"),
    }  # fmt: skip
    return Launch(QUOTIENTS, arguments, lambda meta: (triton.cdiv(height * width, meta["BLOCK_P"]), batch)), e, shift


def plan_gradients(
    input: Tensor, sigma: Tensor, factors: Tensor, each: Tensor, radius: int, e: Tensor, shift: Tensor,
    dinput: Tensor | None, need_sigma: bool,
) -> tuple[Launch, Tensor | None]:  # fmt: skip
    """(launch, the gradient of sigma that it writes, [B, rows, columns, 3]: of tiles where they fit a block, else of
    pixels)."""
    shared = _geometry(input, sigma, radius)
    kernel = GRADIENTS if shared["BLOCK_C"] <= 4 else GRADIENTS_MANY
    block = dict(GRADIENTS.variants[0].meta)
    sides = (shared["tile_height"], shared["tile_width"])
    fits = kernel is GRADIENTS and block["BLOCK_M"] % sides[0] == 0 and block["BLOCK_N"] % sides[1] == 0
    tile = sides if fits else (1, 1)
    dsigma = None
    if need_sigma:
        shape = (input.shape[0], input.shape[2] // tile[0], input.shape[3] // tile[1], 3)
        dsigma = torch.empty(shape, dtype=torch.float32, device=input.device)
    own = {
        "sigma": sigma, "factors": factors, "radius": each, "e": e, "shift": shift, "dinput": dinput, "dsigma": dsigma,
        "TILE_M": tile[0], "TILE_N": tile[1],
    }  # fmt: skip
    grid = lambda meta: _rectangles(input.shape[0], shared, meta)  # noqa: E731
    return Launch(kernel, {**shared, **own}, grid), dsigma


def forward(input: Tensor, sigma: Tensor, radius: int, save_norm: bool) -> tuple[Tensor, Tensor]:
    """(output, norm or empty); arguments as the op's ``prepare`` returns them, not checked here."""
    input, sigma = input.detach(), sigma.detach()
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    shape = (input.shape[0], *input.shape[2:]) if save_norm else (0,)
    norm = torch.empty(shape, dtype=torch.float32, device=input.device)
    if input.numel():
        launch, factors, each = plan_factors(sigma, radius)
        launch.run()
        launch = plan_filter(input, sigma, factors, each, radius, out, norm if save_norm else None)
        launch.run()
    return out, norm


def backward(
    grad: Tensor, input: Tensor, sigma: Tensor, radius: int, out: Tensor, norm: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in ``input`` and ``sigma``, None where ``mask`` is false."""
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device) if mask[0] else None
    if not input.numel() or not any(mask):
        return dinput, torch.empty_like(sigma) if mask[1] else None
    launch, factors, each = plan_factors(sigma, radius)
    launch.run()
    launch, e, shift = plan_quotients(grad, input, out, norm)
    launch.run()
    launch, dsigma = plan_gradients(input, sigma, factors, each, radius, e, shift, dinput, mask[1])
    launch.run()
    if dsigma is not None and dsigma.shape != sigma.shape:
        tiles = (sigma.shape[1], input.shape[2] // sigma.shape[1], sigma.shape[2], input.shape[3] // sigma.shape[2])
        dsigma = dsigma.view(sigma.shape[0], *tiles, 3).sum((2, 4))
    return dinput, dsigma
