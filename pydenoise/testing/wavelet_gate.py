"""Cases of the gated wavelets; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import wavelet_gate
from pydenoise.testing.policy import arrange


@dataclass(frozen=True)
class WaveletGateCase:
    """One call and the reason why it is in the table; ``size`` is that of the image, also where it is made."""

    name: str
    why: str
    batch: int
    channels: int
    size: tuple[int, int]
    up: bool = False
    per_channel: bool = False
    strides: str = "contiguous"  # contiguous | channels_last | sliced | rows (cut out of wider ones)
    offset: float = 0.0  # of all values
    pool: bool = False  # backward: with a gradient of the mean

    def _draw(self, shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + self.offset
        return x.to(dtype).to(device)

    def _arranged(self, x: Tensor) -> Tensor:
        if self.strides != "rows":
            return arrange(x, self.strides)
        wide = x.new_full((*x.shape[:3], x.shape[3] + 3), torch.nan)
        wide[..., 1 : 1 + x.shape[3]] = x
        return wide[..., 1 : 1 + x.shape[3]]

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(input, gate), the gate between 0 and 1 and in float32."""
        coarse = wavelet_gate.reference.coarse_size(self.size)
        channels = 4 * self.channels if self.up else self.channels
        shape = (self.batch, channels, *(coarse if self.up else self.size))
        gates = (self.batch, 4, self.channels) if self.per_channel else (self.batch, 4)
        gate = self._draw(gates, 1, torch.float64, device).sigmoid()
        return self._arranged(self._draw(shape, 0, dtype, device)), gate.to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The arguments of a forward row."""
        input, gate = self.tensors(dtype, device)
        if self.up:
            return wavelet_gate.prepare_up(input, gate, size=self.size)
        return wavelet_gate.prepare_down(input, gate)

    def backward_args(self, dtype: torch.dtype, device: str = "cpu", mask: tuple[bool, bool] = (True, True)) -> tuple:
        """The arguments of a backward row."""
        input, gate, up, size = self.args(dtype, device)
        grad = self._arranged(self._draw(wavelet_gate.output_shape(input, up, size), 2, dtype, device))
        pool = self._draw(tuple(input.shape[:2]), 3, dtype, device) if self.pool else None
        return grad, input, gate, pool, up, size, list(mask)


def _case(name: str, why: str, *shape, **options) -> tuple[WaveletGateCase, WaveletGateCase]:
    """The case for both directions."""
    return WaveletGateCase(f"down_{name}", why, *shape, **options), WaveletGateCase(
        f"up_{name}", why, *shape, up=True, **options
    )


WAVELET_GATE_CASES: tuple[WaveletGateCase, ...] = (
    *_case("plain", "whole vectors", 2, 8, (32, 64)),
    *_case("last", "adjacent channels", 2, 32, (16, 12), strides="channels_last"),
    *_case("per_channel", "a gate for each channel", 2, 6, (16, 32), per_channel=True),
    *_case("last_per_channel", "the same, adjacent", 2, 20, (6, 8), per_channel=True, strides="channels_last"),
    *_case("odd", "a last row and a last column without partner", 2, 5, (7, 37)),
    *_case("odd_last", "the same, adjacent channels", 2, 19, (5, 7), strides="channels_last", per_channel=True),
    *_case("odd_rows", "only a last row", 1, 4, (9, 16), per_channel=True),
    *_case("odd_columns", "only a last column", 1, 3, (8, 33), strides="channels_last"),
    *_case("narrow", "rows shorter than half a vector", 3, 7, (10, 6), per_channel=True),
    *_case("column", "one column", 2, 3, (6, 1)),
    *_case("column_last", "one column of adjacent channels", 2, 3, (5, 1), strides="channels_last"),
    *_case("pixel", "one pixel", 2, 3, (1, 1), per_channel=True),
    *_case("one_channel", "a single channel", 2, 1, (12, 20), per_channel=True),
    *_case("one_channel_last", "a single channel in channels_last memory", 2, 1, (12, 20), strides="channels_last"),
    *_case("sliced", "columns that are not adjacent", 2, 4, (8, 10), strides="sliced"),
    *_case("rows", "rows at odd addresses between NaN", 2, 4, (8, 34), strides="rows", per_channel=True),
    *_case("parts", "several items a plane, sums of several parts", 1, 2, (300, 270)),
    *_case("parts_last", "several items an image", 1, 24, (70, 62), strides="channels_last", per_channel=True),
    *_case("mean", "a mean that hides the details", 2, 8, (32, 64), offset=100.0),
    *_case("pool", "the gradient of the mean added", 2, 6, (14, 26), pool=True),
    *_case("pool_odd", "the same where a row and a column are alone", 2, 6, (13, 27), pool=True, per_channel=True),
    *_case("pool_last", "the same, adjacent channels", 2, 21, (9, 8), pool=True, strides="channels_last"),
    *_case("empty", "no samples", 0, 4, (8, 8), pool=True),
    *_case("empty_last", "no samples, one gate a channel", 0, 4, (8, 8), per_channel=True, strides="channels_last"),
)  # fmt: skip
