"""``pydenoise denoise``: FFDNet, or a denoiser trained on the picture itself, on a picture or hyperspectral cube."""

import argparse
import math
from pathlib import Path

from pydenoise.cli import self_supervised
from pydenoise.cli.denoise_cube import add_options, refuse_options, run_cube
from pydenoise.cli.main import CommandError
from pydenoise.cli.pieces import choose_pieces, int8_options, to_tensor

TRAINED_SIGMA = 75.0
EXAMPLE_SIDE = 64  # what the accelerated network is checked on before it runs; any size works afterwards
DESCRIPTION = """Remove noise from a picture with FFDNet. PNG, JPEG and TIFF; gray and RGB; 8 and 16 bit, which the
output keeps; alpha, colour profile and (except in TIFF) EXIF data travel along. The picture goes through the network in
overlapping tiles, so memory does not grow with its size. Gray pictures go through the colour network as three equal
channels, whose results are averaged. Cubes of many bands (.npy; TIFF of several pages, more than four samples a pixel
or floating point) are denoised in the few components that their spectra have (FastHyDe); they need no --sigma.
With --self-supervised, a small filter is trained on the picture itself."""


def add_parser(subparsers) -> None:
    """Add the ``denoise`` command."""
    parser = subparsers.add_parser("denoise", help="denoise a picture", description=DESCRIPTION)
    add = parser.add_argument
    add("input", type=Path, metavar="IN", help="PNG, JPEG or TIFF; .npy or TIFF of many bands")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="the extension decides the format")
    noise = (
        "standard deviation of the noise on the scale 0-255, for 16-bit pictures too; trained for 0-75 (gray: 0-43). "
        "For cubes in the units of their samples, and estimated if left out"
    )
    add("--sigma", type=_sigma, metavar="S", help=noise)
    add("--weights", type=Path, metavar="PATH", help="FFDNet checkpoint (default: the cache; see `pydenoise weights`)")
    precision = (
        "arithmetic of the network (default: fp32). int8: the inner layers compute with 8-bit integers, whose "
        "scales are calibrated anew in each run, on up to 8 pieces of the picture itself at the given sigma; the "
        "result is not quite that of fp32, and the calibration costs some seconds before the first tile"
    )
    add("--precision", choices=("fp32", "bf16", "int8"), default="fp32", help=precision)
    add(
        "--tile",
        type=_even,
        default=512,
        metavar="N",
        help="side of a tile, margins included; 0: no tiles (default: 512). With --self-supervised, the square whose "
        "patches are compared with each other when the picture is filtered",
    )
    margin = "margin of a tile that is read but not used (default: the receptive radius, 24, which is exact)"
    add("--overlap", type=_even, metavar="N", help=margin)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--backend", choices=("pydenoise", "torch"), default="pydenoise", help="whose kernels (default: pydenoise)")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_options(parser, positive)
    self_supervised.add_options(parser, _sigma, positive)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything, then denoise and write; returns the exit code."""
    from pydenoise.imaging import is_cube, require

    self_supervised.check_options(args)
    console = require("rich.console", "rich", "the command line").Console(
        stderr=True, quiet=args.quiet, highlight=False
    )
    _check_device(args)
    if is_cube(args.input):
        if args.self_supervised:
            raise CommandError("--self-supervised: for pictures; a cube is denoised in its own components")
        return run_cube(args, console, prepare_network)
    refuse_options(args)
    return run_self_supervised(args, console) if args.self_supervised else run_ffdnet(args, console)


def run_self_supervised(args: argparse.Namespace, console) -> int:
    """Train on the picture, filter it, write it."""
    from pydenoise.imaging import check_output, read_picture

    picture = read_picture(args.input)
    check_output(args.output, picture)
    for text in picture.notes:
        console.print(f"note: {text}", style="yellow", markup=False)
    console.print(f"{args.input}: {picture.describe()}", markup=False)
    self_supervised.denoise_picture(picture, args, console)
    _write(args, picture, console)
    return 0


def run_ffdnet(args: argparse.Namespace, console) -> int:
    """Run the network over the picture, write it."""
    from pydenoise.imaging import check_output, read_picture
    from pydenoise.models import load_ffdnet
    from pydenoise.models.weights import find_ffdnet

    if args.sigma is None:
        raise CommandError("the following arguments are required: --sigma, or --self-supervised")
    model = load_ffdnet(find_ffdnet(args.weights))
    overlap = model.receptive_radius if args.overlap is None else args.overlap
    _check_options(args, overlap)
    picture = read_picture(args.input)
    check_output(args.output, picture)
    if picture.gray is False and model.channels == 1:
        raise CommandError(f"{args.input} is RGB and the weights are for gray pictures")
    for text in [*picture.notes, *_notes(args, picture, model, overlap)]:
        console.print(f"note: {text}", style="yellow", markup=False)
    console.print(f"{args.input}: {picture.describe()}", markup=False)
    denoise_picture(picture, model, args, overlap, console)
    _write(args, picture, console)
    return 0


def _write(args: argparse.Namespace, picture, console) -> None:
    from pydenoise.imaging import write_picture

    for text in write_picture(args.output, picture):
        console.print(f"note: {text}", style="yellow", markup=False)
    console.print(f"wrote {args.output}", markup=False)


def denoise_picture(picture, model, args: argparse.Namespace, overlap: int, console) -> None:
    """Replace the pixels of ``picture`` by denoised ones, tile by tile, with a progress bar on ``console``."""
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from pydenoise.imaging import map_tiles, tile_windows
    from pydenoise.models.ffdnet import GRAY_FACTOR

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    height, width, _ = picture.pixels.shape
    windows = tile_windows(height, width, args.tile, overlap)
    dtype = torch.bfloat16 if args.precision == "bf16" and args.backend == "torch" else torch.float32
    replicate = picture.gray and model.channels == 3
    level = args.sigma / 255 * (GRAY_FACTOR if replicate else 1)
    sigma = torch.full((1, 1, 1, 1), level, dtype=dtype, device=args.device)
    batches = None
    if args.precision == "int8":
        console.print("int8: calibrating on pieces of the picture", markup=False)
        batches = calibration_batches(picture.pixels, sigma, replicate)
    network = prepare_network(model, sigma, args.backend, args.precision, batches)
    columns_shown = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles")]
    columns_shown += [TimeElapsedColumn(), TextColumn("remaining"), TimeRemainingColumn()]
    with torch.inference_mode(), Progress(*columns_shown, console=console, disable=args.quiet) as progress:
        task = progress.add_task(f"denoising ({args.backend}, {args.precision})", total=len(windows))
        run_tile = _run_tile(network, sigma, replicate)
        picture.pixels = map_tiles(
            picture.pixels,
            run_tile,
            tile=args.tile,
            overlap=overlap,
            device=args.device,
            dtype=dtype,
            on_tile=lambda: progress.advance(task),
        )


def calibration_batches(pixels, sigma, replicate: bool) -> list[tuple]:
    """FFDNet's inputs (x, sigma) of pieces of the noisy picture ``pixels`` [H, W, C]."""
    pieces = [to_tensor(piece).to(sigma.device) for piece in choose_pieces(pixels)]
    return [(x.expand(-1, 3, -1, -1) if replicate else x, sigma) for x in pieces]


def prepare_network(model, sigma, backend: str, precision: str, batches: list[tuple] | None = None):
    """``model`` on the device of ``sigma``: in channels_last memory for torch, accelerated for pydenoise.

    ``batches`` are for precision "int8".
    """
    import torch

    model = model.to(sigma.device)
    if backend == "torch":
        return model.to(dtype=sigma.dtype, memory_format=torch.channels_last)
    import pydenoise

    example = torch.rand(1, model.channels, EXAMPLE_SIDE, EXAMPLE_SIDE, device=sigma.device)
    example = example.contiguous(memory_format=torch.channels_last)
    options = {} if batches is None else int8_options(model, batches)
    network, _ = pydenoise.accelerate(model, (example, sigma), precision, measure=False, **options)
    return network


def _run_tile(network, sigma, replicate: bool):
    if not replicate:
        return lambda x: network(x, sigma)
    return lambda x: network(x.expand(-1, 3, -1, -1), sigma).mean(dim=1, keepdim=True)


def _check_device(args: argparse.Namespace) -> None:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA device; `pydenoise info` shows what it sees")


def _check_options(args: argparse.Namespace, overlap: int) -> None:
    if args.precision == "int8" and args.backend == "torch":
        raise CommandError("--precision int8: torch has no int8 convolutions on its own; leave out --backend torch")
    if args.tile and args.tile <= 2 * overlap:
        raise CommandError(f"--tile {args.tile} leaves nothing between two margins of --overlap {overlap}")


def _notes(args: argparse.Namespace, picture, model, overlap: int) -> list[str]:
    from pydenoise.models.ffdnet import GRAY_FACTOR

    notes = []
    limit = TRAINED_SIGMA / GRAY_FACTOR if picture.gray and model.channels == 3 else TRAINED_SIGMA
    if args.sigma > limit:
        kind = "gray" if picture.gray else "colour"
        notes.append(
            f"for {kind} pictures the network was trained up to sigma {limit:.0f}; {args.sigma:g} is beyond that"
        )
    if args.tile and overlap < model.receptive_radius:
        notes.append(f"overlap {overlap} is less than the receptive radius {model.receptive_radius}: seams may show")
    return notes


def _sigma(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number of zero or more, got {text!r}")
    return value


def _even(text: str) -> int:
    if not text.isdecimal() or int(text) % 2:
        raise argparse.ArgumentTypeError(f"expected an even number, zero or more, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
