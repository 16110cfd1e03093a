"""Numbers of int8 networks: schemes, calibration of float models, and the choice of a scheme for each layer.

Nothing here executes int8; :mod:`pydenoise.nn` and :func:`pydenoise.accelerate` build on it.
"""

from pydenoise.quantization.arguments import Arguments
from pydenoise.quantization.bias import bias_correction
from pydenoise.quantization.calibrate import calibrate, select_layers
from pydenoise.quantization.calibration import Calibration
from pydenoise.quantization.choose import Decision, Measurement, candidates, choose, choose_layer, measure
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
from pydenoise.quantization.plan import LayerPlan, plan_layer
from pydenoise.quantization.schemes import PRESETS, Scheme, resolve_scheme
from pydenoise.quantization.search import search_range
from pydenoise.quantization.simulation import simulate
from pydenoise.quantization.smoothing import cross_layer_factors, equalize, input_channel_amax, smoothing_factors
from pydenoise.quantization.timesteps import NormalTimesteps, TimestepBuckets, UniformTimesteps, bucket_of
from pydenoise.quantization.trajectories import trajectory_batches
from pydenoise.quantization.weights import quantize_weight

__all__ = [
    "PRESETS",
    "Arguments",
    "Calibration",
    "Decision",
    "LayerPlan",
    "LayerStatistics",
    "Measurement",
    "NormalTimesteps",
    "Scheme",
    "TimestepBuckets",
    "UniformTimesteps",
    "bias_correction",
    "bucket_of",
    "calibrate",
    "candidates",
    "choose",
    "choose_layer",
    "cross_layer_factors",
    "decode",
    "encode",
    "equalize",
    "fake_quantize",
    "fake_quantize_dynamic",
    "input_channel_amax",
    "measure",
    "plan_layer",
    "quantize_weight",
    "range_parameters",
    "relative_error",
    "resolve_scheme",
    "search_range",
    "select_layers",
    "simulate",
    "smoothing_factors",
    "snr_db",
    "trajectory_batches",
]
