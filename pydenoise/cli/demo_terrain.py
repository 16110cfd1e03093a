"""The terrain part of ``pydenoise demo``: the same heightfields sampled from a diffusion U-Net in float and in int8."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SIGMAS = (80.0, 10.0, 2.0, 0.5)
ROUGHNESS = (0.3, 0.8)  # one heightfield each
SIDE = 128  # what the network was trained on
ROUNDS = 3
FLOAT, INT8 = "torch", "pydenoise int8"
FORMATS = ("contiguous", "channels_last")
SEED = 7  # other noise than that on which KEPT was found
# They stay in float: quantized alone, at sigma 80, each of them leaves the output at 31 to 42 dB, and each of the other
# 188 convolutions at 44 dB or more.
KEPT = (
    "unet.encoder.0.block.conv1",
    "unet.encoder.0.block.conv2",
    "unet.encoder.10.block.skip",
    "unet.decoder.23.block.skip",
    "unet.decoder.24.block.conv1",
    "unet.decoder.24.block.skip",
)


@dataclass
class Row:
    """One way of running the network."""

    runner: str
    seconds: float  # of one sampling, median
    speedup: float  # over the faster of torch's two memory formats, median of the ratios within a round
    sample_snr: float | None  # dB: of the heightfields, against float
    step_snr: tuple[float, ...] | None  # dB: of each step's output for the inputs that float sampling has there


def load():
    """The published network; :class:`pydenoise.models.WeightsError` says how to get its weights."""
    from pydenoise.models import TerrainDenoiser
    from pydenoise.models.weights import find_terrain

    return TerrainDenoiser.from_onnx(find_terrain())


def compare_and_draw(model, target: Path, console) -> list[Row]:
    """The table on ``console`` and the picture ``target``."""
    with console.status("") as status:
        rows, images = compare(model, status.update)
    console.print(_table(rows))
    console.print(_footnote())
    draw(images, target)
    return rows


def inputs(seed: int, roughness: tuple[float, ...]):
    """(noise of all steps, condition) of one sampling."""
    import torch

    noise = torch.randn(len(SIGMAS), len(roughness), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return noise, torch.tensor(roughness)


def sample(network: Callable, seed: int, roughness: tuple[float, ...]):
    """The heightfields, and what the network was called with in each step."""
    from pydenoise.models.terrain import consistency_sample

    calls = []

    def watched(*arguments):
        calls.append(tuple(argument.clone() for argument in arguments))
        return network(*arguments)

    noise, condition = inputs(seed, roughness)
    return consistency_sample(watched, SIGMAS, noise=noise, condition=condition), calls


def compare(model, say: Callable[[str], None]) -> tuple[list[Row], tuple]:
    """Rows, and (float, int8) heightfields [N, 1, H, W] of the same noise."""
    from pydenoise.quantization import snr_db

    say("terrain: sampling in float")
    expected, steps = sample(model, SEED, ROUGHNESS)
    runners = {f"{FLOAT} {name}": network for name, network in _formats(model).items()}
    say("terrain: pydenoise.accelerate, precision int8")
    runners[INT8] = accelerated(model, steps[0])
    say(f"terrain: {ROUNDS} rounds of {len(runners)} runners")
    times: dict[str, list[float]] = {label: [] for label in runners}
    for turn in range(ROUNDS):  # interleaved, and in changing order: a busy moment hits all alike
        for label in list(runners) if turn % 2 == 0 else list(runners)[::-1]:
            start = time.perf_counter()
            sample(runners[label], SEED, ROUGHNESS)
            times[label].append(time.perf_counter() - start)
    actual, _ = sample(runners[INT8], SEED, ROUGHNESS)
    baseline = min((label for label in runners if label != INT8), key=lambda label: statistics.median(times[label]))
    rows = []
    for label in runners:
        ratios = [base / own for base, own in zip(times[baseline], times[label], strict=True)]
        snr, each = None, None
        if label == INT8:
            snr = snr_db(expected, actual)
            each = tuple(snr_db(model(*step), runners[INT8](*step)) for step in steps)
        rows.append(Row(label, statistics.median(times[label]), statistics.median(ratios), snr, each))
    return rows, (expected, actual)


def _formats(model) -> dict[str, Callable]:
    import copy

    import torch

    memory = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return {name: copy.deepcopy(model).to(memory_format=memory[name]) for name in FORMATS}


def accelerated(model, example: tuple):
    """``model`` in int8, all but KEPT, with scales per pixel that are computed from each input.

    One calibrated scale for all pixels is faster and much less accurate in this network.
    """
    import pydenoise

    network, _ = pydenoise.accelerate(model, example, "int8", keep=KEPT, measure=False)
    return network


def _table(rows: list[Row]):
    from rich import box
    from rich.table import Table

    title = f"Terrain U-Net: {len(ROUGHNESS)} heightfields of {SIDE} x {SIDE} from noise in {len(SIGMAS)} steps"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold")
    table.add_column("run by", no_wrap=True)
    for heading in ("s", "speed-up", "SNR dB", "SNR dB of each step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        snr = "" if row.sample_snr is None else f"{row.sample_snr:.1f}"
        each = "" if row.step_snr is None else " ".join(f"{value:.1f}" for value in row.step_snr)
        style = "green" if row.runner == INT8 else None
        table.add_row(row.runner, f"{row.seconds:.2f}", f"{row.speedup:.2f}x", snr, each, style=style)
    return table


def _footnote() -> str:
    import torch

    threads = f"{torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"
    levels = ", ".join(f"{sigma:g}" for sigma in SIGMAS)
    return (
        f"Medians of {ROUNDS} interleaved rounds on {threads}. SNR: the energy of float's heightfields over that of "
        f"the difference, from the same noise. Of each step (sigma {levels}): of the network's output for the inputs "
        "that float sampling has there; over a whole sampling differences of earlier steps add up. int8 has scales per "
        f"pixel, computed from each input, without calibration; {len(KEPT)} sensitive layers stay in float."
    )


def draw(images: tuple, target: Path) -> None:
    """A row per heightfield: float | int8 | their difference, in metres."""
    from matplotlib.figure import Figure

    from pydenoise.models.terrain import to_heights

    ours = [to_heights(image)[:, 0].numpy() for image in images]
    figure = Figure(figsize=(11, 3.4 * len(ROUGHNESS)), layout="constrained")
    axes = figure.subplots(len(ROUGHNESS), 3, squeeze=False)
    for row, (level, left, right) in enumerate(zip(ROUGHNESS, *ours, strict=True)):
        low, high = left.min(), left.max()
        difference = right - left
        limit = abs(difference).max() or 1.0
        titles = (f"float, roughness {level:g}", "int8, the same noise", "int8 - float")
        styles = [{"cmap": "terrain", "vmin": low, "vmax": high}] * 2 + [
            {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
        ]
        for axis, values, title, style in zip(axes[row], (left, right, difference), titles, styles, strict=True):
            picture = axis.imshow(values, **style)
            axis.set_title(title)
            axis.set_axis_off()
            figure.colorbar(picture, ax=axis, label="m", shrink=0.8)
    figure.savefig(target, dpi=100)
