"""Normalisation + activation + quantization: group norm in three small launches, layer norm in one.

Group norm: (1) mean and sum of squared deviations of every channel over a part of the pixels; (2) these joined per
group (Chan, Golub, LeVeque: updating formulas for variances) and written per channel as mean, gain and shift; (3) codes
of ``activation((x - mean) * gain + shift)``. Statistics per channel keep the reads of channels_last images whole, and
let groups span the boundary of two inputs that are read as if concatenated.

Layer norm: a program holds its rows and computes two-pass statistics; rows too long to hold are read once per pass.
"""

import torch
import triton
import triton.language as tl
from pydenoise.kernels._int8 import activate, codes, dynamic_parameters
from pydenoise.kernels._tiles import Kernel, Launch, multiprocessors, variants
from torch import Tensor

_SIZES = ("pixels", "per_part", "parts", "width", "rows", "tune")


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _image(x, skip, n, p, ok, c, channels, first, width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w):
    """[pixels, channels] of image ``n`` as float32, channels from ``first`` on from ``skip``; and its mask."""
    h = (p // width).to(tl.int64)
    w = p.to(tl.int64) - h * width
    column = c.to(tl.int64)
    mask = ok[:, None] & (c < channels)[None, :]
    at = (h * x_h + w * x_w)[:, None] + (column * x_c)[None, :]
    if skip is None:
        v = tl.load(x + n * x_n + at, mask=mask, other=0.0).to(tl.float32)
    else:
        own = (c < first)[None, :]
        v = tl.load(x + n * x_n + at, mask=mask & own, other=0.0).to(tl.float32)
        at = (h * s_h + w * s_w)[:, None] + ((column - first) * s_c)[None, :]
        other = tl.load(skip + n * s_n + at, mask=mask & (c >= first)[None, :], other=0.0).to(tl.float32)
        v = tl.where(own, v, other)
    return v, mask


@triton.jit(do_not_specialize=_SIZES)
def channel_statistics_kernel(
    x, skip, means, squares,
    pixels, per_part, parts, channels, first, width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, tune,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over one part of the pixels: [n, part, channel]."""
    tiles = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // tiles % parts
    n = (tl.program_id(0) // tiles // parts).to(tl.int64)
    end = tl.minimum((part + 1) * per_part, pixels)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for start in range(part * per_part, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        v, mask = _image(x, skip, n, p, p < end, c, channels, first, width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w)
        more = tl.minimum(end - start, BLOCK_P).to(tl.float32)
        own = tl.sum(v, 0) / more
        d = tl.where(mask, v - own[None, :], 0.0)
        delta = own - mean
        share = more / (count + more)
        mean += delta * share
        square += tl.sum(d * d, 0) + delta * delta * (count * share)
        count += more
    at = (n * parts + part) * channels + c
    tl.store(means + at, mean, mask=c < channels)
    tl.store(squares + at, square, mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def group_statistics_kernel(
    means, squares, weight, bias, film, mean, gain, shift,
    pixels, per_part, parts, channels, per_group, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Joins the parts and channels of one group of one image; mean, gain, shift: [n, channel]."""
    groups = channels // per_group
    n = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * per_group
    r = tl.arange(0, BLOCK_R)
    rows = parts * per_group  # pairs (part, channel)
    total = 0.0
    for start in range(0, rows, BLOCK_R):
        part = (start + r) // per_group
        count = tl.minimum(pixels - part * per_part, per_part).to(tl.float32)
        at = (n * parts + part) * channels + first + (start + r) % per_group
        total += tl.sum(tl.load(means + at, mask=start + r < rows, other=0.0) * (count / pixels), 0)
    center = total / per_group
    square = 0.0
    for start in range(0, rows, BLOCK_R):
        part = (start + r) // per_group
        count = tl.minimum(pixels - part * per_part, per_part).to(tl.float32)
        at = (n * parts + part) * channels + first + (start + r) % per_group
        ok = start + r < rows
        d = tl.where(ok, tl.load(means + at, mask=ok, other=0.0) - center, 0.0)
        square += tl.sum((tl.load(squares + at, mask=ok, other=0.0) + d * d * count) / pixels, 0)
    inverse = 1.0 / tl.sqrt_rn(square / per_group + eps)
    for start in range(0, per_group, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        ok = c < per_group
        c += first
        scale = tl.zeros((BLOCK_C,), tl.float32) + inverse
        offset = tl.zeros((BLOCK_C,), tl.float32)
        if weight is not None:
            scale *= tl.load(weight + c, mask=ok, other=0.0)
        if bias is not None:
            offset += tl.load(bias + c, mask=ok, other=0.0)
        if film is not None:
            factor = 1.0 + tl.load(film + n * channels * 2 + c, mask=ok, other=0.0)
            scale *= factor
            offset = offset * factor + tl.load(film + n * channels * 2 + channels + c, mask=ok, other=0.0)
        tl.store(mean + n * channels + c, tl.zeros((BLOCK_C,), tl.float32) + center, mask=ok)
        tl.store(gain + n * channels + c, scale, mask=ok)
        tl.store(shift + n * channels + c, offset, mask=ok)


@triton.jit
def _normalised(x, skip, mean, gain, shift, channel_scale, n, p, ok, c, channels, first, width, x_n, x_c, x_h, x_w,
                s_n, s_c, s_h, s_w, ACTIVATION: tl.constexpr):  # fmt: skip
    v, mask = _image(x, skip, n, p, ok, c, channels, first, width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w)
    at = n * channels + c
    c_ok = c < channels
    v = v - tl.load(mean + at, mask=c_ok, other=0.0)[None, :]
    v = v * tl.load(gain + at, mask=c_ok, other=0.0)[None, :] + tl.load(shift + at, mask=c_ok, other=0.0)[None, :]
    v = activate(v, ACTIVATION)
    if channel_scale is not None:
        v = v * tl.load(channel_scale + c, mask=c_ok, other=0.0)[None, :]
    return v, mask


@triton.jit(do_not_specialize=_SIZES)
def group_norm_kernel(
    x, skip, mean, gain, shift, channel_scale, scale, zero_point, y,
    pixels, channels, first, width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, tune,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes under one scale; y is dense [n, pixel, channel]."""
    tiles = tl.cdiv(channels, BLOCK_C)
    blocks = tl.cdiv(pixels, BLOCK_P)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (tl.program_id(0) // tiles % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    v, mask = _normalised(x, skip, mean, gain, shift, channel_scale, n, p, p < pixels, c, channels, first, width,
                          x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, ACTIVATION)  # fmt: skip
    by = tl.zeros_like(v) + tl.load(scale)
    if zero_point is not None:
        q = codes(v, by, tl.load(zero_point), True)
    else:
        q = codes(v, by, 0, False)
    at = ((n * pixels + p.to(tl.int64)) * channels)[:, None] + c[None, :]
    tl.store(y + at, q, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def group_norm_dynamic_kernel(
    x, skip, mean, gain, shift, channel_scale, scale, zero_point, y,
    pixels, channels, first, width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, tune,
    WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes with a scale per pixel. WHOLE: one block holds all channels, so they are read once."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    ok = p < pixels
    c = tl.arange(0, BLOCK_C)
    low = tl.zeros((BLOCK_P,), tl.float32)
    high = tl.zeros((BLOCK_P,), tl.float32)
    nan = tl.zeros((BLOCK_P,), tl.int32)
    v = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, channels, BLOCK_C):
        v, mask = _normalised(x, skip, mean, gain, shift, channel_scale, n, p, ok, start + c, channels, first, width,
                              x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, ACTIVATION)  # fmt: skip
        plain = tl.where(mask & (v == v), v, 0.0)
        low = tl.minimum(low, tl.min(plain, 1))
        high = tl.maximum(high, tl.max(plain, 1))
        nan = tl.maximum(nan, tl.max((mask & (v != v)).to(tl.int32), 1))
    by, offset = dynamic_parameters(low, high, nan, False)
    row = n * pixels + p.to(tl.int64)
    for start in range(0, channels, BLOCK_C):
        if not WHOLE:
            v, mask = _normalised(x, skip, mean, gain, shift, channel_scale, n, p, ok, start + c, channels, first,
                                  width, x_n, x_c, x_h, x_w, s_n, s_c, s_h, s_w, ACTIVATION)  # fmt: skip
        q = codes(v, tl.zeros_like(v) + by[:, None], offset[:, None], True)
        at = (row * channels)[:, None] + (start + c)[None, :]
        tl.store(y + at, q, mask=ok[:, None] & (start + c < channels)[None, :])
    tl.store(scale + row, by, mask=ok)
    tl.store(zero_point + row, offset.to(tl.int32), mask=ok)


@triton.jit
def _layer_normalised(v, mean, inverse, weight, bias, film, channel_scale, n, c, channels, mask):
    """Norm, FiLM and channel scale of ``v`` [rows, channels of the block]."""
    ok = c < channels
    v = (v - mean[:, None]) * inverse[:, None]
    if weight is not None:
        v = v * tl.load(weight + c, mask=ok, other=0.0)[None, :]
    if bias is not None:
        v = v + tl.load(bias + c, mask=ok, other=0.0)[None, :]
    if film is not None:
        at = (n * channels * 2)[:, None] + c[None, :]
        factor = 1.0 + tl.load(film + at, mask=mask, other=0.0)
        v = v * factor + tl.load(film + at + channels, mask=mask, other=0.0)
    if channel_scale is not None:
        v = v * tl.load(channel_scale + c, mask=ok, other=0.0)[None, :]
    return v


@triton.jit(do_not_specialize=(*_SIZES, "per_image"))
def layer_norm_kernel(
    x, weight, bias, film, channel_scale, scale, zero_point, y,
    rows, channels, per_image, eps, tune,
    DYNAMIC: tl.constexpr, AFFINE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of dense x [rows, channels]; ``per_image`` rows share a row of film. WHOLE: one block holds a row.

    DYNAMIC writes scale and zero point per row; otherwise one of each is read, the zero point where AFFINE.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = row < rows
    n = row // per_image
    c = tl.arange(0, BLOCK_C)
    x_rows = x + row * channels
    mean = tl.zeros((BLOCK_R,), tl.float32)
    square = tl.zeros((BLOCK_R,), tl.float32)
    count = 0.0
    v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, channels, BLOCK_C):
        mask = ok[:, None] & (start + c < channels)[None, :]
        v = tl.load(x_rows[:, None] + (start + c)[None, :], mask=mask, other=0.0).to(tl.float32)
        more = tl.minimum(channels - start, BLOCK_C).to(tl.float32)
        own = tl.sum(v, 1) / more
        d = tl.where(mask, v - own[:, None], 0.0)
        delta = own - mean
        share = more / (count + more)
        mean += delta * share
        square += tl.sum(d * d, 1) + delta * delta * (count * share)
        count += more
    inverse = 1.0 / tl.sqrt_rn(square / count + eps)
    if WHOLE:
        mask = ok[:, None] & (c < channels)[None, :]
        v = _layer_normalised(v, mean, inverse, weight, bias, film, channel_scale, n, c, channels, mask)
    if DYNAMIC:
        low = tl.zeros((BLOCK_R,), tl.float32)
        high = tl.zeros((BLOCK_R,), tl.float32)
        nan = tl.zeros((BLOCK_R,), tl.int32)
        for start in range(0, channels, BLOCK_C):
            mask = ok[:, None] & (start + c < channels)[None, :]
            if not WHOLE:
                v = tl.load(x_rows[:, None] + (start + c)[None, :], mask=mask, other=0.0).to(tl.float32)
                v = _layer_normalised(v, mean, inverse, weight, bias, film, channel_scale, n, start + c, channels, mask)
            plain = tl.where(mask & (v == v), v, 0.0)
            low = tl.minimum(low, tl.min(plain, 1))
            high = tl.maximum(high, tl.max(plain, 1))
            nan = tl.maximum(nan, tl.max((mask & (v != v)).to(tl.int32), 1))
        by, offset = dynamic_parameters(low, high, nan, False)
        tl.store(scale + row, by, mask=ok)
        tl.store(zero_point + row, offset.to(tl.int32), mask=ok)
    else:
        by = tl.zeros((BLOCK_R,), tl.float32) + tl.load(scale)
        offset = tl.zeros((BLOCK_R,), tl.float32)
        if AFFINE:
            offset += tl.load(zero_point).to(tl.float32)
    for start in range(0, channels, BLOCK_C):
        mask = ok[:, None] & (start + c < channels)[None, :]
        if not WHOLE:
            v = tl.load(x_rows[:, None] + (start + c)[None, :], mask=mask, other=0.0).to(tl.float32)
            v = _layer_normalised(v, mean, inverse, weight, bias, film, channel_scale, n, start + c, channels, mask)
        q = codes(v, tl.zeros_like(v) + by[:, None], offset[:, None], AFFINE)
        tl.store(y + (row * channels)[:, None] + (start + c)[None, :], q, mask=mask)


# ------------------------------------------------------------------------------------------------------ configurations

_NAMES = ("BLOCK_P", "BLOCK_C")
_LONGEST_ROW = 4096  # channels that one block holds
_PART = 256  # pixels below which the statistics of an image are not split further
_ROW_TILES = [
    (32, 64, 4, 1), (16, 128, 4, 1), (8, 256, 4, 1), (8, 512, 8, 1), (4, 1024, 8, 1), (2, 2048, 8, 1), (1, 4096, 16, 1),
]  # fmt: skip
_STATISTICS_TILES = [(32, 64, 4, 2), (64, 64, 8, 2), (16, 128, 4, 2), (32, 32, 4, 2), (128, 16, 4, 2)]
_KEYS = ("tune", "channels", "x_c", "ACTIVATION")


def _extents(args: dict) -> dict[str, int]:
    return {"BLOCK_P": args["pixels"], "BLOCK_C": args["channels"]}


CHANNEL_STATISTICS = Kernel(
    "channel_statistics",
    channel_statistics_kernel,
    variants(
        "channel_statistics", _NAMES, [(32, 64, 4, 2), (64, 64, 8, 2), (16, 128, 4, 2), (32, 32, 4, 2), (128, 16, 4, 2)]
    ),
    lambda args: {"BLOCK_P": args["per_part"], "BLOCK_C": args["channels"]},
    ("tune", "channels", "x_c"),
)
GROUP_STATISTICS = Kernel(
    "group_statistics",
    group_statistics_kernel,
    variants("group_statistics", ("BLOCK_R", "BLOCK_C"), [(256, 64, 4, 1)]),
    lambda args: {"BLOCK_R": args["parts"] * args["per_group"], "BLOCK_C": args["per_group"]},
)
GROUP_NORM = Kernel(
    "group_norm",
    group_norm_kernel,
    variants("group_norm", _NAMES, [(32, 64, 4, 1), (16, 128, 4, 1), (8, 256, 4, 1), (64, 16, 4, 1), (64, 64, 8, 1)]),
    _extents,
    _KEYS,
)
GROUP_NORM_DYNAMIC = Kernel(
    "group_norm_dynamic",
    group_norm_dynamic_kernel,
    variants("group_norm_dynamic", _NAMES, _ROW_TILES),
    _extents,
    _KEYS,
    whole="BLOCK_C",
)
LAYER_NORM = Kernel(
    "layer_norm",
    layer_norm_kernel,
    variants("layer_norm", ("BLOCK_R", "BLOCK_C"), _ROW_TILES),
    lambda args: {"BLOCK_R": args["rows"], "BLOCK_C": args["channels"]},
    ("tune", "channels", "DYNAMIC"),
    whole="BLOCK_C",
)

KERNELS = (CHANNEL_STATISTICS, GROUP_STATISTICS, GROUP_NORM, GROUP_NORM_DYNAMIC, LAYER_NORM)


# ------------------------------------------------------------------------------------------------------------ launches


def _strides(prefix: str, image: Tensor | None) -> dict[str, int]:
    strides = (0,) * 4 if image is None else image.stride()
    return dict(zip((f"{prefix}_n", f"{prefix}_c", f"{prefix}_h", f"{prefix}_w"), strides, strict=True))


def _parts(pixels: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(parts, pixels of each) of one image's statistics: enough programs to fill the device twice, none too short."""
    parts = max(1, min(-(-2 * multiprocessors(device) // programs), pixels // _PART))
    per_part = -(-pixels // parts)
    return -(-pixels // per_part), per_part


def plan_group_norm(
    input: Tensor, skip: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    film: Tensor | None, activation: str, channel_scale: Tensor | None, scale: Tensor, zero_point: Tensor | None,
    output: Tensor, dynamic: bool,
) -> list[Launch]:  # fmt: skip
    """The launches that write ``output`` and, if ``dynamic``, ``scale`` and ``zero_point``; none of them empty."""
    if skip is not None and skip.shape[1] == 0:
        skip = None
    n, channels, height, width = output.shape
    pixels, device = height * width, input.device
    image = {
        "x": input, "skip": skip, "pixels": pixels, "channels": channels, "first": input.shape[1], "width": width,
        **_strides("x", input), **_strides("s", skip), "tune": (n * pixels).bit_length(),
    }  # fmt: skip
    parts, per_part = _parts(pixels, n * -(-channels // 64), device)
    means, squares = torch.empty((2, n, parts, channels), dtype=torch.float32, device=device)
    mean, gain, shift = torch.empty((3, n, channels), dtype=torch.float32, device=device)
    split = {"means": means, "squares": squares, "parts": parts, "per_part": per_part}
    joined = {
        **split, "weight": weight, "bias": bias, "film": film, "mean": mean, "gain": gain, "shift": shift,
        "pixels": pixels, "channels": channels, "per_group": channels // num_groups, "eps": eps,
    }  # fmt: skip
    written = {
        **image, "mean": mean, "gain": gain, "shift": shift, "channel_scale": channel_scale, "scale": scale,
        "zero_point": zero_point, "y": output, "ACTIVATION": activation,
    }  # fmt: skip

    def statistics_grid(meta):
        return (n * parts * triton.cdiv(channels, meta["BLOCK_C"]),)

    def grid(meta):
        return (n * triton.cdiv(pixels, meta["BLOCK_P"]) * (1 if dynamic else triton.cdiv(channels, meta["BLOCK_C"])),)

    if dynamic:
        written["WHOLE"] = channels <= _LONGEST_ROW
    return [
        Launch(CHANNEL_STATISTICS, {**image, **split}, statistics_grid),
        Launch(GROUP_STATISTICS, joined, lambda meta: (n * num_groups,)),
        Launch(GROUP_NORM_DYNAMIC if dynamic else GROUP_NORM, written, grid),
    ]


def plan_layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, film: Tensor | None,
    channel_scale: Tensor | None, scale: Tensor, zero_point: Tensor | None, output: Tensor, dynamic: bool,
) -> Launch:  # fmt: skip
    """The launch that writes ``output`` and, if ``dynamic``, ``scale`` and ``zero_point``; none of them empty."""
    channels = input.shape[-1]
    rows = input.numel() // channels
    arguments = {
        "x": input.contiguous(), "weight": weight, "bias": bias, "film": film, "channel_scale": channel_scale,
        "scale": scale, "zero_point": zero_point, "y": output, "rows": rows, "channels": channels,
        "per_image": rows // input.shape[0], "eps": eps, "tune": rows.bit_length(), "DYNAMIC": dynamic,
        "AFFINE": zero_point is not None, "WHOLE": channels <= _LONGEST_ROW,
    }  # fmt: skip
    return Launch(LAYER_NORM, arguments, lambda meta: (triton.cdiv(rows, meta["BLOCK_R"]),))


# ---------------------------------------------------------------------------------------------------------- public API
# Arguments as the ``prepare`` functions of ``pydenoise.ops.norm_quantize`` return them, not checked here.


def _positions(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))


def group_norm(
    input: Tensor, skip: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    film: Tensor | None, activation: str, channel_scale: Tensor | None, scale: Tensor | None, zero_point: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(codes in channels_last memory, scale, zero_point); the last two [N, 1, H, W], ``None`` where scale was given."""
    n, channels, height, width = input.shape
    channels += 0 if skip is None else skip.shape[1]
    output = torch.empty((n, height, width, channels), dtype=torch.int8, device=input.device).permute(0, 3, 1, 2)
    dynamic = scale is None
    if dynamic:
        scale, zero_point = _positions((n, 1, height, width), input.device)
    if output.numel():
        launches = plan_group_norm(
            input, skip, num_groups, weight, bias, eps, film, activation, channel_scale, scale, zero_point, output,
            dynamic,
        )  # fmt: skip
        for launch in launches:
            launch.run()
    return (output, scale, zero_point) if dynamic else (output, None, None)


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, film: Tensor | None,
    channel_scale: Tensor | None, scale: Tensor | None, zero_point: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(codes, scale, zero_point), row-major; the last two [..., 1], ``None`` where scale was given."""
    output = torch.empty(input.shape, dtype=torch.int8, device=input.device)
    dynamic = scale is None
    if dynamic:
        scale, zero_point = _positions((*input.shape[:-1], 1), input.device)
    if output.numel():
        plan_layer_norm(input, weight, bias, eps, film, channel_scale, scale, zero_point, output, dynamic).run()
    return (output, scale, zero_point) if dynamic else (output, None, None)
