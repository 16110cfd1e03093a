"""``pydenoise.explain``: which backend would run a call, and why the others would not."""

from collections.abc import Callable
from dataclasses import dataclass

from pydenoise.ops import (
    adaptive_bilateral_filter,
    attention,
    block_importance,
    block_sparse_attention,
    dcls_kernel,
    int8_conv2d,
    int8_linear,
    norm_quantize,
    ode_stage,
    quantize,
    registry,
    routed_norm,
    sampler_step,
    softmax_aggregate,
    token_confidence,
    wavelet_gate,
    weighted_conv,
)


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


def _weighted_conv(dims: int) -> Callable[..., tuple]:
    def prepare(input, weight, density, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation="none",
                residual=None) -> tuple:  # fmt: skip
        return weighted_conv.prepare(
            dims, input, weight, density, bias, residual, stride, padding, dilation, groups, activation
        )

    return prepare


# Name in pydenoise.functional: (op, what checks a call and makes the rows' arguments of it).
_CALLS: dict[str, tuple[str, Callable[..., tuple]]] = {
    **{f"weighted_conv{dims}d": (weighted_conv.OP, _weighted_conv(dims)) for dims in (1, 2, 3)},
    "quantize": (quantize.QUANTIZE, quantize.prepare),
    "quantize_dynamic": (quantize.DYNAMIC, quantize.prepare_dynamic),
    "dequantize": (quantize.DEQUANTIZE, quantize.prepare_dequantize),
    "group_norm_silu_quantize": (norm_quantize.GROUP_NORM, norm_quantize.prepare_group_norm),
    "layer_norm_quantize": (norm_quantize.LAYER_NORM, norm_quantize.prepare_layer_norm),
    "int8_conv2d": (int8_conv2d.OP, int8_conv2d.prepare),
    "int8_linear": (int8_linear.OP, int8_linear.prepare),
    "attention": (attention.OP, attention.prepare),
    "block_importance": (block_importance.OP, block_importance.prepare),
    "block_sparse_attention": (block_sparse_attention.OP, block_sparse_attention.prepare),
    "ode_stage": (ode_stage.OP, ode_stage.prepare),
    "ode_combination": (ode_stage.OP, ode_stage.prepare_combination),
    "sampler_step": (sampler_step.OP, sampler_step.prepare),
    "routed_norm": (routed_norm.OP, routed_norm.prepare),
    "softmax_aggregate": (softmax_aggregate.OP, softmax_aggregate.prepare),
    "token_confidence": (token_confidence.OP, token_confidence.prepare),
    "dcls_kernel": (dcls_kernel.OP, dcls_kernel.prepare),
    "adaptive_bilateral_filter": (adaptive_bilateral_filter.OP, adaptive_bilateral_filter.prepare),
    "wavelet_gate_down": (wavelet_gate.OP, wavelet_gate.prepare_down),
    "wavelet_gate_up": (wavelet_gate.OP, wavelet_gate.prepare_up),
    "wavelet_gate_pool": (wavelet_gate.OP_POOL, wavelet_gate.prepare_pool),
}


def explain(op: str, *args, **kwargs) -> Explanation:
    """Check a call of the functional ``op`` (a name of ``pydenoise.functional``) and print every backend's verdict.

    Returns the :class:`Explanation` it prints. Raises what the call itself would raise for bad arguments, and
    ``ValueError`` for an unknown op.
    """
    if op not in _CALLS:
        raise ValueError(f"op: expected one of {', '.join(_CALLS)}, got {op!r}")
    name, prepare = _CALLS[op]
    explanation = Explanation(op, tuple(registry.verdicts(name, prepare(*args, **kwargs))))
    print(explanation)
    return explanation
