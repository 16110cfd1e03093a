"""Cases of the weighted convolution."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydenoise.testing.policy import arrange


@dataclass(frozen=True)
class ConvCase:
    """One weighted-convolution call and the reason why it is in the table."""

    name: str
    why: str
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    in_channels: int
    out_channels: int
    batch: int = 1
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True
    density: bool = True
    activation: str = "none"
    residual: bool = False
    strides: str = "contiguous"  # contiguous | channels_last | sliced (non-contiguous, with an odd offset)
    relaxed: dict[str, str] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        return len(self.size)

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        """input, weight, density, bias and residual, drawn in float64 and rounded to ``dtype``."""
        from pydenoise.ops._arguments import int_tuple
        from pydenoise.ops.weighted_conv import explicit_padding, output_size

        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

        fan_in = self.in_channels // self.groups * torch.Size(self.kernel).numel()
        weight = draw(self.out_channels, self.in_channels // self.groups, *self.kernel, scale=fan_in**-0.5)
        stride = int_tuple("stride", self.stride, self.dims, minimum=1)
        dilation = int_tuple("dilation", self.dilation, self.dims, minimum=1)
        padding = explicit_padding(self.padding, self.kernel, stride, dilation)
        out = (self.batch, self.out_channels, *output_size(self.size, self.kernel, stride, padding, dilation))
        return {
            "input": arrange(draw(self.batch, self.in_channels, *self.size), self.strides),
            "weight": weight,
            "density": (draw(*self.kernel).abs() + 0.1) if self.density else None,
            "bias": draw(self.out_channels) if self.bias else None,
            "residual": arrange(draw(*out), self.strides) if self.residual else None,
        }

    def options(self) -> dict:
        """Keyword arguments of the functional besides the tensors."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
        }


CONV_CASES: tuple[ConvCase, ...] = (
    ConvCase("plain", "the common layer, all blocks full", (16, 28), (3, 3), 32, 64, padding=1),
    ConvCase(
        "channels_last",
        "no layout change on the way in",
        (15, 17),
        (3, 3),
        32,
        32,
        2,
        padding=1,
        strides="channels_last",
    ),
    ConvCase("odd_channels", "channels not a multiple of any vector width", (9, 31), (3, 3), 19, 37, padding=1),
    ConvCase("wide_tail", "one channel block full, the next nearly empty", (8, 8), (3, 3), 5, 33, padding=1),
    ConvCase("relu_residual", "fused epilogue", (12, 13), (3, 3), 24, 24, padding=1, activation="relu", residual=True),
    ConvCase("silu", "fused epilogue with an exponential", (7, 30), (3, 3), 16, 48, padding=1, activation="silu"),
    ConvCase("gelu", "fused epilogue with erf", (7, 9), (3, 3), 8, 16, padding=1, activation="gelu"),
    ConvCase("gelu_tanh", "fused epilogue with tanh", (7, 9), (3, 3), 8, 16, padding=1, activation="gelu_tanh"),
    ConvCase("softplus", "fused epilogue with a logarithm", (9, 31), (3, 3), 19, 37, padding=1, activation="softplus"),
    ConvCase("leaky", "fused epilogue with a slope", (7, 30), (3, 3), 20, 48, padding=1, activation="leaky_relu_0.1"),
    ConvCase(
        "leaky_residual",
        "another slope, whole tiles, a residual",
        (12, 16),
        (3, 3),
        32,
        32,
        padding=1,
        activation="leaky_relu_0.2",
        residual=True,
    ),
    ConvCase(
        "silu_residual",
        "activation before the residual, not after",
        (6, 6),
        (1, 1),
        8,
        8,
        activation="silu",
        residual=True,
    ),
    ConvCase("pointwise", "1x1: a plain matrix product", (10, 11), (1, 1), 48, 40, 2),
    ConvCase("kernel5", "5x5", (14, 15), (5, 5), 16, 32, padding=2),
    ConvCase("kernel7", "7x7, more padding than half of the row", (9, 6), (7, 7), 8, 24, padding=3),
    ConvCase("kernel3x5", "non-square kernel, one density list per axis", (11, 12), (3, 5), 12, 20, padding=(1, 2)),
    ConvCase("even_kernel", "even kernel with 'same': padding is asymmetric", (9, 10), (4, 2), 8, 16, padding="same"),
    ConvCase(
        "stride2", "stride 2: the input gradient splits into phases", (15, 18), (3, 3), 16, 32, 2, stride=2, padding=1
    ),
    ConvCase(
        "stride3x2", "strides differ per axis, larger than the kernel on one", (13, 17), (2, 3), 8, 16, stride=(3, 2)
    ),
    ConvCase("stride_over_kernel", "input pixels that no output reads", (11, 11), (1, 1), 8, 16, stride=3),
    ConvCase("dilated", "dilation 2", (14, 14), (3, 3), 16, 16, padding=2, dilation=2),
    ConvCase("dilated_far", "dilation larger than the input", (4, 5), (3, 3), 8, 16, padding=6, dilation=6),
    ConvCase(
        "strided_dilated",
        "stride and dilation share a factor: empty phases",
        (12, 12),
        (3, 3),
        8,
        8,
        stride=2,
        padding=2,
        dilation=2,
    ),
    ConvCase("groups", "groups of a few channels", (8, 9), (3, 3), 24, 36, padding=1, groups=3),
    ConvCase("groups_wide", "groups of a full block", (8, 9), (3, 3), 64, 64, padding=1, groups=2),
    ConvCase(
        "depthwise",
        "depthwise, channels not a multiple of the vector width",
        (13, 14),
        (3, 3),
        35,
        35,
        padding=1,
        groups=35,
    ),
    ConvCase(
        "depthwise7", "large depthwise kernel", (12, 20), (7, 7), 32, 32, 2, padding=3, groups=32, activation="silu"
    ),
    ConvCase(
        "depthwise9",
        "a kernel that is split once, odd channels and sizes",
        (13, 19),
        (9, 9),
        35,
        35,
        2,
        padding=4,
        groups=35,
        activation="relu",
        residual=True,
    ),
    ConvCase(
        "depthwise12x8",
        "even kernel, 'same': padding is asymmetric",
        (14, 9),
        (12, 8),
        16,
        16,
        padding="same",
        groups=16,
    ),
    ConvCase(
        "depthwise17",
        "a kernel that is larger than the image",
        (14, 14),
        (17, 17),
        32,
        32,
        2,
        padding=8,
        groups=32,
        activation="silu",
        strides="channels_last",
    ),
    ConvCase(
        "depthwise17_split",
        "a kernel that is split twice along both axes",
        (25, 27),
        (17, 17),
        4,
        4,
        padding=8,
        groups=4,
        activation="gelu",
    ),
    ConvCase(
        "depthwise_wide",
        "several regions of a wide image",
        (6, 140),
        (5, 17),
        8,
        8,
        padding=(2, 8),
        groups=8,
        bias=False,
    ),
    ConvCase("depthwise31", "the largest usual kernel", (6, 40), (31, 31), 16, 16, padding=15, groups=16),
    ConvCase(
        "depthwise31x5", "bands of a separable large kernel", (34, 9), (31, 5), 16, 16, padding=(15, 2), groups=16
    ),
    ConvCase("depthwise13_valid", "a large kernel without padding", (17, 15), (13, 13), 24, 24, groups=24),
    ConvCase("conv1d_depthwise31", "1-D, a large kernel", (77,), (31,), 20, 20, 2, padding=15, groups=20),
    ConvCase("depthwise_stride", "depthwise, stride 2", (12, 13), (3, 3), 16, 16, stride=2, padding=1, groups=16),
    ConvCase("depthwise_multiplier", "channel multiplier 2", (9, 9), (3, 3), 8, 16, padding=1, groups=8),
    ConvCase("first_rgb", "skinny first layer, 3 channels in", (17, 33), (3, 3), 3, 64, padding=1, activation="relu"),
    ConvCase("first_gray", "skinny first layer, 1 channel in", (17, 33), (3, 3), 1, 64, padding=1, activation="relu"),
    ConvCase("last_rgb", "skinny last layer, 3 channels out", (17, 33), (3, 3), 64, 3, padding=1, residual=True),
    ConvCase("last_gray", "skinny last layer, 1 channel out", (17, 33), (3, 3), 64, 1, padding=1),
    ConvCase("last_odd", "skinny last layer, odd channels in", (9, 10), (5, 5), 21, 2, padding=2),
    ConvCase("single_pixel", "1x1 image, every tap but one in the padding", (1, 1), (3, 3), 16, 16, 3, padding=1),
    ConvCase("one_output", "kernel as large as the image", (5, 5), (5, 5), 8, 8),
    ConvCase("empty_batch", "no images: an empty result", (8, 8), (3, 3), 4, 4, 0, padding=1),
    ConvCase(
        "no_bias_no_density", "a plain convolution", (8, 11), (3, 3), 16, 16, padding=1, bias=False, density=False
    ),
    ConvCase(
        "sliced",
        "non-contiguous input and residual",
        (9, 14),
        (3, 3),
        16,
        16,
        padding=1,
        residual=True,
        strides="sliced",
    ),
    ConvCase("deep", "many input channels: several accumulation blocks", (5, 6), (3, 3), 520, 16, padding=1),
    ConvCase("conv1d", "1-D", (37,), (5,), 12, 20, 2, padding=2),
    ConvCase(
        "conv1d_stride",
        "1-D with stride and dilation",
        (41,),
        (3,),
        8,
        16,
        stride=2,
        dilation=3,
        strides="channels_last",
    ),
    ConvCase("conv3d", "3-D", (5, 6, 7), (3, 3, 3), 8, 16, padding=1),
    ConvCase(
        "conv3d_odd",
        "3-D, axes all different",
        (4, 7, 9),
        (1, 3, 2),
        7,
        11,
        2,
        stride=(1, 2, 1),
        padding=(0, 1, 1),
        strides="channels_last",
    ),
    ConvCase("conv3d_depthwise", "3-D depthwise", (4, 5, 6), (3, 3, 3), 16, 16, padding=1, groups=16),
)
