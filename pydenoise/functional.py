"""Functional API: the ops under their torch.nn.functional-style names."""

from pydenoise.ops.weighted_conv import weighted_conv1d, weighted_conv2d, weighted_conv3d

__all__ = ["weighted_conv1d", "weighted_conv2d", "weighted_conv3d"]
