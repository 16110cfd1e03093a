"""The bench harness: shared cases, providers, interleaved timing, floors and reports.

``pydenoise bench`` and the pytest-benchmark entry points in ``bench/`` run the same cases through the same providers.
A bench never asserts: it prints what it saw and writes it down.
"""

from pydenoise.benchmarks.suites import SUITES, Options, run_suite

__all__ = ["SUITES", "Options", "run_suite"]
