"""Timestep samplers and buckets."""

import pytest
import torch

from pydenoise.quantization import NormalTimesteps, TimestepBuckets, UniformTimesteps, bucket_of


def test_normal_timesteps_are_those_of_the_paper():
    t = NormalTimesteps().sample(20000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999
    assert 0.14 < (t == 0).float().mean() < 0.18  # P(N(0.4, 0.4) < 0.001)
    assert 0.06 < (t == 999).float().mean() < 0.08
    inside = t[(t > 0) & (t < 999)].float() / 1000
    assert abs(inside.median() - 0.43) < 0.02


def test_normal_timesteps_truncate():
    assert set(NormalTimesteps(0.5, 0.0, 7).sample(5).tolist()) == {3}  # trunc(3.5)


def test_uniform_timesteps_cover_everything_once():
    t = UniformTimesteps(1000).sample(1000)
    assert sorted(t.tolist()) == list(range(1000))
    assert t.tolist() != list(range(1000))


@pytest.mark.parametrize("sampler", [NormalTimesteps(), UniformTimesteps()])
def test_sampling_is_reproducible(sampler):
    one, two = (sampler.sample(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(("buckets", "total"), [(1, 1000), (10, 1000), (7, 1000), (3, 10), (16, 50)])
def test_buckets_are_equal_ranges(buckets, total):
    t = torch.arange(total)
    assert torch.equal(bucket_of(t, buckets, total), t * buckets // total)
    assert len(TimestepBuckets.uniform(buckets, total)) == buckets


def test_buckets_of_any_numbers():
    ranges = TimestepBuckets.from_values([80.0, 10.0, 2.0, 0.5], 4)
    assert ranges(torch.tensor([0.5, 2.0, 10.0, 80.0])).tolist() == [0, 1, 2, 3]
    assert ranges(1e9) == 3 and ranges(-5) == 0
    assert len(TimestepBuckets.from_values([1, 2, 2], 5)) == 2
    assert TimestepBuckets.from_values(range(100), 4).edges == (24.5, 49.5, 74.5)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: NormalTimesteps(std=-1), ValueError, "std"),
        (lambda: NormalTimesteps(num_train_timesteps=0), ValueError, "num_train_timesteps"),
        (lambda: UniformTimesteps().sample(0), ValueError, "n"),
        (lambda: TimestepBuckets((2, 1)), ValueError, "edges"),
        (lambda: TimestepBuckets.uniform(0), ValueError, "buckets"),
        (lambda: bucket_of(5, 2.0), TypeError, "buckets"),
        (lambda: TimestepBuckets.from_values([], 2), ValueError, "values"),
        (lambda: TimestepBuckets()(float("nan")), ValueError, "timesteps"),
    ],
)
def test_bad_arguments_are_named(make, error, name):
    with pytest.raises(error, match=rf"^{name}:"):
        make()
