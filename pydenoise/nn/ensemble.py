"""Ensemble: N U-Nets of one shape run as one network, their feature maps joined on the way.

Source: Wang et al., "Ensembling Diffusion Models via Adaptive Feature Aggregation", ICLR 2025,
https://arxiv.org/abs/2405.17082.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pydenoise.nn._stacked import Chain, Told, stacked
from pydenoise.nn._unet_units import Unit, alike, center, embedding_of, embedding_parts, units_of
from pydenoise.nn.feature_aggregator import FeatureAggregator
from pydenoise.ops._arguments import check_choice

AGGREGATES = ("blocks", "output", "none")
METHODS = ("stacked", "sequence")


class Ensemble(nn.Module):
    """N U-Nets of one shape as one: the networks frozen, the aggregators between their blocks to be trained.

    Args:
        models: two U-Nets or more of one class and shape: diffusers' ``UNet2DModel`` and ``UNet2DConditionModel``, or
            those of ``pydenoise.models``, told by their attributes. They are frozen and put in evaluation mode.
        aggregate: where feature maps are joined. "blocks": behind the first convolution, every layer, every
            downsampling, the middle and the outputs, as published; the last layer of the decoder stays N-fold.
            "output": the outputs only. "none": nowhere, and the result has all N outputs.
        method: "stacked": every kind of block that is known runs once for all networks, with stacked weights (grouped
            convolutions, batched products), the others in turns. "sequence": all in turns, without a second copy of
            the weights.
        hidden, heads: of every :class:`FeatureAggregator`.

    An untrained ensemble averages: its aggregators begin with equal weights. Train ``aggregators.parameters()`` with
    the denoising loss of the networks; ``aggregators.state_dict()`` is all there is to keep.

    Raises:
        TypeError, ValueError: models that differ in shape or of another kind, or a bad option; the message names it.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        *,
        aggregate: str = "blocks",
        method: str = "stacked",
        hidden: int = 128,
        heads: int = 8,
    ):
        super().__init__()
        models = _checked(models)
        check_choice("aggregate", aggregate, AGGREGATES)
        check_choice("method", method, METHODS)
        self.count, self.aggregate = len(models), aggregate
        self.method = method
        for model in models:
            model.requires_grad_(False).eval()
        units = [units_of(model) for model in models]
        self.places = [(unit.name, unit.role) for unit in units[0]]
        self.units = nn.ModuleList(self._stack(same) for same in zip(*units, strict=True))
        self.embedders = nn.ModuleList(embedding_parts(model) for model in models)
        config = getattr(models[0], "config", None)
        self.text_width = _text_width(units[0])
        self.channels = getattr(config, "in_channels", None) or models[0].conv_in.in_channels
        self.align = _align(units[0], models[0])
        self.aggregators = nn.ModuleDict(self._aggregators(units[0], models[0], hidden, heads))
        self.train(False)

    def _stack(self, same: Sequence[Unit]) -> Chain:
        """One unit of all networks."""
        parts = zip(*(unit.parts for unit in same), strict=True)
        return Chain([stacked(part, separate=self.method == "sequence") for part in parts])

    def _aggregators(self, units: Sequence[Unit], model: nn.Module, hidden: int, heads: int) -> dict:
        places = {
            "blocks": [unit for number, unit in enumerate(units) if number != len(units) - 2],
            "output": units[-1:],
            "none": (),
        }[self.aggregate]
        like = model.conv_in.weight
        return {
            unit.name: FeatureAggregator(
                self.count, unit.channels, _embedding_length(model), hidden=hidden, heads=heads, text=self.text_width
            ).to(like)
            for unit in places
        }

    def train(self, mode: bool = True) -> "Ensemble":
        """Only the aggregators have a training mode."""
        super().train(False)
        self.training = mode
        self.aggregators.train(mode)
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        condition: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """What the networks predict, together.

        Args:
            sample: [B, C, H, W], H and W multiples of ``align``.
            timestep: a number for all, or a tensor [B] or [1].
            condition: what the models take as labels (or as a number each), [B]; ``None`` if they need none.
            encoder_hidden_states: for models with cross-attention: [B, L, D] for all networks, or one for each, N
                tensors or [N, B, L, D]. Aggregators attend to their mean.

        Returns:
            Like ``sample``, with the networks' output channels; [B, N, C, H, W] with ``aggregate="none"``.
        """
        self._check(sample)
        timestep = torch.as_tensor(timestep, device=sample.device)
        if timestep.shape not in ((), (1,), (sample.shape[0],)):
            raise ValueError(f"timestep: expected a number or [{sample.shape[0]}], got {tuple(timestep.shape)}")
        embeddings = [embedding_of(model, sample, timestep, condition) for model in self.embedders]
        told = Told(torch.stack(embeddings, 1), self._texts(encoder_hidden_states, sample))
        return self._run(center(self.embedders[0], sample), told)

    def _run(self, x: Tensor, told: Told) -> Tensor:
        embedding = told.embeddings.mean(1)
        text = None if told.texts is None else told.texts.mean(1)
        skips: list[tuple[Tensor, bool]] = []
        shared = True  # whether all networks read the same map
        for (name, role), unit in zip(self.places, self.units, strict=True):
            if role == "decoder":
                x, shared = self._with_skip(x, shared, *skips.pop())
            x, shared = unit(x, told, shared), False
            if name in self.aggregators:
                x = self.aggregators[name](x.unflatten(1, (self.count, -1)), embedding, text)
                shared = True
            if role == "encoder":
                skips.append((x, shared))
        return x if shared else x.unflatten(1, (self.count, -1))

    def _with_skip(self, x: Tensor, shared: bool, skip: Tensor, skip_shared: bool) -> tuple[Tensor, bool]:
        """The skip connection behind the channels of ``x``, within each network."""
        if shared and skip_shared:
            return torch.cat([x, skip], dim=1), True
        parts = [
            part[:, None].expand(-1, self.count, -1, -1, -1) if alone else part.unflatten(1, (self.count, -1))
            for part, alone in ((x, shared), (skip, skip_shared))
        ]
        return torch.cat(parts, dim=2).flatten(1, 2), False

    def _check(self, sample: Tensor) -> None:
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample: expected a torch.Tensor, got {type(sample).__name__}")
        shape = tuple(sample.shape)
        if sample.dim() != 4 or shape[1] != self.channels or any(n % self.align or n < 1 for n in shape[2:]):
            raise ValueError(
                f"sample: expected [B, {self.channels}, H, W], H and W multiples of {self.align}, got shape {shape}"
            )

    def _texts(self, given: Tensor | Sequence[Tensor] | None, sample: Tensor) -> Tensor | None:
        """[B, N, L, D]."""
        if (given is None) != (self.text_width is None):
            wanted = "None" if self.text_width is None else f"tokens of width {self.text_width}"
            raise ValueError(f"encoder_hidden_states: expected {wanted}, got {type(given).__name__}")
        if given is None:
            return None
        if not isinstance(given, Tensor):
            given = torch.stack(list(given))
        texts = given[:, None].expand(-1, self.count, -1, -1) if given.dim() == 3 else given.transpose(0, 1)
        if texts.dim() != 4 or (*texts.shape[:2], texts.shape[3]) != (sample.shape[0], self.count, self.text_width):
            raise ValueError(
                f"encoder_hidden_states: expected [{sample.shape[0]}, L, {self.text_width}] or {self.count} of them, "
                f"got shape {tuple(given.shape)}"
            )
        return texts

    def extra_repr(self) -> str:
        return f"count={self.count}, aggregate={self.aggregate!r}, method={self.method!r}"


def _checked(models: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    models = tuple(models)
    if len(models) < 2:
        raise ValueError(f"models: expected two or more, got {len(models)}")
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"models: expected torch.nn.Module, got {type(model).__name__}")
        if type(model) is not type(models[0]):
            raise TypeError(f"models: expected one class, got {type(models[0]).__name__} and {type(model).__name__}")
    if len({id(model) for model in models}) < len(models):
        raise ValueError("models: the same network is given twice")
    alike(models)
    return models


def _embedding_length(model: nn.Module) -> int:
    layers = [m for m in (getattr(model, "time_embedding", None) or model.time_embed).modules()]
    return [layer for layer in layers if isinstance(layer, nn.Linear)][-1].out_features


def _text_width(units: Sequence[Unit]) -> int | None:
    """Of the tokens that transformers attend to."""
    for unit in units:
        for part in unit.parts:
            for block in getattr(part.module, "transformer_blocks", ()):
                if getattr(block, "attn2", None) is not None:
                    return block.attn2.to_k.in_features
    return None


def _align(units: Sequence[Unit], model: nn.Module) -> int:
    """Height and width must be multiples of it."""
    if hasattr(model, "align"):
        return model.align
    return 2 ** sum(unit.name.endswith("_downsample") for unit in units)
