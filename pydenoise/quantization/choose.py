"""The choice of a scheme for each layer: the cheapest that is accurate enough on the layer's own inputs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pydenoise.quantization import numbers, simulation
from pydenoise.quantization.calibration import Calibration
from pydenoise.quantization.observers import LayerStatistics, kind_of
from pydenoise.quantization.plan import LayerPlan, plan_layer
from pydenoise.quantization.schemes import Scheme
from pydenoise.quantization.simulation import Sample, sample_outputs

TARGET_DB = 31.0  # an error of 2.8 %
# What an option must gain to be taken. A clipped range does worse than measured on inputs beyond the calibration's
# (FFDNet calibrated on dark pictures lost 4 dB on bright ones); smoothing costs a multiplication per input.
SEARCH_GAIN_DB, SMOOTH_GAIN_DB = 1.0, 0.25


@dataclass(frozen=True)
class Measurement:
    """What one scheme makes of a layer's output on its calibration samples.

    Attributes:
        scheme: measured. snr_db: signal over noise; with several buckets, of their mean noise-to-signal ratio, so that
            every range of timesteps counts alike. per_bucket: of each bucket, ``None`` without samples.
    """

    scheme: Scheme
    snr_db: float
    per_bucket: tuple[float | None, ...]

    @property
    def relative_error(self) -> float:
        """||error|| / ||output||."""
        return 10.0 ** (-self.snr_db / 20.0)


@dataclass(frozen=True)
class Decision:
    """The scheme that a layer gets.

    Attributes:
        layer: its name. plan: its int8 numbers, or ``None`` if it stays in float. snr_db: of its output; ``inf`` in
            float. reason: a sentence for the report. measurements: of the candidates that were tried.
    """

    layer: str
    scheme: Scheme
    plan: LayerPlan | None
    snr_db: float
    reason: str
    measurements: tuple[Measurement, ...]


def candidates(kind: str, buckets: int = 1) -> tuple[Scheme, ...]:
    """The schemes that "auto" chooses from, for a "conv2d" or "linear" layer calibrated with ``buckets``."""
    dynamic = "per_pixel" if kind == "conv2d" else "per_token"
    static = [
        Scheme("per_tensor", symmetric=True, bias_correction=True),
        Scheme("per_tensor", bias_correction=True),
        Scheme("per_tensor", clip="search", bias_correction=True),
        Scheme("per_tensor", smooth=0.5, bias_correction=True),
        Scheme("per_tensor", clip="search", smooth=0.5, bias_correction=True),
    ]
    if buckets > 1:
        static += [
            Scheme("per_timestep", buckets=buckets, bias_correction=True),
            Scheme("per_timestep", buckets=buckets, clip="search", bias_correction=True),
            Scheme("per_timestep", buckets=buckets, smooth=0.5, bias_correction=True),
        ]
    corrected = [Scheme(dynamic, bias_correction=True), Scheme(dynamic, smooth=0.5, bias_correction=True)]
    return (*static, *corrected)


def measure(
    layer: nn.Module, statistics: LayerStatistics, plan: LayerPlan, samples: list[Sample] | None = None
) -> Measurement:
    """How accurate ``plan`` is on the samples of ``statistics`` (or their ``sample_outputs``, if at hand).

    Raises ``ValueError`` if there are none.
    """
    signal, noise = [0.0] * len(statistics.counts), [0.0] * len(statistics.counts)
    bias = torch.zeros(()) if layer.bias is None else layer.bias.detach().float()
    bias = bias.to(plan.weight.device).reshape((-1, 1, 1) if plan.kind == "conv2d" else -1)
    for bucket, x, expected in sample_outputs(layer, statistics) if samples is None else samples:
        error = simulation.simulate(plan, layer, x, bucket) - expected
        signal[bucket] += (expected - bias).double().square().sum().item()
        noise[bucket] += error.double().square().sum().item()
    sampled = [bool(statistics.samples(bucket)) for bucket in range(len(signal))]
    if not any(sampled):
        raise ValueError(f"statistics: no samples of the input of layer {statistics.name!r}")
    each = tuple(numbers.decibels(s, n) if got else None for s, n, got in zip(signal, noise, sampled, strict=True))
    ratios = [10.0 ** (-value / 10.0) for value in each if value is not None]
    mean = sum(ratios) / len(ratios)
    overall = math.inf if mean == 0.0 else -math.inf if mean == math.inf else -10.0 * math.log10(mean)
    return Measurement(plan.scheme, overall, each)


def _merit(measurement: Measurement) -> float:
    scheme = measurement.scheme
    handicap = SEARCH_GAIN_DB * (scheme.clip == "search") + SMOOTH_GAIN_DB * (scheme.smooth is not None)
    return measurement.snr_db - handicap


def choose_layer(
    layer: nn.Module,
    statistics: LayerStatistics,
    *,
    schemes: Iterable[Scheme] | None = None,
    target_db: float = TARGET_DB,
    float_below: float | None = None,
) -> Decision:
    """Measure candidates on the layer's calibration samples, cheap ones first, until one reaches ``target_db``.

    The output is compared with the full-precision one, less its bias (a large bias would hide the error). Among schemes
    of one cost the most accurate counts, with a handicap of 1 dB for a clip search and of 0.25 dB for smoothing; costs
    are static, a table per timestep, a scale per position, float.

    Args:
        layer: ``nn.Conv2d`` or ``nn.Linear``. statistics: of its input.
        schemes: candidates; default :func:`candidates`. A "float" one is taken where no other reaches the target.
        target_db: signal over noise to reach. If none does, the best is taken.
        float_below: if even the best is below this, the layer stays in float.

    Raises:
        ValueError: no candidates; or as :func:`plan_layer` and :func:`measure`.
    """
    kind = kind_of(layer)
    given = candidates(kind, len(statistics.counts)) if schemes is None else tuple(schemes)
    real = tuple(dict.fromkeys(scheme.for_kind(kind) for scheme in given if not scheme.is_float))
    if not given:
        raise ValueError("schemes: expected at least one")
    samples = sample_outputs(layer, statistics)
    plans: dict[Scheme, LayerPlan] = {}
    measured: tuple[Measurement, ...] = ()
    reached: list[Measurement] = []
    for cost in sorted({scheme.cost for scheme in real}):  # what costs more is measured only where it is needed
        schemes_here = [scheme for scheme in real if scheme.cost == cost]
        tried = {scheme: plan_layer(layer, statistics, scheme, samples=samples) for scheme in schemes_here}
        results = tuple(measure(layer, statistics, plan, samples) for plan in tried.values())
        plans |= tried
        measured += results
        reached = [m for m in results if m.snr_db >= target_db]
        if reached:
            break
    note = " (its input is constant)" if statistics.is_constant else ""
    if reached:
        cost = min(m.scheme.cost for m in reached)
        best = max((m for m in reached if m.scheme.cost == cost), key=_merit)
        reason = f"the cheapest kind that reaches {target_db:g} dB" + note
    elif measured:
        best = max(measured, key=_merit)
        reason = f"the best, below {target_db:g} dB" + note
    wants_float = not reached and any(scheme.is_float for scheme in given)
    if not measured or wants_float or (float_below is not None and best.snr_db < float_below):
        reason = f"the best int8 scheme reaches {best.snr_db:.1f} dB" if measured else "named as float"
        return Decision(statistics.name, Scheme("float"), None, math.inf, reason, measured)
    return Decision(statistics.name, best.scheme, plans[best.scheme], best.snr_db, reason, measured)


def choose(
    model: nn.Module,
    calibration: Calibration,
    *,
    layers: Iterable[str] | None = None,
    target_db: float = TARGET_DB,
    float_below: float | None = None,
) -> dict[str, Decision]:
    """Decide for every calibrated layer of ``model``: with "auto" by measurement, else the calibration's scheme.

    Args:
        model: that was calibrated. layers: names to decide for; default all that were called.
        target_db, float_below: see :func:`choose_layer`; with a named scheme, ``float_below`` alone counts.

    Raises:
        ValueError: a calibration of another model; a name that was not calibrated; or as :func:`choose_layer`.
    """
    calibration.check(model)
    names = list(calibration.layers) if layers is None else list(layers)
    modules = dict(model.named_modules())
    decisions = {}
    for name in names:
        if name not in calibration.layers:
            raise ValueError(f"layers: {name!r} was not calibrated")
        schemes = None if calibration.scheme == "auto" else (calibration.scheme,)
        with torch.no_grad():
            decisions[name] = choose_layer(
                modules[name], calibration.layers[name], schemes=schemes, target_db=target_db, float_below=float_below
            )
    return decisions
