"""Turn the fused layers of a traced model into int8 ones, and let neighbours hand int8 codes to each other."""

import copy
from collections import Counter

import torch
from torch import fx, nn

from pydenoise.nn._plans import Request, keeps_float
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.nn.int8_chain import fold_smoothing
from pydenoise.nn.int8_conv2d import Int8Conv2d, plain_conv
from pydenoise.surgery.int8_plans import OUTER, Int8Plans
from pydenoise.surgery.report import Kept, Swap


class Int8GraphModule(fx.GraphModule):
    """A graph of int8 layers whose copies and pickles keep what stands beside the graph: hooks, recordings, timesteps.

    A plain ``fx.GraphModule`` keeps only what its graph calls.
    """

    def _beside(self) -> dict[str, object]:
        """What is kept, by name in ``__dict__``; modules that the graph does not call are under "modules"."""
        names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "forward", "int8_recipe", "training")
        used = [node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        called = {target.partition(".")[0] for target in used}
        modules = {name: module for name, module in self._modules.items() if name not in called}
        return {**{name: self.__dict__[name] for name in names if name in self.__dict__}, "modules": modules}

    def _set_beside(self, values: dict[str, object]) -> None:
        self._modules.update(values.pop("modules"))
        self.__dict__.update(values)

    def __deepcopy__(self, memo: dict) -> "Int8GraphModule":
        twin = super().__deepcopy__(memo)
        twin._set_beside(copy.deepcopy(self._beside(), memo))
        return twin

    def __reduce__(self) -> tuple:
        function, (body, imports) = super().__reduce__()
        beside = self._beside()
        body = {name: value for name, value in body.items() if name not in beside}
        body["_modules"] = {k: v for k, v in self._modules.items() if k not in beside["modules"]}
        return _rebuilt, (function, body, imports, self.__class__.__name__), beside

    def __setstate__(self, state: dict) -> None:
        self._set_beside(dict(state))


def _rebuilt(function, body: dict, imports: str, name: str) -> Int8GraphModule:
    module = function(body, imports)
    return Int8GraphModule(module, module.graph, name)


class Int8GraphSurgeon:
    """Works on the ``fx.GraphModule`` of fused layers that :class:`GraphSurgeon` made.

    Args:
        swapped: its entries of the report. sources: name of a fused layer -> of the convolution that it was made of.
    """

    def __init__(self, model: fx.GraphModule, plans: Int8Plans, swapped: list[Swap], sources: dict[str, str]):
        self.model, self.plans, self.sources = model, plans, sources
        self.entries = {swap.name: swap for swap in swapped}
        self.kept: list[Kept] = []

    def operate(self) -> Int8GraphModule:
        """The int8 model; raises nothing: what cannot be quantized stays a fused float layer, with a reason."""
        calls = [node for node in self.model.graph.nodes if self._is_fused(node)]
        outer = {calls[0].target, calls[-1].target} if len(calls) > 2 else set()
        self._calls = Counter(node.target for node in calls)
        for name in self._calls:
            if name in outer:
                self.kept.append(Kept(name, "FusedConv2d", OUTER))
            else:
                self._quantize(name)
        for node in calls:
            if isinstance(self._module(node), Int8Conv2d) and len(node.args) > 1:  # the residual is keyword-only here
                node.args, node.kwargs = node.args[:1], {"residual": node.args[1]}
        self._hand_codes_on()
        self.model.graph.lint()
        return Int8GraphModule(self.model, self.model.graph, type(self.model).__name__).eval()

    def _is_fused(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self._module(node), FusedConv2d)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(node.target)

    def _quantize(self, name: str) -> None:
        fused = self.model.get_submodule(name)
        try:
            conv = plain_conv(fused, name)
            choice = self.plans.choice("", Request((self.sources[name],), conv), shown=name)
            if keeps_float(choice):
                return
            layer = Int8Conv2d.from_float(conv, choice, activation=fused.activation, name=name)
        except (TypeError, ValueError) as reason:
            self.kept.append(Kept(name, "FusedConv2d", f"has no int8 form: {reason}"))
            return
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, layer)
        entry = self.entries[name]
        entry.replacement, entry.kernel = "Int8Conv2d", "int8"

    # ------------------------------------------------------------------------------------------------ int8 between

    def _hand_codes_on(self) -> None:
        """Where the only reader of a layer's output quantizes it with a known scale, write its codes at once."""
        for node in self.model.graph.nodes:
            readers = list(node.users)
            if node.op != "call_module" or len(readers) != 1 or not self._reads_static_codes(readers[0], node):
                continue
            reader = readers[0]
            alone = self._calls[node.target] == 1 and self._calls[reader.target] == 1
            if alone and node.kwargs.get("residual") is None and len(node.args) == 1:
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
