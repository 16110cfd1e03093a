"""What a model is called with: a tensor, positional arguments, keyword arguments, or both."""

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of one call of a model."""

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: object, name: str) -> "Arguments":
        """``inputs``: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or ``Arguments``.

        Raises ``TypeError`` for anything else, calling it ``name``.
        """
        if isinstance(inputs, Arguments):
            return inputs
        if isinstance(inputs, Tensor):
            return cls((inputs,))
        if isinstance(inputs, dict):
            if not all(isinstance(key, str) for key in inputs):
                raise TypeError(f"{name}: expected a dict of keyword arguments, with str keys")
            return cls((), dict(inputs))
        if isinstance(inputs, tuple | list):
            return cls(tuple(inputs))
        raise TypeError(
            f"{name}: expected a tensor, a tuple or list of positional arguments, or a dict of keyword "
            f"arguments, got {type(inputs).__name__}"
        )

    def fresh(self, dtype: torch.dtype | None = None) -> tuple[tuple, dict]:
        """Copies (a model may write into its arguments), floating tensors in ``dtype`` if it is given."""

        def clone(value):
            if not isinstance(value, Tensor):
                return value
            value = value.detach()
            return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()

        return pytree.tree_map(clone, (self.args, self.kwargs))


_USUAL_NAMES = ("timestep", "timesteps", "t")


def find_timestep(model: nn.Module, argument: str | int | None) -> str | int | None:
    """Name or index of ``model``'s timestep argument, or ``None`` if it has none.

    "auto" looks for a parameter of forward called timestep, timesteps or t. A name or an index must exist
    (``ValueError``); ``None`` stays.
    """
    if argument is None:
        return None
    if isinstance(argument, bool) or not isinstance(argument, str | int):
        raise TypeError(f"timestep_argument: expected a name, an index or None, got {type(argument).__name__}")
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward written in C
        return None if argument == "auto" else argument
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if argument == "auto":
        return next((name for name in _USUAL_NAMES if name in named), None)
    variadic = {p.kind for p in parameters}
    if isinstance(argument, int):
        if not 0 <= argument < len(named) and inspect.Parameter.VAR_POSITIONAL not in variadic:
            raise ValueError(f"timestep_argument: expected an index below {len(named)}, got {argument}")
    elif argument not in named and inspect.Parameter.VAR_KEYWORD not in variadic:
        raise ValueError(f"timestep_argument: forward takes {', '.join(named)}; got {argument!r}")
    return argument


def timesteps_of(model: nn.Module, call: Arguments, argument: str | int) -> Tensor:
    """The timesteps of one call, float64 [n] on the CPU; n is 1 or the batch.

    Raises:
        ValueError: the call has no such argument, or it is no number.
    """
    value = None
    if isinstance(argument, int):
        value = call.args[argument] if argument < len(call.args) else None
    elif argument in call.kwargs:
        value = call.kwargs[argument]
    else:
        try:
            value = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments.get(argument)
        except TypeError as error:
            raise ValueError(f"batches: the model cannot be called with this batch ({error})") from error
    if value is None:
        raise ValueError(f"batches: a batch has no timestep argument {argument!r}")
    try:
        values = torch.as_tensor(value).detach().double().flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"batches: the timestep argument {argument!r} is no number ({error})") from error
    if values.numel() == 0 or not torch.isfinite(values).all():
        raise ValueError(f"batches: the timestep argument {argument!r} is empty or not finite")
    return values
