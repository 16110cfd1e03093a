"""What the caller of ``accelerate`` allows: the precision, and the layers to keep."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from pydenoise.surgery import layers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # of layers that stay in float


class Policy:
    """``keep`` patterns resolved on one model, and the dtype that fused layers compute in."""

    def __init__(self, model: nn.Module, precision: str, keep: Iterable[str]):
        self.precision = precision
        self.dtype = PRECISIONS[precision]
        self.names = dict(model.named_modules(remove_duplicate=False))
        self._kept = _resolve(self.names, keep)

    def keeps(self, module: nn.Module) -> bool:
        """Whether the caller asked to keep ``module``."""
        return id(module) in self._kept

    def why_conv_stays(self, module: nn.Module) -> str | None:
        """Why the convolution ``module`` stays, or ``None`` where it may be swapped."""
        return "named in keep" if self.keeps(module) else layers.why_conv_stays(module, self.dtype)


class StoredPolicy(Policy):
    """The policy of a checkpoint: the modules named in ``swapped`` are swapped, on the meta device too; others stay."""

    def __init__(self, model: nn.Module, keep: Iterable[str], swapped: Iterable[str]):
        super().__init__(model, "int8", ())
        self._kept = _resolve(self.names, [pattern for pattern in keep if _matches(self.names, pattern)])
        self._swapped = {id(self.names[name]) for name in swapped if name in self.names}

    def why_conv_stays(self, module: nn.Module) -> str | None:
        if self.keeps(module):
            return "named in keep"
        return None if id(module) in self._swapped else "stays, as in the checkpoint"


def _matches(names: dict[str, nn.Module], pattern: str) -> list[nn.Module]:
    return [module for name, module in names.items() if name and fnmatchcase(name, pattern)]


def _resolve(names: dict[str, nn.Module], keep: Iterable[str]) -> set[int]:
    """Ids of the modules that ``keep`` names, with everything inside them."""
    kept: set[int] = set()
    for pattern in keep:
        if not isinstance(pattern, str):
            raise TypeError(f"keep: expected names or glob patterns (str), got {type(pattern).__name__}")
        matched = _matches(names, pattern)
        if not matched:
            known = ", ".join(name for name in list(names)[1:9])
            raise ValueError(f"keep: {pattern!r} matches no module of the model; its modules are {known}, ...")
        kept.update(id(inner) for module in matched for inner in module.modules())
    return kept
