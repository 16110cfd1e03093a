"""Route the calls of ``F.scaled_dot_product_attention`` inside chosen modules, and those only, to another function.

A torch function mode catches the calls, however the module has imported the function. Modes belong to a thread and are
active only while a chosen module's forward runs, so nothing global is changed.
"""

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pydenoise.nn._graph_break import keep_out_of_graphs

# route(layer, query, key, value, options) -> output, or None where the original is to be called. `options`: the named
# arguments behind value.
Route = Callable[[str, Tensor, Tensor, Tensor, dict], Tensor | None]

_OPTIONS = ("attn_mask", "dropout_p", "is_causal")  # that may be given by position
_NO_GRAPH = "while SparseD is attached, the forward of this module runs outside of compiled graphs"


@dataclass
class _Frame:
    """One running forward. ``route`` is ``None`` where calls are left as they are; ``total`` counts inner ones too."""

    name: str
    route: Route | None
    calls: int = 0
    total: int = 0


_local = threading.local()


def _frames() -> list[_Frame]:
    if not hasattr(_local, "frames"):
        _local.frames = []
    return _local.frames


class _Catch(TorchFunctionMode):
    """Hands attention calls to the innermost running forward."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # calls the function by a name of its own module
            return _multi_head_attention()(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
    frame, output = _frames()[-1], None
    frame.calls += 1
    frame.total += 1
    if frame.route is not None:
        layer = frame.name if frame.calls == 1 else f"{frame.name}#{frame.calls}"
        options = {**dict(zip(_OPTIONS, args, strict=False)), **kwargs}
        output = frame.route(layer, query, key, value, options)
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs) if output is None else output


@functools.cache
def _multi_head_attention() -> Callable:
    """``F.multi_head_attention_forward`` with attention routed: the same code in a namespace of its own."""
    original = F.multi_head_attention_forward
    names = {
        **original.__globals__,
        "scaled_dot_product_attention": _attention,
        "has_torch_function": lambda tensors: False,  # it was asked already
    }
    copy = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


class RoutedForward:
    """Takes the place of a module's ``forward``: calls it with the attention calls inside routed.

    Kept as an attribute of the module, and copied with it.

    Args:
        route: where attention calls go; ``None``: to the original.
        cross: name of an argument that, where it is given, makes a call cross-attention, which is not routed.
        must_call: what is wrong if the forward makes no attention call.
    """

    def __init__(self, module: nn.Module, name: str, route: Route | None, *, cross: str = "", must_call: str = ""):
        keep_out_of_graphs(RoutedForward, "__call__", _NO_GRAPH)
        self.original = module.forward
        self.name, self.route, self.cross, self.must_call = name, route, cross, must_call
        self.replaced = module.__dict__.get("forward")
        self.__wrapped__ = self.original  # what inspect.signature shows
        module.__dict__["forward"] = self

    def __call__(self, *args, **kwargs):
        frames, frame = _frames(), _Frame(self.name, None if self._is_cross(args, kwargs) else self.route)
        frames.append(frame)
        try:
            with contextlib.nullcontext() if len(frames) > 1 else _Catch():
                output = self.original(*args, **kwargs)
        finally:
            frames.pop()
            if frames:
                frames[-1].total += frame.total
        if self.must_call and frame.total == 0:
            raise RuntimeError(self.must_call)
        return output

    def _is_cross(self, args: tuple, kwargs: dict) -> bool:
        if not self.cross:
            return False
        return inspect.signature(self.original).bind_partial(*args, **kwargs).arguments.get(self.cross) is not None

    def restore(self, module: nn.Module) -> None:
        """Put the module's own forward back. Raises ``RuntimeError`` if another one took this one's place."""
        if module.__dict__.get("forward") is not self:
            raise RuntimeError(f"the forward of {self.name!r} was replaced after attach_sparsed; undo that first")
        if self.replaced is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self.replaced
