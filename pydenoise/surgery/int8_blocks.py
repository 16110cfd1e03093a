"""Swap the blocks of a U-Net (diffusers, OpenAI or ours) for int8 ones, and what is between them for fused layers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pydenoise.nn._plans import Request, keeps_float
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.nn.int8_attention import Int8AttentionBlock, attention_spec
from pydenoise.nn.int8_conv2d import Int8Conv2d
from pydenoise.nn.int8_resnet import Int8ResnetBlock, resnet_spec
from pydenoise.nn.int8_sampling import Int8Downsample2D, Int8Upsample2D
from pydenoise.nn.int8_transformer import Int8Transformer2D
from pydenoise.quantization.observers import kind_of
from pydenoise.surgery import layers
from pydenoise.surgery.int8_plans import Int8Plans
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


@dataclass
class Seen:
    """What one run of the model showed. ``skips``: name of a residual block -> channels of the skip connection that it
    reads. ``convs``: names of the convolutions, in the order of their calls."""

    skips: dict[str, int] = field(default_factory=dict)
    convs: list[str] = field(default_factory=list)

    @property
    def outer(self) -> set[str]:
        """The first and the last convolution, of more than two."""
        return {self.convs[0], self.convs[-1]} if len(set(self.convs)) > 2 else set()


def watch(model: nn.Module, run: Callable[[], object]) -> Seen:
    """What is seen while ``run()`` runs ``model``.

    Skip connections: diffusers' up blocks are told by their class, our own residual blocks by their third argument.
    """
    seen, handles = Seen(), []

    def watch_up_block(name: str) -> Callable:
        def hook(module, args, kwargs):
            skips = kwargs.get("res_hidden_states_tuple", args[1] if len(args) > 1 else ())
            for index in range(len(module.resnets)):
                seen.skips[f"{name}.resnets.{index}"] = skips[-1 - index].shape[1]

        return hook

    def watch_resnet(name: str) -> Callable:
        def hook(module, args, kwargs):
            concat = kwargs.get("concat", args[2] if len(args) > 2 else None)
            if isinstance(concat, Tensor):
                seen.skips[name] = concat.shape[1]

        return hook

    def watch_conv(name: str) -> Callable:
        return lambda module, args, kwargs: seen.convs.append(name)

    for name, module in model.named_modules():
        if is_up_block(module):
            hook = watch_up_block(name)
        elif isinstance(module, nn.Conv2d):
            hook = watch_conv(name)
        elif _has("film", "resample", "skip")(module):
            hook = watch_resnet(name)
        else:
            continue
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


class BlockSurgeon:
    """Swaps blocks inside ``model``, in place. After :meth:`operate`: ``swapped`` and ``kept``.

    Args:
        skips: see :class:`Seen`. shortcut_dtype: of shortcuts that stay in float; ``None``: their own.
    """

    def __init__(self, model: nn.Module, plans: Int8Plans, skips: dict[str, int], shortcut_dtype: torch.dtype | None):
        self.model, self.plans, self.skips, self.shortcut_dtype = model, plans, skips, shortcut_dtype
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
            if kind is not None and self.plans.allows(path) and self._swap(parent, name, path, child, kind):
                continue
            if isinstance(child, nn.Conv2d):
                self._between(parent, name, path, child)
            elif isinstance(child, nn.Linear):
                self.kept.append(Kept(path, "Linear", "outside the blocks, such as an embedding: stays in float"))
            else:
                self._walk(child, path)
                if is_up_block(child) and layers.hooks_reason(child) is None:
                    setattr(parent, name, ConcatFreeUpBlock(child))

    def _swap(self, parent: nn.Module, name: str, path: str, child: nn.Module, kind: type) -> bool:
        """Put the int8 block in place; on an option without int8 form, say so and let its parts be looked at."""
        before = self.plans.mark()
        try:
            self._check_parts(child)
            block = self._make(path, child, kind)
        except (TypeError, ValueError) as reason:
            self.plans.forget(before)
            self.kept.append(Kept(path, type(child).__name__, f"has no int8 form: {reason}"))
            return False
        setattr(parent, name, block)
        inside = tuple(entry.name.removeprefix(f"{path}.") for entry in self.plans.layers[before[0] :])
        self.swapped.append(Swap(path, type(child).__name__, inside, type(block).__name__, "int8"))
        return True

    def _check_parts(self, block: nn.Module) -> None:
        """Raise ``ValueError`` for a part that a fused block would not call as the caller wants it."""
        for name, part in block.named_modules():
            reason = layers.hooks_reason(part)
            if reason is not None:
                raise ValueError(f"{name or 'it'} {reason}")
            if self.plans.policy.keeps(part) and kind_of(part) is None:
                raise ValueError(f"{name} inside it is named in keep")

    def _make(self, path: str, child: nn.Module, kind: type) -> nn.Module:
        plans = self.plans.within(path)
        if kind is Int8ResnetBlock:
            return kind.from_float(
                resnet_spec(child), plans, skip_channels=self.skips.get(path, 0), shortcut="plans",
                shortcut_dtype=self.shortcut_dtype,
            )  # fmt: skip
        if kind is Int8AttentionBlock:
            return kind.from_float(attention_spec(child), plans)
        return kind.from_float(child, plans)

    def _between(self, parent: nn.Module, name: str, path: str, conv: nn.Conv2d) -> None:
        """A convolution outside the blocks: int8, or fused and in channels_last memory (the first, the last)."""
        reason = self.plans.why_conv_stays(path, conv)
        if reason is None:
            swap = swap_conv(parent, name, path, conv, self.plans)
            if isinstance(swap, Swap):
                self.swapped.append(swap)
                return
            reason = swap.reason
        if self.plans.allows(path) and self.plans.policy.why_conv_stays(conv) is None:
            setattr(parent, name, FusedConv2d.from_float(conv).eval())
            self.swapped.append(Swap(path, "Conv2d", (), "FusedConv2d"))
        else:
            reason = self.plans.policy.why_conv_stays(conv) or reason
        self.kept.append(Kept(path, "Conv2d", reason))


def swap_conv(parent: nn.Module, name: str, path: str, conv: nn.Conv2d, plans: Int8Plans) -> Swap | Kept:
    """Put an :class:`Int8Conv2d` in the place of one convolution, or say why not."""
    reason = layers.hooks_reason(conv)
    if reason is not None:
        return Kept(path, type(conv).__name__, reason)
    try:
        choice = plans.choice("", Request((path,), conv))
        if keeps_float(choice):
            return Kept(path, type(conv).__name__, "as its plan says")
        layer = Int8Conv2d.from_float(conv, choice, name=path)
    except (TypeError, ValueError) as reason:
        return Kept(path, type(conv).__name__, f"has no int8 form: {reason}")
    setattr(parent, name, layer)
    return Swap(path, layers.describe(conv), (), "Int8Conv2d", "int8")


def swap_convs(model: nn.Module, plans: Int8Plans) -> tuple[list[Swap], list[Kept]]:
    """Swap the convolutions of a model without known blocks one by one, in place, except the first and the last."""
    swapped, kept = [], []
    for path, conv in [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]:
        reason = plans.why_conv_stays(path, conv)
        if reason is None and path:
            parent, _, name = path.rpartition(".")
            result = swap_conv(model.get_submodule(parent), name, path, conv, plans)
        else:
            result = Kept(path, type(conv).__name__, reason or "is the model itself")
        (swapped if isinstance(result, Swap) else kept).append(result)
    return swapped, kept
