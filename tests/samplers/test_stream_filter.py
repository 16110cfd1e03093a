"""The similarity filter: its probability, the limit of skips, bad input."""

import math

import pytest
import torch

from pydenoise.samplers import SimilarityFilter

FRAME = torch.tensor([1.0, 0.0])


def turned(cosine: float) -> torch.Tensor:
    return torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("cosine", [1.0, 0.999, 0.95, 0.6, 0.0, -1.0])
def test_probability(threshold, cosine):
    similar = SimilarityFilter(threshold)
    assert similar.probability(FRAME) == 0, "nothing came before"
    similar.accept(FRAME.double())
    wanted = max(0.0, 1 - (1 - cosine) / (1 - threshold))
    assert similar.probability(turned(cosine)) == pytest.approx(wanted, abs=1e-9)
    assert similar.probability(5 * turned(cosine)) == pytest.approx(wanted, abs=1e-9), "brightness does not count"


def test_skips_as_often_as_it_says():
    similar = SimilarityFilter(0.9, max_skip=10**6, seed=0)
    similar.accept(FRAME.double())
    frame, skipped = turned(0.97), 0
    for _ in range(2000):
        skipped += not similar.accepts(frame)
        similar.accept(FRAME.double())
    assert skipped / 2000 == pytest.approx(0.7, abs=0.03)


def test_still_frames_pass_after_max_skip():
    for most in (0, 3, 10):
        similar = SimilarityFilter(max_skip=most, seed=1)
        accepted = [similar.accepts(torch.ones(2, 8, 8)) for _ in range(4 * (most + 1))]
        assert accepted == ([True] + [False] * most) * 4


def test_a_change_counts_anew():
    similar = SimilarityFilter(max_skip=3, seed=1)
    frames = [FRAME, FRAME, FRAME, -FRAME, -FRAME, -FRAME, -FRAME, -FRAME]
    assert [similar.accepts(f) for f in frames] == [True, False, False, True, False, False, False, True]
    similar.reset()
    assert similar.accepts(-FRAME)


def test_compared_with_the_last_accepted_frame():
    """A slow turn: neighbours are alike, and yet frames pass before all has changed."""
    similar = SimilarityFilter(0.9, max_skip=10**6, seed=2)
    angles = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    accepted = [similar.accepts(torch.stack([a.cos(), a.sin()])) for a in angles]
    assert 6 < sum(accepted) < 100
    far = [i for i, yes in enumerate(accepted) if yes]
    assert max(b - a for a, b in zip(far, far[1:], strict=False)) <= math.acos(0.9) / (math.pi / 199) + 1


def test_threshold_one_and_nothing_to_compare():
    similar = SimilarityFilter(1.0)
    assert all(similar.accepts(FRAME) for _ in range(5))
    dark = SimilarityFilter(0.5, seed=0)
    assert all(dark.accepts(torch.zeros(4)) for _ in range(5)), "no direction"
    assert dark.accepts(torch.full((4,), math.nan))


def test_seeds():
    frames = [turned(0.99) if i % 2 else turned(1.0) for i in range(60)]

    def run(seed):
        similar = SimilarityFilter(0.98, max_skip=1000, seed=seed)
        return [similar.accepts(f) for f in frames]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"threshold": 1.5}, ValueError),
        ({"threshold": -0.1}, ValueError),
        ({"threshold": math.nan}, ValueError),
        ({"threshold": "much"}, TypeError),
        ({"max_skip": -1}, ValueError),
        ({"max_skip": 2.5}, TypeError),
        ({"seed": 0.5}, TypeError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        SimilarityFilter(**options)


def test_bad_frames():
    similar = SimilarityFilter()
    with pytest.raises(TypeError, match="frame"):
        similar.accepts(3)
    similar.accepts(FRAME)
    with pytest.raises(ValueError, match="frame"):
        similar.accepts(torch.ones(3))
