"""FeatureAggregator: N feature maps joined to one, with weights of each pixel that a small network finds.

Source: the spatial aware block-wise (SABW) aggregator of Wang et al., "Ensembling Diffusion Models via Adaptive Feature
Aggregation", ICLR 2025, https://arxiv.org/abs/2405.17082.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

import pydenoise.functional as PF

GROUPS = 32  # of the group norms, where they divide the channels
FEED_FORWARD = 4  # width of the feed-forward part, in multiples of the channels


def _groups(channels: int) -> int:
    return math.gcd(GROUPS, channels)


class _Residual(nn.Module):
    """Two 3x3 convolutions and the embedding between them."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(_groups(channels), channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.embedding = nn.Linear(embedding, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.embedding(F.silu(embedding))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    """Of tokens to ``context``, or to themselves."""

    def __init__(self, channels: int, heads: int, context: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(context or channels, 2 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        kv = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(x), *kv))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Transformer(nn.Module):
    """One layer over the pixels: self-attention, attention to a text if there is one, and a gated feed-forward part."""

    def __init__(self, channels: int, heads: int, text: int | None):
        super().__init__()
        self.norm = nn.GroupNorm(_groups(channels), channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.norm1, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = _Attention(channels, heads)
        self.norm2 = self.cross = None
        if text is not None:
            self.norm2, self.cross = nn.LayerNorm(channels), _Attention(channels, heads, text)
        self.gate = nn.Linear(channels, 2 * FEED_FORWARD * channels)
        self.out = nn.Linear(FEED_FORWARD * channels, channels)

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        h = h + self.attention(self.norm1(h))
        if self.cross is not None:
            h = h + self.cross(self.norm2(h), text)
        value, gate = self.gate(self.norm3(h)).chunk(2, dim=-1)
        h = self.proj_out(h + self.out(value * F.gelu(gate)))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class FeatureAggregator(nn.Module):
    """Join the feature maps of N networks: a softmax over the networks at every pixel, and the weighted sum.

    A 1x1 convolution of all maps, a residual block that is told the time, one transformer layer, and logits by a 1x1
    convolution without bias that begins at zero: at first the result is the plain average.

    Args:
        maps: N. channels: C, of each map. embedding: length of the time embedding.
        hidden: channels of the layers between, a multiple of ``heads``.
        text: width of a text's tokens, which the pixels attend to; ``None``: no text.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.

    Source: Wang et al. (2025), the SABW aggregator.
    """

    def __init__(
        self, maps: int, channels: int, embedding: int, *, hidden: int = 128, heads: int = 8, text: int | None = None
    ):
        super().__init__()
        numbers = {"maps": maps, "channels": channels, "embedding": embedding, "hidden": hidden, "heads": heads}
        for name, value in (numbers if text is None else {**numbers, "text": text}).items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if hidden % heads:
            raise ValueError(f"hidden: expected a multiple of heads = {heads}, got {hidden}")
        self.maps, self.channels, self.text = maps, channels, text
        self.conv_in = nn.Conv2d(maps * channels, hidden, 1)
        self.residual = _Residual(hidden, embedding)
        self.transformer = _Transformer(hidden, heads, text)
        self.logits = nn.Conv2d(hidden, maps, 1, bias=False)
        nn.init.zeros_(self.logits.weight)

    def forward(self, features: Tensor, embedding: Tensor, text: Tensor | None = None) -> Tensor:
        """The joined map.

        Args:
            features: [B, N, C, h, w]; embedding: [B, E], such as the mean of the networks' own.
            text: [B, L, D], for an aggregator that was made with ``text``.

        Returns:
            [B, C, h, w], laid out as ``features``.
        """
        if features.dim() != 5 or tuple(features.shape[1:3]) != (self.maps, self.channels):
            raise ValueError(
                f"features: expected [B, {self.maps}, {self.channels}, h, w], got shape {tuple(features.shape)}"
            )
        if (text is None) != (self.text is None):
            raise ValueError(f"text: expected {'none' if self.text is None else 'a text'}, as the aggregator was made")
        h = self.residual(self.conv_in(features.flatten(1, 2)), embedding)
        return PF.softmax_aggregate(features, self.transformer(h, text), self.logits.weight)

    def extra_repr(self) -> str:
        return f"maps={self.maps}, channels={self.channels}"
