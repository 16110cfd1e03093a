"""What a calibration learns of each layer's input: ranges of its channels, and samples of it, per timestep bucket."""

import math
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pydenoise.quantization.reservoir import Reservoir

SAMPLE_ELEMENTS = 1 << 19  # numbers kept of one layer: 2 MiB
_MORE_PIXELS, _MOST_TOKENS, _MOST_CROPS = 5, 32, 32  # a patch is so much larger than the kernel


def kind_of(module: nn.Module) -> str | None:
    """ "conv2d" or "linear" for a layer that can be quantized, else ``None``."""
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    return "linear" if isinstance(module, nn.Linear) else None


class LayerStatistics:
    """Statistics of one layer's input.

    Attributes:
        name, kind: the module's name; "conv2d" or "linear".
        channels: C, of the input. extent: pixels (rows, columns) that one output pixel of a convolution reads.
        calls: how often the layer was called.
        counts: int64 [buckets]: images or rows of the batch seen.
        channel_low, channel_high: float32 [buckets, C], the range of each channel; inf and -inf where nothing was seen.
        reservoir: samples: patches [C, h, w] of convolutions' inputs, [tokens, C] of linear layers'; float32, CPU.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        channels: int,
        extent: tuple[int, int] = (1, 1),
        buckets: int = 1,
        sample_elements: int = SAMPLE_ELEMENTS,
        seed: int = 0,
    ):
        self.name, self.kind, self.channels, self.extent = name, kind, channels, extent
        self.calls = 0
        self.counts = torch.zeros(buckets, dtype=torch.int64)
        self.channel_low = torch.full((buckets, channels), math.inf)
        self.channel_high = torch.full((buckets, channels), -math.inf)
        self.reservoir: Reservoir | None = None
        self._size: tuple[int, int] = (1, 1)  # of a patch, or (tokens, 1)
        self._sample_elements, self._seed = sample_elements, seed

    @classmethod
    def of(cls, name: str, module: nn.Module, buckets: int, sample_elements: int, seed: int) -> "LayerStatistics":
        """Empty statistics of a layer. Raises ``TypeError`` for a module that is no convolution or linear layer."""
        kind = kind_of(module)
        if kind is None:
            raise TypeError(f"{name}: expected a Conv2d or Linear, got {type(module).__name__}")
        if kind == "linear":
            return cls(name, kind, module.in_features, (1, 1), buckets, sample_elements, seed)
        extent = tuple(d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True))
        return cls(name, kind, module.in_channels, extent, buckets, sample_elements, seed)

    # ------------------------------------------------------------------------------------------------- collecting

    def observe(self, x: Tensor, buckets: Tensor) -> None:
        """Take in one input, [N, C, H, W] or [..., C].

        Args:
            x: fp32, bf16, fp16 or float64. buckets: int64 [n] on the CPU: one for each row of the batch, or all alike.

        Raises:
            ValueError: NaN or infinity, another number of channels, or buckets that do not fit the batch.
        """
        x = x.detach()
        if self.kind == "conv2d" and x.dim() == 3:
            x = x.unsqueeze(0)
        if self.kind == "linear" and x.dim() == 1:
            x = x.unsqueeze(0)
        dim = 1 if self.kind == "conv2d" else x.dim() - 1
        if x.shape[dim] != self.channels:
            raise ValueError(f"{self.name}: expected an input of {self.channels} channels, got {list(x.shape)}")
        self.calls += 1
        if x.numel() == 0:
            return
        groups = self._groups(x, buckets)
        for bucket, rows in groups:
            part = x if rows is None else x[rows]
            self._take_range(bucket, part, dim)
            self._take_samples(bucket, part)
            self.counts[bucket] += part.shape[0]

    def _groups(self, x: Tensor, buckets: Tensor) -> list[tuple[int, Tensor | None]]:
        present = buckets.unique().tolist()
        if len(present) == 1:
            return [(present[0], None)]
        if buckets.shape[0] != x.shape[0]:
            raise ValueError(
                f"batches: the input of layer {self.name!r} has {x.shape[0]} rows and the batch {buckets.shape[0]} "
                "timesteps, so they cannot be told apart there; give batches of one timestep each"
            )
        return [(bucket, (buckets == bucket).nonzero().flatten().to(x.device)) for bucket in present]

    def _take_range(self, bucket: int, x: Tensor, dim: int) -> None:
        others = [d for d in range(x.dim()) if d != dim]
        low, high = (end.float().cpu() for end in (x.amin(others), x.amax(others)))
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            what = "NaN" if torch.isnan(low).any() or torch.isnan(high).any() else "infinity"
            raise ValueError(f"batches: the input of layer {self.name!r} holds {what}")
        self.channel_low[bucket] = torch.minimum(self.channel_low[bucket], low)
        self.channel_high[bucket] = torch.maximum(self.channel_high[bucket], high)

    def _take_samples(self, bucket: int, x: Tensor) -> None:
        if self.reservoir is None:
            self._plan_samples(x)
        offer = self._offer_patches if self.kind == "conv2d" else self._offer_tokens
        for row in x:
            offer(bucket, row)

    def _plan_samples(self, x: Tensor) -> None:
        """Sizes from the first input: small samples, of which many fit; at least four a bucket if the room allows."""
        buckets = len(self.counts)
        room = max(1, self._sample_elements // (4 * buckets * self.channels))
        if self.kind == "conv2d":
            side = math.isqrt(room)
            self._size = tuple(
                min(e + max(1, min(side - e, _MORE_PIXELS)), n) for e, n in zip(self.extent, x.shape[2:], strict=True)
            )
        else:
            tokens = math.prod(x.shape[1:-1])
            self._size = (max(1, min(room, _MOST_TOKENS, tokens)), 1)
        elements = self.channels * self._size[0] * self._size[1]
        self.reservoir = Reservoir(buckets, max(1, self._sample_elements // (buckets * elements)), self._seed)

    def _offer_patches(self, bucket: int, image: Tensor) -> None:
        height, width = (min(size, n) for size, n in zip(self._size, image.shape[1:], strict=True))
        crops = min(_MOST_CROPS, max(1, image.shape[1] * image.shape[2] // (height * width)))
        for _ in range(crops):
            top = self.reservoir.draw(image.shape[1] - height + 1)
            left = self.reservoir.draw(image.shape[2] - width + 1)
            patch = image[:, top : top + height, left : left + width]
            self.reservoir.offer(bucket, lambda patch=patch: patch.float().cpu().clone())

    def _offer_tokens(self, bucket: int, row: Tensor) -> None:
        tokens = row.reshape(-1, self.channels)
        count = min(self._size[0], tokens.shape[0])

        step = tokens.shape[0] // count

        def make() -> Tensor:  # tokens at equal distances, from a drawn start
            return tokens[self.reservoir.draw(step) :: step][:count].float().cpu().clone()

        for _ in range(min(_MOST_CROPS, step)):
            self.reservoir.offer(bucket, make)

    # ---------------------------------------------------------------------------------------------------- reading

    @property
    def seen(self) -> Tensor:
        """bool [buckets]: where anything was seen."""
        return self.counts > 0

    @property
    def low(self) -> Tensor:
        """float32 [buckets]: the least value; inf where nothing was seen."""
        return self.channel_low.amin(1)

    @property
    def high(self) -> Tensor:
        """float32 [buckets]: the largest value; -inf where nothing was seen."""
        return self.channel_high.amax(1)

    @property
    def channel_amax(self) -> Tensor:
        """float32 [C]: the largest magnitude of each channel over all buckets."""
        seen = self.seen
        return torch.maximum(-self.channel_low[seen].amin(0), self.channel_high[seen].amax(0))

    @property
    def is_constant(self) -> bool:
        """Whether the input was one and the same number everywhere."""
        return bool(self.seen.any()) and bool(self.low.min() == self.high.max())

    def samples(self, bucket: int) -> list[Tensor]:
        """The samples of one bucket."""
        return self.reservoir.items[bucket] if self.reservoir is not None else []

    def slice_channels(self, start: int, stop: int) -> "LayerStatistics":
        """Statistics of the channels ``start`` .. ``stop`` - 1 alone: for an input that is two tensors concatenated,
        each with a scale of its own (Q-Diffusion's split shortcut quantization)."""
        if not 0 <= start < stop <= self.channels:
            raise ValueError(f"start, stop: expected a range of 0..{self.channels}, got {start}..{stop}")
        part = LayerStatistics(self.name, self.kind, stop - start, self.extent, len(self.counts))
        part.calls, part.counts = self.calls, self.counts.clone()
        part.channel_low = self.channel_low[:, start:stop].clone()
        part.channel_high = self.channel_high[:, start:stop].clone()
        if self.reservoir is not None:
            part.reservoir = Reservoir(len(self.counts), self.reservoir.capacity)
            part.reservoir.seen = list(self.reservoir.seen)
            dim = 0 if self.kind == "conv2d" else -1
            part.reservoir.items = [
                [item.narrow(dim, start, stop - start) for item in items] for items in self.reservoir.items
            ]
        return part

    def as_linear(self) -> "LayerStatistics":
        """Statistics of a 1x1 convolution's input as those of the linear layer that it is on the pixels."""
        if self.kind == "linear":
            return self
        if self.extent != (1, 1):
            raise ValueError(f"{self.name}: expected a 1x1 convolution, got one that reads {self.extent} pixels")
        result = LayerStatistics(self.name, "linear", self.channels, (1, 1), len(self.counts))
        result.calls, result.counts = self.calls, self.counts
        result.channel_low, result.channel_high = self.channel_low, self.channel_high
        if self.reservoir is not None:
            result.reservoir = Reservoir(len(self.counts), self.reservoir.capacity)
            result.reservoir.seen = list(self.reservoir.seen)
            result.reservoir.items = [
                [item.flatten(1).T.contiguous() for item in items] for items in self.reservoir.items
            ]
        return result

    def merged(self, other: "LayerStatistics", seed: int = 0) -> "LayerStatistics":
        """Statistics of what either has seen. Raises ``ValueError`` if they are of different layers or buckets."""
        same = ("name", "kind", "channels", "extent")
        if any(getattr(self, f) != getattr(other, f) for f in same) or len(self.counts) != len(other.counts):
            raise ValueError(f"{self.name}: statistics of different layers or buckets cannot be merged")
        result = LayerStatistics(self.name, self.kind, self.channels, self.extent, len(self.counts))
        result.calls, result.counts = self.calls + other.calls, self.counts + other.counts
        result.channel_low = torch.minimum(self.channel_low, other.channel_low)
        result.channel_high = torch.maximum(self.channel_high, other.channel_high)
        if self.reservoir is None or other.reservoir is None:
            result.reservoir = self.reservoir or other.reservoir
        else:
            result.reservoir = self.reservoir.merged(other.reservoir, seed)
        return result


class Observers:
    """Forward pre-hooks on the layers of a model; they observe only inside :meth:`watching`.

    Use as a context manager: the hooks are gone at its end.
    """

    def __init__(self, layers: Iterable[tuple[nn.Module, LayerStatistics]]):
        self._layers = list(layers)
        self._buckets: Tensor | None = None
        self._handles: list = []

    def __enter__(self) -> "Observers":
        for module, statistics in self._layers:
            self._handles.append(module.register_forward_pre_hook(self._hook(statistics), with_kwargs=True))
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, statistics: LayerStatistics):
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._buckets is not None:
                statistics.observe(args[0] if args else kwargs["input"], self._buckets)

        return observe

    @contextmanager
    def watching(self, buckets: Tensor):
        """Observe the calls inside, whose batch has these timestep buckets."""
        self._buckets = buckets
        try:
            yield
        finally:
            self._buckets = None
