"""A stream beside its model alone: frames a second of `Stream`, of `StreamBatch`, and of bare calls of the same batch.

Run: python bench/stream.py [--rounds 7] [--threads N]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pydenoise.models import DiffusionUNet, FFDNet, load_digits
from pydenoise.samplers import NoiseSchedule, SimilarityFilter, Stream, StreamBatch

STAGES = [0, 16, 32, 45]
VP = NoiseSchedule.linear()


class Ramp(torch.nn.Module):
    """FFDNet as a predictor of noise: its noise map is the stage's."""

    def __init__(self):
        super().__init__()
        self.net = FFDNet().eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x - self.net(x, t.to(x.dtype).view(-1, 1, 1, 1) / 1000)


class Unconditional(torch.nn.Module):
    """A U-Net with the same condition for every row."""

    def __init__(self, net: DiffusionUNet):
        super().__init__()
        self.net = net.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, torch.zeros(x.shape[0]))


def cases() -> dict[str, tuple[torch.nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "digits 1x8x8": (load_digits(), (1, 8, 8)),
        "U-Net 1x32x32": (Unconditional(DiffusionUNet(1, 32, (1, 2), 1, (1,))), (1, 32, 32)),
        "FFDNet 3x96x96": (Ramp(), (3, 96, 96)),
    }


@torch.inference_mode()
def alone(model: Callable[..., Tensor], shape: Sequence[int], frames: Tensor) -> float:
    """Seconds for as many calls of the model as there are frames, on a batch of the stages' rows."""
    x, t = torch.randn(len(STAGES), *shape), torch.tensor([999, 679, 359, 99])
    begin = time.perf_counter()
    for _ in range(len(frames) + len(STAGES) - 1):
        model(x, t)
    return time.perf_counter() - begin


def batched(model: Callable[..., Tensor], shape: Sequence[int], frames: Tensor) -> float:
    batch = StreamBatch(model, VP, shape, t_index_list=STAGES, guidance="self-negative", guidance_scale=1.2, seed=0)
    begin = time.perf_counter()
    for frame in [*frames, *frames[: len(STAGES) - 1]]:
        batch.step(frame[None])
    return time.perf_counter() - begin


def streamed(model: Callable[..., Tensor], shape: Sequence[int], frames: Tensor) -> float:
    options = {"t_index_list": STAGES, "guidance": "self-negative", "guidance_scale": 1.2, "seed": 0}
    with Stream(model, VP, shape, **options) as stream:
        begin = time.perf_counter()
        for _ in stream.feed(frames):
            pass
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one round of one contender")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, (model, shape) in cases().items():
        few = torch.rand(20, *shape)
        alone(model, shape, few)
        number = max(20, int(given.seconds / alone(model, shape, few) * 20))
        frames = torch.rand(number, *shape)
        times: dict[str, list[float]] = {"alone": [], "batched": [], "streamed": []}
        for _ in range(given.rounds):  # interleaved: what disturbs one disturbs all
            for contender in (alone, batched, streamed):
                times[contender.__name__].append(contender(model, shape, frames))
        middle = {key: statistics.median(values) for key, values in times.items()}
        ratios = {
            key: statistics.median(b / a for a, b in zip(times["alone"], times[key], strict=True))
            for key in ("batched", "streamed")
        }
        print(
            f"{name:>16}: model alone {number / middle['alone']:8.1f} frames/s; StreamBatch takes "
            f"{ratios['batched']:.3f} of its time, Stream {ratios['streamed']:.3f}"
        )
    model, shape = cases()["digits 1x8x8"]
    still = torch.rand(1, *shape).expand(300, *shape)
    with Stream(model, VP, shape, t_index_list=STAGES, seed=0, similarity=SimilarityFilter(seed=0)) as stream:
        for _ in stream.feed(still):
            pass
        print(f"a still stream of 300 frames: {stream.stats.evaluations} evaluations")


if __name__ == "__main__":
    main()
