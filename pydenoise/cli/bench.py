"""``pydenoise bench``: time the kernels beside other libraries on this machine."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """Time pydenoise beside torch and other libraries: the same threads, interleaved in one process, results
checked against float64, the floor of each case from peaks measured in the same run. Nothing is asserted."""


def add_parser(subparsers) -> None:
    """Add the ``bench`` command."""
    parser = subparsers.add_parser("bench", help="time the kernels beside other libraries", description=DESCRIPTION)
    add = parser.add_argument
    suites = "weighted_conv, networks, int8-layers, unet, attention, sampler or blocks (default: all)"
    add("suite", nargs="?", metavar="SUITE", help=suites)
    add("--quick", action="store_true", help="a few tiny cases and rounds: shows that everything runs")
    add("--repeats", type=_positive(int), metavar="N", help="rounds per case (default: 15; quick: 3)")
    budget = "end a case after this many seconds of rounds, but after 5 rounds at least (default: 12)"
    add("--seconds", type=_positive(float), metavar="S", default=12.0, help=budget)
    add("--providers", type=_names, metavar="A,B", help="only these; an unknown name is answered with the known ones")
    add("--cases", metavar="PATTERN", help='only these groups or cases, for example training or "*/3x3*"')
    add("--threads", type=_positive(int), metavar="N", help="threads for every provider (default: torch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    add("--out", type=Path, metavar="DIR", default=Path("bench/out"), help="for JSON and plot (default: bench/out)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the suites; 0, or 2 for arguments that make no sense."""
    try:
        from pydenoise.benchmarks import report
    except ImportError as error:
        print(f"pydenoise bench needs rich ({error}); pip install 'pydenoise[bench]'", file=sys.stderr)
        return 2
    from pydenoise.benchmarks.providers import choose
    from pydenoise.benchmarks.suites import SUITES, get_suite, run_suite, select_cases

    names = list(SUITES) if args.suite is None else [args.suite]
    try:
        options = _options(args)
        for name in names:  # everything is checked before anything is measured
            select_cases(get_suite(name), options)
            choose(get_suite(name).providers, options.providers)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"pydenoise bench: {error}", file=sys.stderr)
        return 2
    for name in names:
        result = run_suite(name, options, progress=lambda text: print(f"… {text}", file=sys.stderr))
        report.print_tables(result)
        print(f"wrote {report.write_json(result, args.out)}")
        try:
            print(f"wrote {report.write_plot(result, args.out)}")
        except ImportError as error:
            print(f"no plot: matplotlib is not installed ({error})", file=sys.stderr)
    return 0


def _options(args: argparse.Namespace):
    import torch

    from pydenoise.benchmarks.suites import Options

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch finds no CUDA device here; leave out --device cuda")
    return Options(
        quick=args.quick,
        repeats=args.repeats or (3 if args.quick else 15),
        budget_seconds=args.seconds,
        providers=args.providers,
        cases=args.cases,
        threads=args.threads,
        device=args.device,
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("expected names separated by commas")
    return names


def _positive(kind: type):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return value

    return parse
