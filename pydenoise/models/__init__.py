"""Denoising networks in plain torch: what ``pydenoise.accelerate`` is shown and measured on."""

from pydenoise.models.dncnn import DnCNN
from pydenoise.models.ffdnet import FFDNet, load_ffdnet
from pydenoise.models.weights import WeightsError

__all__ = ["DnCNN", "FFDNet", "WeightsError", "load_ffdnet"]
