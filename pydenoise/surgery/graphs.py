"""Rewrite a traced model: every chain becomes one call of a fused layer, and the rest stays."""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import fx, nn

from pydenoise.nn.fused_conv import FUSED
from pydenoise.surgery import chains, dtypes, layers
from pydenoise.surgery.chains import Chain, Untraceable
from pydenoise.surgery.modules import keep_entry
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.report import Kept, Swap

# Not worth a line in the report.
_SMALL_TALK = ("getattr", "getitem")


class GraphSurgeon:
    """Turns a copy of ``model`` into a ``torch.fx.GraphModule`` of fused layers.

    ``make_policy`` makes the policy of the copy. ``stay_narrow``: with precision "bf16", values stay in bfloat16
    between layers; otherwise every fused layer returns the model's own dtype. After :meth:`operate`: ``swapped``,
    ``kept``, and ``sources`` (name of a fused layer -> of its convolution).
    """

    def __init__(
        self, model: nn.Module, args: tuple, kwargs: dict, make_policy: Callable[[nn.Module], Policy], stay_narrow: bool
    ):
        self.model = copy.deepcopy(model)
        self.args, self.kwargs = args, kwargs
        self.policy = make_policy(self.model)
        self.stay_narrow = stay_narrow
        self.swapped: list[Swap] = []
        self.kept: list[Kept] = []
        self.sources: dict[str, str] = {}
        self._fused: set[fx.Node] = set()
        self._narrow: set[fx.Node] = set()  # values in bfloat16 that the original had in another dtype
        self._names: dict[tuple, str] = {}

    def operate(self, check) -> fx.GraphModule:
        """The accelerated model. ``check(output)`` says why the trace's output is not the original's, or ``None``."""
        self.graph = chains.trace(self.model, self.args, self.kwargs)
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        reason = check(_record(self.model, self.graph, self.args, self.kwargs))
        if reason is not None:
            raise Untraceable(f"the traced model gives another result on the example ({reason})")
        self._drop_identities()
        found = chains.find_chains(self.graph, self.modules, self.policy)
        self._convs_kept = found.kept
        self._follow_dtypes(found.chains)
        for chain in found.chains:
            self._replace(chain)
        self._cast_back()
        self._relax_layout()
        self._finish_outputs()
        self.graph.owning_module = None  # the module of the recording run; the rewritten graph gets its own
        self.graph.lint()
        self._list_kept()
        return fx.GraphModule(self.model, self.graph, class_name=type(self.model).__name__)

    # ---------------------------------------------------------------------------------------------- before

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                continue
            module = self.modules[node.target]
            if layers.is_identity(module) and not self.policy.keeps(module):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _follow_dtypes(self, found: list[Chain]) -> None:
        """Fill ``_narrow``, and take residuals out of chains where the sum would be rounded to bfloat16 needlessly."""
        ends = {chain.end: chain for chain in found}
        interior = {node: chain for chain in found for node in chain.nodes[:-1]}
        for node in self.graph.nodes:
            chain = ends.get(node) or interior.get(node)
            if chain is None:
                if self._narrow and dtypes.keeps_dtype(node, self.modules, self._narrow):
                    self._narrow.add(node)
            elif self._narrows(chain):
                if node is chain.end and chain.residual is not None and chain.residual not in self._narrow:
                    chain.nodes.pop()
                    chain.residual, chain.negate = None, False
                elif self.stay_narrow:
                    self._narrow.add(node)

    def _narrows(self, chain: Chain) -> bool:
        """Whether ``chain`` will compute in a narrower dtype than the original did."""
        return self.policy.dtype is not self._weight(chain).dtype and self.policy.dtype is torch.bfloat16

    def _weight(self, chain: Chain) -> torch.Tensor:
        return self.modules[chain.conv.target].weight

    # ---------------------------------------------------------------------------------------------- chains

    def _replace(self, chain: Chain) -> None:
        name = self._fused_layer(chain)
        source, end = chain.conv.args[0], chain.end
        operands = (source,)
        if chain.residual is not None:
            # Its node may have been replaced since the chain was found: read it from the sum itself.
            operands = (source, next(n for n in end.all_input_nodes if n is not chain.nodes[-2]))
        with self.graph.inserting_before(end):
            fused = self.graph.create_node("call_module", name, operands)
        fused.meta = dict(end.meta)
        end.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            self._narrow.discard(node)
            self.graph.erase_node(node)
        self._fused.add(fused)
        if self.stay_narrow and self._narrows(chain):
            self._narrow.add(fused)

    def _fused_layer(self, chain: Chain) -> str:
        """Name of the fused module for ``chain``; calls with the same weights and epilogue share it."""
        conv = self.modules[chain.conv.target]
        norm = self.modules[chain.norm.target] if chain.norm is not None else None
        key = (id(conv), id(norm), chain.activation, chain.negate)
        if key in self._names:
            return self._names[key]
        narrows = self._narrows(chain)
        layer = FUSED[layers.conv_dims(conv)].from_float(
            conv,
            batch_norm=norm,
            activation=chain.activation,
            negate=chain.negate,
            dtype=self.policy.dtype if narrows else None,
            output_dtype=None if not narrows else self.policy.dtype if self.stay_narrow else conv.weight.dtype,
        )
        name = self._free_name(chain.conv.target)
        parent, _, attribute = name.rpartition(".")
        self.model.get_submodule(parent).add_module(attribute, layer)
        self._names[key], self.sources[name] = name, chain.conv.target
        self.swapped.append(_swap(name, conv, chain, self.modules, layer))
        return name

    def _free_name(self, wanted: str) -> str:
        """``wanted``, so that the state dict keeps its keys, unless another call of that convolution has it."""
        taken = {*self._names.values(), *self._convs_kept}
        name, number = wanted, 2
        # The convolution itself must stay reachable for its other calls: only its first fused form takes its place.
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        return name

    # ---------------------------------------------------------------------------------------------- after

    def _cast_back(self) -> None:
        """Give values in bfloat16 back in the original's dtype to operations that need it."""
        cast: dict[fx.Node, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node in self._fused or node in self._narrow or node.op == "output":
                continue
            if dtypes.reads_metadata(node) or dtypes.promotes(node):
                continue
            for source in node.all_input_nodes:
                if source not in self._narrow:
                    continue
                if len(source.users) > 1 and chains.mutates(node, self.modules):
                    raise Untraceable(f"{node.name} may write into a bfloat16 value that others read")
                if source not in cast:
                    with self.graph.inserting_after(source):
                        cast[source] = self.graph.call_method("to", (source, source.meta["tensor"].dtype))
                    cast[source].meta = dict(source.meta, inserted=True)
                node.replace_input_with(source, cast[source])

    def _relax_layout(self) -> None:
        """``view`` needs a memory layout that fused layers do not keep; ``reshape`` gives the same values from any."""
        for node in self.graph.nodes:
            if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
                if self._written_through(node):
                    raise Untraceable(f"its forward writes through {node.name}, a view of another tensor")
                node.target = "reshape"

    def _written_through(self, view: fx.Node) -> bool:
        """Whether an operation writes into memory that ``view`` may share with its source."""
        todo, seen = list(view.users), set()
        while todo:
            node = todo.pop()
            if node in seen or node in self._fused:
                continue
            seen.add(node)
            if chains.mutates(node, self.modules):
                return True
            fresh = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
            if not (node.op == "call_module" and isinstance(self.modules[node.target], fresh)):
                todo += node.users
        return False

    def _finish_outputs(self) -> None:
        """Return the original's dtypes, and contiguous memory where the original did."""
        output = next(node for node in self.graph.nodes if node.op == "output")

        def finish(node: fx.Node) -> fx.Node:
            info = node.meta.get("tensor")
            if info is None:
                return node
            with self.graph.inserting_before(output):
                if node in self._narrow:
                    node = self.graph.call_method("to", (node, info.dtype))
                    node.meta["inserted"] = True
                if info.contiguous and len(info.shape) in (4, 5):
                    node = self.graph.call_method("contiguous", (node,))
                    node.meta["inserted"] = True
            return node

        output.args = fx.map_arg(output.args, finish)

    def _list_kept(self) -> None:
        seen = set()
        for node in self.graph.nodes:
            if node.op == "call_module" and node not in self._fused and node.target not in seen:
                seen.add(node.target)
                self.kept.append(self._keep_entry(node.target))
            elif node.op in ("call_function", "call_method") and not node.meta.get("inserted") and node.meta["moves"]:
                target = node.target
                name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
                if name not in _SMALL_TALK:
                    self.kept.append(Kept(node.name, f"{name}()", "the model's own code: runs as it is"))

    def _keep_entry(self, name: str) -> Kept:
        entry = keep_entry(name, self.modules[name], self.policy)
        entry.reason = self._convs_kept.get(name, entry.reason)
        return entry


# -------------------------------------------------------------------------------------------------------- helpers


class _Info:
    """What the original had at one node of the graph."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype, self.contiguous = tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()


class _Recorder(fx.Interpreter):
    def run_node(self, node):
        result = super().run_node(node)
        node.meta["tensor"] = _Info(result) if isinstance(result, torch.Tensor) else None
        leaves = result if isinstance(result, tuple | list) else (result,)
        node.meta["moves"] = any(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return result


def _record(model: nn.Module, graph: fx.Graph, args: tuple, kwargs: dict):
    """Run ``graph`` on the example, noting each value's shape, dtype and layout; returns the output."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = bound.signature.parameters
    values = [value for name, value in bound.arguments.items() if parameters[name].kind not in variadic]
    return _Recorder(fx.GraphModule(model, graph)).run(*values)


def _swap(name: str, conv: nn.Module, chain: Chain, modules: dict[str, nn.Module], layer: nn.Module) -> Swap:
    fused = []
    if layers.weighted_dims(conv) is not None:
        fused.append("density (folded)")
    if chain.norm is not None:
        fused.append(f"{type(modules[chain.norm.target]).__name__} (folded)")
    if chain.activation != "none":
        fused.append(chain.activation)
    if chain.residual is not None:
        fused.append("residual - y" if chain.negate else "+ residual")
    return Swap(name, layers.describe(conv), tuple(fused), type(layer).__name__)
