"""``pydenoise.explain``: which backend would run a call, and why the others would not."""

from collections.abc import Callable
from dataclasses import dataclass

from pydenoise.ops import registry, weighted_conv


@dataclass(frozen=True)
class Explanation:
    """Verdicts of the backends on one call, in the order in which ``backend="auto"`` asks them."""

    op: str
    verdicts: tuple[tuple[str, str | None], ...]

    @property
    def chosen(self) -> str | None:
        """The backend that ``auto`` takes, or ``None`` if none can run."""
        return next((name for name, reason in self.verdicts if reason is None), None)

    def __str__(self) -> str:
        lines = [f"{self.op}: auto takes {self.chosen or 'no backend'}"]
        lines += [f"  {name:<10} {reason or 'can run'}" for name, reason in self.verdicts]
        return "\n".join(lines)


def _explain_conv(dims: int) -> Callable[..., Explanation]:
    def explain_call(input, weight, density, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation="none",
                     residual=None) -> Explanation:  # fmt: skip
        args = weighted_conv.prepare(
            dims, input, weight, density, bias, residual, stride, padding, dilation, groups, activation
        )
        return Explanation(f"weighted_conv{dims}d", tuple(registry.verdicts(weighted_conv.OP, args)))

    return explain_call


_EXPLAINERS = {f"weighted_conv{dims}d": _explain_conv(dims) for dims in (1, 2, 3)}


def explain(op: str, *args, **kwargs) -> Explanation:
    """Check a call of the functional ``op`` (a name of ``pydenoise.functional``) and print every backend's verdict.

    Returns the :class:`Explanation` it prints. Raises what the call itself would raise for bad arguments, and
    ``ValueError`` for an unknown op.
    """
    if op not in _EXPLAINERS:
        raise ValueError(f"op: expected one of {', '.join(_EXPLAINERS)}, got {op!r}")
    explanation = _EXPLAINERS[op](*args, **kwargs)
    print(explanation)
    return explanation
