"""Drop-in modules: the constructors and state_dicts of their torch.nn twins."""

from pydenoise.nn.weighted_conv import WeightedConv1d, WeightedConv2d, WeightedConv3d

__all__ = ["WeightedConv1d", "WeightedConv2d", "WeightedConv3d"]
