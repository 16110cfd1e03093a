"""Statistics of layers' inputs: ranges, samples, buckets, bounds, and inputs that must not pass."""

import math

import pytest
import torch
from torch import nn

from pydenoise.quantization import LayerStatistics
from pydenoise.quantization.observers import Observers
from pydenoise.quantization.reservoir import Reservoir

ALONE = torch.zeros(1, dtype=torch.int64)


def statistics(module, buckets=1, elements=1 << 16):
    return LayerStatistics.of("layer", module, buckets, elements, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ranges_of_images(dtype):
    item = statistics(nn.Conv2d(3, 4, 3, dilation=2))
    batches = [(torch.randn(2, 3, 9, 11) * 4).to(dtype) for _ in range(3)]
    for x in batches:
        item.observe(x, ALONE)
    x = torch.cat(batches).float()
    assert torch.equal(item.channel_low[0], x.amin((0, 2, 3)))
    assert torch.equal(item.channel_high[0], x.amax((0, 2, 3)))
    assert torch.equal(item.channel_amax, x.abs().amax((0, 2, 3)))
    assert item.low == x.min() and item.high == x.max()
    assert (item.calls, item.counts.tolist(), item.extent) == (3, [6], (5, 5))
    assert all(sample.dtype == torch.float32 and sample.shape[0] == 3 for sample in item.samples(0))


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 3, 5, 6), (6,)])
def test_ranges_of_tokens(shape):
    item = statistics(nn.Linear(6, 2))
    x = torch.randn(shape)
    item.observe(x, ALONE)
    assert torch.equal(item.channel_high[0], x.reshape(-1, 6).amax(0))
    rows = {tuple(row.tolist()) for row in x.reshape(-1, 6)}
    taken = torch.cat(item.samples(0))
    assert {tuple(row.tolist()) for row in taken} <= rows


def test_unbatched_images():
    item = statistics(nn.Conv2d(3, 4, 3))
    item.observe(torch.randn(3, 8, 8), ALONE)
    assert item.counts.tolist() == [1]


def test_samples_are_patches_of_the_input():
    item = statistics(nn.Conv2d(2, 4, 3), elements=2000)
    x = torch.arange(2.0 * 20 * 20).reshape(1, 2, 20, 20)
    item.observe(x, ALONE)
    for patch in item.samples(0):
        top, left = divmod(int(patch[0, 0, 0]), 20)
        assert torch.equal(patch, x[0, :, top : top + patch.shape[1], left : left + patch.shape[2]])
        assert patch.shape[1] > 3, "more than one output pixel"


@pytest.mark.parametrize("channels", [4, 64, 1000])
@pytest.mark.parametrize("buckets", [1, 5])
def test_memory_is_bounded(channels, buckets):
    item = statistics(nn.Conv2d(channels, 1, 3), buckets, 50_000)
    for index in range(20):
        item.observe(torch.randn(4, channels, 16, 16), torch.tensor([index % buckets]))
    kept = sum(sample.numel() for bucket in range(buckets) for sample in item.samples(bucket))
    assert kept <= max(50_000, buckets * channels * 16), "or one smallest patch a bucket"
    assert all(item.samples(bucket) for bucket in range(buckets))


def test_rows_go_to_their_buckets():
    item = statistics(nn.Linear(2, 2), 3)
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0]])
    item.observe(x, torch.tensor([0, 2, 0]))
    assert item.seen.tolist() == [True, False, True]
    assert item.high.tolist() == [4.0, -math.inf, 20.0]
    assert item.channel_low[0].tolist() == [1.0, 2.0]
    assert len(item.samples(1)) == 0


def test_timesteps_that_cannot_be_told_apart():
    item = statistics(nn.Linear(2, 2), 3)
    item.observe(torch.randn(8, 2), torch.tensor([1, 1]))  # all in one bucket: no question
    with pytest.raises(ValueError, match="'layer' has 8 rows and the batch 2 timesteps"):
        item.observe(torch.randn(8, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
@pytest.mark.parametrize("module", [nn.Conv2d(3, 3, 1), nn.Linear(3, 3)], ids=["conv", "linear"])
def test_what_is_not_finite_names_the_layer(module, value, word):
    x = torch.randn(2, 3, 3, 3)
    x[1, 0, 2, 0] = value
    with pytest.raises(ValueError, match=f"'layer' holds {word}"):
        statistics(module).observe(x, ALONE)


def test_constant_and_empty_inputs():
    item = statistics(nn.Conv2d(2, 2, 1))
    item.observe(torch.empty(0, 2, 4, 4), ALONE)
    assert item.calls == 1 and not item.seen.any() and not item.is_constant
    item.observe(torch.full((1, 2, 4, 4), 3.0), ALONE)
    assert item.is_constant
    item.observe(torch.randn(1, 2, 4, 4), ALONE)
    assert not item.is_constant


def test_merged_statistics_are_those_of_both():
    conv = nn.Conv2d(2, 2, 3)
    one, two, both = statistics(conv), statistics(conv), statistics(conv)
    for index in range(6):
        x = torch.randn(3, 2, 16, 16)
        (one, two)[index % 2].observe(x, ALONE)
        both.observe(x, ALONE)
    merged = one.merged(two)
    assert torch.equal(merged.channel_low, both.channel_low) and torch.equal(merged.channel_high, both.channel_high)
    assert merged.counts == both.counts and merged.calls == both.calls
    assert merged.reservoir.seen == both.reservoir.seen
    assert len(merged.samples(0)) == len(both.samples(0))
    with pytest.raises(ValueError, match="different layers"):
        one.merged(statistics(nn.Conv2d(3, 2, 3)))


def test_reservoirs_draw_uniformly():
    kept = torch.zeros(40)
    for seed in range(400):
        reservoir = Reservoir(1, 10, seed)
        for index in range(40):
            reservoir.offer(0, lambda index=index: torch.tensor(index))
        assert len(reservoir.items[0]) == 10
        for item in reservoir.items[0]:
            kept[item] += 1
    assert kept.min() > 65 and kept.max() < 140  # 100 each, standard deviation 8.7


def test_merged_reservoirs_weigh_by_what_was_seen():
    share = 0
    for seed in range(100):
        sides = [Reservoir(1, 10, seed + 1000 * side) for side in (0, 1)]
        for side, count in ((0, 90), (1, 30)):
            for _ in range(count):
                sides[side].offer(0, lambda side=side: torch.tensor(side))
        merged = sides[0].merged(sides[1], seed)
        assert len(merged.items[0]) == 10 and merged.seen == [120]
        share += sum(int(item) for item in merged.items[0])
    assert 180 < share < 320  # a quarter of 1000


def test_hooks_observe_only_while_watching():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    pairs = [(model[0], statistics(model[0])), (model[1], statistics(model[1]))]
    with Observers(pairs) as observers:
        model(torch.randn(3, 4))
        with observers.watching(ALONE):
            model(torch.randn(3, 4))
        model(torch.randn(3, 4))
    assert [item.calls for _, item in pairs] == [1, 1]
    assert not model[0]._forward_pre_hooks


def test_keyword_inputs_are_observed():
    layer = nn.Linear(4, 2)
    item = statistics(layer)
    with Observers([(layer, item)]) as observers, observers.watching(ALONE):
        layer(input=torch.randn(3, 4))
    assert item.calls == 1


def test_only_convolutions_and_linear_layers():
    with pytest.raises(TypeError, match="layer: expected a Conv2d or Linear, got ReLU"):
        statistics(nn.ReLU())
    with pytest.raises(ValueError, match="expected an input of 3 channels"):
        statistics(nn.Conv2d(3, 3, 1)).observe(torch.randn(1, 4, 2, 2), ALONE)


def test_a_1x1_convolution_as_a_linear_layer():
    item = statistics(nn.Conv2d(3, 4, 1))
    item.observe(torch.randn(2, 3, 4, 4), ALONE)
    linear = item.as_linear()
    assert linear.kind == "linear" and linear.as_linear() is linear
    assert torch.equal(linear.channel_low, item.channel_low) and torch.equal(linear.counts, item.counts)
    for image, tokens in zip(item.samples(0), linear.samples(0), strict=True):
        assert torch.equal(image.permute(1, 2, 0).flatten(0, 1), tokens)
    with pytest.raises(ValueError, match="layer: expected a 1x1 convolution"):
        statistics(nn.Conv2d(3, 4, 3)).as_linear()
