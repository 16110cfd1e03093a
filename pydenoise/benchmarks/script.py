"""What the scripts in ``bench/`` share: the comparison of ``pydenoise bench``, of one suite and printed only."""

import argparse
import sys
from collections.abc import Sequence

from pydenoise.benchmarks.providers import choose
from pydenoise.benchmarks.report import print_tables
from pydenoise.benchmarks.suites import Options, Suite, run_suite, select_cases

ROUNDS = 200  # at most; the seconds end a case before that


def main(suite: Suite, description: str, arguments: Sequence[str] | None = None) -> None:
    """Time the providers of ``suite`` in turns, as the command line (or ``arguments``) says, and print the tables."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--threads", type=int, help="for every provider (default: torch's)")
    add("--seconds", type=float, default=6.0, help="for each case (default: 6)")
    add("--cases", metavar="PATTERN", help='a shell pattern on groups or "group/name"')
    add("--providers", nargs="+", metavar="NAME", help="only these, and those that run only when they are named")
    add("--quick", action="store_true", help="tiny cases, three rounds: shows that everything runs")
    words = parser.parse_args(arguments)
    options = Options(
        quick=words.quick, repeats=3 if words.quick else ROUNDS, budget_seconds=words.seconds,
        providers=words.providers and tuple(words.providers), cases=words.cases, threads=words.threads,
    )  # fmt: skip
    try:
        select_cases(suite, options), choose(suite.providers, options.providers)
    except ValueError as error:
        parser.error(str(error))
    print_tables(run_suite(suite, options, progress=lambda text: print(f"… {text}", file=sys.stderr)))
