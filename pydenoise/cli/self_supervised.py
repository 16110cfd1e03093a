"""``pydenoise denoise --self-supervised``: Filter2Noise trained on the user's own picture."""

import argparse
import math
import re
from pathlib import Path

from pydenoise.cli.main import CommandError

STEPS, DETAIL, SEED, STAGES, CROP = 500, 350.0, 77, 2, 512
PATCH = 8
LARGEST_SPATIAL = 127  # pixels
_REGION = re.compile(r"(\d+):(\d+),(\d+):(\d+)=([^,@]+),([^,@]+),([^,@]+)(?:@(\d+))?")


def add_options(parser: argparse.ArgumentParser, number, positive) -> None:
    """Add the switch and what belongs to it; ``number`` and ``positive`` are argparse types."""
    parser.add_argument(
        "--self-supervised",
        action="store_true",
        help="train a small denoiser (Filter2Noise) on the picture itself, instead of FFDNet: neither weights nor "
        "the noise's sigma are needed; a picture of 512 x 512 takes minutes on a CPU",
    )
    group = parser.add_argument_group("with --self-supervised")
    add = group.add_argument
    add("--steps", type=positive, metavar="N", help=f"training steps (default: {STEPS})")
    add("--detail", type=number, metavar="W", help=f"weight of the term that keeps detail (default: {DETAIL:g})")
    add("--stages", type=positive, metavar="N", help=f"filters one after the other (default: {STAGES})")
    add("--seed", type=int, metavar="N", help=f"of the first parameters (default: {SEED})")
    crop = "train on at most N pixels a side, from the middle; 0: on everything (default: 512)"
    add("--crop", type=_natural, metavar="N", help=crop)
    region = (
        "your own sigmas for a rectangle: pixels along x and y, and values on the scale 0-255; a dash keeps the "
        "predicted one, @N means stage N only, and the option may be given several times. "
        "Example: 40:120,200:260=-,-,5@1"
    )
    add("--region", type=_region, action="append", metavar="TOP:BOTTOM,LEFT:RIGHT=SX,SY,SR[@N]", help=region)
    add("--sigma-maps", type=Path, metavar="PNG", help="write a picture of the sigmas (needs matplotlib)")


OWN = ("steps", "detail", "stages", "seed", "crop", "region", "sigma_maps")
FOREIGN = ("sigma", "weights", "overlap")


def check_options(args: argparse.Namespace) -> None:
    """Options of the one way are refused in the other."""
    if not args.self_supervised:
        for name in OWN:
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} belongs to --self-supervised")
        return
    for name in FOREIGN:
        if getattr(args, name) is not None:
            raise CommandError(f"--{name} does not go with --self-supervised, which needs none")
    if args.precision != "fp32":
        raise CommandError(f"--precision {args.precision} does not go with --self-supervised, which trains in fp32")
    if args.backend != "pydenoise":
        raise CommandError("--backend torch does not go with --self-supervised, whose filter torch does not have")
    if args.tile % PATCH:
        raise CommandError(f"--tile {args.tile}: --self-supervised needs a multiple of {PATCH}")
    if args.sigma_maps is not None and args.sigma_maps.suffix.lower() != ".png":
        raise CommandError(f"--sigma-maps {args.sigma_maps}: expected the name of a .png file")
    if args.sigma_maps is not None and not args.sigma_maps.resolve().parent.is_dir():
        raise CommandError(f"--sigma-maps {args.sigma_maps}: {args.sigma_maps.resolve().parent} is no directory")


def check_regions(args: argparse.Namespace, picture) -> list:
    """The regions as the library takes them, checked against the picture."""
    from pydenoise.nn import SigmaRegion

    height, width, _ = picture.pixels.shape
    found = []
    for text, rows, columns, sigmas, stage in args.region or ():
        if rows[1] > height or columns[1] > width:
            raise CommandError(f"--region {text}: ends outside the picture's {height} rows and {width} columns")
        if stage is not None and stage >= (args.stages or STAGES):
            raise CommandError(f"--region {text}: there is no stage {stage}; the first is 0")
        sigma_x, sigma_y, sigma_r = sigmas
        sigma_r = None if sigma_r is None else sigma_r / 255
        found.append(SigmaRegion(rows, columns, sigma_x, sigma_y, sigma_r, stage))
    return found


def denoise_picture(picture, args: argparse.Namespace, console) -> None:
    """Replace the pixels of ``picture``; training shows a progress bar with the loss on ``console``."""
    import numpy as np
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from pydenoise.imaging import require
    from pydenoise.self_supervised import denoise_single_image

    if args.sigma_maps is not None:
        require("matplotlib", "matplotlib", "--sigma-maps", extra="demo")
    regions = check_regions(args, picture)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    top = np.iinfo(picture.pixels.dtype).max
    noisy = torch.from_numpy(picture.pixels.astype(np.float32) / top).permute(2, 0, 1).to(args.device)
    steps = args.steps or STEPS
    shown = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps")]
    shown += [TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(), TextColumn("remaining")]
    with Progress(*shown, TimeRemainingColumn(), console=console, disable=args.quiet) as progress:
        task = progress.add_task("training on the picture", total=steps, loss=float("nan"))
        result = denoise_single_image(
            noisy,
            regions=regions,
            crop=CROP if args.crop is None else args.crop,
            tile=args.tile,
            steps=steps,
            detail=DETAIL if args.detail is None else args.detail,
            stages=args.stages or STAGES,
            patch_size=PATCH,
            seed=SEED if args.seed is None else args.seed,
            on_step=lambda step, loss: progress.update(task, completed=step, loss=loss),
        )
    samples = result.image.permute(1, 2, 0).clamp(0, 1).mul(top).round().cpu().numpy()
    picture.pixels = samples.astype(picture.pixels.dtype)
    if args.sigma_maps is not None:
        result.plot_sigma_maps().savefig(args.sigma_maps, dpi=150)
        console.print(f"wrote {args.sigma_maps}", markup=False)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, zero or more, got {text!r}")
    return int(text)


def _region(text: str) -> tuple:
    """(text, rows, columns, three sigmas or None, stage or None)."""
    match = _REGION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected TOP:BOTTOM,LEFT:RIGHT=SX,SY,SR or ...@STAGE, got {text!r}")
    top, bottom, left, right = (int(match[i]) for i in range(1, 5))
    if not (top < bottom and left < right):
        raise argparse.ArgumentTypeError(f"the rectangle of {text!r} is empty")
    sigmas = []
    for word in match.groups()[4:7]:
        try:
            value = None if word == "-" else float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number or a dash, got {word!r} in {text!r}") from None
        if value is not None and not (0 < value < math.inf and (len(sigmas) == 2 or value <= LARGEST_SPATIAL)):
            limit = "" if len(sigmas) == 2 else f", at most {LARGEST_SPATIAL},"
            raise argparse.ArgumentTypeError(f"expected a positive number{limit} or a dash, got {word!r} in {text!r}")
        sigmas.append(value)
    return text, (top, bottom), (left, right), tuple(sigmas), None if match[8] is None else int(match[8])
