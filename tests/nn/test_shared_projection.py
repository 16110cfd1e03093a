"""SharedProjection: the results of the layers themselves, and an eye on their weights."""

import copy
import pickle

import torch
from torch import nn

from pydenoise.nn import Int8ResnetBlock
from pydenoise.nn.int8_resnet import ResnetSpec
from pydenoise.nn.shared_projection import SharedProjection, share_projections

LAYERS = (nn.Linear(20, 8), nn.Linear(20, 13, bias=False), nn.Linear(20, 1))


def test_gives_what_each_layer_gives():
    layers = copy.deepcopy(LAYERS)
    together = SharedProjection(layers, "silu")
    for batch in (1, 3, 0):
        temb = torch.randn(batch, 20)
        with torch.no_grad():
            for layer in reversed(layers):
                torch.testing.assert_close(together(layer, temb), layer(nn.functional.silu(temb)))


def test_notices_changed_weights_and_embeddings():
    layers = copy.deepcopy(LAYERS)
    together = SharedProjection(layers, "none")
    temb = torch.randn(2, 20)
    with torch.no_grad():
        together(layers[0], temb)
        temb.mul_(2)
        torch.testing.assert_close(together(layers[0], temb), layers[0](temb))
        layers[0].weight.add_(1)
        fresh = temb.clone()
        torch.testing.assert_close(together(layers[0], fresh), layers[0](fresh))


def block(seed: int) -> Int8ResnetBlock:
    torch.manual_seed(seed)
    norm, conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
    return Int8ResnetBlock.from_float(
        ResnetSpec(norm, conv, copy.deepcopy(norm), copy.deepcopy(conv), nn.Linear(12, 16))
    )


def test_blocks_share_survive_copies_and_pickles():
    blocks = nn.ModuleList([block(0), block(1)]).eval()
    x, temb = torch.randn(2, 16, 5, 6), torch.randn(2, 12)
    with torch.no_grad():
        expected = [b(x, temb) for b in blocks]
        assert share_projections(blocks) == 2
        for twin in (blocks, copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
            together = twin[0].__dict__["_shared_projection"]
            assert together is twin[1].__dict__["_shared_projection"] and together.layers[0] is twin[0].time_emb_proj
            for b, y in zip(twin, expected, strict=True):
                torch.testing.assert_close(b(x, temb), y)
    assert share_projections(blocks[:1]) == 0
