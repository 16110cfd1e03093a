"""Cases of the op ``softmax_aggregate``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import softmax_aggregate
from pydenoise.testing.policy import arrange


@dataclass(frozen=True)
class AggregateCase:
    """One call and the reason why it is in the table."""

    name: str
    why: str
    maps: int
    channels: int
    size: tuple[int, int]
    depth: int | None = 128  # channels of hidden; None: logits that are ready
    batch: int = 2
    layout: str = "contiguous"  # of features; see _features
    hidden: str = "contiguous"  # of hidden: contiguous, channels_last, sliced
    spread: float = 1.0  # of the logits

    def features(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """[B, N, C, h, w], drawn in float64."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.maps, self.channels, *self.size)
        return _laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device), self.layout)

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        """(features, hidden, weight)."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        features = self.features(dtype, device)
        if self.depth is None:
            hidden, weight = draw(self.batch, self.maps, *self.size) * self.spread, None
        else:
            hidden = draw(self.batch, self.depth, *self.size)
            weight = (draw(self.maps, self.depth) * (self.spread / self.depth**0.5)).to(dtype).to(device)
        return features, arrange(hidden.to(dtype).to(device), self.hidden), weight

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments."""
        return softmax_aggregate.prepare(*self.tensors(dtype, device))

    def grads(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Gradients of the result and of the shares."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.batch, self.channels, *self.size)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        shape = (self.batch, self.maps, *self.size)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return grad, torch.randn(shape, generator=generator, dtype=torch.float64).to(wide).to(device)


def _laid_out(features: Tensor, layout: str) -> Tensor:
    """The values in another arrangement of memory.

    "maps_first": [N, B, ...], as N networks one after the other write them. "channels_last": pixel by pixel, the maps
    far apart. "grouped": channels of all maps adjacent, as a grouped convolution in channels_last memory writes them.
    "cropped": a part of a larger channels_last image. "sliced": every second pixel.
    """
    batch, maps, channels, height, width = features.shape
    if layout == "contiguous":
        return features
    if layout == "maps_first":
        return features.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last":
        return features.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
    if layout == "grouped":
        return features.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    if layout == "cropped":
        wide = features.new_full((batch, maps, height, width + 3, channels), torch.nan)
        wide[:, :, :, 1 : width + 1] = features.permute(0, 1, 3, 4, 2)
        return wide[:, :, :, 1 : width + 1].permute(0, 1, 4, 2, 3)
    return arrange(features, layout)


AGGREGATE_CASES: tuple[AggregateCase, ...] = (
    AggregateCase("usual", "three maps, pixels of several tiles", 3, 20, (24, 24)),
    AggregateCase("two", "two maps", 2, 33, (8, 8), 64),
    AggregateCase("four", "four maps, odd planes", 4, 12, (7, 9), 31),
    AggregateCase("one", "a single map: its own average", 1, 5, (6, 6), 8),
    AggregateCase("many", "more maps than there are kernels for", 7, 9, (5, 6), 20),
    AggregateCase("logits", "logits that are ready", 3, 16, (9, 15), None, spread=4.0),
    AggregateCase("sharp", "a softmax that picks one map", 3, 8, (11, 5), 40, spread=60.0),
    AggregateCase("flat", "all logits equal: the plain average", 4, 8, (6, 10), 32, spread=0.0),
    AggregateCase("deep", "long sums over hidden and over channels", 2, 700, (3, 19), 1100),
    AggregateCase("pixel", "one pixel", 3, 40, (1, 1), 24),
    AggregateCase("channel", "one channel", 3, 1, (17, 6), 24, layout="sliced"),
    AggregateCase("column", "one column", 2, 6, (40, 1), 10),
    AggregateCase("large", "the last tile of a plane is short", 2, 4, (33, 40), 12),
    AggregateCase("rows", "channels_last", 3, 48, (8, 9), 128, layout="channels_last", hidden="channels_last"),
    AggregateCase("grouped", "channels_last, odd channels, maps within a pixel", 3, 37, (7, 6), 21, layout="grouped"),
    AggregateCase("mixed", "features in planes, hidden in rows", 2, 10, (6, 7), 19, hidden="channels_last"),
    AggregateCase("mixed_logits", "logits in rows", 3, 10, (6, 7), None, layout="grouped", hidden="channels_last"),
    AggregateCase("maps_first", "one network after the other", 3, 18, (8, 8), 32, layout="maps_first"),
    AggregateCase("cropped", "rows of pixels that do not join", 3, 18, (8, 5), 32, layout="cropped", hidden="sliced"),
    AggregateCase("sliced", "no adjacent pixels or channels", 3, 10, (4, 9), 16, layout="sliced", hidden="sliced"),
    AggregateCase("empty", "an empty batch", 3, 10, (4, 4), 16, batch=0),
)
