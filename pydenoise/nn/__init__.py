"""Drop-in modules: the constructors and state_dicts of their torch.nn twins, and the int8 layers and blocks."""

from pydenoise.nn.fused_conv import FusedConv1d, FusedConv2d, FusedConv3d
from pydenoise.nn.int8_conv2d import Int8Conv2d
from pydenoise.nn.int8_linear import Int8Linear
from pydenoise.nn.weighted_conv import WeightedConv1d, WeightedConv2d, WeightedConv3d

__all__ = [
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "Int8Conv2d",
    "Int8Linear",
    "WeightedConv1d",
    "WeightedConv2d",
    "WeightedConv3d",
]
