"""Cases of the int8 ops, and how exact their results must be.

Policy: int32 accumulators and the codes of a plain quantization are exact; float32 results are within 1e-6 of the
largest oracle value (FLOAT_ERROR), 16-bit ones within one rounding more; codes behind float arithmetic (a norm, an
activation, an epilogue) may differ by one, in few places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import int8_conv2d, int8_linear, norm_quantize, quantize
from pydenoise.ops.weighted_conv import output_size
from pydenoise.testing.policy import arrange

FLOAT_ERROR = 1e-6
# A sum over taps in float32 instead of one exact integer sum: a few roundings more.
PER_PIXEL_ERROR = 4e-6
# Codes that may differ by one where float arithmetic precedes the rounding, as a share of all.
OFF_BY_ONE = 2e-3


def assert_codes(actual: Tensor, oracle: Tensor, *, exact: bool, what: str) -> None:
    """int8 codes: equal, or, unless ``exact``, off by one in at most OFF_BY_ONE of the places (and in one place)."""
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == torch.int8, f"{what}: dtype {actual.dtype}"
    difference = (actual.cpu().int() - oracle.cpu().int()).abs()
    worst = difference.max().item() if difference.numel() else 0
    off = (difference > 0).sum().item()
    assert worst <= (0 if exact else 1), f"{what}: codes differ by up to {worst} in {off} places"
    assert off <= max(2, OFF_BY_ONE * difference.numel()), f"{what}: {off} of {difference.numel()} codes differ by one"


def assert_output(actual: Tensor, oracle: Tensor, *, error: float, what: str) -> None:
    """A result of an int8 op against the oracle of the same dtype, or of float64 for floats."""
    if actual.dtype == torch.int8:
        return assert_codes(actual, oracle, exact=False, what=what)
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if actual.dtype == torch.int32:
        assert torch.equal(actual.cpu(), oracle.cpu()), f"{what}: accumulators differ"
        return None
    if oracle.numel() == 0:
        return None
    exact, got = oracle.double().cpu(), actual.double().cpu()
    rounding = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2
    bound = error * exact.abs().max() + rounding * 1.01 * exact.abs()
    excess = ((got - exact).abs() - bound).max().item()
    assert excess <= 0, f"{what}: error exceeds the bound by {excess:.3e} (largest value {exact.abs().max():.3e})"
    return None


class _Draw:
    """Reproducible tensors, drawn in float64 on the CPU."""

    def __init__(self, device: str, seed: int = 0):
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(dtype).to(self.device)

    def codes(self, *shape: int, low: int = -128) -> Tensor:
        return torch.randint(low, 128, shape, generator=self.generator).to(torch.int8).to(self.device)

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) * 0.05 + 0.001).to(self.device)

    def zero_points(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=self.generator).to(torch.int32).to(self.device)


@dataclass(frozen=True)
class Int8ConvCase:
    """One ``int8_conv2d`` call and the reason why it is in the table."""

    name: str
    why: str
    size: tuple[int, int]
    kernel: tuple[int, int]
    in_channels: int
    out_channels: int
    batch: int = 1
    stride: int | tuple[int, int] = 1
    padding: object = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    zero_point: bool = True
    per_pixel: bool = False
    bias: bool = True
    channel_bias: bool = False
    film: bool = False
    residual: torch.dtype | None = None
    activation: str = "none"
    upsample: int = 1
    strides: str = "channels_last"
    extreme: bool = False  # all codes at their limits: the largest accumulators

    def args(self, out_dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments; for int32, without what cannot be fused into accumulators."""
        draw = _Draw(device)
        plain = out_dtype == torch.int32
        x = draw.codes(self.batch, self.in_channels, *self.size)
        weight = draw.codes(self.out_channels, self.in_channels // self.groups, *self.kernel)
        if self.extreme:
            x, weight = torch.full_like(x, -128), torch.full_like(weight, -128)
        position = (self.batch, 1, *self.size) if self.per_pixel and not plain else ()
        scale = draw.scales(*position)
        zero_point = draw.zero_points(*position) if self.zero_point else 0
        stride, padding, dilation = int8_conv2d._geometry(
            self.stride, int8_conv2d._hashable(self.padding), self.dilation, self.kernel
        )
        size = output_size([n * self.upsample for n in self.size], self.kernel, stride, padding, dilation)
        fan_in = weight[0].numel()
        fused = {} if plain else {
            "bias": draw.normal(self.out_channels) if self.bias else None,
            "channel_bias": draw.normal(self.batch, self.out_channels) if self.channel_bias else None,
            "film": draw.normal(self.batch, 2 * self.out_channels) if self.film else None,
            "residual": None if self.residual is None else arrange(
                draw.normal(self.batch, self.out_channels, *size, dtype=self.residual), self.strides
            ),
            "activation": self.activation,
        }  # fmt: skip
        if out_dtype == torch.int8:
            fused |= {"out_scale": 0.03, "out_zero_point": -20 if self.zero_point else 0}
        return int8_conv2d.prepare(
            arrange(x, self.strides), weight, scale, draw.scales(self.out_channels) / (fan_in**0.5 * 2),
            input_zero_point=zero_point, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, out_dtype=out_dtype, upsample=self.upsample, **fused,
        )  # fmt: skip


INT8_CONV_CASES: tuple[Int8ConvCase, ...] = (
    Int8ConvCase("plain", "the common layer, all blocks full", (16, 28), (3, 3), 64, 64, padding=1),
    Int8ConvCase("symmetric", "no zero point", (15, 17), (3, 3), 32, 32, 2, padding=1, zero_point=False),
    Int8ConvCase("odd_channels", "channels not a multiple of 4 or of any vector", (9, 31), (3, 3), 19, 37, padding=1),
    Int8ConvCase("wide_tail", "one block of outputs full, the next nearly empty", (8, 8), (3, 3), 5, 33, padding=1),
    Int8ConvCase("three_in", "first layer: fewer input channels than a dot product takes", (17, 33), (3, 3), 3, 64,
                 padding=1, activation="relu"),
    Int8ConvCase("three_out", "last layer: a block nearly empty", (17, 33), (3, 3), 64, 3, padding=1),
    Int8ConvCase("one_channel", "1 channel in and out", (9, 10), (3, 3), 1, 1, padding=1),
    Int8ConvCase("pointwise", "1x1: a plain matrix product", (10, 11), (1, 1), 48, 40, 2),
    Int8ConvCase("pointwise_stride", "1x1 with stride", (11, 11), (1, 1), 32, 32, stride=2),
    Int8ConvCase("kernel5", "5x5", (14, 15), (5, 5), 16, 32, padding=2),
    Int8ConvCase("kernel7", "7x7, more padding than half of the row", (9, 6), (7, 7), 8, 24, padding=3),
    Int8ConvCase("kernel3x5", "non-square kernel and padding", (11, 12), (3, 5), 12, 20, padding=(1, 2)),
    Int8ConvCase("asymmetric", "padding at one end only, as diffusers' downsampling pads", (12, 13), (3, 3), 32, 32,
                 stride=2, padding=((0, 1), (0, 1))),
    Int8ConvCase("same_even", "even kernel with 'same'", (9, 10), (4, 2), 8, 16, padding="same"),
    Int8ConvCase("stride3x2", "strides differ per axis", (13, 17), (2, 3), 8, 16, stride=(3, 2)),
    Int8ConvCase("dilated", "dilation 2", (14, 14), (3, 3), 16, 16, padding=2, dilation=2),
    Int8ConvCase("dilated_far", "dilation larger than the input", (4, 5), (3, 3), 8, 16, padding=6, dilation=6),
    Int8ConvCase("groups", "groups of a few channels", (8, 9), (3, 3), 24, 36, padding=1, groups=3),
    Int8ConvCase("groups_wide", "groups of a full block", (8, 9), (3, 3), 64, 64, padding=1, groups=2),
    Int8ConvCase("depthwise", "depthwise, odd channels", (13, 14), (3, 3), 35, 35, padding=1, groups=35),
    Int8ConvCase("depthwise_multiplier", "channel multiplier 2", (9, 9), (3, 3), 8, 16, padding=1, groups=8),
    Int8ConvCase("upsample", "nearest upsampling in the gather", (7, 9), (3, 3), 32, 32, 2, padding=1, upsample=2),
    Int8ConvCase("single_pixel", "every tap but one in the padding", (1, 1), (3, 3), 16, 16, 3, padding=1),
    Int8ConvCase("one_output", "kernel as large as the image", (5, 5), (5, 5), 8, 8),
    Int8ConvCase("tiny_map", "a 4x4 map of many channels: work is split over outputs", (4, 4), (3, 3), 256, 256,
                 padding=1),
    Int8ConvCase("empty_batch", "no images: an empty result", (8, 8), (3, 3), 4, 4, 0, padding=1),
    Int8ConvCase("contiguous", "rows of channels, not pixels, are adjacent", (9, 14), (3, 3), 16, 16, padding=1,
                 residual=torch.float32, strides="contiguous"),
    Int8ConvCase("sliced", "non-contiguous input and residual", (9, 14), (3, 3), 16, 16, padding=1,
                 residual=torch.float32, strides="sliced"),
    Int8ConvCase("no_bias", "nothing to add", (8, 11), (3, 3), 16, 16, padding=1, bias=False),
    Int8ConvCase("residual", "residual after the activation", (8, 9), (3, 3), 32, 48, 2, padding=1, activation="silu",
                 residual=torch.float32),
    Int8ConvCase("residual_bf16", "16-bit residual stream", (8, 9), (3, 3), 32, 48, padding=1, residual=torch.bfloat16),
    Int8ConvCase("residual_fp16", "16-bit residual stream", (8, 9), (3, 3), 32, 20, padding=1, residual=torch.float16),
    Int8ConvCase("everything", "time embedding, FiLM, activation and residual", (7, 9), (3, 3), 24, 40, 2, padding=1,
                 channel_bias=True, film=True, activation="gelu", residual=torch.float32),
    Int8ConvCase("gelu_tanh", "the other GELU", (7, 9), (3, 3), 8, 16, padding=1, activation="gelu_tanh"),
    Int8ConvCase("leaky", "a slope below zero", (9, 14), (3, 3), 32, 72, 2, padding=1, activation="leaky_relu_0.1"),
    Int8ConvCase("leaky_per_pixel", "another slope, a scale per pixel, a residual", (6, 9), (3, 3), 16, 36, padding=1,
                 per_pixel=True, activation="leaky_relu_0.01", residual=torch.float32),
    Int8ConvCase("extreme", "largest accumulators, also in the padding's fold", (5, 6), (3, 3), 512, 16, padding=1,
                 extreme=True),
    Int8ConvCase("per_pixel", "a scale and zero point per pixel", (9, 13), (3, 3), 40, 36, 2, padding=1,
                 per_pixel=True),
    Int8ConvCase("per_pixel_symmetric", "a scale per pixel, no zero point", (8, 8), (3, 3), 64, 32, padding=1,
                 per_pixel=True, zero_point=False, activation="silu", residual=torch.float32),
    Int8ConvCase("per_pixel_stride", "rescaled taps of a strided, dilated kernel", (13, 12), (3, 3), 16, 24, stride=2,
                 padding=2, dilation=2, per_pixel=True),
    Int8ConvCase("per_pixel_upsample", "the scales are upsampled too", (6, 5), (3, 3), 16, 16, padding=1, upsample=2,
                 per_pixel=True),
    Int8ConvCase("per_pixel_pointwise", "per token, as linear layers", (1, 37), (1, 1), 64, 80, per_pixel=True),
    Int8ConvCase("per_pixel_groups", "rescaled taps of groups", (8, 9), (3, 3), 24, 36, padding=1, groups=3,
                 per_pixel=True),
    Int8ConvCase("per_pixel_depthwise", "rescaled taps, depthwise", (8, 9), (3, 3), 20, 20, padding=1, groups=20,
                 per_pixel=True),
)  # fmt: skip


@dataclass(frozen=True)
class Int8LinearCase:
    """One ``int8_linear`` call and the reason why it is in the table."""

    name: str
    why: str
    shape: tuple[int, ...]
    out_features: int
    zero_point: bool = True
    per_token: bool = False
    bias: bool = True
    residual: torch.dtype | None = None
    activation: str = "none"

    def args(self, out_dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments; for int32, without what cannot be fused into accumulators."""
        draw = _Draw(device)
        plain = out_dtype == torch.int32
        features = self.shape[-1]
        position = (*self.shape[:-1], 1) if self.per_token and not plain else ()
        output = (*self.shape[:-1], self.out_features)
        fused = {} if plain else {
            "bias": draw.normal(self.out_features) if self.bias else None,
            "residual": None if self.residual is None else draw.normal(*output, dtype=self.residual),
            "activation": self.activation,
        }  # fmt: skip
        if out_dtype == torch.int8:
            fused |= {"out_scale": 0.03, "out_zero_point": 7 if self.zero_point else 0}
        return int8_linear.prepare(
            draw.codes(*self.shape), draw.codes(self.out_features, features), draw.scales(*position),
            draw.scales(self.out_features) / (features**0.5 * 2),
            input_zero_point=draw.zero_points(*position) if self.zero_point else 0, out_dtype=out_dtype, **fused,
        )  # fmt: skip


INT8_LINEAR_CASES: tuple[Int8LinearCase, ...] = (
    Int8LinearCase("plain", "tokens of a transformer", (2, 64, 128), 256),
    Int8LinearCase("odd", "no size a multiple of anything", (3, 11, 77), 45, residual=torch.float32),
    Int8LinearCase("one_token", "a time embedding: one row", (1, 128), 64, activation="silu"),
    Int8LinearCase("vector", "1-D input", (48,), 20),
    Int8LinearCase("empty", "no tokens", (0, 32), 16),
    Int8LinearCase("per_token", "a scale and zero point per token", (2, 33, 96), 80, per_token=True),
    Int8LinearCase("per_token_symmetric", "a scale per token", (40, 64), 33, per_token=True, zero_point=False,
                   activation="gelu", residual=torch.bfloat16),
    Int8LinearCase("leaky", "a slope below zero", (3, 7, 64), 40, activation="leaky_relu_0.2"),
    Int8LinearCase("narrow", "fewer features than a dot product takes", (5, 3), 2),
    Int8LinearCase("long", "K of several thousand", (4, 2560), 24, bias=False),
)  # fmt: skip


@dataclass(frozen=True)
class QuantizeCase:
    """One ``quantize`` call; ``dequantize`` and ``quantize_dynamic`` are tested on the same inputs."""

    name: str
    why: str
    shape: tuple[int, ...]
    granularity: str = "tensor"
    zero_point: bool = True
    activation: str = "none"
    channel_scale: bool = False
    strides: str = "contiguous"
    special: bool = False  # NaN, infinities, ties and numbers near the limits among the values

    def input(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        x = _Draw(device).normal(*self.shape, dtype=dtype, scale=2.0)
        if self.special:
            values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5, -0.5, 1.5, 2.5, 1e30, -1e30, 0.0])
            x.view(-1)[: len(values)] = values.to(dtype)
        return x if self.strides == "contiguous" or x.dim() < 3 else arrange(x, self.strides)

    def _channel_scale(self, draw: "_Draw") -> Tensor | None:
        channels = self.shape[1 if len(self.shape) == 4 else -1] // (2 if self.activation == "geglu" else 1)
        return draw.normal(channels).abs() + 0.1 if self.channel_scale else None

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        draw = _Draw(device, 1)
        shape = list(self.shape)
        position = {"tensor": (), "pixel": (shape[0], 1, *shape[2:]), "token": (*shape[:-1], 1)}[self.granularity]
        scale = torch.full((), 1.0, device=device) if self.special else draw.scales(*position)
        zero_point = draw.zero_points(*position) if self.zero_point else 0
        return quantize.prepare(
            self.input(dtype, device), scale, zero_point, activation=self.activation,
            channel_scale=self._channel_scale(draw),
        )  # fmt: skip

    def dynamic_args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        image = len(self.shape) == 4
        return quantize.prepare_dynamic(
            self.input(dtype, device), granularity="pixel" if image else "token", activation=self.activation,
            channel_scale=self._channel_scale(_Draw(device, 1)), symmetric=not self.zero_point,
        )  # fmt: skip

    def dequantize_args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        _, scale, zero_point, _, _ = self.args(torch.float32, device)
        codes = _Draw(device, 2).codes(*self.shape)
        codes = codes if self.strides == "contiguous" or codes.dim() < 3 else arrange(codes, self.strides)
        return quantize.prepare_dequantize(codes, scale, 0 if zero_point is None else zero_point, dtype=dtype)


QUANTIZE_CASES: tuple[QuantizeCase, ...] = (
    QuantizeCase("image", "one scale for an image in channels_last", (2, 32, 9, 11), strides="channels_last"),
    QuantizeCase("image_nchw", "an image whose rows are adjacent", (2, 19, 7, 10)),
    QuantizeCase("symmetric", "codes -127..127", (1, 16, 8, 8), zero_point=False, strides="channels_last"),
    QuantizeCase("per_pixel", "a scale per pixel", (2, 24, 5, 6), granularity="pixel", strides="channels_last"),
    QuantizeCase("per_token", "a scale per token", (3, 17, 40), granularity="token"),
    QuantizeCase("vector", "1-D", (37,)),
    QuantizeCase("sliced", "non-contiguous", (1, 12, 6, 7), strides="sliced"),
    QuantizeCase("special", "NaN, infinities, ties", (4, 50), special=True),
    QuantizeCase("special_symmetric", "NaN, infinities, ties", (4, 50), special=True, zero_point=False),
    QuantizeCase("empty", "nothing", (0, 8, 4, 4)),
    QuantizeCase("one_channel", "images of one channel", (2, 1, 5, 5), strides="channels_last"),
    QuantizeCase("silu", "activation first", (2, 20, 6, 6), activation="silu", strides="channels_last"),
    QuantizeCase("gelu", "activation first", (5, 33), activation="gelu"),
    QuantizeCase("relu", "activation first", (2, 20, 6, 6), activation="relu", strides="channels_last"),
    QuantizeCase("leaky", "activation first", (2, 20, 6, 6), activation="leaky_relu_0.1", strides="channels_last"),
    QuantizeCase("geglu", "halves of tokens", (3, 9, 48), activation="geglu", channel_scale=True),
    QuantizeCase("geglu_image", "halves of channels", (1, 20, 4, 5), activation="geglu", strides="channels_last"),
    QuantizeCase("smoothed", "a factor per channel", (2, 20, 6, 6), channel_scale=True, strides="channels_last"),
    QuantizeCase("smoothed_tokens", "a factor per channel", (7, 30), channel_scale=True, activation="gelu_tanh"),
)  # fmt: skip


@dataclass(frozen=True)
class NormCase:
    """One ``group_norm_silu_quantize`` call (4-D) or ``layer_norm_quantize`` call (others)."""

    name: str
    why: str
    shape: tuple[int, ...]
    groups: int = 0
    skip: int = 0
    affine: bool = True
    film: bool = False
    activation: str = "silu"
    channel_scale: bool = False
    dynamic: bool = False
    zero_point: bool = True
    strides: str = "channels_last"
    offset: float = 0.0  # a mean far from 0: where squares would cancel

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        draw = _Draw(device)
        x = (draw.normal(*self.shape) + self.offset).to(dtype)
        image = self.groups > 0
        channels = self.shape[1 if image else -1] + self.skip
        affine = {"weight": draw.normal(channels), "bias": draw.normal(channels)} if self.affine else {}
        options = affine | {
            "film": draw.normal(self.shape[0], 2 * channels, scale=0.3) if self.film else None,
            "channel_scale": draw.normal(channels).abs() + 0.1 if self.channel_scale else None,
            "scale": None if self.dynamic else 0.021,
            "zero_point": -100 if self.zero_point and not self.dynamic else 0,
        }
        if not image:
            return norm_quantize.prepare_layer_norm(x, **options)
        skip = (draw.normal(self.shape[0], self.skip, *self.shape[2:]) * 3).to(dtype) if self.skip else None
        skip = None if skip is None else arrange(skip, self.strides)
        return norm_quantize.prepare_group_norm(
            arrange(x, self.strides), self.groups, skip=skip, activation=self.activation, **options
        )


GROUP_NORM_CASES: tuple[NormCase, ...] = (
    NormCase("plain", "GroupNorm + SiLU of a U-Net", (2, 64, 9, 8), 32),
    NormCase("wide", "many pixels: statistics in chunks", (1, 32, 70, 61), 8),
    NormCase("odd", "groups across any vector width", (2, 21, 5, 7), 3),
    NormCase("one_group", "a single group", (1, 19, 6, 6), 1),
    NormCase("per_channel", "groups of one channel", (2, 12, 7, 5), 12),
    NormCase("single_pixel", "one pixel", (3, 32, 1, 1), 4),
    NormCase("single_value", "groups of one value: nothing but the bias remains", (2, 8, 1, 1), 8),
    NormCase("skip", "two inputs, no concatenation", (2, 32, 6, 7), 8, skip=16),
    NormCase("skip_boundary", "a group across the two inputs", (1, 20, 6, 5), 3, skip=13),
    NormCase("film", "adaptive GroupNorm of EDM", (2, 32, 6, 6), 8, film=True),
    NormCase("smoothed", "a factor per channel", (1, 32, 6, 6), 8, channel_scale=True),
    NormCase("bare", "no weight, no activation", (2, 16, 5, 5), 4, affine=False, activation="none"),
    NormCase("symmetric", "no zero point", (1, 32, 6, 6), 8, zero_point=False),
    NormCase("dynamic", "a scale per pixel", (2, 40, 6, 7), 8, dynamic=True),
    NormCase("dynamic_skip", "a scale per pixel over both inputs", (1, 24, 5, 6), 4, skip=16, film=True, dynamic=True),
    NormCase("nchw", "channels not adjacent", (2, 32, 6, 7), 8, strides="contiguous"),
    NormCase("sliced", "non-contiguous", (1, 16, 5, 6), 4, strides="sliced", skip=8),
    NormCase("offset", "mean far from 0", (1, 32, 16, 16), 8, offset=1000.0, activation="none"),
    NormCase("empty", "no images", (0, 16, 4, 4), 4),
    NormCase("relu", "another activation", (1, 16, 6, 6), 4, activation="relu"),
    NormCase("gelu", "another activation", (1, 16, 6, 6), 4, activation="gelu"),
)  # fmt: skip
LAYER_NORM_CASES: tuple[NormCase, ...] = (
    NormCase("tokens", "tokens of a transformer", (2, 33, 64)),
    NormCase("tokens_dynamic", "a scale per token", (2, 33, 100), dynamic=True),
    NormCase("tokens_odd", "odd width", (5, 37), zero_point=False),
    NormCase("tokens_film", "adaptive LayerNorm", (3, 9, 48), film=True, affine=False),
    NormCase("tokens_offset", "mean far from 0", (4, 320), offset=1000.0, channel_scale=True),
    NormCase("tokens_one", "one channel", (3, 1)),
    NormCase("tokens_empty", "no tokens", (0, 8)),
)
