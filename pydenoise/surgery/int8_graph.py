"""Turn the fused layers of a traced model into int8 ones, and let neighbours hand int8 codes to each other."""

import torch
from torch import fx

from pydenoise.nn._plans import Request, keeps_float
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.nn.int8_chain import fold_smoothing
from pydenoise.nn.int8_conv2d import Int8Conv2d, plain_conv
from pydenoise.surgery.int8_plans import Int8Plans
from pydenoise.surgery.report import Kept, Swap

OUTER = "the first or the last convolution, which stays in float"
SHARED = "called more than once: one scale for its inputs would be wrong for some"


class Int8GraphSurgeon:
    """Works on the ``fx.GraphModule`` of fused layers that :class:`GraphSurgeon` made. ``swapped`` are its entries."""

    def __init__(self, model: fx.GraphModule, plans: Int8Plans, swapped: list[Swap]):
        self.model, self.plans = model, plans
        self.entries = {swap.name: swap for swap in swapped}
        self.kept: list[Kept] = []

    def operate(self) -> fx.GraphModule:
        """The int8 model; raises nothing: what cannot be quantized stays a fused float layer, with a reason."""
        calls = [node for node in self.model.graph.nodes if self._is_fused(node)]
        outer = {calls[0], calls[-1]} if len(calls) > 2 else set()
        counts: dict[str, int] = {}
        for node in calls:
            counts[node.target] = counts.get(node.target, 0) + 1
        for node in calls:
            if node in outer or counts[node.target] > 1:
                self.kept.append(Kept(node.target, "FusedConv2d", OUTER if node in outer else SHARED))
            else:
                self._quantize(node)
        self._hand_codes_on()
        self.model.graph.lint()
        self.model.recompile()
        return self.model

    def _is_fused(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._module(node), FusedConv2d)

    def _module(self, node: fx.Node) -> torch.nn.Module:
        return self.model.get_submodule(node.target)

    def _quantize(self, node: fx.Node) -> None:
        fused, name = self._module(node), node.target
        try:
            conv = plain_conv(fused, name)
            choice = self.plans.choice("", Request((name,), conv))
            if keeps_float(choice):
                return
            layer = Int8Conv2d.from_float(conv, choice, activation=fused.activation, name=name)
        except (TypeError, ValueError) as reason:
            self.kept.append(Kept(name, "FusedConv2d", f"has no int8 form: {reason}"))
            return
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, layer)
        if len(node.args) > 1:  # the residual is keyword-only here
            node.args, node.kwargs = node.args[:1], {"residual": node.args[1]}
        entry = self.entries[name]
        entry.replacement, entry.kernel = "Int8Conv2d", "int8"

    # ------------------------------------------------------------------------------------------------ int8 between

    def _hand_codes_on(self) -> None:
        """Where the only reader of a layer's output quantizes it with a known scale, write its codes at once."""
        for node in self.model.graph.nodes:
            readers = list(node.users)
            if len(readers) != 1 or not self._reads_static_codes(readers[0], node):
                continue
            reader = readers[0]
            if node.op != "call_module":
                continue
            if node.kwargs.get("residual") is None and len(node.args) == 1:
                fold_smoothing(self._module(node), self._module(reader))
            if not isinstance(self._module(node), Int8Conv2d) or self._module(reader).channel_scale is not None:
                continue
            with self.model.graph.inserting_before(node):
                scale = self.model.graph.get_attr(f"{reader.target}.input_scale")
                zero_point = None
                if self._module(reader).input_zero_point is not None:
                    zero_point = self.model.graph.get_attr(f"{reader.target}.input_zero_point")
            node.kwargs = {
                **node.kwargs, "out_dtype": torch.int8, "out_scale": scale,
                "out_zero_point": 0 if zero_point is None else zero_point,
            }  # fmt: skip
            reader.args = ((node, scale, zero_point),)

    def _reads_static_codes(self, reader: fx.Node, source: fx.Node) -> bool:
        if reader.op != "call_module" or reader.args != (source,) or source in reader.kwargs.values():
            return False
        layer = self._module(reader)
        return isinstance(layer, Int8Conv2d) and layer.scheme.granularity == "per_tensor"
