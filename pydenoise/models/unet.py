"""The U-Net of diffusion models in its widely used form: residual blocks that the noise level steers, and attention.

Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021 (the noise level scales and
shifts the second group norm of a block; blocks change the resolution).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
HEAD_DIM = 32
LONGEST_PERIOD = 10000.0  # of the sines that encode the time, in units of 2 pi


class ResBlock(nn.Module):
    """Two convolutions with a skip connection; ``embedding`` scales and shifts the second group norm.

    Args:
        inputs: channels of ``x``, those of ``concat`` included.
        outputs: channels of the result.
        embedding: length of the embedding.
        resample: what changes the resolution, before the first convolution and in the skip connection.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, resample: nn.Module | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.resample = resample or nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor, concat: Tensor | None = None) -> Tensor:
        """``x`` [N, C, H, W]; ``embedding`` [N, E]; ``concat`` [N, inputs - C, H, W]: more channels, behind those of x.

        Returns [N, outputs, H', W'], where ``resample`` makes H' of H.
        """
        if concat is not None:
            x = torch.cat((x, concat), dim=1)
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(self.resample(x)) + h


class Attention(nn.Module):
    """Self-attention between all pixels, with heads of ``HEAD_DIM`` channels; q, k and v are thirds of ``qkv``."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // HEAD_DIM
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, C, H, W]; the result has its shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, HEAD_DIM))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [N, heads, H * W, HEAD_DIM]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))


class Stage(nn.Module):
    """A residual block, attention where the level has it, and an upsampling block at the end of a decoder's level."""

    def __init__(self, block: ResBlock, attention: Attention | None = None, upsample: ResBlock | None = None):
        super().__init__()
        self.block, self.attention, self.upsample = block, attention, upsample

    def forward(self, x: Tensor, embedding: Tensor, concat: Tensor | None = None) -> Tensor:
        x = self.block(x, embedding, concat)
        if self.attention is not None:
            x = self.attention(x)
        if self.upsample is not None:
            x = self.upsample(x, embedding)
        return x


class Middle(nn.Module):
    """Between encoder and decoder: block, attention, block."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.block1 = ResBlock(channels, channels, embedding)
        self.attention = Attention(channels)
        self.block2 = ResBlock(channels, channels, embedding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x, embedding)), embedding)


class DiffusionUNet(nn.Module):
    """Encoder, middle and decoder, told a time and a scalar condition.

    Args:
        channels: image channels.
        base: channels of the finest level, a multiple of 32.
        multipliers: channels of the levels, in multiples of ``base``; every level but the last ends in a halving.
        blocks: residual blocks a level in the encoder; the decoder has one more a level.
        attention_levels: levels with attention, counted from the finest.
    """

    def __init__(
        self,
        channels: int = 1,
        base: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        attention_levels: Sequence[int] = (2,),
    ):
        super().__init__()
        if base < 1 or base % GROUPS:
            raise ValueError(f"base: expected a multiple of {GROUPS}, got {base}")
        self.channels, self.length = channels, 4 * base
        self.align = 2 ** (len(multipliers) - 1)  # height and width are multiples of it
        self.time_embed = nn.Sequential(nn.Linear(base, self.length), nn.SiLU(), nn.Linear(self.length, self.length))
        self.condition_embed = nn.Sequential(nn.Linear(1, self.length), nn.SiLU(), nn.Linear(self.length, self.length))
        exponents = torch.arange(base // 2) * (-math.log(LONGEST_PERIOD) / (base // 2))
        self.register_buffer("frequencies", exponents.exp(), persistent=False)
        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skips = base, [base]  # channels of the last result, and of all that the decoder reads again
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.encoder.append(self._stage(width, base * multiplier, level in attention_levels))
                width = base * multiplier
                skips.append(width)
            if level < len(multipliers) - 1:
                self.encoder.append(Stage(ResBlock(width, width, self.length, nn.AvgPool2d(2))))
                skips.append(width)
        self.middle = Middle(width, self.length)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                stage = self._stage(width + skips.pop(), base * multiplier, level in attention_levels)
                self.decoder.append(stage)
                width = base * multiplier
            if level > 0:
                stage.upsample = ResBlock(width, width, self.length, nn.Upsample(scale_factor=2))
        self.norm_out = nn.GroupNorm(GROUPS, width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def _stage(self, inputs: int, outputs: int, attention: bool) -> Stage:
        return Stage(ResBlock(inputs, outputs, self.length), Attention(outputs) if attention else None)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """``x`` [N, channels, H, W], H and W multiples of ``align``; ``timesteps`` and ``condition`` [N].

        Returns [N, channels, H, W].
        """
        return self.denoise(x, self.embed(x, timesteps, condition))

    def embed(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """All that the blocks are told of a call of ``forward`` besides ``x``: [N, length]."""
        return F.silu(self.embed_time(timesteps) + self.condition_embed(condition[:, None]))

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """``timesteps`` [N]; returns [N, length]."""
        angles = timesteps[:, None] * self.frequencies
        return self.time_embed(torch.cat((angles.cos(), angles.sin()), dim=-1))

    def denoise(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` as in ``forward``; ``embedding`` [N, length]: all that the blocks are told."""
        x = self.conv_in(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for stage in self.decoder:
            x = stage(x, embedding, skips.pop())
        return self.conv_out(F.silu(self.norm_out(x)))
