"""SparseD in models of transformers, through its registries of attention functions and of masks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise.surgery.sparsed_sdpa import Route

IMPLEMENTATION = "pydenoise_sparsed"
_LINK = "_pydenoise_sparsed"
# Arguments by which a model asks for more than softmax(scale * query @ key^T + mask) @ value.
_UNKNOWN_TO_US = {
    "softcap": "caps its scores",
    "position_bias": "adds a position bias to its scores",
    "s_aux": "has attention sinks",
    "cache": "reads a paged cache",
}


def models_inside(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models in ``model`` (itself, if it is one)."""
    if "transformers" not in sys.modules:  # then nothing is made of it, and importing it would take seconds
        return []
    from transformers import PreTrainedModel

    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, PreTrainedModel):
            found.append(module)
        else:
            for child in module.children():
                visit(child)

    visit(model)
    return found


@dataclass
class _Link:
    """Tells the registered function, which knows only the module that calls, where the call belongs."""

    name: str
    route: Route
    alone: str | None = None  # why the module keeps full attention


class TransformersAttachment:
    """Switches the attention implementation of the transformers models in ``model`` to SparseD's.

    Args:
        keeps: whether the caller wants a module left alone.
        leave_alone: told the name of a layer that keeps full attention, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        route: Route,
        keeps: Callable[[nn.Module], bool],
        leave_alone: Callable[[str, str], None],
    ):
        self.linked: list[nn.Module] = []
        self.configs: list[tuple[object, str | None]] = []
        models = models_inside(model)
        _register()
        names = {id(module): name for name, module in model.named_modules()}
        _refuse_causal(models, names, keeps)
        try:
            for part in models:
                self._switch(part)
                self._link(part, names, route, keeps, leave_alone)
        except BaseException:
            self.restore()
            raise

    def _switch(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel

        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        for part in parts:
            if not (part._can_set_attn_implementation() and part._supports_sdpa):
                raise ValueError(
                    f"model: {type(part).__name__} does not take its attention from transformers' registry; if it "
                    "calls F.scaled_dot_product_attention, attach with kind='sdpa'"
                )
        known: dict[int, object] = {}
        for part in parts:
            _collect(part.config, known)
        self.configs += [(config, config._attn_implementation_internal) for config in known.values()]
        model.set_attn_implementation(IMPLEMENTATION)
        left = [type(part).__name__ for part in parts if part.config._attn_implementation != IMPLEMENTATION]
        if left:
            raise ValueError(f"model: transformers did not switch the attention of {', '.join(left)}")

    def _link(self, model, names, route, keeps, leave_alone) -> None:
        for module in model.modules():
            name = names[id(module)]
            alone = "named in keep" if keeps(module) else "is cross-attention" if _is_cross(module) else None
            if alone is not None and hasattr(module, "is_causal"):
                leave_alone(name, alone)
            module.__dict__[_LINK] = _Link(name, route, alone)
            self.linked.append(module)

    def restore(self) -> None:
        """The model as it was."""
        for config, implementation in self.configs:
            config._attn_implementation_internal = implementation
        for module in self.linked:
            module.__dict__.pop(_LINK, None)
        self.configs, self.linked = [], []


def _collect(config: object, known: dict[int, object]) -> None:
    """``config`` and the configs inside it, by identity."""
    known[id(config)] = config
    for name in config.sub_configs:
        inner = getattr(config, name)
        if inner is not None and id(inner) not in known:
            _collect(inner, known)


def _is_cross(module: nn.Module) -> bool:
    return "CrossAttention" in type(module).__name__


def _refuse_causal(models: list[nn.Module], names: dict[int, str], keeps: Callable[[nn.Module], bool]) -> None:
    parts = [part for model in models for part in model.modules()]
    causal = [names[id(m)] for m in parts if getattr(m, "is_causal", False) is True and not keeps(m)]
    if causal:
        raise ValueError(
            f"model: SparseD is for bidirectional attention, but {causal[0]!r} is causal (is_causal is True there "
            f"and in {len(causal) - 1} other modules); name causal layers in keep, or set is_causal = False where "
            "attention is bidirectional"
        )


# ------------------------------------------------------------------------------------------------- registered functions


def _register() -> None:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"model: its attention is reached in transformers 5 or later, this is {transformers.__version__}; if it "
            "calls F.scaled_dot_product_attention, attach with kind='sdpa'"
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*args, mask_function: Callable, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """The mask that transformers makes for SDPA; plain padding of bidirectional attention as [B, 1, 1, Lk] only."""
    from transformers import masking_utils

    if mask_function is not masking_utils.bidirectional_mask_function or args:
        return masking_utils.sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    valid = masking_utils.prepare_padding_mask(attention_mask, kwargs["kv_length"], kwargs.get("kv_offset", 0))
    if valid is None:
        return None
    start = kwargs.get("kv_offset", 0)
    return valid[:, None, None, start : start + kwargs["kv_length"]].to(torch.bool)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The registered attention function: [B, H, Lq, D] in, [B, Lq, H, D] out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    link: _Link | None = module.__dict__.get(_LINK)  # none: another model that shares the config of an attached one
    output = None
    if link is not None and link.alone is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options = {
            "attn_mask": attention_mask,
            "dropout_p": dropout,
            "scale": scaling,
            # as transformers does it: a mask says it all
            "is_causal": bool(causal) and attention_mask is None and query.shape[2] > 1,
            "alone": _why_alone(kwargs),
        }
        if options["alone"] is None:
            _check(link.name, kwargs)
        output = link.route(link.name, query, key, value, options)
    if output is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return output.transpose(1, 2).contiguous(), None


def _why_alone(kwargs: dict) -> str | None:
    window = kwargs.get("sliding_window")
    return None if window is None else f"attends to a sliding window of {window}"


def _check(name: str, kwargs: dict) -> None:
    for argument, what in _UNKNOWN_TO_US.items():
        if kwargs.get(argument) is not None:
            raise ValueError(f"{argument}: {name!r} {what}, which SparseD does not know; name it in keep")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: attention weights are never written down; ask for none")
