"""``pydenoise demo``: real photographs through the pretrained FFDNet, with plain torch and with pydenoise."""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydenoise.cli.denoise import positive
from pydenoise.cli.main import CommandError

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
SIGMAS = (25, 50)
BASELINES = ("torch contiguous", "torch channels_last")
PANEL = (340, 260)  # width and height that the picture shows of each photograph, at its own resolution
MARGIN = 6
LABEL = 24


def add_parser(subparsers) -> None:
    """Add the ``demo`` command."""
    parser = subparsers.add_parser(
        "demo",
        help="denoise real photographs with torch and with pydenoise, and compare",
        description="Denoise three photographs of scikit-image (Gaussian noise, sigma 25 and 50, seeded, not clipped) "
        "with the pretrained colour FFDNet, by plain torch and by pydenoise. Prints PSNR, time, speed-up, error, and "
        "draws them side by side.",
    )
    add = parser.add_argument
    add(
        "-o", "--output", type=Path, default=Path("demo/denoised.png"), metavar="OUT", help="default: demo/denoised.png"
    )
    add("--weights", type=Path, metavar="PATH", help="FFDNet checkpoint (default: the cache; see `pydenoise weights`)")
    add("--rounds", type=positive, default=5, metavar="N", help="interleaved timing rounds per row (default: 5)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    parser.set_defaults(run=run)


@dataclass
class Row:
    """One photograph at one noise level through one way of running the network."""

    photograph: str
    sigma: int
    runner: str
    psnr: float  # dB
    milliseconds: float  # median
    speedup: float  # over the faster of BASELINES, median of the ratios within a round
    error: float  # largest absolute difference from float64, pixel values in [0, 1]


def run(args: argparse.Namespace) -> int:
    """Run everything; returns the exit code."""
    from pydenoise.imaging import Picture, check_output, require, write_picture
    from pydenoise.models import load_ffdnet
    from pydenoise.models.weights import find_ffdnet

    console = require("rich.console", "rich", "the command line").Console(highlight=False)
    data = require("skimage.data", "scikit-image", "the demo", extra="demo")
    require("PIL.ImageDraw", "Pillow", "the demo", extra="demo")
    import numpy as np
    import torch

    model = load_ffdnet(find_ffdnet(args.weights))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{args.output.parent}: the folder cannot be made: {error.strerror}") from error
    check_output(args.output, Picture(np.zeros((1, 1, 3), np.uint8)))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    panels: list[list] = []
    runners: dict = {}
    with torch.inference_mode(), console.status("") as status:
        for name in PHOTOGRAPHS:
            clean = torch.from_numpy(getattr(data, name)()).double().div_(255).permute(2, 0, 1).unsqueeze(0)
            runners = runners or _runners(model, clean.float(), status.update)
            for sigma in SIGMAS:
                status.update(f"{name}, sigma {sigma}: {args.rounds} rounds of {len(runners)} runners, and float64")
                new_rows, images = compare(model, runners, name, clean, sigma, args.rounds)
                rows += new_rows
                panels.append([f"{name}, sigma {sigma}", *images])
    console.print(_table(rows))
    console.print(_footnote(args.rounds))
    write_picture(args.output, Picture(draw_panels(panels)))
    console.print(f"wrote {args.output}", markup=False)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        console.print(f"wrote {args.json}", markup=False)
    return 0


# ----------------------------------------------------------------------------------------------------------- runners


def _runners(model, example, say) -> dict:
    """Name -> function of (x, sigma), both float32. Torch in both of its memory formats: which is faster varies."""
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
    for precision in ("fp32", "bf16"):
        say(f"pydenoise.accelerate, precision {precision}")
        accelerated, _ = pydenoise.accelerate(model, (example, level), precision=precision, measure=False)
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
    """Rows of one photograph at one noise level, and [noisy, torch's result, pydenoise's result] for the picture.

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
    rows = [
        Row(
            name,
            sigma,
            label,
            psnr(results[label].clamp(0, 1), clean),
            statistics.median(times[label]) * 1e3,
            statistics.median(base / own for base, own in zip(times[baseline], times[label], strict=True)),
            (results[label] - oracle).abs().max().item(),
        )
        for label in runners
    ]
    ours = next(label for label in runners if label.startswith("pydenoise"))
    images = [(noisy, psnr(noisy, clean))]
    images += [(results[label], next(row.psnr for row in rows if row.runner == label)) for label in (baseline, ours)]
    return rows, images


def psnr(image, clean) -> float:
    """Peak signal-to-noise ratio in dB, for pixel values in [0, 1]."""
    error = (image - clean).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def _table(rows: list[Row]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="Pretrained colour FFDNet on real photographs", title_style="bold")
    table.add_column("photograph", no_wrap=True)
    table.add_column("\N{GREEK SMALL LETTER SIGMA}", justify="right")
    table.add_column("run by", no_wrap=True)
    for heading in ("PSNR dB", "ms", "speed-up", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        key = (row.photograph, row.sigma)
        if previous not in (None, key):
            table.add_section()
        head = ("", "") if key == previous else (row.photograph, str(row.sigma))
        figures = (f"{row.psnr:.2f}", f"{row.milliseconds:.0f}", f"{row.speedup:.2f}x", f"{row.error:.1e}")
        table.add_row(*head, row.runner, *figures, style="green" if row.runner.startswith("pydenoise") else None)
        previous = key
    return table


def _footnote(rounds: int) -> str:
    import torch

    threads = f"{torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"
    return (
        f"Medians of {rounds} interleaved rounds on {threads}. Speed-up: over the faster of torch's two memory formats "
        "in float32 (the row with 1.00x), eager. Error: the largest difference of any pixel value (they lie in 0 to 1) "
        "from the network in float64."
    )


# ----------------------------------------------------------------------------------------------------------- picture


def draw_panels(panels: list[list]):
    """The picture, [H, W, 3] uint8: a row per photograph and noise level, noisy | torch | pydenoise | difference.

    ``panels``: rows of [title, (noisy, dB), (torch's result, dB), (pydenoise's result, dB)], images [1, 3, H, W].
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    largest = max((ours - theirs).abs().max().item() for _, _, (theirs, _), (ours, _) in panels)
    factor = amplification(largest)
    width, height = PANEL
    step_x, step_y = width + MARGIN, height + LABEL + MARGIN
    canvas = Image.new("RGB", (4 * step_x + MARGIN, len(panels) * step_y + MARGIN), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for index, (title, noisy, theirs, ours) in enumerate(panels):
        y = MARGIN + index * step_y
        difference = (ours[0] - theirs[0]).abs() * factor
        captions = [
            f"{title}: noisy, {noisy[1]:.2f} dB",
            f"torch, {theirs[1]:.2f} dB",
            f"pydenoise, {ours[1]:.2f} dB",
            f"|torch - pydenoise| x {factor:,}",
        ]
        for column, (caption, image) in enumerate(
            zip(captions, (noisy[0], theirs[0], ours[0], difference), strict=True)
        ):
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
