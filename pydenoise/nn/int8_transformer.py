"""Int8TransformerBlock and Int8Transformer2D: the transformers of conditional U-Nets, every product in int8 but q k v.

Each LayerNorm is fused with the quantization of its result, self-attention computes q, k and v in one product,
cross-attention k and v; GEGLU is fused with the quantization of its result, every residual with the product before it.
"""

import torch
from torch import Tensor, nn

from pydenoise._native import multiplies_bfloat16
from pydenoise.nn._blocks import (
    Int8Block,
    as_image,
    as_tokens,
    check_attributes,
    group_normed,
    layer_normed,
    linear_layer,
    run_linear,
)
from pydenoise.nn._frozen import Norm
from pydenoise.nn._int8 import Codes, Int8Layer
from pydenoise.nn._plans import Plans, Within
from pydenoise.nn.int8_attention import attend, check_attention, score_dtype
from pydenoise.nn.int8_linear import Int8Linear, joined
from pydenoise.reference.quantize import transform

_MASKED = -10000.0  # added to the scores of tokens that a mask drops, as diffusers does


class Int8Attention(Int8Block):
    """LayerNorm, attention and residual: a part of :class:`Int8TransformerBlock`."""

    def __init__(self, attention: nn.Module, norm: nn.Module, plans: Plans, name: str, crossed: bool):
        super().__init__()
        check_attention(attention, name)
        if getattr(attention, "group_norm", None) is not None:
            raise ValueError(f"{name}.group_norm: expected None inside a transformer block")
        self.heads, self.scale = attention.heads, attention.scale
        self.fast_bfloat16 = multiplies_bfloat16()
        self.crossed = crossed
        gain = 1.0 / attention.rescale_output_factor
        if gain != 1.0 or attention.residual_connection:
            raise ValueError(f"{name}: expected no residual_connection and no rescale_output_factor of its own")
        self.norm = Norm.from_float(norm, f"{name}'s norm")
        plans = Within(plans, name)
        if crossed:
            self.to_q = linear_layer(attention.to_q, plans, ("to_q",), normed=True)
            self.to_kv = linear_layer(joined((attention.to_k, attention.to_v), name), plans, ("to_k", "to_v"))
        else:
            parts = (attention.to_q, attention.to_k, attention.to_v)
            self.to_qkv = linear_layer(joined(parts, name), plans, ("to_q", "to_k", "to_v"), normed=True)
        self.to_out = linear_layer(attention.to_out[0], plans, ("to_out.0",))

    def key_value(self, encoder_hidden_states: Tensor | Codes, dtype: torch.dtype) -> Tensor:
        """[N, S, 2 * inner]: keys and values of what is attended to, [N, S, C]; the same at every step of a sampler."""
        return run_linear(self.to_kv, encoder_hidden_states, score_dtype(self.to_kv, dtype, self.fast_bfloat16))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Codes | None = None,
        mask: Tensor | None = None,
        key_value: Tensor | None = None,
    ) -> Tensor:
        """``hidden_states + to_out(attention(norm(hidden_states)))``; ``key_value`` as :meth:`key_value` gave it."""
        dtype = hidden_states.dtype
        if self.crossed:
            q = layer_normed(self.to_q, self.norm, hidden_states)
            q = run_linear(self.to_q, q, score_dtype(self.to_q, dtype, self.fast_bfloat16))
            if key_value is None:
                key_value = self.key_value(encoder_hidden_states, dtype)
            parts = (q, *key_value.to(q.dtype).chunk(2, dim=-1))
        else:
            x = layer_normed(self.to_qkv, self.norm, hidden_states)
            parts = run_linear(self.to_qkv, x, score_dtype(self.to_qkv, dtype, self.fast_bfloat16)).chunk(3, dim=-1)
        return run_linear(self.to_out, attend(parts, self.heads, self.scale, mask), dtype, hidden_states)


class Int8FeedForward(Int8Block):
    """LayerNorm, two linear layers and residual: a part of :class:`Int8TransformerBlock`."""

    def __init__(self, feed_forward: nn.Module, norm: nn.Module, plans: Plans):
        super().__init__()
        first, last = feed_forward.net[0], feed_forward.net[2]
        check_attributes(first, ("proj",), "diffusers' GEGLU or GELU")
        self.activation = _feed_forward_activation(first)
        self.norm = Norm.from_float(norm, "norm3")
        self.proj_in = linear_layer(first.proj, plans, ("ff.net.0.proj",), normed=True)
        self.proj_out = linear_layer(last, plans, ("ff.net.2",))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states + proj_out(activation(proj_in(norm(hidden_states))))``."""
        dtype = hidden_states.dtype
        h = run_linear(self.proj_in, layer_normed(self.proj_in, self.norm, hidden_states), dtype)
        if isinstance(self.proj_out, Int8Layer):
            h = self.proj_out.quantize(h, self.activation)
        else:
            h = transform(h, self.activation, None)
        return run_linear(self.proj_out, h, dtype, hidden_states)


class Int8TransformerBlock(Int8Block):
    """Self-attention, cross-attention and feed-forward over tokens [N, T, C]; made by :meth:`from_float`.

    Either attention may be missing or attend to the tokens themselves, as in the float block.
    """

    def __init__(self, block: nn.Module, plans: Plans):
        super().__init__()
        self.attn1 = Int8Attention(block.attn1, block.norm1, plans, "attn1", _is_crossed(block.attn1))
        self.attn2 = None
        if block.attn2 is not None:
            self.attn2 = Int8Attention(block.attn2, block.norm2, plans, "attn2", _is_crossed(block.attn2))
        self.ff = Int8FeedForward(block.ff, block.norm3, plans)

    @classmethod
    def from_float(cls, block: nn.Module, plans: Plans = "per_token") -> "Int8TransformerBlock":
        """The int8 block of diffusers' ``BasicTransformerBlock``, which stays as it is.

        Args:
            plans: how "attn1.to_q" (for q, k and v), "attn1.to_out.0", "attn2.to_q", "attn2.to_k" (for k and v),
                "attn2.to_out.0", "ff.net.0.proj" and "ff.net.2" are quantized; see
                :meth:`Int8ResnetBlock.from_float`.

        Raises:
            TypeError, ValueError: a block of another kind, or an option that has no int8 form (adaptive norms, gated
            attention, positional embeddings, activations other than GEGLU and GELU); the message names it.
        """
        check_attributes(block, ("norm1", "attn1", "attn2", "norm3", "ff"), "diffusers' BasicTransformerBlock")
        kind = getattr(block, "norm_type", "layer_norm")
        if kind != "layer_norm":
            raise ValueError(f"norm_type: expected 'layer_norm', got {kind!r}: adaptive norms have no int8 form yet")
        for name in ("pos_embed", "fuser"):
            if getattr(block, name, None) is not None:
                raise ValueError(f"{name}: expected None, got {type(getattr(block, name)).__name__}")
        return cls(block, plans)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | Codes | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict | None = None,
        *,
        key_value: Tensor | None = None,
    ) -> Tensor:
        """Run the block; the arguments of the float one, of which these count:

        Args:
            hidden_states: [N, T, C], float32, bfloat16 or float16.
            attention_mask, encoder_attention_mask: [N, S], 1 or True keeps a token; or [N, 1, S] or [N, heads, T, S],
                added to the scores (boolean: True keeps).
            encoder_hidden_states: [N, S, C_e], what is attended to; or (codes, scale, zero point) of them.
            key_value: of the cross-attention, as ``attn2.key_value`` gave it, instead of ``encoder_hidden_states``.

        Returns:
            [N, T, C] in the input's dtype.
        """
        self.check(hidden_states, dims=3)
        _check_kwargs(cross_attention_kwargs)
        hidden_states = hidden_states.contiguous()
        self._check_context(encoder_hidden_states, key_value)
        own = score_bias(attention_mask, hidden_states.dtype, "attention_mask")
        other = score_bias(encoder_attention_mask, hidden_states.dtype, "encoder_attention_mask")
        context = encoder_hidden_states
        hidden_states = self.attn1(hidden_states, context if self.attn1.crossed else None, own)
        if self.attn2 is not None:
            hidden_states = self.attn2(hidden_states, context, other, key_value)
        return self.ff(hidden_states)

    def _check_context(self, context: Tensor | Codes | None, key_value: Tensor | None) -> None:
        needs = self.attn1.crossed or (self.attn2 is not None and self.attn2.crossed and key_value is None)
        if needs and context is None:
            raise ValueError("encoder_hidden_states: the block has cross-attention, got None")
        if self.attn2 is not None and not self.attn2.crossed and context is not None:
            raise ValueError("encoder_hidden_states: the block attends to its own tokens only, expected None")


class Int8Transformer2D(Int8Block):
    """Group norm, projection, transformer blocks, projection and residual over images; made by :meth:`from_float`."""

    def __init__(self, model: nn.Module, plans: Plans):
        super().__init__()
        self.norm = Norm.from_float(model.norm, "norm")
        self.proj_in = linear_layer(model.proj_in, plans, ("proj_in",), normed=True)
        self.transformer_blocks = nn.ModuleList(
            Int8TransformerBlock.from_float(block, Within(plans, f"transformer_blocks.{index}"))
            for index, block in enumerate(model.transformer_blocks)
        ).eval()
        self.proj_out = linear_layer(model.proj_out, plans, ("proj_out",))

    @classmethod
    def from_float(cls, model: nn.Module, plans: Plans = "per_token") -> "Int8Transformer2D":
        """The int8 form of diffusers' ``Transformer2DModel`` over continuous images, which stays as it is.

        Args:
            plans: how "proj_in", "proj_out" and "transformer_blocks.<i>.<layer>" are quantized; see
                :meth:`Int8TransformerBlock.from_float`.

        Raises:
            TypeError, ValueError: another module, or an option that has no int8 form; the message names it.
        """
        expected = "diffusers' Transformer2DModel over images"
        check_attributes(model, ("norm", "proj_in", "transformer_blocks", "proj_out"), expected)
        if not getattr(model, "is_input_continuous", True):
            raise ValueError(f"model: expected {expected}, got one over patches or classes")
        return cls(model, plans)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        key_values: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor]:
        """Run the transformer; the arguments of the float one, of which these count:

        Args:
            hidden_states: [N, C, H, W], float32, bfloat16 or float16; channels_last is fastest.
            encoder_hidden_states: [N, S, C_e]. attention_mask, encoder_attention_mask: as in
                :class:`Int8TransformerBlock`.
            key_values: of each block's cross-attention (see :meth:`key_values`), instead of encoder_hidden_states.
            return_dict: ``False`` returns a tuple of one tensor.

        Returns:
            [N, C, H, W] in the input's dtype and channels_last memory.
        """
        self.check(hidden_states)
        _check_kwargs(cross_attention_kwargs)
        dtype, (height, width) = hidden_states.dtype, hidden_states.shape[2:]
        if key_values is None:
            encoder_hidden_states = self._shared_codes(encoder_hidden_states)
        x = as_tokens(group_normed(self.proj_in, self.norm, hidden_states, activation="none"))
        x = run_linear(self.proj_in, x, dtype)
        for index, block in enumerate(self.transformer_blocks):
            x = block(
                x, attention_mask, encoder_hidden_states, encoder_attention_mask,
                key_value=None if key_values is None else key_values[index],
            )  # fmt: skip
        y = as_image(run_linear(self.proj_out, x, dtype, as_tokens(hidden_states)), height, width)
        return (y,) if return_dict is False else y

    def key_values(self, encoder_hidden_states: Tensor) -> list[Tensor]:
        """Keys and values of each block's cross-attention: the same at every step of a sampler."""
        shared, dtype = self._shared_codes(encoder_hidden_states), encoder_hidden_states.dtype
        return [block.attn2.key_value(shared, dtype) for block in self.transformer_blocks]

    def _shared_codes(self, states: Tensor | None) -> Tensor | Codes | None:
        """``states`` quantized once, where all layers that read them do it alike and need nothing else of them."""
        readers = [part for block in self.transformer_blocks for part in (block.attn1, block.attn2)]
        layers = [part.to_kv for part in readers if part is not None and part.crossed]
        if states is None or not layers or not all(_quantizes_plainly(layer) for layer in layers):
            return states
        if any(layer.scheme.symmetric != layers[0].scheme.symmetric for layer in layers):
            return states
        return layers[0].quantize(states)


def _quantizes_plainly(layer: nn.Module) -> bool:
    return isinstance(layer, Int8Linear) and layer.scheme.is_dynamic and layer.channel_scale is None


def score_bias(mask: Tensor | None, dtype: torch.dtype, name: str) -> Tensor | None:
    """``mask`` as what is added to scores [N, heads, T, S]. [N, S] keeps a token where it is not 0."""
    if mask is None:
        return None
    if mask.dim() == 2:
        return ((1 - mask.to(dtype)) * _MASKED)[:, None, None, :]
    if mask.dim() in (3, 4):
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        return mask[:, None] if mask.dim() == 3 else mask
    raise ValueError(f"{name}: expected [N, S], [N, 1, S] or [N, heads, T, S], got {tuple(mask.shape)}")


def _check_kwargs(cross_attention_kwargs: dict | None) -> None:
    """They are meant for processors of the attention, which int8 blocks do not have."""
    if cross_attention_kwargs:
        raise ValueError(f"cross_attention_kwargs: expected none, got {sorted(cross_attention_kwargs)}")


def _is_crossed(attention: nn.Module) -> bool:
    """Whether keys and values come from other states."""
    return bool(getattr(attention, "is_cross_attention", False))


def _feed_forward_activation(layer: nn.Module) -> str:
    """The op's name of the activation of diffusers' GEGLU or GELU."""
    kind = type(layer).__name__
    if kind == "GEGLU":
        return "geglu"
    if kind == "GELU":
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    raise ValueError(f"ff.net.0: expected GEGLU or GELU, got {kind}")
