"""The other implementations of attention in the ``attention`` suite: torch's dense one, and compiled FlexAttention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pydenoise.benchmarks.attention_cases import AttentionBench
from pydenoise.benchmarks.providers import Setting, Skip
from pydenoise.block_mask import BlockMask

SCORES = ("aten::bmm", "aten::matmul", "aten::softmax", "aten::_softmax", "aten::_safe_softmax")


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention, in the kernel that torch takes by itself: on a CPU its flash attention, the fastest it has."""
    return F.scaled_dot_product_attention(query, key, value)


def sdpa_masked(mask: BlockMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense attention with the pattern as a mask of tokens: what one writes without a block-sparse kernel."""
    tokens = mask.to_token_mask()
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=tokens)


def flex(case: AttentionBench, setting: Setting, mask: BlockMask, tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """FlexAttention compiled for this very length, the same blocks as whole blocks without a ``mask_mod``: its fastest.

    Skips with torch's own words where it cannot be compiled, or where the compiled call still computes scores with
    torch's operators.
    """
    if case.training and setting.device == "cpu":
        raise Skip("torch compiles FlexAttention on a CPU for inference only")
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # other lengths would count as recompilations of the same function
    blocks = flex_mask(mask)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=blocks)

    try:
        with torch.inference_mode(not case.training):
            call(*tensors)
            names = operators_of(lambda: call(*tensors))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise Skip(f"FlexAttention does not compile here: {type(error).__name__}: {text}") from error
    eager = sorted(names & set(SCORES))
    if eager or not any("CompiledFxGraph" in name for name in names):
        raise Skip(f"FlexAttention was not compiled: the call runs {', '.join(eager) or 'no compiled graph'}")
    return call


def flex_mask(mask: BlockMask):
    """``mask`` for FlexAttention: all blocks whole, nothing to look up inside them."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    same = mask.to_flex()
    lists = (same.kv_num_blocks, same.kv_indices, same.full_kv_num_blocks, same.full_kv_indices)
    lengths = (mask.query_length, mask.key_length)
    return FlexBlockMask.from_kv_blocks(*lists, BLOCK_SIZE=mask.block_size, seq_lengths=lengths)


def operators_of(call: Callable[[], object]) -> set[str]:
    """The names of what torch's profiler sees in one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events()}
