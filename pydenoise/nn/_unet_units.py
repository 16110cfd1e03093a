"""U-Nets as a chain of units, told by their attributes: a unit lies between two places where maps can be joined."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

# How a part is called: with the feature map alone, also with the embedding, or also with a text.
PLAIN, EMBEDDED, TEXT = "plain", "embedded", "text"

_DIFFUSERS = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out")
_OWN = ("conv_in", "encoder", "middle", "decoder", "norm_out", "conv_out", "embed")
_BLOCKS = {
    "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out", "encoder", "middle",
    "decoder", "norm_out",
}  # fmt: skip
# Parts of diffusers' U-Nets that take further inputs, or change what the blocks read.
_REFUSED = ("add_embedding", "encoder_hid_proj", "position_net", "time_embed_act")


@dataclass(frozen=True)
class Part:
    """A module and how it is called: ``PLAIN``, ``EMBEDDED`` or ``TEXT``."""

    module: nn.Module
    call: str = PLAIN

    def __call__(self, x: Tensor, embedding: Tensor, text: Tensor | None) -> Tensor:
        if self.call == EMBEDDED:
            return self.module(x, embedding)
        if self.call == TEXT:
            return self.module(x, encoder_hidden_states=text, return_dict=False)[0]
        return self.module(x)


@dataclass(frozen=True)
class Unit:
    """What runs between two aggregators. ``role``: "encoder" (its result is a skip connection), "middle", "decoder"
    (which reads the last skip connection behind its input) or "head"."""

    name: str
    role: str
    parts: tuple[Part, ...]

    @property
    def channels(self) -> int:
        """Of its result."""
        for part in reversed(self.parts):
            found = _out_channels(part.module)
            if found is not None:
                return found
        raise TypeError(f"{self.name}: no convolution tells its channels")


def _out_channels(module: nn.Module) -> int | None:
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.Sequential):
        return next((found for child in reversed(module) if (found := _out_channels(child)) is not None), None)
    for name in ("conv2", "conv", "Conv2d_0"):
        if isinstance(getattr(module, name, None), nn.Conv2d):
            return getattr(module, name).out_channels
    return None


def is_diffusers(model: nn.Module) -> bool:
    """Whether ``model`` has the parts of diffusers' UNet2DModel or UNet2DConditionModel."""
    return all(hasattr(model, name) for name in _DIFFUSERS)


def units_of(model: nn.Module) -> tuple[Unit, ...]:
    """The units of a U-Net of diffusers, or of ``pydenoise.models``, in the order of their calls.

    Raises:
        TypeError: another kind of model. ValueError: an option that the units cannot express; the message names it.
    """
    if is_diffusers(model):
        _check_diffusers(model)
        return tuple(_diffusers_units(model))
    if all(hasattr(model, name) for name in _OWN):
        return tuple(_own_units(model))
    raise TypeError(
        "models: expected U-Nets of diffusers (UNet2DModel, UNet2DConditionModel) or of pydenoise.models, "
        f"got {type(model).__name__}"
    )


# --------------------------------------------------------------------------------------------------------- diffusers


def _check_diffusers(model: nn.Module) -> None:
    for name in _REFUSED:
        if getattr(model, name, None) is not None:
            raise ValueError(f"models: {name}: expected None, got {type(getattr(model, name)).__name__}")
    config = model.config
    for name in ("class_embeddings_concat", "time_cond_proj_dim", "dual_cross_attention"):
        if getattr(config, name, None):
            raise ValueError(f"models: {name}: expected none, got {getattr(config, name)}")
    if getattr(config, "time_embedding_type", "positional") == "fourier":
        raise ValueError("models: time_embedding_type: expected 'positional', got 'fourier'")
    if getattr(config, "class_embed_type", None) not in (None, "timestep", "identity"):
        raise ValueError(f"models: class_embed_type: expected none or 'timestep', got {config.class_embed_type!r}")
    for block in (*model.down_blocks, *model.up_blocks):
        if hasattr(block, "skip_conv") or not hasattr(block, "resnets"):
            raise ValueError(f"models: expected blocks with resnets and no skip_conv, got {type(block).__name__}")


def _attention(module: nn.Module) -> Part:
    return Part(module, TEXT if hasattr(module, "transformer_blocks") else PLAIN)


def _sampler(module: nn.Module) -> Part:
    """Of a down or up block: a convolution, or a residual block that resamples."""
    return Part(module, EMBEDDED if hasattr(module, "time_emb_proj") else PLAIN)


def _layers(block: nn.Module) -> list[list[Part]]:
    """Each residual block with the attention behind it."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [
        [Part(resnet, EMBEDDED), *([] if attention is None else [_attention(attention)])]
        for resnet, attention in zip(block.resnets, attentions, strict=True)
    ]


def _diffusers_units(model: nn.Module) -> Iterator[Unit]:
    yield Unit("conv_in", "encoder", (Part(model.conv_in),))
    for number, block in enumerate(model.down_blocks):
        for index, parts in enumerate(_layers(block)):
            yield Unit(f"down_{number}_{index}", "encoder", tuple(parts))
        if block.downsamplers is not None:
            yield Unit(f"down_{number}_downsample", "encoder", tuple(map(_sampler, block.downsamplers)))
    if model.mid_block is not None:
        first, *rest = model.mid_block.resnets
        parts = [Part(first, EMBEDDED)]
        for attention, resnet in zip(model.mid_block.attentions, rest, strict=True):
            parts += [] if attention is None else [_attention(attention)]
            parts.append(Part(resnet, EMBEDDED))
        yield Unit("middle", "middle", tuple(parts))
    for number, block in enumerate(model.up_blocks):
        layers = _layers(block)
        layers[-1] += map(_sampler, block.upsamplers or ())
        for index, parts in enumerate(layers):
            yield Unit(f"up_{number}_{index}", "decoder", tuple(parts))
    head = [model.conv_out]
    if model.conv_norm_out is not None:
        head = [model.conv_norm_out, model.conv_act, model.conv_out]
    yield Unit("conv_out", "head", (Part(nn.Sequential(*head)),))


def _diffusers_embedding(model: nn.Module, sample: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    times = timestep.to(sample.device).expand(sample.shape[0])
    embedding = model.time_embedding(model.time_proj(times).to(sample.dtype))
    if model.class_embedding is None:
        if labels is not None:
            raise ValueError("condition: the models know no classes, expected None")
        return embedding
    if labels is None:
        raise ValueError("condition: expected class labels, which the models are told")
    if model.config.class_embed_type == "timestep":
        labels = model.time_proj(labels).to(sample.dtype)
    return embedding + model.class_embedding(labels).to(sample.dtype)


# ---------------------------------------------------------------------------------------------------------------- own


def _stage(stage: nn.Module) -> tuple[Part, ...]:
    parts = [Part(stage.block, EMBEDDED)]
    if stage.attention is not None:
        parts.append(Part(stage.attention))
    if stage.upsample is not None:
        parts.append(Part(stage.upsample, EMBEDDED))
    return tuple(parts)


def _own_units(model: nn.Module) -> Iterator[Unit]:
    yield Unit("conv_in", "encoder", (Part(model.conv_in),))
    for index, stage in enumerate(model.encoder):
        yield Unit(f"encoder_{index}", "encoder", _stage(stage))
    middle = model.middle
    parts = (Part(middle.block1, EMBEDDED), Part(middle.attention), Part(middle.block2, EMBEDDED))
    yield Unit("middle", "middle", parts)
    for index, stage in enumerate(model.decoder):
        yield Unit(f"decoder_{index}", "decoder", _stage(stage))
    head = nn.Sequential(model.norm_out, nn.SiLU(), model.conv_out)
    yield Unit("conv_out", "head", (Part(head),))


# --------------------------------------------------------------------------------------------------------- embeddings


def embedding_of(model: nn.Module, sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    """[B, E]: what the blocks of ``model`` are told of the time and the condition (labels, or a number each)."""
    if hasattr(model, "time_proj"):  # of diffusers; its blocks may be gone
        return _diffusers_embedding(model, sample, timestep, condition)
    times = timestep.to(sample.dtype).expand(sample.shape[0])
    return model.embed(sample, times) if condition is None else model.embed(sample, times, condition)


def embedding_parts(model: nn.Module) -> nn.Module:
    """``model`` without its blocks, for :func:`embedding_of`; what is left is shared with it."""
    light = copy.copy(model)
    light._modules = {name: child for name, child in model._modules.items() if name not in _BLOCKS}
    return light


def center(model: nn.Module, sample: Tensor) -> Tensor:
    """``sample`` as ``model`` reads it."""
    config = getattr(model, "config", None)
    return 2 * sample - 1.0 if getattr(config, "center_input_sample", False) else sample


def alike(models: tuple[nn.Module, ...]) -> None:
    """Raise ``ValueError`` unless all have the same parameters by name and shape."""
    first = {name: tuple(p.shape) for name, p in models[0].named_parameters()}
    for number, model in enumerate(models[1:], 1):
        own = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if own != first:
            different = next(iter(set(first.items()) ^ set(own.items())))
            raise ValueError(f"models: number {number} is not shaped as the first: {different[0]}")
    dtypes = {(p.dtype, p.device) for model in models for p in model.parameters()}
    if len(dtypes) > 1:
        raise ValueError(f"models: expected one dtype and device, got {sorted(map(str, dtypes))}")
    if not dtypes or not next(iter(dtypes))[0].is_floating_point:
        raise ValueError("models: expected networks with floating-point parameters")
