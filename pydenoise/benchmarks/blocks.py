"""Suite ``blocks``: blocks from papers beside their plain torch forms; each kind of case has providers of its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pydenoise.benchmarks import (
    blocks_aggregate,
    blocks_bilateral,
    blocks_continuous,
    blocks_dcls,
    blocks_ensemble,
    blocks_hyperspectral,
    blocks_routing,
    blocks_wavelet,
)
from pydenoise.benchmarks.cases import Case
from pydenoise.benchmarks.providers import NO_PART, RESULT_BOUNDS, Contender, Provider, Setting, Skip

# (the class of the cases, the cases, who computes them, the float64 reference)
_KINDS = (
    (
        blocks_bilateral.BilateralBench, blocks_bilateral.bilateral_cases, blocks_bilateral.PROVIDERS,
        blocks_bilateral.expected_results,
    ),
    (blocks_dcls.DclsBench, blocks_dcls.dcls_cases, blocks_dcls.PROVIDERS, blocks_dcls.expected_results),
    (
        blocks_continuous.DynamicBlockBench, blocks_continuous.cases, blocks_continuous.PROVIDERS,
        blocks_continuous.expected_results,
    ),
    (
        blocks_hyperspectral.NoiseBench, blocks_hyperspectral.hyperspectral_cases, blocks_hyperspectral.PROVIDERS,
        blocks_hyperspectral.expected_results,
    ),
    (
        blocks_wavelet.WaveletBench, blocks_wavelet.wavelet_cases, blocks_wavelet.PROVIDERS,
        blocks_wavelet.expected_results,
    ),
    (
        blocks_aggregate.AggregateBench, blocks_aggregate.aggregate_cases, blocks_aggregate.PROVIDERS,
        blocks_aggregate.expected_results,
    ),
    (
        blocks_ensemble.EnsembleBench, blocks_ensemble.ensemble_cases, blocks_ensemble.PROVIDERS,
        blocks_ensemble.expected_results,
    ),
    (
        blocks_routing.RoutingBench, blocks_routing.routing_cases, blocks_routing.PROVIDERS,
        blocks_routing.expected_results,
    ),
)  # fmt: skip
# Of the largest result: HySime's residuals are differences of much larger numbers.
BOUNDS = RESULT_BOUNDS | {"fp32": 1e-3}


def blocks_cases(quick: bool = False) -> list[Case]:
    """The cases of every kind."""
    return [case for _, cases, _, _ in _KINDS for case in cases(quick)]


def expected_results(case: Case, setting: Setting):
    """What the case's own module expects."""
    return next(expected for kind, _, _, expected in _KINDS if isinstance(case, kind))(case, setting)


def _only(kind: type, prepare: Callable[[Case, Setting], Contender]) -> Callable[[Case, Setting], Contender]:
    def prepared(case: Case, setting: Setting) -> Contender:
        if not isinstance(case, kind):
            raise Skip(NO_PART)
        return prepare(case, setting)

    return prepared


def _providers() -> Sequence[Provider]:
    return tuple(
        replace(provider, prepare=_only(kind, provider.prepare)) for kind, _, own, _ in _KINDS for provider in own
    )


PROVIDERS = _providers()
