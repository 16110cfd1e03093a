"""Cases of the op ``ode_stage``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import ode_stage
from pydenoise.testing.policy import arrange


@dataclass(frozen=True)
class OdeStageCase:
    """One ``ode_stage`` call, or ``ode_combination`` where not ``normalise``, and the reason why it is in the table."""

    name: str
    why: str
    shape: tuple[int, int, int, int]
    slopes: int = 0
    order: str = "augmented"
    drift: float = 0.0
    film: bool = False
    plane: float | None = None
    keep: bool = False
    normalise: bool = True
    offset: float = 0.0  # added to the state: a mean far from 0
    strides: str = "contiguous"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Tensor], Tensor | None]:
        """(state, slopes, film), the same values for every dtype and device."""
        generator = torch.Generator().manual_seed(0)
        n, channels, *size = self.shape

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        gains = draw(1, channels, 1, 1).exp()
        state = (draw(*self.shape) * gains + self.offset).to(dtype)
        width = channels // 2 if self.order == "second" else channels
        slopes = [draw(n, width, *size).to(dtype) for _ in range(self.slopes)]
        film = draw(n, 2 * channels).to(dtype).to(device) if self.film else None
        return arrange(state.to(device), self.strides), [arrange(s.to(device), self.strides) for s in slopes], film

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The positional arguments of the rows."""
        state, slopes, film = self.tensors(dtype, device)
        weights = [0.75, -0.5, 0.25, 1.5][: self.slopes]
        options: dict = {"order": self.order, "drift": self.drift}
        if self.order == "second":
            options["position_weights"] = [0.125, 0.0, -0.375, 0.5][: self.slopes]
        if not self.normalise:
            return ode_stage.prepare_combination(state, slopes, weights, **options)
        options |= {"film": film, "plane": self.plane, "return_point": self.keep}
        return ode_stage.prepare(state, slopes, weights, **options)


ODE_STAGE_CASES = (
    OdeStageCase("norm", "no slopes: an instance norm", (2, 16, 9, 7)),
    OdeStageCase("norm_odd", "channels and pixels that fill no block", (3, 5, 3, 7)),
    OdeStageCase("wide", "several vectors and a rest", (1, 67, 11, 13), slopes=2),
    OdeStageCase("chunks", "an image of several chunks", (2, 32, 48, 40), slopes=3, strides="channels_last"),
    OdeStageCase("many_chunks", "more pixels than chunks hold", (1, 3, 300, 401), slopes=1),
    OdeStageCase("one_slope", "the second stage", (2, 24, 8, 8), slopes=1),
    OdeStageCase("four_slopes", "as many slopes as there may be", (1, 20, 6, 10), slopes=4),
    OdeStageCase("sliced", "memory with gaps is copied", (2, 6, 5, 9), slopes=2, strides="sliced"),
    OdeStageCase("film", "scale and shift of each image", (3, 19, 8, 5), slopes=2, film=True),
    OdeStageCase("plane", "one more channel", (2, 16, 7, 9), slopes=1, plane=0.375),
    OdeStageCase("plane_kept", "one more channel, and the point", (2, 15, 7, 9), slopes=3, plane=-1.0, keep=True),
    OdeStageCase("kept", "the point is wanted too", (2, 18, 12, 11), slopes=2, keep=True),
    OdeStageCase("second", "halves with weights of their own", (2, 32, 9, 10), slopes=3, order="second", drift=0.5),
    OdeStageCase("second_odd", "halves that fill no vector", (2, 10, 6, 7), slopes=2, order="second", drift=1.0,
                 keep=True, film=True, plane=0.5),
    OdeStageCase("drift_only", "order second without slopes: a half stays", (1, 12, 5, 6), order="second", drift=0.25),
    OdeStageCase("second_start", "order second, first stage: nothing is combined", (2, 12, 5, 6), order="second"),
    OdeStageCase("far", "a mean far from 0 beside the deviation", (2, 17, 16, 16), slopes=1, offset=100.0),
    OdeStageCase("pixel", "a single pixel is its own mean", (2, 9, 1, 1), film=True),
    OdeStageCase("end", "the end of a step", (2, 33, 9, 8), slopes=4, normalise=False),
    OdeStageCase("end_second", "likewise, of order second", (2, 14, 9, 8), slopes=3, order="second", drift=1.0,
                 normalise=False),
    OdeStageCase("empty", "no images", (0, 8, 4, 4), slopes=2, film=True, plane=0.5, keep=True),
)  # fmt: skip
