"""FeatureAggregator: its start, its gradients, its options."""

import pytest
import torch

from pydenoise.nn import FeatureAggregator


def drawn(maps=3, channels=10, size=(4, 6), batch=2, embedding=16):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, maps, channels, *size, generator=generator)
    return features, torch.randn(batch, embedding, generator=generator)


def test_begins_as_the_plain_average():
    features, embedding = drawn()
    module = FeatureAggregator(3, 10, 16, hidden=32, heads=4)
    torch.testing.assert_close(module(features, embedding), features.mean(1))
    wide = features.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    out = module(wide, embedding)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, features.mean(1))


def test_a_network_alone_and_what_the_weights_see():
    """Trained logits look at the pixel, the time and the text."""
    torch.manual_seed(0)
    features, embedding = drawn()
    text = torch.randn(2, 5, 7)
    module = FeatureAggregator(3, 10, 16, hidden=32, heads=4, text=7)
    torch.nn.init.normal_(module.logits.weight)
    out = module(features, embedding, text)
    low, high = features.amin(1), features.amax(1)
    assert ((out >= low - 1e-5) & (out <= high + 1e-5)).all(), "a mean under weights lies between the maps"
    assert not torch.allclose(module(features, embedding + 1, text), out)
    assert not torch.allclose(module(features, embedding, text.flip(1) + 1), out)


def test_gradients_reach_everything():
    features, embedding = drawn()
    module = FeatureAggregator(3, 10, 16, hidden=32, heads=4)
    torch.nn.init.normal_(module.logits.weight, std=0.1)
    features.requires_grad_()
    module(features, embedding.requires_grad_()).square().sum().backward()
    assert features.grad is not None and embedding.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_fits():
    """It learns to take one map on the left and another on the right."""
    torch.manual_seed(0)
    module = FeatureAggregator(2, 4, 8, hidden=16, heads=2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        features = torch.randn(4, 2, 4, 4, 8)
        features[:, :, 0] = torch.linspace(-1, 1, 8)  # where it is
        target = torch.cat([features[:, 0, :, :, :4], features[:, 1, :, :, 4:]], -1)
        loss = (module(features, torch.zeros(4, 8)) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


BAD = {
    "hidden: expected a multiple of heads = 3": lambda: FeatureAggregator(2, 4, 8, hidden=16, heads=3),
    "maps: expected at least 1": lambda: FeatureAggregator(0, 4, 8),
    "channels: expected an int": lambda: FeatureAggregator(2, 4.0, 8),
    "text: expected an int": lambda: FeatureAggregator(2, 4, 8, text="long"),
    r"features: expected \[B, 2, 4, h, w\]": lambda: FeatureAggregator(2, 4, 8)(*drawn()),
    "text: expected none": lambda: FeatureAggregator(3, 10, 16)(*drawn(), torch.zeros(2, 3, 4)),
    "text: expected a text": lambda: FeatureAggregator(3, 10, 16, text=4)(*drawn()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
