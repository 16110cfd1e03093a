"""Functional API: the ops under their torch.nn.functional-style names."""

from pydenoise.ops.adaptive_bilateral_filter import adaptive_bilateral_filter
from pydenoise.ops.attention import attention
from pydenoise.ops.block_importance import block_importance
from pydenoise.ops.block_sparse_attention import block_sparse_attention
from pydenoise.ops.dcls_kernel import dcls_kernel
from pydenoise.ops.int8_conv2d import int8_conv2d
from pydenoise.ops.int8_linear import int8_linear
from pydenoise.ops.norm_quantize import group_norm_silu_quantize, layer_norm_quantize
from pydenoise.ops.ode_stage import ode_combination, ode_stage
from pydenoise.ops.quantize import dequantize, quantize, quantize_dynamic
from pydenoise.ops.routed_norm import RoutedNorm, routed_norm
from pydenoise.ops.sampler_step import Buffers as StepBuffers
from pydenoise.ops.sampler_step import Launcher as StepLauncher
from pydenoise.ops.sampler_step import bind as bind_sampler_step
from pydenoise.ops.sampler_step import sampler_step
from pydenoise.ops.softmax_aggregate import softmax_aggregate
from pydenoise.ops.sparsed_block_mask import sparsed_block_mask
from pydenoise.ops.token_confidence import token_confidence
from pydenoise.ops.wavelet_gate import wavelet_gate_down, wavelet_gate_pool, wavelet_gate_up
from pydenoise.ops.weighted_conv import weighted_conv1d, weighted_conv2d, weighted_conv3d

__all__ = [
    "adaptive_bilateral_filter",
    "attention",
    "block_importance",
    "block_sparse_attention",
    "dcls_kernel",
    "dequantize",
    "group_norm_silu_quantize",
    "int8_conv2d",
    "int8_linear",
    "layer_norm_quantize",
    "ode_combination",
    "ode_stage",
    "quantize",
    "quantize_dynamic",
    "RoutedNorm",
    "routed_norm",
    "softmax_aggregate",
    "sparsed_block_mask",
    "StepBuffers",
    "StepLauncher",
    "bind_sampler_step",
    "sampler_step",
    "token_confidence",
    "wavelet_gate_down",
    "wavelet_gate_pool",
    "wavelet_gate_up",
    "weighted_conv1d",
    "weighted_conv2d",
    "weighted_conv3d",
]
