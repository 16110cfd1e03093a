"""Swap the blocks of a U-Net (diffusers, OpenAI or ours) for int8 ones, and what is between them for fused layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.nn.int8_attention import Int8AttentionBlock, attention_spec
from pydenoise.nn.int8_conv2d import Int8Conv2d
from pydenoise.nn.int8_resnet import Int8ResnetBlock, resnet_spec
from pydenoise.nn.int8_sampling import Int8Downsample2D, Int8Upsample2D
from pydenoise.nn.int8_transformer import Int8Transformer2D
from pydenoise.surgery.int8_plans import Int8Plans, quantizable
from pydenoise.surgery.report import Kept, Swap
from pydenoise.surgery.up_blocks import ConcatFreeUpBlock, is_up_block


def _has(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: all(hasattr(module, name) for name in names)


def _is_resnet(module: nn.Module) -> bool:
    known = (
        ("time_embedding_norm", "norm1", "conv1", "norm2", "conv2"),
        ("in_layers", "out_layers", "skip_connection"),
        ("norm1", "conv1", "film", "norm2", "conv2", "skip", "resample"),
    )
    return any(_has(*names)(module) for names in known)


def _is_attention(module: nn.Module) -> bool:
    ours = _has("norm", "qkv", "proj", "heads")(module)
    return ours or (_has("to_q", "to_k", "to_v", "to_out")(module) and getattr(module, "group_norm", None) is not None)


# What a block is told by, and what makes an int8 one of it. The first that fits is tried.
KINDS: tuple[tuple[Callable[[nn.Module], bool], type], ...] = (
    (_is_resnet, Int8ResnetBlock),
    (_has("transformer_blocks", "proj_in", "proj_out", "norm"), Int8Transformer2D),
    (_is_attention, Int8AttentionBlock),
    (_has("use_conv", "use_conv_transpose"), Int8Upsample2D),
    (_has("use_conv", "padding"), Int8Downsample2D),
)


def block_kind(module: nn.Module) -> type | None:
    """The int8 block that stands for ``module``, or ``None``."""
    return next((kind for fits, kind in KINDS if fits(module)), None)


def has_blocks(model: nn.Module) -> bool:
    """Whether there is a residual or attention block in ``model``."""
    return any(block_kind(m) in (Int8ResnetBlock, Int8Transformer2D, Int8AttentionBlock) for m in model.modules())


def skip_channels(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """For each residual block that reads a skip connection, the channels of it, seen while ``run()`` runs ``model``.

    Diffusers' up blocks are told by their class, our own residual blocks by their third argument.
    """
    found: dict[str, int] = {}
    handles = []

    def watch_up_block(name: str) -> Callable:
        def hook(module, args, kwargs):
            skips = kwargs.get("res_hidden_states_tuple", args[1] if len(args) > 1 else ())
            for index in range(len(module.resnets)):
                found[f"{name}.resnets.{index}"] = skips[-1 - index].shape[1]

        return hook

    def watch_resnet(name: str) -> Callable:
        def hook(module, args, kwargs):
            concat = kwargs.get("concat", args[2] if len(args) > 2 else None)
            if isinstance(concat, Tensor):
                found[name] = concat.shape[1]

        return hook

    for name, module in model.named_modules():
        if is_up_block(module):
            handles.append(module.register_forward_pre_hook(watch_up_block(name), with_kwargs=True))
        elif _has("film", "resample", "skip")(module):
            handles.append(module.register_forward_pre_hook(watch_resnet(name), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


class BlockSurgeon:
    """Swaps blocks inside ``model``, in place. After :meth:`operate`: ``swapped`` and ``kept``."""

    def __init__(self, model: nn.Module, plans: Int8Plans, skips: dict[str, int], float_dtype: torch.dtype | None):
        self.model, self.plans, self.skips, self.float_dtype = model, plans, skips, float_dtype
        self.swapped: list[Swap] = []
        self.kept: list[Kept] = []

    def operate(self) -> None:
        """Swap all that can be swapped."""
        self._walk(self.model, "")

    def _walk(self, parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            path = f"{prefix}.{name}" if prefix else name
            if self.plans.policy.keeps(child):
                self.kept.append(Kept(path, type(child).__name__, "named in keep"))
                continue
            kind = block_kind(child)
            if kind is not None and self._swap(parent, name, path, child, kind):
                continue
            if isinstance(child, nn.Conv2d):
                self._between(parent, name, path, child)
            elif isinstance(child, nn.Linear):
                self.kept.append(Kept(path, "Linear", "outside the blocks: embeddings stay in float"))
            else:
                self._walk(child, path)
                if is_up_block(child):
                    setattr(parent, name, ConcatFreeUpBlock(child))

    def _swap(self, parent: nn.Module, name: str, path: str, child: nn.Module, kind: type) -> bool:
        """Put the int8 block in place; on an option without int8 form, say so and let its parts be looked at."""
        noted = len(self.plans.layers), len(self.plans.kept)
        try:
            block = self._make(path, child, kind)
        except (TypeError, ValueError) as reason:
            del self.plans.layers[noted[0] :], self.plans.kept[noted[1] :]
            self.kept.append(Kept(path, type(child).__name__, f"has no int8 form: {reason}"))
            return False
        setattr(parent, name, block)
        inside = tuple(entry.name.removeprefix(f"{path}.") for entry in self.plans.layers[noted[0] :])
        self.swapped.append(Swap(path, type(child).__name__, inside, type(block).__name__, "int8"))
        return True

    def _make(self, path: str, child: nn.Module, kind: type) -> nn.Module:
        plans = self.plans.within(path)
        if kind is Int8ResnetBlock:
            spec = resnet_spec(child)
            skip = self.skips.get(path, 0)
            return kind.from_float(spec, plans, skip_channels=skip, shortcut="plans", shortcut_dtype=self.float_dtype)
        if kind is Int8AttentionBlock:
            return kind.from_float(attention_spec(child), plans)
        return kind.from_float(child, plans)

    def _between(self, parent: nn.Module, name: str, path: str, conv: nn.Conv2d) -> None:
        """Convolutions outside the blocks (the first, the last): float, but fused and in channels_last."""
        reason = self.plans.policy.why_conv_stays(conv)
        if reason is None:
            setattr(parent, name, FusedConv2d.from_float(conv).eval())
            self.swapped.append(Swap(path, "Conv2d", (), "FusedConv2d"))
            reason = "outside the blocks: first and last convolutions stay in float"
        self.kept.append(Kept(path, "Conv2d", reason))


def swap_layers(model: nn.Module, plans: Int8Plans) -> tuple[list[Swap], list[Kept]]:
    """Swap the convolutions of a model without known blocks one by one, in place, except the first and the last."""
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    called = [name for name in plans.calibration.layers if name in set(convs)]
    outer = {called[0], called[-1]} if len(called) > 2 else set()
    swapped, kept = [], []
    for name in convs:
        conv = model.get_submodule(name)
        if name in outer:
            kept.append(Kept(name, "Conv2d", "the first or the last convolution, which stays in float"))
            continue
        choice = None
        try:
            if plans.policy.keeps(conv):
                raise ValueError("named in keep")
            from pydenoise.nn._plans import Request, keeps_float

            choice = plans.choice("", Request((name,), conv))
            if keeps_float(choice):
                continue
            layer = Int8Conv2d.from_float(conv, choice, name=name)
        except (TypeError, ValueError) as reason:
            kept.append(Kept(name, type(conv).__name__, str(reason)))
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        swapped.append(Swap(name, "Conv2d", (), "Int8Conv2d", "int8"))
    return swapped, kept


__all__ = ["BlockSurgeon", "block_kind", "has_blocks", "quantizable", "skip_channels", "swap_layers"]
