"""``pydenoise sample``: handwritten digits by every solver, at several numbers of evaluations."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

from pydenoise.cli import digits
from pydenoise.cli.denoise import positive
from pydenoise.cli.main import CommandError
from pydenoise.cli.targets import check_picture_target

# Written out: the parser answers without loading torch. A test keeps them equal to those of digits.solvers().
SOLVERS = (
    "ddpm", "ddim", "fast-ddpm", "time-shift", "euler", "euler-ancestral", "heun", "pndm-s", "pndm-f", "pndm-fon",
    "plms", "dpm++-2m", "dpm++-3m", "dpm++-2m-sde", "unipc", "evodiff",
)  # fmt: skip
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
EVALUATIONS = (5, 10, 20, 50)
IMAGES = 10  # of each class
QUICK_EVALUATIONS, QUICK_IMAGES = (10,), 2
MOST_EVALUATIONS = 1000
DESCRIPTION = """Sample handwritten digits (8 x 8) with the denoiser that ships with pydenoise, by every solver of
pydenoise.samplers and with several numbers of evaluations of the network, all from the same noise. Prints how many
samples look like their class, how far they are from a fine-step reference and what an image takes, and draws them side
by side. The adaptive PFODE and what needs a network of its own (OneMoreStep, DDSM) are not among them."""


def add_parser(subparsers) -> None:
    """Add the ``sample`` command."""
    parser = subparsers.add_parser(
        "sample", help="sample digits with every solver and compare them", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--solver", choices=SOLVERS, nargs="+", default=SOLVERS, metavar="NAME", help=f"of {', '.join(SOLVERS)}")
    add(
        "--evaluations",
        type=_evaluations,
        nargs="+",
        metavar="N",
        help=f"of the network, for each image (default: {' '.join(map(str, EVALUATIONS))})",
    )
    add("--classes", type=_digit, nargs="+", default=tuple(range(10)), metavar="D", help="digits (default: all ten)")
    add("--images", type=positive, metavar="N", help=f"of each class (default: {IMAGES})")
    guidance = "classifier-free: 1 is the class alone (default), more of it looks more like its class, 0 is no class"
    add("--guidance", type=_guidance, default=1.0, metavar="W", help=guidance)
    add("--seed", type=seed_number, default=0, metavar="S", help="of the noise (default: 0)")
    add("--backend", choices=BACKENDS, default="auto", help="of the solver's steps (default: auto)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--weights", type=Path, metavar="PATH", help="of examples/train_digits.py (default: those that are shipped)")
    add("-o", "--out", type=Path, default=Path("digits.png"), metavar="OUT", help="the picture (default: digits.png)")
    add("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    add(
        "--quick",
        action="store_true",
        help=f"seconds: {QUICK_EVALUATIONS[0]} evaluations and {QUICK_IMAGES} images of each class, where not said",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything, then sample, print and draw; returns the exit code."""
    from pydenoise.imaging import require
    from pydenoise.models import load_digits

    console = require("rich.console", "rich", "the command line").Console(highlight=False)
    require("PIL.ImageDraw", "Pillow", "the picture")
    require("sklearn.datasets", "scikit-learn", "judging digits", extra="demo")
    model = load_digits(args.weights)
    check_picture_target(args.out)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA device")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    budgets = args.evaluations or (QUICK_EVALUATIONS if args.quick else EVALUATIONS)
    budgets, names = sorted(set(budgets)), list(dict.fromkeys(args.solver))
    _check_budgets(names, budgets)
    with torch.inference_mode():
        rows = digits.compare_and_draw(model, names, budgets, task(args), args.out, console)
    console.print(f"wrote {args.out}", markup=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        console.print(f"wrote {args.json}", markup=False, soft_wrap=True)
    return 0


def task(args: argparse.Namespace) -> digits.Task:
    """Image i of a class has the same noise whatever else is sampled."""
    images = args.images or (QUICK_IMAGES if args.quick else IMAGES)
    wanted = [(label, number) for label in dict.fromkeys(args.classes) for number in range(images)]
    seeds = [args.seed + number * 10 + label for label, number in wanted]
    return digits.Task([label for label, _ in wanted], seeds, args.guidance, args.backend, args.device)


def _check_budgets(names: list[str], budgets: list[int]) -> None:
    from pydenoise.samplers import NoiseSchedule

    schedule, known = NoiseSchedule.linear(), digits.solvers()
    if all(digits.steps_within(known[name], schedule, budget) is None for name in names for budget in budgets):
        raise CommandError(f"--evaluations: {budgets[-1]} are too few for {', '.join(names)}")


def _evaluations(text: str) -> int:
    count = positive(text)
    if count > MOST_EVALUATIONS:
        raise argparse.ArgumentTypeError(f"at most {MOST_EVALUATIONS}, got {text}")
    return count


def _digit(text: str) -> int:
    if text not in set("0123456789"):
        raise argparse.ArgumentTypeError(f"expected a digit, 0 to 9, got {text!r}")
    return int(text)


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or more, got {text!r}")
    return value


def seed_number(text: str) -> int:
    """A seed given on the command line."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)
