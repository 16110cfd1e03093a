"""Int8Upsample2D and Int8Downsample2D: the resampling layers of U-Nets with their convolutions in int8."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.nn._blocks import Int8Block, check_attributes, conv_layer, run_conv
from pydenoise.nn._plans import Plans

_BOTTOM_RIGHT = ((0, 1), (0, 1))


class Int8Upsample2D(Int8Block):
    """Nearest upsampling by 2 and a convolution, which reads each small pixel four times: nothing is enlarged first.

    Made by :meth:`from_float`.
    """

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    @classmethod
    def from_float(cls, block: nn.Module, plans: Plans = "per_pixel") -> "Int8Upsample2D":
        """Of diffusers' ``Upsample2D``, or a module with its attributes, that has a convolution.

        Args:
            plans: how the convolution, "conv" (or "Conv2d_0"), is quantized; see :meth:`Int8ResnetBlock.from_float`.

        Raises:
            TypeError, ValueError: another module, or an option that has no int8 form; the message names it.
        """
        name, conv = _conv_of(block, "diffusers' Upsample2D")
        if getattr(block, "use_conv_transpose", False):
            raise ValueError("use_conv_transpose: expected nearest upsampling, got a transposed convolution")
        if not getattr(block, "interpolate", True):
            raise ValueError("interpolate: expected True; without it the block is a plain convolution")
        return cls(conv_layer(conv, plans, name))

    def forward(self, hidden_states: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """``hidden_states`` [N, C, H, W]; [N, C_out, 2 H, 2 W] in its dtype and channels_last memory.

        Another ``output_size`` (H', W') than (2 H, 2 W) enlarges the image first.
        """
        self.check(hidden_states)
        twice = tuple(2 * n for n in hidden_states.shape[2:])
        if output_size is None or tuple(output_size) == twice:
            return run_conv(self.conv, hidden_states, hidden_states.dtype, upsample=2)
        enlarged = F.interpolate(hidden_states, size=tuple(output_size), mode="nearest")
        return run_conv(self.conv, enlarged, hidden_states.dtype)


class Int8Downsample2D(Int8Block):
    """A convolution with stride 2, padded at all sides or only below and at the right; made by :meth:`from_float`."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    @classmethod
    def from_float(cls, block: nn.Module, plans: Plans = "per_pixel") -> "Int8Downsample2D":
        """Of diffusers' ``Downsample2D``, or a module with its attributes, that has a convolution.

        Its ``padding=0`` means zeros below and at the right.

        Args:
            plans: how the convolution, "conv" (or "Conv2d_0"), is quantized; see :meth:`Int8ResnetBlock.from_float`.

        Raises:
            TypeError, ValueError: another module, or an option that has no int8 form; the message names it.
        """
        name, conv = _conv_of(block, "diffusers' Downsample2D")
        asymmetric = getattr(block, "padding", None) == 0
        return cls(conv_layer(conv, plans, name, padding=_BOTTOM_RIGHT if asymmetric else None))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` [N, C, H, W]; about half its size, in its dtype and channels_last memory."""
        self.check(hidden_states)
        return run_conv(self.conv, hidden_states, hidden_states.dtype)


def _conv_of(block: nn.Module, expected: str) -> tuple[str, nn.Module]:
    """(name, convolution) of a resampling block."""
    check_attributes(block, ("use_conv",), expected)
    if not block.use_conv:
        raise ValueError("use_conv: expected a block with a convolution; without one there is nothing to quantize")
    if getattr(block, "norm", None) is not None:
        raise ValueError(f"norm: expected None, got {type(block.norm).__name__}")
    for name in ("conv", "Conv2d_0"):
        if getattr(block, name, None) is not None:
            return name, getattr(block, name)
    raise TypeError(f"block: expected {expected}, got {type(block).__name__} without 'conv'")
