"""Numbers of int8 networks: schemes, calibration of float models, and the choice of a scheme for each layer.

Nothing here executes int8; :mod:`pydenoise.nn` and :func:`pydenoise.accelerate` build on it.
"""

from pydenoise.quantization.arguments import Arguments
from pydenoise.quantization.calibrate import calibrate, select_layers
from pydenoise.quantization.calibration import Calibration
from pydenoise.quantization.numbers import (
    decode,
    encode,
    fake_quantize,
    fake_quantize_dynamic,
    range_parameters,
    relative_error,
    snr_db,
)
from pydenoise.quantization.observers import LayerStatistics
from pydenoise.quantization.schemes import PRESETS, Scheme, resolve_scheme
from pydenoise.quantization.search import search_range
from pydenoise.quantization.timesteps import NormalTimesteps, TimestepBuckets, UniformTimesteps, bucket_of
from pydenoise.quantization.weights import quantize_weight

__all__ = [
    "PRESETS",
    "Arguments",
    "Calibration",
    "LayerStatistics",
    "NormalTimesteps",
    "Scheme",
    "TimestepBuckets",
    "UniformTimesteps",
    "bucket_of",
    "calibrate",
    "decode",
    "encode",
    "fake_quantize",
    "fake_quantize_dynamic",
    "quantize_weight",
    "range_parameters",
    "relative_error",
    "resolve_scheme",
    "search_range",
    "select_layers",
    "snr_db",
]
