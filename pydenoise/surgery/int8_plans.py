"""Which scheme each layer of a model gets: the blocks' requests, answered from a calibration, kept for the report."""

import math
from collections.abc import Callable

from torch import nn

from pydenoise.nn._plans import Choice, Request
from pydenoise.quantization import Calibration, Decision, Scheme, choose_layer
from pydenoise.quantization.observers import kind_of
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.report import Kept, QuantizedLayer

DYNAMIC = Scheme("per_pixel")  # of the kind of layer: per token for linear layers


class Int8Plans:
    """Answers the blocks' requests for the layers of one model.

    Args:
        calibration: statistics of the layers' inputs. scheme: a :class:`Scheme`, or "auto": chosen per layer by its
            measured error. measured_only: the calibration serves for the report alone, and layers get dynamic scales.
        target_db, float_below: see :func:`pydenoise.quantization.choose_layer`.
    """

    def __init__(
        self,
        policy: Policy,
        calibration: Calibration,
        scheme: Scheme | str,
        *,
        measured_only: bool,
        target_db: float,
        float_below: float | None,
    ):
        self.policy, self.calibration = policy, calibration
        self.schemes = None if scheme == "auto" else (scheme,)
        if measured_only:
            self.schemes = (DYNAMIC,)
        self.target_db, self.float_below = target_db, float_below
        self.layers: list[QuantizedLayer] = []
        self.kept: list[Kept] = []
        self._modules = self.policy.names

    def within(self, prefix: str) -> Callable[[Request], Choice]:
        """What a block called ``prefix`` asks for its layers."""
        return lambda request: self.choice(prefix, request)

    def choice(self, prefix: str, request: Request) -> Choice:
        """The plan of one layer, or "float"."""
        names = [f"{prefix}.{name}" if prefix and name else prefix or name for name in request.names]
        if any(self.policy.keeps(self._modules[name]) for name in names if name in self._modules):
            self.kept.append(Kept("+".join(names), type(request.layer).__name__, "named in keep"))
            return "float"
        statistics = self.calibration.layers.get(names[0])
        shown = request.name if not prefix else f"{prefix}.{request.name}"
        if statistics is None:
            scheme = DYNAMIC.for_kind(kind_of(request.layer))
            self.layers.append(QuantizedLayer(shown, str(scheme), None, "no calibration batch called it"))
            return scheme
        if request.channels is not None:
            statistics = statistics.slice_channels(*request.channels)
        if kind_of(request.layer) == "linear":
            statistics = statistics.as_linear()  # of a 1x1 convolution that is computed as a linear layer
        decision = choose_layer(
            request.layer, statistics, schemes=self.schemes, target_db=self.target_db, float_below=self.float_below
        )
        if decision.plan is None:
            self.kept.append(Kept(shown, type(request.layer).__name__, decision.reason))
            return "float"
        self.layers.append(self._entry(shown, decision))
        return decision.plan

    @staticmethod
    def _entry(name: str, decision: Decision) -> QuantizedLayer:
        chosen = next(m for m in decision.measurements if m.scheme == decision.scheme)
        snr = None if math.isinf(decision.snr_db) else decision.snr_db
        several = len(chosen.per_bucket) > 1
        return QuantizedLayer(name, str(decision.scheme), snr, decision.reason, chosen.per_bucket if several else None)


def quantizable(module: nn.Module) -> bool:
    """Whether ``module`` is a plain convolution or linear layer."""
    return kind_of(module) is not None
