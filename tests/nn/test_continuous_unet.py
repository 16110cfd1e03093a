"""The continuous U-Net: its published size, the time it is told, images of any size, bad input."""

import pytest
import torch
import torch.nn.functional as F

import pydenoise.nn as pnn
from pydenoise.nn.continuous_unet import PixelAttention, TimeSines

SMALL = {"in_channels": 1, "n_features": 4, "levels": 2}
TIMES = torch.tensor([3, 700])


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_size():
    """8.56 million parameters, 7.855 of them in the dynamic blocks, and 0.757 million more with FiLM everywhere."""
    network = pnn.ContinuousUNet(time_embedding="none", device="meta")
    blocks = [m for m in network.modules() if isinstance(m, pnn.DynamicBlock)]
    assert [b.channels for b in blocks] == [32, 64, 128, 256, 512, 256, 128, 64, 32]
    assert sum(map(count, blocks)) == 7_854_976
    attention = [m for m in network.modules() if isinstance(m, PixelAttention)]
    assert [a.gain.numel() for a in attention] == [256, 256] and sum(map(count, attention)) == 263_168
    assert count(network.down) + count(network.up) == 436_640
    assert round(count(network) / 1e6, 2) == 8.56
    film = pnn.ContinuousUNet(time_embedding="film", device="meta")
    assert sum(count(b.film) for b in film.modules() if isinstance(b, pnn.DynamicBlock)) == 756_608


def test_sines_of_the_published_table():
    """A table of 1000 times: the frequency of index j is 10000^(-2 j / d); sines at even j, cosines as those before."""
    features = 8
    j = torch.arange(features, dtype=torch.float64)
    frequencies = 10000 ** (-2 * j / features)
    t = torch.arange(1000, dtype=torch.float64)[:, None]
    table = torch.zeros(1000, features, dtype=torch.float64)
    table[:, ::2] = (t * frequencies[::2]).sin()
    table[:, 1::2] = (t * frequencies[::2]).cos()
    actual = TimeSines(features, dtype=torch.float64)(t[:, 0])
    torch.testing.assert_close(actual, table)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 17), (3, 1), (1, 1)])
@pytest.mark.parametrize("time_embedding", ["none", "add", "film"])
def test_any_size(size, time_embedding):
    torch.manual_seed(0)
    network = pnn.ContinuousUNet(**SMALL, time_embedding=time_embedding)
    x = torch.randn(2, 1, *size)
    times = () if time_embedding == "none" else (TIMES,)
    with torch.no_grad():
        y = network(x, *times)
        assert y.shape == x.shape and y.isfinite().all()
        if size == (1, 1):  # a constant image: norms make rounding errors of it
            return
        if times:
            assert not torch.allclose(network(x, TIMES + 100), y)
            torch.testing.assert_close(network(x[1:], TIMES[1]), y[1:], rtol=1e-3, atol=1e-4)
        below, right = (max(8, -(-n // 4) * 4) - n for n in size)
        padded = F.pad(x, (0, right, 0, below), mode="replicate")
        torch.testing.assert_close(network(padded, *times)[:, :, : size[0], : size[1]], y)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "second"},
        {"residual": True, "time_embedding": "film"},
        {"time_dependent": True, "method": "midpoint", "n_steps": 2},
        {"kernel_size": 1, "attention_levels": (0, 1), "attention_residual": True},
        {"attention_levels": (), "recompute": False},
    ],
    ids=str,
)
def test_trains(options):
    torch.manual_seed(0)
    network = pnn.ContinuousUNet(**SMALL, classes=3, **options)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    losses = []
    for _ in range(12):
        loss = (network(x, TIMES, labels) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for name, p in network.named_parameters())


def test_labels():
    network = pnn.ContinuousUNet(**SMALL, classes=3)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        none = network(x, TIMES)
        assert network.null_class == 3
        assert torch.equal(network(x, TIMES, torch.tensor([3, 3])), none)
        assert not torch.allclose(network(x, TIMES, torch.tensor([0, 1])), none)


def test_attention_is_scaled_dot_product_attention():
    torch.manual_seed(1)
    layer, x = PixelAttention(6), torch.randn(2, 6, 3, 4)
    norm = x / x.norm(dim=1, keepdim=True) * 6**0.5
    q, k, v = F.conv2d(norm, layer.qkv.weight).chunk(3, 1)
    heads = []
    for h in range(4):
        one = [t[:, 32 * h : 32 * h + 32].flatten(2) for t in (q, k, v)]
        weights = (one[0].transpose(1, 2) @ one[1] / 32**0.5).softmax(-1)
        heads.append((one[2] @ weights.transpose(1, 2)).unflatten(2, (3, 4)))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)


BAD = {
    "n_features: expected a positive int": lambda: pnn.ContinuousUNet(n_features=0),
    "levels: expected an int": lambda: pnn.ContinuousUNet(levels=2.0),
    "time_embedding: expected one of": lambda: pnn.ContinuousUNet(time_embedding="table"),
    "time_features: expected an even number": lambda: pnn.ContinuousUNet(time_features=7),
    "attention_levels: expected levels from 0 to 1": lambda: pnn.ContinuousUNet(**SMALL, attention_levels=(2,)),
    "classes: labels are added": lambda: pnn.ContinuousUNet(**SMALL, classes=3, time_embedding="none"),
    "method: expected one of": lambda: pnn.ContinuousUNet(**SMALL, method="dopri5"),
    r"x: expected \[N, 1, H, W\]": lambda: pnn.ContinuousUNet(**SMALL)(torch.zeros(1, 3, 8, 8), TIMES),
    "timesteps: expected a tensor": lambda: pnn.ContinuousUNet(**SMALL)(torch.zeros(1, 1, 8, 8)),
    "timesteps, labels: this network": lambda: pnn.ContinuousUNet(**SMALL, time_embedding="none")(
        torch.zeros(2, 1, 8, 8), TIMES
    ),
    "labels: this network was built without": lambda: pnn.ContinuousUNet(**SMALL)(
        torch.zeros(2, 1, 8, 8), TIMES, torch.tensor([0, 1])
    ),
    "labels: expected integers": lambda: pnn.ContinuousUNet(**SMALL, classes=2)(
        torch.zeros(2, 1, 8, 8), TIMES, torch.tensor([0.0, 1.0])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
