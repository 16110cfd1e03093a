"""``pydenoise demo``: pretrained networks with plain torch and with pydenoise, in float and in int8.

Real photographs through FFDNet are compared here, heightfields sampled from a diffusion U-Net in ``demo_terrain``;
``digits`` compares solvers.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydenoise.cli import demo_terrain, digits
from pydenoise.cli.denoise import positive
from pydenoise.cli.pieces import int8_options, noisy_batches
from pydenoise.cli.targets import check_picture_target

PARTS = ("photographs", "terrain", "digits")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
SIGMAS = (25, 50)
# int8 is calibrated on pictures that are not tested: scikit-image's, or the first of several it returns.
CALIBRATION = ("stereo_motorcycle", "rocket", "immunohistochemistry", "retina")
CALIBRATION_SIGMAS = (5, 15, 25, 35, 50)
CALIBRATION_PIECES = 10  # of each picture
BASELINES = ("torch contiguous", "torch channels_last")
SHOWN = ("pydenoise fp32", "pydenoise int8")  # in the picture, beside torch
PANEL = (340, 260)  # width and height that the picture shows of each photograph, at its own resolution
MARGIN = 6
DIGITS_EVALUATIONS, DIGITS_IMAGES = (10,), 2  # images of each class
LABEL = 24


def add_parser(subparsers) -> None:
    """Add the ``demo`` command."""
    parser = subparsers.add_parser(
        "demo",
        help="compare torch and pydenoise, float and int8, and solvers, on pretrained networks",
        description="Denoise three photographs of scikit-image (Gaussian noise, sigma 25 and 50, seeded, not clipped) "
        "with the pretrained colour FFDNet, by plain torch and by pydenoise in fp32, bf16 and int8; int8 is calibrated "
        "on other pictures of scikit-image. Then sample heightfields from the terrain U-Net with the same noise in "
        "float and in int8, and digits with every solver of pydenoise.samplers (`pydenoise sample` does that with more "
        "evaluations). Prints tables and draws the results side by side.",
    )
    add = parser.add_argument
    add("--only", choices=PARTS, help="this part alone (default: all)")
    photographs, terrain, drawn = (Path("demo") / f"{name}.png" for name in ("denoised", "terrain", "digits"))
    add("-o", "--output", type=Path, default=photographs, metavar="OUT", help=f"photographs (default: {photographs})")
    add("--terrain-output", type=Path, default=terrain, metavar="OUT", help=f"heightfields (default: {terrain})")
    add("--digits-output", type=Path, default=drawn, metavar="OUT", help=f"digits (default: {drawn})")
    add("--weights", type=Path, metavar="PATH", help="FFDNet checkpoint (default: the cache; see `pydenoise weights`)")
    add("--rounds", type=positive, default=5, metavar="N", help="interleaved timing rounds of photographs (default: 5)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--json", type=Path, metavar="FILE", help="write the tables as JSON too")
    parser.set_defaults(run=run)


@dataclass
class Row:
    """One photograph at one noise level through one way of running the network."""

    photograph: str
    sigma: int
    runner: str
    psnr: float  # dB
    loss: float  # dB of PSNR below BASELINES' faster one
    milliseconds: float  # median
    speedup: float  # over the faster of BASELINES, median of the ratios within a round
    error: float  # largest absolute difference from float64, pixel values in [0, 1]


def run(args: argparse.Namespace) -> int:
    """Check everything, then run the parts; returns the exit code."""
    from pydenoise.imaging import require
    from pydenoise.models import load_digits, load_ffdnet
    from pydenoise.models.weights import find_ffdnet

    console = require("rich.console", "rich", "the command line").Console(highlight=False)
    require("matplotlib", "matplotlib", "the demo", extra="demo")
    parts = PARTS if args.only is None else (args.only,)
    outputs = {"photographs": args.output, "terrain": args.terrain_output, "digits": args.digits_output}
    models: dict = {}
    if "photographs" in parts:
        models["photographs"] = load_ffdnet(find_ffdnet(args.weights))
    if "terrain" in parts:
        models["terrain"] = demo_terrain.load()
    if "digits" in parts:
        require("sklearn.datasets", "scikit-learn", "judging digits", extra="demo")
        models["digits"] = load_digits()
    for part in parts:
        check_picture_target(outputs[part])
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: dict[str, list] = {}
    with torch.inference_mode():
        if "photographs" in parts:
            rows["photographs"] = _photographs(models["photographs"], args, console)
        if "terrain" in parts:
            rows["terrain"] = demo_terrain.compare_and_draw(models["terrain"], args.terrain_output, console)
        if "digits" in parts:
            rows["digits"] = _digits(models["digits"], args.digits_output, console)
    for part in parts:
        console.print(f"wrote {outputs[part]}", markup=False, soft_wrap=True)
    if args.json is not None:
        tables = {part: [asdict(row) for row in rows[part]] for part in parts}
        args.json.write_text(json.dumps(tables, indent=2) + "\n")
        console.print(f"wrote {args.json}", markup=False, soft_wrap=True)
    return 0


def _digits(model, target: Path, console) -> list[digits.Row]:
    """The table and the picture of the digits."""
    labels = [label for label in range(10) for _ in range(DIGITS_IMAGES)]
    task = digits.Task(labels, seeds=range(len(labels)))
    return digits.compare_and_draw(model, list(digits.solvers()), DIGITS_EVALUATIONS, task, target, console)


def _photographs(model, args: argparse.Namespace, console) -> list["Row"]:
    """The table and the picture of the photographs."""
    import torch

    from pydenoise.imaging import Picture, require, write_picture

    data = require("skimage.data", "scikit-image", "the demo", extra="demo")
    require("PIL.ImageDraw", "Pillow", "the demo", extra="demo")
    rows: list[Row] = []
    panels: list[list] = []
    runners: dict = {}
    with console.status("") as status:
        for name in PHOTOGRAPHS:
            clean = torch.from_numpy(getattr(data, name)()).double().div_(255).permute(2, 0, 1).unsqueeze(0)
            runners = runners or _runners(model, clean.float(), calibration_batches(data), status.update)
            for sigma in SIGMAS:
                status.update(f"{name}, sigma {sigma}: {args.rounds} rounds of {len(runners)} runners, and float64")
                new_rows, images = compare(model, runners, name, clean, sigma, args.rounds)
                rows += new_rows
                panels.append([f"{name}, sigma {sigma}", *images])
    console.print(_table(rows))
    console.print(_footnote(args.rounds))
    write_picture(args.output, Picture(draw_panels(panels)))
    return rows


# ----------------------------------------------------------------------------------------------------------- runners


def calibration_batches(data) -> list[tuple]:
    """FFDNet's inputs of pieces of CALIBRATION's pictures; ``data`` is skimage.data."""
    pictures = [getattr(data, name)() for name in CALIBRATION]
    pictures = [picture[0] if isinstance(picture, tuple) else picture for picture in pictures]
    return list(noisy_batches(pictures, CALIBRATION_SIGMAS, CALIBRATION_PIECES))


def _runners(model, example, batches: list[tuple], say) -> dict:
    """Name -> function of (x, sigma), both float32. Torch in both of its memory formats: which is faster varies.

    ``batches`` calibrate int8.
    """
    import copy

    import torch

    import pydenoise

    level = torch.full((1, 1, 1, 1), 25 / 255)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    runners: dict = {}
    for name, memory_format in formats.items():
        plain = copy.deepcopy(model).to(memory_format=memory_format)
        runners[f"torch {name}"] = _TorchRunner(plain, torch.float32, memory_format)
    narrow = copy.deepcopy(model).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    runners["torch bf16"] = _TorchRunner(narrow, torch.bfloat16, torch.channels_last)
    for precision in ("fp32", "bf16", "int8"):
        say(f"pydenoise.accelerate, precision {precision}")
        options = int8_options(model, batches) if precision == "int8" else {}
        accelerated, _ = pydenoise.accelerate(model, (example, level), precision, measure=False, **options)
        runners[f"pydenoise {precision}"] = accelerated
    for runner in runners.values():
        runner(example, level)
    return runners


class _TorchRunner:
    """Plain torch, eager: the conversions in and out are part of the time, as they are of a user's."""

    def __init__(self, model, dtype, memory_format):
        self.model, self.dtype, self.memory_format = model, dtype, memory_format

    def __call__(self, x, sigma):
        x = x.to(dtype=self.dtype, memory_format=self.memory_format)
        return self.model(x, sigma.to(self.dtype)).float()


def _seconds(runner, x, sigma) -> float:
    start = time.perf_counter()
    runner(x, sigma)
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------------- comparison


def compare(model, runners: dict, name: str, clean, sigma: int, rounds: int) -> tuple[list[Row], list]:
    """Rows of one photograph at one noise level, and for the picture [noisy, torch's result, those of SHOWN].

    ``clean`` [1, 3, H, W] float64 in [0, 1]. The noise is drawn with seed 0 and not clipped: clipping would make it
    another noise than the network was trained for.
    """
    import copy

    import torch

    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = clean + noise * (sigma / 255)
    x, level = noisy.float(), torch.full((1, 1, 1, 1), sigma / 255)
    oracle = copy.deepcopy(model).double()(x.double(), level.double())
    results = {label: runner(x, level).double() for label, runner in runners.items()}
    times: dict[str, list[float]] = {label: [] for label in runners}
    for turn in range(rounds):  # interleaved, and in changing order: a busy moment hits all alike
        labels = list(runners) if turn % 2 == 0 else list(runners)[::-1]
        for label in labels:
            times[label].append(_seconds(runners[label], x, level))
    plain = [label for label in BASELINES if label in runners]
    baseline = min(plain, key=lambda label: statistics.median(times[label]))
    quality = {label: psnr(results[label].clamp(0, 1), clean) for label in runners}
    rows = [
        Row(
            name,
            sigma,
            label,
            quality[label],
            quality[baseline] - quality[label],
            statistics.median(times[label]) * 1e3,
            statistics.median(base / own for base, own in zip(times[baseline], times[label], strict=True)),
            (results[label] - oracle).abs().max().item(),
        )
        for label in runners
    ]
    shown = [baseline, *(label for label in SHOWN if label in runners)]
    return rows, [(noisy, psnr(noisy, clean)), *((results[label], quality[label]) for label in shown)]


def psnr(image, clean) -> float:
    """Peak signal-to-noise ratio in dB, for pixel values in [0, 1]."""
    error = (image - clean).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def _table(rows: list[Row]):
    from rich import box
    from rich.table import Table

    title = "Pretrained colour FFDNet on real photographs"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("photograph", no_wrap=True)
    table.add_column("\N{GREEK SMALL LETTER SIGMA}", justify="right", no_wrap=True)
    table.add_column("run by", no_wrap=True)
    for heading in ("PSNR", "loss", "ms", "speed-up", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        key = (row.photograph, row.sigma)
        if previous not in (None, key):
            table.add_section()
        head = ("", "") if key == previous else (row.photograph, str(row.sigma))
        loss = round(row.loss, 2) + 0.0  # no -0.00
        figures = (f"{row.psnr:.2f}", f"{loss:.2f}", f"{row.milliseconds:.0f}", f"{row.speedup:.2f}x")
        figures = (*figures, f"{row.error:.1e}")
        table.add_row(*head, row.runner, *figures, style="green" if row.runner.startswith("pydenoise") else None)
        previous = key
    return table


def _footnote(rounds: int) -> str:
    import torch

    threads = f"{torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"
    return (
        f"Medians of {rounds} interleaved rounds on {threads}. PSNR in dB. Its loss, and the speed-up: against the "
        "faster of torch's two memory formats in float32 (the row with 1.00x), eager. Error: the largest difference of "
        "any pixel value (they lie in 0 to 1) from the network in float64. int8 was calibrated on other pictures "
        f"(scikit-image's {', '.join(CALIBRATION)}) with noise of sigma {CALIBRATION_SIGMAS[0]} to "
        f"{CALIBRATION_SIGMAS[-1]}."
    )


# ----------------------------------------------------------------------------------------------------------- picture


def draw_panels(panels: list[list]):
    """The picture, [H, W, 3] uint8: a row per photograph and noise level.

    Columns: noisy | torch | for each of pydenoise's: its result, and its difference from torch's, amplified.
    ``panels``: rows of [title, (noisy, dB), (torch's result, dB), (pydenoise's, dB), ...], images [1, 3, H, W].
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    names = SHOWN[: len(panels[0]) - 3]
    factors = [
        amplification(max((row[3 + index][0] - row[2][0]).abs().max().item() for row in panels))
        for index in range(len(names))
    ]
    width, height = PANEL
    step_x, step_y = width + MARGIN, height + LABEL + MARGIN
    size = ((2 + 2 * len(names)) * step_x + MARGIN, len(panels) * step_y + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for index, (title, noisy, theirs, *ours) in enumerate(panels):
        cells = [(f"{title}: noisy, {noisy[1]:.2f} dB", noisy[0]), (f"torch, {theirs[1]:.2f} dB", theirs[0])]
        for name, (image, quality), factor in zip(names, ours, factors, strict=True):
            cells.append((f"{name}, {quality:.2f} dB", image))
            cells.append((f"|torch - {name}| x {factor:,}", (image - theirs[0]).abs() * factor))
        y = MARGIN + index * step_y
        for column, (caption, image) in enumerate(cells):
            x = MARGIN + column * step_x
            draw.text((x + 1, y + 2), caption, fill="black", font=font)
            canvas.paste(Image.fromarray(_crop(image, width, height)), (x, y + LABEL))
    return np.asarray(canvas)


def amplification(largest: float) -> int:
    """The power of ten that brings the largest difference to full white, and with it the common ones into sight."""
    return 10 ** max(0, math.ceil(-math.log10(largest))) if largest > 0 else 1


def _crop(image, width: int, height: int):
    """The middle of [1, 3, H, W], somewhat above it, as [height, width, 3] uint8."""
    top, left = (image.shape[2] - height) // 4, (image.shape[3] - width) // 2
    inner = image[0, :, top : top + height, left : left + width].clamp(0, 1)
    return inner.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
