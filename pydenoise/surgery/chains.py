"""Trace a model with torch.fx and find the chains convolution -> batch norm -> activation -> residual in its graph."""

import inspect
import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from pydenoise.surgery import inplace, layers
from pydenoise.surgery.policy import Policy

_ADDS = (operator.add, torch.add, "add")
_INPLACE_ADDS = (inplace.iadd, "add_")
_SUBS = (operator.sub, torch.sub, torch.subtract, "sub")
# Arguments in front of `inplace`, where it may be given by position.
_BEFORE_INPLACE = {F.relu: 1, F.silu: 1, F.leaky_relu: 2}


class Untraceable(Exception):
    """The model's forward cannot be written down as a graph; the message says why."""


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is: see :mod:`pydenoise.surgery.inplace`."""


def _recorder(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in inplace.FUNCTIONS:
    setattr(_Proxy, f"__{_function.__name__}__", _recorder(_function))


class _Tracer(fx.Tracer):
    """Treats as one node what must keep its own call: convolutions of ours, hooked and parametrized modules."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if type(module).__module__.startswith("pydenoise.nn"):
            return True
        if layers.hooks_reason(module) is not None or isinstance(module, torch.jit.ScriptModule):
            return True
        if isinstance(module, nn.modules.conv._ConvNd):  # subclasses with a forward of their own included
            return True
        return super().is_leaf_module(module, qualified_name)

    def create_arg(self, a):
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and id(a) not in self.known_tensors:
            raise Untraceable("its forward makes tensors, which a trace would freeze at their present values")
        return super().create_arg(a)

    def proxy(self, node):
        return _Proxy(node, self)

    def trace(self, root, concrete_args=None):
        self.known_tensors = {id(t) for t in (*root.parameters(), *root.buffers())}
        return super().trace(root, concrete_args)


def trace(model: nn.Module, args: tuple, kwargs: dict) -> fx.Graph:
    """The graph of ``model.forward``; arguments that the example leaves at their defaults are fixed at those.

    Raises :class:`Untraceable`.
    """
    reason = layers.hooks_reason(model)
    if reason is not None:
        raise Untraceable(f"the model itself {reason}")
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        given = dict(bound.arguments)
        bound.apply_defaults()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = bound.signature.parameters
        if any(parameters[name].kind in variadic and given.get(name) for name in parameters):
            raise Untraceable("its forward takes *args or **kwargs, and the example uses them")
        # A proxy is never `None`, so a test for it would take the wrong branch: what is absent is fixed.
        fixed = {
            name: value
            for name, value in bound.arguments.items()
            if (name not in given or value is None) and parameters[name].kind not in variadic
        }
        return _Tracer().trace(model, concrete_args=fixed or None)
    except Untraceable:
        raise
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        text = str(error).strip().splitlines()
        raise Untraceable(f"{type(error).__name__}: {text[0] if text else 'no message'}") from error


# -------------------------------------------------------------------------------------------------------- chains


@dataclass
class Chain:
    """One convolution and what follows it; ``nodes`` in order, the convolution first."""

    conv: fx.Node
    nodes: list[fx.Node]
    norm: fx.Node | None = None
    activation: str = "none"
    activation_node: fx.Node | None = None
    residual: fx.Node | None = None
    negate: bool = False  # residual - conv(x)

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


@dataclass
class Layers:
    """The convolutions of a graph: chains to swap, and (module name -> reason) for those that stay."""

    chains: list[Chain] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def find_chains(graph: fx.Graph, modules: dict[str, nn.Module], policy: Policy) -> Layers:
    """All chains of ``graph`` that ``policy`` allows, their residuals included."""
    found = Layers()
    order = {node: position for position, node in enumerate(graph.nodes)}
    mutations = [order[n] for n in graph.nodes if mutates(n, modules) and not _writes_private_memory(n, modules)]
    for node in graph.nodes:
        if node.op != "call_module" or layers.conv_dims(modules[node.target]) is None:
            continue
        reason = policy.why_conv_stays(modules[node.target])
        if reason is None and (len(node.args) != 1 or node.kwargs):
            reason = "is called with more than one argument"
        if reason is not None:
            found.kept[node.target] = reason
            continue
        found.chains.append(_follow(node, modules, policy, order, mutations))
    _add_residuals(found.chains, modules, order, mutations)
    return found


def _follow(conv: fx.Node, modules, policy, order, mutations) -> Chain:
    """The chain that starts at ``conv``, without a residual."""
    chain = Chain(conv, [conv])
    module = modules[conv.target]
    user = _only_user(conv)
    if user is not None and user.op == "call_module" and not policy.keeps(modules[user.target]):
        reason = layers.why_norm_stays(modules[user.target], layers.conv_dims(module), module.out_channels)
        if reason is None and len(user.args) == 1 and not _mutated_between(conv, user, order, mutations, [conv, user]):
            chain.norm = user
            chain.nodes.append(user)
    user = _only_user(chain.end)
    activation = None if user is None else _activation(user, chain.end, modules, policy)
    if activation is not None and not _mutated_between(conv, user, order, mutations, chain.nodes + [user]):
        chain.activation, chain.activation_node = activation, user
        chain.nodes.append(user)
    return chain


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, if it is not the graph's output."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return None if user is None or user.op == "output" else user


def _activation(node: fx.Node, value: fx.Node, modules, policy) -> str | None:
    """The activation that ``node`` applies to ``value``, else ``None``."""
    if node.op == "call_module":
        if policy.keeps(modules[node.target]):
            return None
        return layers.module_activation(modules[node.target]) if len(node.all_input_nodes) == 1 else None
    if node.op not in ("call_function", "call_method"):
        return None
    args, kwargs = list(node.args), dict(node.kwargs)
    first = args.pop(0) if args else kwargs.pop("input", None)
    return layers.function_activation(node.target, tuple(args), kwargs) if first is value else None


# ----------------------------------------------------------------------------------------------------- residuals


def _add_residuals(chains: list[Chain], modules, order, mutations) -> None:
    """Give every chain that ends in ``chain + tensor`` (or ``tensor - chain``) its residual, where that is safe."""
    claimed = set()
    # Where two chains meet in one sum, the later one takes it: the other is then complete before it starts.
    for chain in sorted(chains, key=lambda c: -order[c.conv]):
        user = _only_user(chain.end)
        if user is None or user in claimed:
            continue
        residual, negate = _sum_operand(user, chain.end)
        if residual is None or (negate and chain.activation != "none"):
            continue
        written = user.target in _INPLACE_ADDS and residual is user.args[0]
        if written and not _fresh(residual, user, order, chains):
            continue
        if _mutated_between(chain.conv, user, order, mutations, [*chain.nodes, user]):
            continue
        claimed.add(user)
        chain.residual, chain.negate = residual, negate
        chain.nodes.append(user)


def _sum_operand(node: fx.Node, value: fx.Node) -> tuple[fx.Node | None, bool]:
    """(the other operand, whether ``value`` is subtracted from it) if ``node`` is a plain sum with ``value``."""
    if node.op not in ("call_function", "call_method"):
        return None, False
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in ("input", "other"):
        if name in kwargs:
            args.append(kwargs.pop(name))
    if len(args) != 2 or kwargs.pop("alpha", 1) != 1 or kwargs:
        return None, False
    if not all(isinstance(a, fx.Node) for a in args) or args[0] is args[1]:
        return None, False
    other = args[1] if args[0] is value else args[0]
    if node.target in _ADDS or node.target in _INPLACE_ADDS:
        return other, False
    if node.target in _SUBS and args[1] is value:
        return other, True
    return None, False


def _fresh(node: fx.Node, last: fx.Node, order, chains) -> bool:
    """Whether writing into ``node`` at ``last`` is seen by nobody else: its memory is its own and read only before.

    ``node`` is a convolution's chain or a sum, and every other reader comes earlier and returns memory of its own.
    """
    own = {c.end for c in chains} | {c.conv for c in chains}
    if node not in own and not (node.op == "call_function" and node.target in (operator.add, torch.add, torch.cat)):
        return False
    for user in node.users:
        if user is last:
            continue
        if order[user] > order[last] or not (user in own or user.target in (operator.add, torch.add, torch.cat)):
            return False
    return True


# ----------------------------------------------------------------------------------------------------- mutations


def mutates(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` may write into a tensor that exists already."""
    if node.op == "call_module":
        module = modules[node.target]
        # A module that the trace did not enter may do anything; those of torch.nn say `inplace`.
        known = type(module).__module__.startswith(("torch.nn", "pydenoise.nn")) and layers.hooks_reason(module) is None
        return bool(getattr(module, "inplace", False)) or not known
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        positional = len(node.args) > _BEFORE_INPLACE.get(node.target, len(node.args))
        written = node.kwargs.get("inplace") or node.kwargs.get("out") is not None or positional
        named = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
        return bool(written or named or node.target in inplace.FUNCTIONS)
    return False


def _writes_private_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` writes only into a layer's result that nothing else reads: no other node can see it."""
    sources = node.all_input_nodes
    if not sources or len(sources[0].users) != 1 or sources[0].op != "call_module" or "out" in node.kwargs:
        return False
    if node.op == "call_module" and not getattr(modules[node.target], "inplace", False):
        return False  # a module that the trace did not enter
    source = modules[sources[0].target]
    fresh = isinstance(source, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear))
    return fresh and layers.hooks_reason(source) is None


def _mutated_between(start: fx.Node, end: fx.Node, order, mutations, own) -> bool:
    """Whether a node between ``start`` and ``end`` writes in place: the fused layer runs at ``end``, after it."""
    mine = {order[node] for node in own}
    return any(order[start] < position < order[end] and position not in mine for position in mutations)
