"""Which scheme each layer of a model gets: the blocks' requests, answered from a calibration or from a recipe."""

import math
from collections.abc import Callable

from torch import nn

from pydenoise.nn._plans import Choice, Request
from pydenoise.quantization import Calibration, Decision, Scheme, choose_layer
from pydenoise.quantization.observers import kind_of
from pydenoise.quantization.schemes import AUTO
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.recipe import FLOAT, Recipe
from pydenoise.surgery.report import Kept, QuantizedLayer

DYNAMIC = Scheme("per_pixel")  # of the kind of layer: per token for linear layers
OUTER = "the first or the last convolution, which stays in float"


class Int8Plans:
    """Answers the requests for the layers of one model. After the surgery: ``layers`` and ``kept`` for the report, and
    ``choices`` for the recipe.

    Args:
        policy: of the model under surgery. outer: names of its first and its last convolution.
        calibration: statistics of the layers' inputs. scheme: a :class:`Scheme`, or "auto": chosen per layer by its
            measured error. measured_only: the calibration serves for the report alone, and "auto" means scales computed
            from each input.
        target_db, float_below: see :func:`pydenoise.quantization.choose_layer`.
    """

    def __init__(
        self,
        policy: Policy,
        outer: set[str],
        calibration: Calibration,
        scheme: Scheme | str,
        *,
        measured_only: bool,
        target_db: float,
        float_below: float | None,
    ):
        self.policy, self.outer, self.calibration = policy, outer, calibration
        self.schemes = (scheme,)
        if scheme == AUTO:
            self.schemes = (DYNAMIC,) if measured_only else None
        self.target_db, self.float_below = target_db, float_below
        self.layers: list[QuantizedLayer] = []
        self.kept: list[Kept] = []
        self.choices: dict[str, dict | str] = {}

    def allows(self, name: str) -> bool:
        """Whether the module ``name`` may be swapped."""
        return True

    def why_conv_stays(self, name: str, conv: nn.Conv2d) -> str | None:
        """Why a convolution that no block contains stays in float, or ``None``."""
        if self.policy.keeps(conv):
            return "named in keep"
        if name in self.outer:
            return OUTER
        if min(conv.in_channels, conv.out_channels) < _FEW:
            return f"outside the blocks, with fewer than {_FEW} channels: stays in float"
        return None if name in self.calibration.layers else "not called by the example or a calibration batch"

    def within(self, prefix: str) -> Callable[[Request], Choice]:
        """What a block called ``prefix`` asks for its layers."""
        return lambda request: self.choice(prefix, request)

    def choice(self, prefix: str, request: Request, shown: str | None = None) -> Choice:
        """The plan of one layer, or "float". ``shown``: its name in the report, if another than the request's."""
        shown = shown or full_name(prefix, request)
        choice = self._choose(prefix, request, shown)
        scheme = choice if isinstance(choice, Scheme | str) else choice.scheme
        self.choices[shown] = scheme.to_dict() if isinstance(scheme, Scheme) else scheme
        return choice

    def _choose(self, prefix: str, request: Request, shown: str) -> Choice:
        names = [f"{prefix}.{name}" if prefix and name else prefix or name for name in request.names]
        modules = self.policy.names
        if any(self.policy.keeps(modules[name]) for name in names if name in modules):
            self.kept.append(Kept("+".join(names), type(request.layer).__name__, "named in keep"))
            return FLOAT
        statistics = self.calibration.layers.get(names[0])
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
            return FLOAT
        self.layers.append(self._entry(shown, decision))
        return decision.plan

    def mark(self) -> tuple[int, int, dict]:
        """Where the lists are now, for :meth:`forget`."""
        return len(self.layers), len(self.kept), dict(self.choices)

    def forget(self, mark: tuple[int, int, dict]) -> None:
        """Take back what was answered since ``mark``: the block was not made."""
        del self.layers[mark[0] :], self.kept[mark[1] :]
        self.choices = mark[2]

    @staticmethod
    def _entry(name: str, decision: Decision) -> QuantizedLayer:
        chosen = next(m for m in decision.measurements if m.scheme == decision.scheme)
        snr = None if math.isinf(decision.snr_db) else decision.snr_db
        several = len(chosen.per_bucket) > 1
        return QuantizedLayer(name, str(decision.scheme), snr, decision.reason, chosen.per_bucket if several else None)


_FEW = 16  # channels below which a convolution outside the blocks is not worth it: latents, images


class StoredPlans(Int8Plans):
    """Answers as a recipe says, without numbers: they are loaded later."""

    def __init__(self, policy: Policy, recipe: Recipe):
        super().__init__(policy, set(), None, AUTO, measured_only=False, target_db=0.0, float_below=None)
        self.recipe = recipe

    def allows(self, name: str) -> bool:
        return name in self.recipe.swapped

    def why_conv_stays(self, name: str, conv: nn.Conv2d) -> str | None:
        return None if name in self.recipe.schemes else "stays, as in the checkpoint"

    def _choose(self, prefix: str, request: Request, shown: str) -> Choice:
        if shown not in self.recipe.schemes:
            raise StoredElsewhere(f"the checkpoint has no layer {shown!r}")
        stored = self.recipe.schemes[shown]
        return FLOAT if stored == FLOAT else Scheme.from_dict(stored)


class StoredElsewhere(Exception):
    """A recipe is of another model; the message names the layer."""


def full_name(prefix: str, request: Request) -> str:
    """The name of a request's layer from the model down."""
    return f"{prefix}.{request.name}" if prefix else request.name
