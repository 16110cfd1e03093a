"""The decoder blocks of diffusers' U-Nets, without their concatenations."""

import torch
from torch import Tensor, nn

from pydenoise.nn.int8_resnet import Int8ResnetBlock

_FREEU = ("s1", "s2", "b1", "b2")


def is_up_block(module: nn.Module) -> bool:
    """Whether ``module`` is a diffusers block that concatenates skip connections in front of its residual blocks."""
    return type(module).__name__ in ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")


def _with_skip(resnet: nn.Module, hidden_states: Tensor, temb: Tensor | None, skip: Tensor) -> Tensor:
    """``resnet`` on both inputs; one that stayed in float takes them concatenated."""
    if isinstance(resnet, Int8ResnetBlock) and resnet.skip_channels:
        return resnet(hidden_states, temb, skip)
    return resnet(torch.cat([hidden_states, skip], dim=1), temb)


class ConcatFreeUpBlock(nn.Module):
    """Runs the parts of an up block; each residual block reads its skip connection where it lies.

    Takes over the block's children under their names, and the attributes that the U-Net's forward reads. With FreeU
    enabled, which changes what would be concatenated, the block's own forward runs.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.__dict__["_own_forward"] = type(block).forward
        self.resnets, self.upsamplers = block.resnets, block.upsamplers
        self.attentions = getattr(block, "attentions", None)
        self.has_cross_attention = getattr(block, "has_cross_attention", False)
        self.gradient_checkpointing = False
        self.resolution_idx = getattr(block, "resolution_idx", None)
        self.upsample_type = getattr(block, "upsample_type", "conv")
        self.training = block.training

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        upsample_size: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """As diffusers' block of the same name: [N, C, H, W] and its skip connections, the last one first."""
        if all(self.recorded_state()):
            return self._with_freeu(
                hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, cross_attention_kwargs,
                upsample_size, attention_mask, encoder_attention_mask,
            )  # fmt: skip
        for index, resnet in enumerate(self.resnets):
            hidden_states = _with_skip(resnet, hidden_states, temb, res_hidden_states_tuple[-1 - index])
            if self.attentions is None:
                continue
            attention = self.attentions[index]
            if not self.has_cross_attention:
                hidden_states = attention(hidden_states)
                continue
            hidden_states = attention(
                hidden_states, encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs, attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask, return_dict=False,
            )[0]  # fmt: skip
        for upsampler in self.upsamplers or ():
            if self.attentions is not None and self.upsample_type == "resnet":
                hidden_states = upsampler(hidden_states, temb)
            elif upsample_size is None:
                hidden_states = upsampler(hidden_states)
            else:
                hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states

    def recorded_state(self) -> tuple:
        """What a recording of the forward depends on: FreeU's factors, which the U-Net sets and takes away."""
        return tuple(getattr(self, name, None) for name in _FREEU)

    def _with_freeu(self, hidden_states, skips, temb, states, cross_kwargs, upsample_size, mask, states_mask) -> Tensor:
        if self.has_cross_attention:
            return self._own_forward(
                self, hidden_states, skips, temb, states, cross_kwargs, upsample_size, mask, states_mask
            )
        return self._own_forward(self, hidden_states, skips, temb, upsample_size)
