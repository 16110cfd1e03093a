"""Large depthwise kernels for the suite of blocks: the group of the weighted-convolution suite that times them."""

from pydenoise.benchmarks.cases import Case, weighted_conv_cases
from pydenoise.benchmarks.convolution import PROVIDERS, expected_results

__all__ = ["PROVIDERS", "expected_results", "large_depthwise_cases"]


def large_depthwise_cases(quick: bool = False) -> list[Case]:
    """The cases of group "large-depthwise"; ``quick`` gives the smallest alone."""
    cases = [case for case in weighted_conv_cases() if case.group == "large-depthwise"]
    return cases[:1] if quick else cases
