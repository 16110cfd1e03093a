"""Int8AttentionBlock: self-attention over the pixels of an image, its projections in int8.

``group norm + quantize -> q, k and v in one product -> scaled dot product -> quantize -> projection + residual``
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise._native import multiplies_bfloat16
from pydenoise.nn._blocks import (
    Int8Block,
    as_image,
    as_tokens,
    check_attributes,
    group_normed,
    linear_layer,
    run_linear,
)
from pydenoise.nn._frozen import Norm
from pydenoise.nn._plans import Plans
from pydenoise.nn.int8_linear import Int8Linear, joined
from pydenoise.ops._quantized import FLOATS

_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "AttentionProcessor")
_REFUSED = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class AttentionSpec:
    """A float attention block by its parts: what :meth:`Int8AttentionBlock.from_float` reads.

    Attributes:
        norm: GroupNorm. qkv: linear layers or 1x1 convolutions whose outputs, one after the other, are q, k and v, each
            with its heads one after the other. proj: behind the attention.
        heads: of equal size. scale: of the scores, ``None``: 1 / sqrt(head size).
        residual: whether the block's input is added. gain: of the sum.
        names: what plans call the layers of ``qkv``, then ``proj``.
    """

    norm: nn.Module
    qkv: tuple[nn.Module, ...]
    proj: nn.Module
    heads: int
    scale: float | None = None
    residual: bool = True
    gain: float = 1.0
    names: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Int8AttentionBlock(Int8Block):
    """Self-attention over [N, C, H, W] with int8 projections; made by :meth:`from_float`."""

    def __init__(self, spec: AttentionSpec, plans: Plans):
        super().__init__()
        self.heads, self.scale = spec.heads, spec.scale
        self.fast_bfloat16 = multiplies_bfloat16()
        self.residual, self.gain = spec.residual, spec.gain
        self.group_norm = Norm.from_float(spec.norm, "group_norm")
        *names, last = spec.names
        self.to_qkv = linear_layer(joined(spec.qkv, "+".join(names)), plans, tuple(names), normed=True)
        self.to_out = linear_layer(spec.proj, plans, (last,), gain=spec.gain)

    @classmethod
    def from_float(cls, block: nn.Module | AttentionSpec, plans: Plans = "per_token") -> "Int8AttentionBlock":
        """The int8 block of a float one, which stays as it is.

        Args:
            block: diffusers' ``Attention`` with a group norm (UNet2DModel, AutoencoderKL), the one of
                ``pydenoise.models``, or any other as an :class:`AttentionSpec`.
            plans: how "to_q" (for q, k and v, which are one layer) and "to_out.0" are quantized; see
                :meth:`Int8ResnetBlock.from_float`.

        Raises:
            TypeError, ValueError: a block of another kind, or an option that has no int8 form; the message names it.
        """
        return cls(block if isinstance(block, AttentionSpec) else attention_spec(block), plans)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``hidden_states`` [N, C, H, W], float32, bfloat16 or float16; the result has its shape and dtype, in
        channels_last memory.

        Of diffusers' further arguments, the first two must be ``None`` and ``temb`` counts for nothing, as there.
        """
        self.check(hidden_states)
        for name, value in (("encoder_hidden_states", encoder_hidden_states), ("attention_mask", attention_mask)):
            if value is not None:
                raise ValueError(f"{name}: the block attends to all of its own pixels, expected None")
        dtype, (height, width) = hidden_states.dtype, hidden_states.shape[2:]
        x = as_tokens(group_normed(self.to_qkv, self.group_norm, hidden_states, activation="none"))
        qkv = run_linear(self.to_qkv, x, score_dtype(self.to_qkv, dtype, self.fast_bfloat16))
        mixed = attend(qkv.chunk(3, dim=-1), self.heads, self.scale)
        residual = None
        if self.residual:
            residual = as_tokens(hidden_states if self.gain == 1.0 else hidden_states * self.gain)
        return as_image(run_linear(self.to_out, mixed, dtype, residual), height, width)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def score_dtype(layer: nn.Module, dtype: torch.dtype, fast: bool) -> torch.dtype:
    """The dtype of the attention behind the projection ``layer`` in a network of ``dtype``.

    bfloat16 behind an int8 projection where the processor multiplies it (``fast``): its rounding (2**-9) is far below
    the error that the projection's own 8 bits make, and the products are twice as fast.
    """
    if dtype != torch.float32 or not isinstance(layer, Int8Linear):
        return dtype
    return torch.bfloat16 if layer.weight.is_cpu and fast else dtype


def attend(
    projections: tuple[Tensor, Tensor, Tensor], heads: int, scale: float | None, mask: Tensor | None = None
) -> Tensor:
    """Scaled dot product attention of q, k and v, each [N, tokens, heads * size]; the result has q's shape.

    ``mask``: added to the scores, or boolean; broadcasts to [N, heads, tokens of q, tokens of k].

    On the CPU this is ``PF.attention``, which reads the projections as they are and was never slower than torch's
    (bench/notes-attention.md); elsewhere, and where gradients are wanted, torch's.
    """
    if projections[0].is_cpu and projections[0].dtype in FLOATS and not any(t.requires_grad for t in projections):
        return PF.attention(*projections, heads, scale=scale, mask=mask)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projections)
    if q.shape[0] == 0:
        return torch.empty_like(projections[0])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------ float blocks known


def check_attention(attention: nn.Module, name: str = "block") -> None:
    """``attention`` is a diffusers ``Attention`` without parts that int8 blocks lack; ``name`` is for messages."""
    check_attributes(attention, ("to_q", "to_k", "to_v", "to_out", "heads"), "diffusers' Attention")
    for part in _REFUSED:
        if getattr(attention, part, None) is not None:
            raise ValueError(f"{name}.{part}: expected None, got {type(getattr(attention, part)).__name__}")
    if attention.to_q.weight.shape[0] != attention.to_k.weight.shape[0]:
        raise ValueError(f"{name}.kv_heads: expected as many heads of keys as of queries")
    if getattr(attention, "is_causal", False):
        raise ValueError(f"{name}.is_causal: expected False")
    processor = getattr(attention, "processor", None)
    if processor is not None and type(processor).__name__ not in _PROCESSORS:
        raise ValueError(f"{name}.processor: expected diffusers' own, got {type(processor).__name__}")


def attention_spec(block: nn.Module) -> AttentionSpec:
    """The parts of a float attention block of a known kind, told by its attributes.

    Raises:
        TypeError: an unknown kind. ValueError: a known one with an option that has no int8 form.
    """
    if all(hasattr(block, name) for name in ("norm", "qkv", "proj", "heads")):  # pydenoise.models.unet.Attention
        return AttentionSpec(block.norm, (block.qkv,), block.proj, block.heads, names=("qkv", "proj"))
    check_attention(block)
    if block.group_norm is None:
        raise ValueError("block.group_norm: expected a GroupNorm, got None")
    return AttentionSpec(
        block.group_norm, (block.to_q, block.to_k, block.to_v), block.to_out[0], block.heads, block.scale,
        block.residual_connection, 1.0 / block.rescale_output_factor,
    )  # fmt: skip
