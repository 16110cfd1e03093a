"""Cases of the op ``routed_norm``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import routed_norm


@dataclass(frozen=True)
class RoutedNormCase:
    """One call and the reason why it is in the table."""

    name: str
    why: str
    batch: int
    tokens: int
    channels: int
    start: int | tuple[int, ...] | None = None
    width: int | None = None
    compact: bool = False
    updated: bool = False
    random_mask: bool = False
    layout: str = "dense"  # "sliced": a part of wider tokens; "transposed": no adjacent channels; "shared": stride 0
    offset: float = 0.0  # of the values: a mean far from 0

    def _draw(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def _tokens(self, seed: int, dtype: torch.dtype, device: str) -> Tensor:
        x = (self._draw(seed, self.batch, self.tokens, self.channels) * 2 + self.offset).to(dtype).to(device)
        if self.layout == "sliced":
            wide = x.new_full((self.batch, self.tokens, self.channels + 7), torch.nan)
            wide[..., 3 : 3 + self.channels] = x
            return wide[..., 3 : 3 + self.channels]
        if self.layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x[:, :1].expand_as(x) if self.layout == "shared" else x

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, dict]:
        """(input, shift, scale) and the options of the functional."""
        shape = (self.batch, self.channels)
        shift, scale = (self._draw(seed, *shape).to(dtype).to(device) for seed in (1, 2))
        options: dict = {"compact": self.compact}
        if self.start is not None:
            start = self.start if isinstance(self.start, int) else torch.tensor(self.start).to(device)
            options |= {"start": start, "width": self.width}
        if self.random_mask:
            options["mask"] = (self._draw(5, *shape) > 0).to(device)
        if self.updated:
            options["update"] = self._tokens(3, dtype, device)
            options["gate"] = self._draw(4, *shape).to(dtype).to(device)
        return self._tokens(0, dtype, device), shift, scale, options

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments."""
        input, shift, scale, options = self.tensors(dtype, device)
        return routed_norm.prepare(input, shift, scale, **options)

    def backward_args(self, dtype: torch.dtype, device: str = "cpu", full: bool = True) -> tuple:
        """Those of the backward rows; not ``full``: the result alone has a gradient."""
        from pydenoise.reference import routed_norm as reference

        input, mask, update, gate, scale, shift, total, eps = self.args(dtype, device)
        stats = reference.routed_norm(input, mask, update, gate, scale, shift, total, eps)[2]
        grad, carried = (self._draw(seed, *input.shape).to(dtype).to(device) for seed in (6, 7))
        constant = self._draw(8, *input.shape[:2]).to(stats.dtype).to(device)
        given = (carried if full and update is not None else None, constant if full else None)
        return (grad, *given, input, mask, update, gate, scale, stats, total)


ROUTED_NORM_CASES: tuple[RoutedNormCase, ...] = (
    RoutedNormCase("plain", "all channels", 2, 9, 64),
    RoutedNormCase("window", "one window for all", 2, 70, 40, 5, 32),
    RoutedNormCase("windows", "a window for each sample", 3, 5, 37, (0, 7, 3), 30),
    RoutedNormCase("updated", "the second norm of a block", 2, 66, 48, 4, 40, updated=True),
    RoutedNormCase("updated_windows", "with a window for each sample", 3, 11, 33, (1, 0, 8), 25, updated=True),
    RoutedNormCase("updated_plain", "without a mask", 1, 130, 20, updated=True),
    RoutedNormCase("random", "a set of channels for each sample", 3, 7, 50, random_mask=True, updated=True),
    RoutedNormCase("compact", "the window's channels only", 2, 13, 40, 3, 33, compact=True),
    RoutedNormCase("compact_all", "a window of everything", 2, 6, 24, 0, 24, compact=True),
    RoutedNormCase("one", "a single channel", 2, 3, 1, updated=True),
    RoutedNormCase("narrow", "a window of one channel", 2, 4, 19, 18, 1),
    RoutedNormCase("wide", "long sums", 1, 3, 1152, 200, 921, updated=True),
    RoutedNormCase("offset", "a mean far from 0 in all channels", 2, 5, 96, offset=300.0),
    RoutedNormCase("offset_window", "left-out channels far from the mean", 2, 5, 96, 10, 76, compact=True, offset=50.0),
    RoutedNormCase("sliced", "tokens far apart at odd addresses", 2, 6, 35, 2, 28, updated=True, layout="sliced"),
    RoutedNormCase("transposed", "no adjacent channels", 2, 6, 21, 2, 15, updated=True, layout="transposed"),
    RoutedNormCase("shared", "all tokens are one", 2, 6, 32, layout="shared"),
    RoutedNormCase("empty", "an empty batch", 0, 6, 32, 3, 20, updated=True),
    RoutedNormCase("no_tokens", "no tokens", 2, 0, 32, updated=True),
)
