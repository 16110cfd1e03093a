"""Entry point: reads the arguments, runs a command, and turns expected errors into one line and exit code 2."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import pydenoise

# Each module has add_parser(subparsers), which sets ``run``: a function of the arguments that returns the exit code.
# None of them imports torch or rich before its ``run``: `pydenoise --help` answers at once.
COMMANDS = ("denoise", "sample", "gallery", "demo", "bench", "info", "weights")
USAGE_ERROR = 2
INTERRUPTED = 130


class CommandError(Exception):
    """An error to be shown as one line, for what only the command line knows (its options)."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pydenoise",
        description="Compiled kernels that make PyTorch denoisers faster, and a denoiser to use them on.",
    )
    parser.add_argument("--version", action="version", version=f"pydenoise {pydenoise.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"pydenoise.cli.{name}").add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for anything the user can put right, 130 after Ctrl-C."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\npydenoise: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left (`pydenoise info | head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        print(f"pydenoise: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the user. Imported late: these modules bring torch with them."""
    from pydenoise.imaging import ImageError, MissingExtra
    from pydenoise.models import WeightsError
    from pydenoise.ops.registry import BackendUnavailable

    return (CommandError, ImageError, MissingExtra, WeightsError, BackendUnavailable)
