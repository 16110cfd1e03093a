"""Tensors and masks of the ``attention`` suite's cases, the same for every provider."""

import torch
from torch import Tensor

from pydenoise.benchmarks.attention_cases import AttentionBench, PatternBench
from pydenoise.benchmarks.providers import Contender, Setting, Skip, cpu_only, gpu_only
from pydenoise.block_mask import BlockMask
from pydenoise.ops.registry import BackendUnavailable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw(case: AttentionBench | PatternBench, setting: Setting, precision: str, layout: str) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient, [1, H, L, D].

    ``layout``: "heads" has one head after the other in memory; "projection" are views of one [1, L, 3 H D], as they
    come from a projection.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.length, 3, case.heads, case.head_size)
    fused = torch.randn(shape, generator=generator).to(setting.device, DTYPES[precision])
    qkv = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    grad = torch.randn(1, case.heads, case.length, case.head_size, generator=generator)
    if layout == "heads":
        qkv = [tensor.contiguous() for tensor in qkv]
    return *qkv, grad.to(setting.device, DTYPES[precision])


def mask_of(case: AttentionBench, setting: Setting) -> BlockMask:
    """The case's kept blocks."""
    return BlockMask.from_dense(case.kept_blocks(), case.block_size, case.length, case.length).to(setting.device)


def of_ours(contender: Contender, setting: Setting, backend: str) -> Contender:
    """``contender`` after one call; skips where ``backend`` is not there or does not take the call."""
    (cpu_only if backend == "cpu" else gpu_only)(setting)
    try:
        contender.run()
    except BackendUnavailable as error:
        raise Skip(str(error)) from error
    return contender
