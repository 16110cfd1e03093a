"""What the ways to differentiate a run share: the denoiser with leaves of its own, and the torch.autograd.Function.

A run goes forward without a graph; ``Gradient`` has its result, and asks an engine (``_checkpoint.py``,
``_adjoint.py``) for the gradients when they are wanted.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class Model:
    """A denoiser that is called again and again on detached tensors, and what its output depends on.

    Args:
        denoiser: any callable. Leaf tensors that it holds (parameters) are found when it is called.
        conditions: its keyword arguments.
        device: of the sample.
    """

    def __init__(self, denoiser: Callable[..., Tensor], conditions: Mapping[str, object], device: torch.device):
        self._denoiser = denoiser
        self.given: list[Tensor] = []  # conditioning that needs gradients, as the caller has it
        self.inner: list[Tensor] = []  # the same as leaves of a call
        self.conditions = self._leaves(conditions)
        self.parameters: list[Tensor] = []  # leaves that the denoiser holds
        self._known: set[int] = set()
        self.seen: Tensor | None = None  # the beginning of the last output
        kind = device.type
        # Without autocast's cache, whose copies of weights belong to the graph of the call that made them.
        self._autocast = {
            "device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,
        }  # fmt: skip

    def _leaves(self, value):
        if isinstance(value, Mapping):
            return {key: self._leaves(inner) for key, inner in value.items()}
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        self.given.append(value)
        self.inner.append(value.detach().requires_grad_())
        return self.inner[-1]

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x as a leaf, the output with its graph)."""
        with torch.enable_grad(), torch.autocast(**self._autocast):
            x = x.detach().requires_grad_()
            return x, self._denoiser(x, t, **self.conditions)

    def watched(self, x: Tensor, t: Tensor, **_: object) -> Tensor:
        """The output without its graph, whose leaves are remembered. The call is made as that of the way back, so that
        both compute the same."""
        begin = _next_number()
        x, output = self(x, t)
        if not isinstance(output, Tensor):
            return output
        self.seen = _beginning(output)
        for leaf in _leaves_of(output, begin):
            if id(leaf) not in self._known and leaf is not x and not any(leaf is own for own in self.inner):
                self._known.add(id(leaf))
                self.parameters.append(leaf)
        return output.detach()

    def check_same(self, output: Tensor, seen: Tensor) -> None:
        """Raise unless an output of the way back begins as ``seen``, that of the same call of the run."""
        if not seen.numel():
            return
        tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
        if bool(((_beginning(output) - seen).abs() > tolerance * seen.abs().max()).any()):
            raise ValueError(
                "denoiser: returned something else when it was called again; gradients need one without dropout or "
                "other random numbers of its own (eval mode)"
            )

    def backward(self, x: Tensor, outputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients with respect to x, and to ``inner`` and ``parameters``."""
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [*self.inner, *self.parameters]
        if not pairs:
            return torch.zeros_like(x), [None] * len(wanted)
        found = torch.autograd.grad([o for o, _ in pairs], [x, *wanted], [g for _, g in pairs], allow_unused=True)
        return torch.zeros_like(x) if found[0] is None else found[0], list(found[1:])


def _beginning(output: Tensor) -> Tensor:
    return output.detach().flatten()[:256].clone()


def _next_number() -> int:
    """The number that autograd gives to what is computed next."""
    with torch.enable_grad():
        return (torch.zeros((), requires_grad=True) * 1).grad_fn._sequence_nr()


def _leaves_of(output: Tensor, begin: int) -> Iterator[Tensor]:
    """The leaves of a graph, none of whose other nodes may be older than number ``begin``."""
    if output.grad_fn is None:
        if output.requires_grad:
            yield output
        return
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            yield node.variable
            continue
        if node._sequence_nr() < begin:
            raise ValueError(
                "denoiser: uses a tensor that was computed, under gradients, before the run; give it as conditioning "
                "(parameters, which are leaves, may be held)"
            )
        stack.extend(following for following, _ in node.next_functions if following is not None)


class Sums:
    """Gradients that are added up, each in its tensor's dtype."""

    def __init__(self, model: Model):
        self.values: list[Tensor | None] = [None] * (len(model.inner) + len(model.parameters))

    def add(self, grads: list[Tensor | None], weight: float = 1.0) -> None:
        """Add ``weight`` times each."""
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if self.values[i] is None:
                self.values[i] = grad * weight if weight != 1 else grad.clone()
            else:
                self.values[i].add_(grad, alpha=weight)


class Gradient(torch.autograd.Function):
    """The result of a run, as a function of where it began, the noise given, the conditioning and the parameters."""

    @staticmethod
    def forward(ctx, engine, result, *given):
        ctx.engine = engine
        ctx.save_for_backward(*given)
        return result.view_as(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        given = ctx.saved_tensors  # raises where one was changed in place since the run
        found = ctx.engine.backward(grad)
        found = [None if g is None else g.to(t.dtype).view(t.shape) for g, t in zip(found, given, strict=True)]
        return None, None, *found
