"""Drop-in modules (constructors and state_dicts of their torch.nn twins), int8 layers and blocks, SparseD, blocks."""

from pydenoise.nn._plans import Request
from pydenoise.nn.attention_guided_bilateral import AttentionGuidedBilateral, SigmaPredictor, SigmaRegion
from pydenoise.nn.continuous_unet import ContinuousUNet
from pydenoise.nn.dcls_conv import DclsConv1d, DclsConv2d, DclsConv3d
from pydenoise.nn.dcls_loading import DclsLoadReport, load_dcls_state_dict
from pydenoise.nn.dcls_variants import DclsConv2_1d, DclsConv2dK1d, DclsConv3_1d
from pydenoise.nn.dynamic_block import DynamicBlock
from pydenoise.nn.ensemble import Ensemble
from pydenoise.nn.feature_aggregator import FeatureAggregator
from pydenoise.nn.filter2noise_loss import Filter2NoiseLoss
from pydenoise.nn.fused_conv import FusedConv1d, FusedConv2d, FusedConv3d
from pydenoise.nn.int8_attention import AttentionSpec, Int8AttentionBlock
from pydenoise.nn.int8_chain import Int8Chain
from pydenoise.nn.int8_conv2d import Int8Conv2d
from pydenoise.nn.int8_linear import Int8Linear
from pydenoise.nn.int8_resnet import Int8ResnetBlock
from pydenoise.nn.int8_sampling import Int8Downsample2D, Int8Upsample2D
from pydenoise.nn.int8_transformer import Int8Transformer2D, Int8TransformerBlock
from pydenoise.nn.resnet_spec import ResnetSpec
from pydenoise.nn.routed_dit import RoutedDiTBlock
from pydenoise.nn.sparsed_attention import SparseDAttention
from pydenoise.nn.sparsed_report import SparsityReport
from pydenoise.nn.sparsed_schedule import SparseDSchedule
from pydenoise.nn.spectral_loss import SpectralDistillationLoss
from pydenoise.nn.task_routing import Route, TaskRouting
from pydenoise.nn.timestep_scales import TimestepScales
from pydenoise.nn.wavelet_gate import WaveletGateDown, WaveletGateUp
from pydenoise.nn.weighted_conv import WeightedConv1d, WeightedConv2d, WeightedConv3d

__all__ = [
    "AttentionGuidedBilateral",
    "AttentionSpec",
    "ContinuousUNet",
    "DclsConv1d",
    "DclsConv2_1d",
    "DclsConv2d",
    "DclsConv2dK1d",
    "DclsConv3_1d",
    "DclsConv3d",
    "DclsLoadReport",
    "DynamicBlock",
    "Ensemble",
    "FeatureAggregator",
    "Filter2NoiseLoss",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "Int8AttentionBlock",
    "Int8Chain",
    "Int8Conv2d",
    "Int8Downsample2D",
    "Int8Linear",
    "Int8ResnetBlock",
    "Int8Transformer2D",
    "Int8TransformerBlock",
    "Int8Upsample2D",
    "Request",
    "ResnetSpec",
    "Route",
    "RoutedDiTBlock",
    "SigmaPredictor",
    "SigmaRegion",
    "SparseDAttention",
    "SparseDSchedule",
    "SparsityReport",
    "SpectralDistillationLoss",
    "TaskRouting",
    "TimestepScales",
    "WaveletGateDown",
    "WaveletGateUp",
    "WeightedConv1d",
    "WeightedConv2d",
    "WeightedConv3d",
    "load_dcls_state_dict",
]
