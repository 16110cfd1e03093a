"""Swap layers in place of their modules, without a graph: the model keeps its class and its own forward.

Used where tracing fails, and for ``inplace=True``. A convolution takes in the batch norm and the activation that
follow it, which become ``nn.Identity``; a residual is added by the model's own code.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn

from pydenoise.nn.fused_conv import FUSED
from pydenoise.surgery import chains, layers
from pydenoise.surgery.policy import Policy
from pydenoise.surgery.report import Kept, Swap


@dataclass
class _Group:
    """Names of a convolution and of the modules that it takes in."""

    conv: str
    norm: str | None = None
    activation_module: str | None = None
    activation: str = "none"


def swap_modules(
    model: nn.Module, policy: Policy, graph: fx.Graph | None, *, follow: bool, keep_layout: bool
) -> tuple[list[Swap], list[Kept]]:
    """Swap the layers of ``model`` itself. ``graph`` (if there is one) or ``nn.Sequential`` tells what follows what.

    Args:
        follow: ``False`` swaps convolutions alone. keep_layout: fused layers return contiguous memory for contiguous
            inputs, for models whose code depends on it.
    """
    modules = dict(model.named_modules())
    if not follow:
        groups = _single(modules, policy)
    elif graph is not None:
        groups = _from_graph(graph, modules, policy)
    else:
        groups = _from_sequentials(model, modules, policy)
    swapped, absorbed = [], set()
    for group in groups:
        swapped.append(_swap(model, modules, group, policy, keep_layout))
        absorbed.update(name for name in (group.norm, group.activation_module) if name)
    convs = {group.conv for group in groups}
    kept = [
        keep_entry(name, module, policy)
        for name, module in modules.items()
        if name not in convs and name not in absorbed and not any(True for _ in module.children())
    ]
    return swapped, kept


def _single(modules: dict[str, nn.Module], policy: Policy) -> list[_Group]:
    return [_Group(name) for name, module in modules.items() if _swappable(name, module, policy)]


def _swappable(name: str, module: nn.Module, policy: Policy) -> bool:
    return bool(name) and layers.conv_dims(module) is not None and policy.why_conv_stays(module) is None


def _from_sequentials(model: nn.Module, modules: dict[str, nn.Module], policy: Policy) -> list[_Group]:
    """Runs of convolution, batch norm, activation inside ``nn.Sequential``; every other convolution alone."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    groups = {name: _Group(name) for name, module in modules.items() if _swappable(name, module, policy)}
    for parent_name, parent in modules.items():
        if type(parent) is not nn.Sequential or layers.hooks_reason(parent) is not None:
            continue
        children = [(f"{parent_name}.{key}".lstrip("."), child) for key, child in parent.named_children()]
        if len(children) != len(parent):
            continue  # a module that occurs twice
        for index, (name, conv) in enumerate(children):
            if name not in groups or uses[id(conv)] > 1:
                continue
            rest = [(n, m) for n, m in children[index + 1 : index + 3] if uses[id(m)] == 1 and not policy.keeps(m)]
            rest = rest if rest == children[index + 1 : index + 1 + len(rest)] else []
            if rest and layers.why_norm_stays(rest[0][1], layers.conv_dims(conv), conv.out_channels) is None:
                groups[name].norm = rest.pop(0)[0]
            if rest and layers.module_activation(rest[0][1]) is not None:
                groups[name].activation_module, activation = rest[0]
                groups[name].activation = layers.module_activation(activation)
    return list(groups.values())


def _from_graph(graph: fx.Graph, modules: dict[str, nn.Module], policy: Policy) -> list[_Group]:
    """Groups that hold at every call of their modules: a shared module must always be used in the same way."""
    found = chains.find_chains(graph, modules, policy)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    groups: dict[str, _Group] = {}
    roles: dict[str, set[tuple]] = {}
    taken: Counter[str] = Counter()
    for chain in found.chains:
        norm = chain.norm.target if chain.norm is not None else None
        node = chain.activation_node
        act = node.target if node is not None and node.op == "call_module" else None
        roles.setdefault(chain.conv.target, set()).add((norm, act))
        groups[chain.conv.target] = _Group(chain.conv.target, norm, act, chain.activation if act else "none")
        taken.update(name for name in (norm, act) if name)
    for name, group in groups.items():
        same = len(roles[name]) == 1
        if not same or (group.norm and (taken[group.norm] != calls[group.norm] or calls[group.norm] != calls[name])):
            groups[name] = _Group(name)
    # What a group gave up above is used outside of any group now, and so are the activations that it shared.
    still = Counter()
    for name, group in groups.items():
        if group.activation_module:
            still[group.activation_module] += calls[name]
    for group in groups.values():
        act = group.activation_module
        if act and still[act] != calls[act]:
            group.activation_module, group.activation = None, "none"
    return list(groups.values())


def _swap(model: nn.Module, modules: dict[str, nn.Module], group: _Group, policy: Policy, keep_layout: bool) -> Swap:
    conv, norm = modules[group.conv], modules.get(group.norm)
    narrows = policy.dtype is torch.bfloat16 and conv.weight.dtype is not torch.bfloat16
    layer = FUSED[layers.conv_dims(conv)].from_float(
        conv,
        batch_norm=norm,
        activation=group.activation,
        dtype=policy.dtype if narrows else None,
        output_dtype=conv.weight.dtype if narrows else None,
        keep_layout=keep_layout,
    )
    _set(model, conv, layer)
    for name in (group.norm, group.activation_module):
        if name:
            _set(model, modules[name], nn.Identity().eval())
    fused = ["density (folded)"] if layers.weighted_dims(conv) is not None else []
    fused += [f"{type(norm).__name__} (folded)"] if norm is not None else []
    fused += [group.activation] if group.activation != "none" else []
    return Swap(group.conv, layers.describe(conv), tuple(fused), type(layer).__name__)


def _set(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered in ``model``."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def keep_entry(name: str, module: nn.Module, policy: Policy) -> Kept:
    """The report's line on a layer that stays."""
    if policy.keeps(module):
        return Kept(name, layers.describe(module), "named in keep")
    if layers.conv_dims(module) is not None:
        return Kept(name, layers.describe(module), policy.why_conv_stays(module) or "is the model itself")
    return Kept(name, layers.describe(module), layers.hooks_reason(module) or layers.why_kept(module))
