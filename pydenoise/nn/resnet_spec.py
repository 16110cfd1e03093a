"""Float residual blocks by their parts: what an int8 block is made from, and which blocks are known."""

from dataclasses import dataclass, field, replace
from functools import partial

import torch.nn.functional as F
from torch import nn

from pydenoise.nn._blocks import activation_name
from pydenoise.ops._arguments import check_choice
from pydenoise.reference.activations import ACTIVATIONS

RESAMPLINGS = ("none", "up", "down")


@dataclass(frozen=True)
class ResnetSpec:
    """A float residual block by its parts: what :meth:`Int8ResnetBlock.from_float` reads.

    ``y = gain * (shortcut(resample(x)) + conv2(act(film(norm2(conv1(resample(act(norm1(x)))) + embedding)))))``

    Attributes:
        norm1, norm2: GroupNorm. conv1, conv2: Conv2d.
        embedding: Linear from the time embedding to C_out channels that are added to conv1's output, or with ``film``
            to 2 C_out: gain - 1 and shift behind norm2; ``None``: the block has none.
        embedding_activation: in front of ``embedding``; "none" where the model activates the embedding itself.
        shortcut: Conv2d, or ``None`` for the input itself.
        activation: behind both norms. resample: "none", "up" (nearest x2) or "down" (mean of 2x2).
        gain: of the sum; 1 / output_scale_factor, or the skip_scale of EDM.
        names: what plans call conv1, conv2 and shortcut.
    """

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module
    embedding: nn.Module | None = None
    embedding_activation: str = "silu"
    film: bool = False
    shortcut: nn.Module | None = None
    activation: str = "silu"
    resample: str = "none"
    gain: float = 1.0
    names: tuple[str, str, str] = field(default=("conv1", "conv2", "conv_shortcut"))

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("embedding_activation", self.embedding_activation, ACTIVATIONS)
        check_choice("resample", self.resample, RESAMPLINGS)
        if self.film and self.embedding is None:
            raise ValueError("film: needs an embedding")
        if not self.gain > 0:
            raise ValueError(f"gain: expected a positive number, got {self.gain}")


# ------------------------------------------------------------------------------------------------ float blocks known


def resnet_spec(block: nn.Module) -> ResnetSpec:
    """The parts of a float residual block of a known kind, told by its attributes.

    Raises:
        TypeError: an unknown kind. ValueError: a known one with an option that has no int8 form.
    """
    for attribute, reader in (("time_embedding_norm", _diffusers), ("in_layers", _openai), ("film", _own)):
        if hasattr(block, attribute):
            return reader(block)
    raise TypeError(
        f"block: expected diffusers' ResnetBlock2D, OpenAI's ResBlock or a ResnetSpec, got {type(block).__name__}"
    )


def _diffusers(block: nn.Module) -> ResnetSpec:
    """``diffusers.models.resnet.ResnetBlock2D``."""
    kind, embedding = block.time_embedding_norm, getattr(block, "time_emb_proj", None)
    # "group" is what decoders without a time embedding say; the two others norm by the embedding
    if kind not in ("default", "scale_shift") and (embedding is not None or kind in ("ada_group", "spatial")):
        raise ValueError(f"time_embedding_norm: expected 'default' or 'scale_shift', got {kind!r}")
    activation = activation_name(block.nonlinearity, "nonlinearity")
    return ResnetSpec(
        block.norm1, block.conv1, block.norm2, block.conv2, embedding,
        "none" if getattr(block, "skip_time_act", False) else activation,
        embedding is not None and kind == "scale_shift", block.conv_shortcut, activation,
        _resampling(block.upsample, block.downsample), 1.0 / block.output_scale_factor,
    )  # fmt: skip


def _resampling(upsample: object, downsample: object) -> str:
    """Which resampling a block does; refuses filters other than nearest and mean, and ones with weights."""
    if upsample is None and downsample is None:
        return "none"
    if upsample is not None:
        if (
            isinstance(upsample, partial)
            and upsample.func is F.interpolate
            and upsample.keywords.get("mode") == "nearest"
        ):
            return "up"
        plain = not getattr(upsample, "use_conv", True) and not getattr(upsample, "use_conv_transpose", False)
        if plain and getattr(upsample, "norm", None) is None and getattr(upsample, "dims", 2) == 2:
            return "up"
        raise ValueError("upsample: expected nearest upsampling by 2 without weights")
    if _calls(downsample, F.avg_pool2d) and _by_two(downsample.keywords):
        return "down"
    pool = getattr(downsample, "conv", None) or getattr(downsample, "op", None) or downsample
    if isinstance(pool, nn.AvgPool2d) and _by_two(vars(pool)) and getattr(downsample, "norm", None) is None:
        return "down"
    raise ValueError("downsample: expected the mean of 2x2 pixels without weights")


def _calls(value: object, function: object) -> bool:
    return isinstance(value, partial) and value.func is function and not value.args


def _by_two(options: dict) -> bool:
    pair = ((2, 2), 2)
    return options.get("kernel_size") in pair and options.get("stride") in pair and not options.get("padding", 0)


def _openai(block: nn.Module) -> ResnetSpec:
    """``ResBlock`` of OpenAI's guided-diffusion and of the latent-diffusion code."""
    norm1, act, conv1 = block.in_layers[0], block.in_layers[1], block.in_layers[-1]
    norm2, conv2 = block.out_layers[0], block.out_layers[-1]
    changes = bool(getattr(block, "updown", False))
    plain = isinstance(block.skip_connection, nn.Identity)
    up = changes and "up" in type(block.h_upd).__name__.lower()
    resample = _resampling(block.h_upd if up else None, None if up else block.h_upd) if changes else "none"
    return ResnetSpec(
        norm1, conv1, norm2, conv2, block.emb_layers[-1], activation_name(block.emb_layers[0], "emb_layers.0"),
        bool(getattr(block, "use_scale_shift_norm", False)), None if plain else block.skip_connection,
        activation_name(act, "in_layers.1"), resample,
        names=(f"in_layers.{len(block.in_layers) - 1}", f"out_layers.{len(block.out_layers) - 1}", "skip_connection"),
    )  # fmt: skip


def _own(block: nn.Module) -> ResnetSpec:
    """``pydenoise.models.unet.ResBlock``: FiLM of an embedding that is activated already."""
    resample = "none"
    if isinstance(block.resample, nn.Upsample):
        if block.resample.mode != "nearest" or block.resample.scale_factor != 2:
            raise ValueError("resample: expected nearest upsampling by 2")
        resample = "up"
    elif not isinstance(block.resample, nn.Identity):
        resample = _resampling(None, block.resample)
    spec = ResnetSpec(
        block.norm1, block.conv1, block.norm2, block.conv2, block.film, "none", True, resample=resample,
        names=("conv1", "conv2", "skip"),
    )  # fmt: skip
    return spec if isinstance(block.skip, nn.Identity) else replace(spec, shortcut=block.skip)
