"""The continuous U-Net: a U-Net of diffusion models whose levels are ODEs, with far fewer parameters.

Source: Cheng et al., "The Missing U for Efficient Diffusion Models" (2023), https://arxiv.org/abs/2310.20092. Where the
paper leaves a choice, the published code's is the default.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise import functional as PF
from pydenoise.nn.dynamic_block import DynamicBlock, SoftplusConv2d, _check_count
from pydenoise.ops._arguments import check_choice

TIME_EMBEDDINGS = ("none", "add", "film")
HEADS, HEAD_DIM = 4, 32
FILM_FEATURES = 256
LONGEST_PERIOD = 10000.0  # of the sines that encode the time, in units of 2 pi


class TimeSines(nn.Module):
    """Sines and cosines of a time, [N] to [N, features], sines at the even places.

    Frequency i is ``10000 ** (-4 i / features)``: the published table's, which falls twice as fast as the usual one.
    """

    def __init__(self, features: int, *, device=None, dtype=None):
        super().__init__()
        exponents = torch.arange(features // 2, dtype=torch.float64) * (-4 * math.log(LONGEST_PERIOD) / features)
        self.register_buffer("frequencies", exponents.exp().to(device, dtype or torch.float32), persistent=False)

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class PixelAttention(nn.Module):
    """Attention between all pixels of an image behind an RMS norm over the channels: 4 heads of 32."""

    def __init__(self, channels: int, residual: bool = False, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual = residual
        self.gain = nn.Parameter(torch.ones(channels, **factory))
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_DIM, 1, bias=False, **factory)
        self.proj = nn.Conv2d(HEADS * HEAD_DIM, channels, 1, **factory)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [N, C, H, W]; the result has its shape."""
        n, channels, height, width = input.shape
        x = F.normalize(input, dim=1) * (channels**0.5 * self.gain)[:, None, None]
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, HEADS, HEAD_DIM))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [N, heads, H * W, head dim]
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, HEADS * HEAD_DIM, height, width)
        h = self.proj(h)
        return input + h if self.residual else h


class Transition(nn.Module):
    """To the next level: a 1 x 1 convolution, the time where it is added, softplus."""

    def __init__(self, inputs: int, outputs: int, time_features: int | None, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = SoftplusConv2d(inputs, outputs, 1, **factory)
        self.time = None
        if time_features is not None:
            self.time = nn.Sequential(
                nn.Linear(time_features, outputs, **factory), nn.SiLU(), nn.Linear(outputs, outputs, **factory)
            )

    def forward(self, input: Tensor, time: Tensor | None) -> Tensor:
        if self.time is None:
            return self.conv(input)
        x = F.conv2d(input, self.conv.weight, self.conv.bias)
        return F.softplus(x + self.time(time)[:, :, None, None])


class ContinuousUNet(nn.Module):
    """Predict the noise in images [N, in_channels, H, W] of any size: a dynamic block a level, encoder and decoder.

    The widths are 2, 4, 8, ... times ``n_features``, doubled at each of ``levels`` halvings; with the defaults
    32, 64, 128, 256, 512 and back, 8.56 million parameters and the embedding of the time.

    Args:
        in_channels, out_channels: of images; ``out_channels=None``: as many.
        n_features: the width in front of the first block, halved.
        levels: how often the resolution is halved.
        attention_levels: levels with attention behind their blocks, counted from the finest (0 to ``levels`` - 1) in
            encoder and decoder; ``None``: the deepest one of them.
        attention_residual: add the attention's input to its result; the published code does not.
        time_embedding: "add": every transition adds its own small network's view of the time (the published variant 1);
            "film": the time scales and shifts the second norm of every block (variant 2); "none": the network is told
            no time.
        time_features: length of the sines that encode the time, even.
        classes: number of classes; ``forward`` then takes labels, of which ``null_class`` = ``classes`` stands for
            none. Needs a time embedding.
        order, kernel_size, residual, time_dependent, method, n_steps, recompute: of the blocks
            (:class:`DynamicBlock`).

    Images are padded on the right and below, with their last pixels, to multiples of ``align`` = 2 ** ``levels`` and to
    2 ``align`` at least, so that the deepest level has pixels to take a norm over; the result is cut to their size.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        n_features: int = 16,
        levels: int = 4,
        *,
        attention_levels: Sequence[int] | None = None,
        attention_residual: bool = False,
        time_embedding: str = "add",
        time_features: int = 100,
        classes: int | None = None,
        order: str = "augmented",
        kernel_size: int = 3,
        residual: bool = False,
        time_dependent: bool = False,
        method: str = "rk4_38",
        n_steps: int = 1,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        attention_levels = (levels - 1,) if attention_levels is None else tuple(attention_levels)
        counts = {"in_channels": in_channels, "out_channels": out_channels, "n_features": n_features, "levels": levels}
        for name, value in (counts | ({} if classes is None else {"classes": classes})).items():
            _check_count(name, value)
        check_choice("time_embedding", time_embedding, TIME_EMBEDDINGS)
        _check_count("time_features", time_features)
        if time_features % 2:
            raise ValueError(f"time_features: expected an even number, got {time_features}")
        if any(level not in range(levels) for level in attention_levels):
            raise ValueError(f"attention_levels: expected levels from 0 to {levels - 1}, got {attention_levels}")
        if classes is not None and time_embedding == "none":
            raise ValueError("classes: labels are added to the time's embedding; time_embedding is 'none'")
        factory = {"device": device, "dtype": dtype}
        self.in_channels, self.out_channels, self.levels = in_channels, out_channels, levels
        self.time_embedding, self.classes, self.align = time_embedding, classes, 2**levels
        added = time_features if time_embedding == "add" else None
        film = FILM_FEATURES if time_embedding == "film" else None
        options = {
            "order": order, "kernel_size": kernel_size, "residual": residual, "time_dependent": time_dependent,
            "method": method, "n_steps": n_steps, "recompute": recompute, "film_features": film, **factory,
        }  # fmt: skip

        def attention(level: int) -> nn.Module:
            if level not in attention_levels:
                return nn.Identity()
            return PixelAttention(2**level * 2 * n_features, attention_residual, **factory)

        widths = [2**level * 2 * n_features for level in range(levels + 1)]
        self._embed(time_features, film, classes, factory)
        self.first = SoftplusConv2d(in_channels, n_features, 3, **factory)
        self.second = Transition(n_features, widths[0], added, **factory)
        self.encoder = nn.ModuleList(DynamicBlock(width, **options) for width in widths[:-1])
        self.encoder_attention = nn.ModuleList(map(attention, range(levels)))
        self.down = nn.ModuleList(
            Transition(inputs, outputs, added, **factory)
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        )
        self.middle = DynamicBlock(widths[-1], **options)
        deeper = list(zip(widths[1:], widths[:-1], strict=True))[::-1]  # (width below, own width), deepest first
        self.up = nn.ModuleList(Transition(below + own, own, added, **factory) for below, own in deeper)
        self.decoder = nn.ModuleList(DynamicBlock(own, **options) for _, own in deeper)
        self.decoder_attention = nn.ModuleList(map(attention, reversed(range(levels))))
        self.head = nn.Conv2d(widths[0], out_channels, 1, **factory)

    def _embed(self, features: int, film: int | None, classes: int | None, factory: dict) -> None:
        self.sines = self.time_network = self.class_embedding = None
        if self.time_embedding == "none":
            return
        self.sines = TimeSines(features, **factory)
        if film is not None:
            self.time_network = nn.Sequential(
                nn.Linear(features, film, **factory), nn.SiLU(), nn.Linear(film, film, **factory)
            )
        if classes is not None:
            self.class_embedding = nn.Embedding(classes + 1, features, **factory)

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class."""
        return self.classes

    # ----------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, timesteps: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The noise in ``x``.

        Args:
            x: [N, in_channels, H, W].
            timesteps: [N] or a single one for all, whole or not; needed unless ``time_embedding`` is "none".
            labels: integers [N] from 0 to ``classes``; ``None``: no image has a class.

        Returns:
            [N, out_channels, H, W].
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(f"x: expected [N, {self.in_channels}, H, W], got shape {tuple(x.shape)}")
        time = self._time(x, timesteps, labels)
        added, film = (time, None) if self.time_network is None else (None, self.time_network(time))
        height, width = x.shape[2:]
        x = self._padded(x).contiguous(memory_format=torch.channels_last)
        h = self.second(PF.ode_stage(self.first(PF.ode_stage(x))), added)
        skips = []
        for block, attention, down in zip(self.encoder, self.encoder_attention, self.down, strict=True):
            h = attention(block(h, film))
            skips.append(h)
            h = F.avg_pool2d(down(h, added), 2)  # bilinear halving of even sizes
        h = self.middle(h, film)
        for block, attention, up in zip(self.decoder, self.decoder_attention, self.up, strict=True):
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
            h = up(torch.cat((h, skips.pop()), dim=1), added)
            h = attention(block(h, film))
        return self.head(h)[:, :, :height, :width]

    def _padded(self, x: Tensor) -> Tensor:
        sizes = [max(2 * self.align, -(-size // self.align) * self.align) for size in x.shape[2:]]
        below, right = (size - own for size, own in zip(sizes, x.shape[2:], strict=True))
        return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x

    def _time(self, x: Tensor, timesteps: Tensor | None, labels: Tensor | None) -> Tensor | None:
        count = x.shape[0]
        if self.sines is None:
            if timesteps is not None or labels is not None:
                raise ValueError("timesteps, labels: this network was built with time_embedding='none'")
            return None
        if not isinstance(timesteps, Tensor) or timesteps.shape not in ((), (1,), (count,)):
            got = tuple(timesteps.shape) if isinstance(timesteps, Tensor) else type(timesteps).__name__
            raise ValueError(f"timesteps: expected a tensor [{count}] or a single number, got {got}")
        embedding = self.sines(timesteps.to(x.dtype).expand(count))
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("labels: this network was built without classes")
            return embedding
        if labels is None:
            labels = torch.full((count,), self.classes, device=x.device)
        elif labels.shape != (count,) or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels: expected integers [{count}], got {labels.dtype} {tuple(labels.shape)}")
        return embedding + self.class_embedding(labels)
