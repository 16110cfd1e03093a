"""What an int8 model has beside its layers: the switch of its scales per timestep, its recorded forward, its recipe."""

import inspect

from torch import Tensor, nn

from pydenoise import recording
from pydenoise.nn._int8 import Int8Layer
from pydenoise.nn.timestep_scales import PER_TIMESTEP, TimestepScales
from pydenoise.quantization import TimestepBuckets

SCALES = "timestep_scales"  # name of the submodule
NUMBERS = ("timestep", "timesteps", "t", "time", "sigma")  # arguments that change from call to call


class SelectScales:
    """Forward pre-hook of a model with :class:`TimestepScales`: tells them the call's timestep."""

    def __init__(self, model: nn.Module, argument: str | int):
        parameters = inspect.signature(model.forward).parameters
        self.name = list(parameters)[argument] if isinstance(argument, int) else argument
        self.index = list(parameters).index(self.name) if self.name in parameters else None
        default = parameters[self.name].default if self.name in parameters else inspect.Parameter.empty
        self.default = None if default is inspect.Parameter.empty else default

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        value = kwargs.get(self.name, self.default)
        if self.index is not None and self.index < len(args):
            value = args[self.index]
        if not isinstance(value, Tensor | int | float):
            raise TypeError(f"{self.name}: expected a tensor or a number, got {type(value).__name__}")
        getattr(model, SCALES).select(value)


def attach_timesteps(model: nn.Module, timesteps: TimestepBuckets, argument: str | int | None) -> bool:
    """Switch the scales of "per_timestep" layers at each call, in front of the forward; whether there are any."""
    layers = [module for module in model.modules() if isinstance(module, Int8Layer)]
    if argument is None or not any(layer.scheme.granularity == PER_TIMESTEP for layer in layers):
        return False
    model.add_module(SCALES, TimestepScales(model, timesteps))
    model.register_forward_pre_hook(SelectScales(model, argument), with_kwargs=True)
    return True


def why_not_recorded(model: nn.Module) -> str | None:
    """Why the forward of ``model`` cannot be recorded at all, or ``None``."""
    reason = recording.unavailable()
    if reason is None and any(not t.is_cpu for t in [*model.parameters(), *model.buffers()]):
        reason = "the model is not on the CPU"
    return reason


def record(model: nn.Module) -> recording.RecordedForward:
    """Record the forward of ``model`` once per input shape from now on."""
    return recording.record_forward(model, NUMBERS)
