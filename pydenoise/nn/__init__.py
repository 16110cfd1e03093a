"""Drop-in modules: the constructors and state_dicts of their torch.nn twins."""

from pydenoise.nn.fused_conv import FusedConv1d, FusedConv2d, FusedConv3d
from pydenoise.nn.weighted_conv import WeightedConv1d, WeightedConv2d, WeightedConv3d

__all__ = ["FusedConv1d", "FusedConv2d", "FusedConv3d", "WeightedConv1d", "WeightedConv2d", "WeightedConv3d"]
