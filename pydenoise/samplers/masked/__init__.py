"""Masked-diffusion language models: generation by filling in masked tokens."""

from pydenoise.samplers.masked.result import Generation, StepInfo
from pydenoise.samplers.masked.semi_autoregressive import SemiAutoregressive, generate, transfer_counts
from pydenoise.samplers.masked.variable_length import VariableLength

__all__ = ["Generation", "SemiAutoregressive", "StepInfo", "VariableLength", "generate", "transfer_counts"]
