"""SharedProjection: the time embedding's projections of all residual blocks of a U-Net in one matrix product."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.reference.weighted_conv import activate


class SharedProjection:
    """Computes ``linear(activation(temb))`` of several linear layers at once, when the first of them is asked for.

    A block that asks with the tensor of the block before it gets its part of what was computed then. It is no module:
    the layers stay where they are in the blocks, and its own copy of their weights follows them.

    Args:
        layers: with one number of inputs, on one device. activation: in front of them.
    """

    def __init__(self, layers: Sequence[nn.Linear], activation: str):
        self.layers, self.activation = list(layers), activation
        self._forget()

    def _forget(self) -> None:
        self._known: tuple | None = None  # what the product was made of, and the product
        self._last: tuple = (lambda: None, None, None)  # the last embedding, its version, its projections

    def _product(self) -> nn.Module:
        made_of = [
            (t.data_ptr(), t.dtype, None if t.is_inference() else t._version)
            for layer in self.layers
            for t in (layer.weight, layer.bias)
            if t is not None
        ]
        if self._known is None or self._known[0] != made_of:
            self._known = (made_of, self._joined())
        return self._known[1]

    def _joined(self) -> FusedConv2d:
        """All layers as a 1x1 convolution of one pixel, which our kernels run faster than torch its linear layers."""
        first = self.layers[0].weight
        conv = nn.Conv2d(first.shape[1], sum(layer.out_features for layer in self.layers), 1, device="meta")
        with torch.inference_mode(False), torch.no_grad():
            biases = [first.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in self.layers]
            conv.weight = nn.Parameter(torch.cat([m.weight.detach() for m in self.layers])[:, :, None, None])
            conv.bias = nn.Parameter(torch.cat(biases))
            return FusedConv2d.from_float(conv).eval()

    def __call__(self, layer: nn.Linear, temb: Tensor) -> Tensor:
        """``layer(activation(temb))``, float32 [N, out_features]; ``layer`` is one of the layers."""
        source, version, parts = self._last
        current = None if temb.is_inference() else temb._version
        if source() is not temb or version != current:
            product = self._product()
            x = activate(temb, self.activation).to(product.weight.dtype)
            y = product(x[:, :, None, None])[:, :, 0, 0].float()
            parts = dict(zip(map(id, self.layers), y.split([m.out_features for m in self.layers], 1), strict=True))
            self._last = (weakref.ref(temb), current, parts)
        return parts[id(layer)]

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "activation": self.activation}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()


def share_projections(model: nn.Module) -> int:
    """Let the int8 residual blocks of ``model`` that project one kind of embedding do it together.

    Returns how many blocks do. Blocks alone of their kind are left as they are.
    """
    kinds: dict[tuple, list[nn.Module]] = {}
    for block in model.modules():
        linear = getattr(block, "time_emb_proj", None)
        if isinstance(linear, nn.Linear) and hasattr(block, "embedding_activation"):
            kinds.setdefault((linear.in_features, block.embedding_activation), []).append(block)
    shared = 0
    for (_, activation), blocks in kinds.items():
        if len(blocks) < 2:
            continue
        together = SharedProjection([block.time_emb_proj for block in blocks], activation)
        for block in blocks:
            block.__dict__["_shared_projection"] = together
        shared += len(blocks)
    return shared
