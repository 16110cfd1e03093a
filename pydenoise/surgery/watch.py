"""While the example runs: which backend and which kernel each swapped layer takes."""

from collections.abc import Callable

from torch import Tensor, nn

from pydenoise.nn.fused_conv import FUSED
from pydenoise.ops import registry
from pydenoise.ops import weighted_conv as op
from pydenoise.surgery.report import Swap


class Watch:
    """Notes in each of ``swapped`` the shape of the layer's input, its kernel and its backend, as a context manager."""

    def __init__(self, model: nn.Module, swapped: list[Swap]):
        self.layers = [(swap, model.get_submodule(swap.name)) for swap in swapped]

    def __enter__(self) -> None:
        self.handles = []
        for swap, layer in self.layers:
            if type(layer) in FUSED.values():
                self.handles.append(layer.register_forward_pre_hook(self._of_fused(swap)))
            else:
                before: list[int] = []
                self.handles.append(layer.register_forward_pre_hook(self._before(before), with_kwargs=True))
                self.handles.append(layer.register_forward_hook(self._of_int8(swap, before), with_kwargs=True))

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def _of_fused(swap: Swap) -> Callable:
        def note(layer, arguments):
            x = arguments[0]
            swap.shape, swap.kernel = tuple(x.shape), layer.kernel
            if swap.kernel != "chosen per call":
                swap.backend = "cpu"
                return
            row = op.prepare(
                layer.dims, x.to(layer.weight.dtype), layer.weight, None, layer.bias, None, layer.stride, layer.padding,
                layer.dilation, layer.groups, layer.activation,
            )  # fmt: skip
            chosen = next((name for name, reason in registry.verdicts(op.OP, row) if reason is None), "none")
            swap.backend = f"{chosen} (plain torch)" if chosen == registry.REFERENCE else chosen

        return note

    @staticmethod
    def _before(before: list[int]) -> Callable:
        return lambda layer, args, kwargs: before.append(registry.fallbacks.total())

    @staticmethod
    def _of_int8(swap: Swap, before: list[int]) -> Callable:
        """Blocks and layers of int8 run several operations: their backend is their device, unless one fell back."""

        def note(layer, args, kwargs, output):
            fell_back = registry.fallbacks.total() > before.pop()
            x = next(iter((*args, *kwargs.values())))
            x = x[0] if isinstance(x, tuple) else x
            if isinstance(x, Tensor):
                swap.shape = tuple(x.shape)
                swap.backend = f"{registry.REFERENCE} (plain torch)" if fell_back else x.device.type

        return note
