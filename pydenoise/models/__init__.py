"""Denoising networks in plain torch: what ``pydenoise.accelerate`` is shown and measured on."""

from pydenoise.models.cunet import CUNet
from pydenoise.models.digits import DigitsUNet, load_digits
from pydenoise.models.dncnn import DnCNN
from pydenoise.models.ffdnet import FFDNet, load_ffdnet
from pydenoise.models.masked_lm import MaskedLM, load_masked_lm, save_masked_lm
from pydenoise.models.minilm import MiniLM
from pydenoise.models.terrain import TerrainDenoiser
from pydenoise.models.unet import DiffusionUNet
from pydenoise.models.weights import WeightsError

__all__ = [
    "CUNet",
    "DigitsUNet",
    "DiffusionUNet",
    "DnCNN",
    "FFDNet",
    "MaskedLM",
    "MiniLM",
    "TerrainDenoiser",
    "WeightsError",
    "load_digits",
    "load_ffdnet",
    "load_masked_lm",
    "save_masked_lm",
]
