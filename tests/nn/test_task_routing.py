"""TaskRouting: the published tables, respaced schedules, routes of batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pydenoise.nn import TaskRouting

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "blocks_afa.npz")


@pytest.mark.parametrize("channels", [384, 1024, 1152])
def test_published_tables(channels):
    routing = TaskRouting(channels)
    assert routing.width == int(GOLDEN[f"dtr_nact_C{channels}"])
    assert torch.equal(routing.starts, torch.from_numpy(GOLDEN[f"dtr_start_C{channels}"]))


def test_width():
    assert TaskRouting(768).width == int(GOLDEN["dtr_nact_C768"])
    assert TaskRouting(1152).width == 921
    assert TaskRouting(64, sharing=1.0).route(999).start == 0
    assert len(set(TaskRouting(1024).starts.tolist())) == 206
    assert TaskRouting(8, 1).starts.tolist() == [0]


def test_alpha_spreads_the_windows():
    even, steep = TaskRouting(1000, alpha=1.0), TaskRouting(1000, alpha=8.0)
    assert even.starts[500] == 100 and steep.starts[500] == 1
    assert (even.starts.diff() >= 0).all() and even.starts[-1] == steep.starts[-1] == 200


def test_masks():
    routing = TaskRouting(20, 100)
    times = torch.tensor([0, 99, 60])
    masks = routing.mask(times)
    assert masks.shape == (3, 20) and (masks.sum(1) == 16).all()
    for mask, start in zip(masks, routing.starts[times].tolist(), strict=True):
        assert mask.nonzero()[:, 0].tolist() == list(range(start, start + 16))
    route = routing.route(times)
    assert torch.equal(route.channels(3, times.device), masks.nonzero()[:, 1].view(3, 16))
    assert torch.equal(routing.mask(99), masks[1:2])


def test_random_sets():
    routing, again, other = (TaskRouting(50, 30, method="random", seed=seed) for seed in (1, 1, 2))
    assert (routing.sets.sum(1) == 40).all()
    assert torch.equal(routing.sets, again.sets) and not torch.equal(routing.sets, other.sets)
    assert not torch.equal(routing.sets[0], routing.sets[1])
    assert list(routing.state_dict()) == ["sets"] and not TaskRouting(50, 30).state_dict()
    route = routing.route(torch.tensor([3, 4]))
    assert torch.equal(route.mask, routing.sets[3:5])
    assert torch.equal(route.channels(2, torch.device("cpu")), routing.sets[3:5].nonzero()[:, 1].view(2, 40))
    assert torch.equal(routing.route(3).mask, routing.sets[3])


def test_respaced_schedules_use_the_original_timesteps():
    """250 steps of 1000: step i stands for timestep 4 i + 3, and uses its channels."""
    routing = TaskRouting(1024)
    kept = range(3, 1000, 4)
    short = TaskRouting(1024, timestep_map=kept)
    assert short.count == 250
    for step in (0, 100, 249):
        assert short.route(step).start == routing.route(4 * step + 3).start
    steps = torch.tensor([10, 249])
    assert torch.equal(short.route(steps).start, routing.route(4 * steps + 3).start)
    assert short.route(249).start != routing.route(249).start
    assert short.respaced(None).route(249).start == routing.route(249).start


def test_equal_timesteps_share_a_window():
    routing = TaskRouting(64)
    assert routing.route(torch.tensor([900, 900])).start == routing.route(900).start == int(routing.starts[900])
    assert isinstance(routing.route(torch.tensor([900, 901])).start, torch.Tensor)
    assert routing.route(torch.tensor(5)).start == 0


R = TaskRouting(16, 10)
BAD = {
    "channels: expected an int": lambda: TaskRouting(16.0),
    "tasks: expected at least 1": lambda: TaskRouting(16, 0),
    "sharing: expected": lambda: TaskRouting(16, sharing=1.5),
    "alpha: expected": lambda: TaskRouting(16, alpha=0),
    "method: expected one of": lambda: TaskRouting(16, method="learned"),
    "timestep_map: expected timesteps from 0 to 9": lambda: TaskRouting(16, 10, timestep_map=[3, 10]),
    "timestep_map: expected a sequence": lambda: TaskRouting(16, 10, timestep_map=[0.5]),
    "timesteps: expected 0 to 9, got 10": lambda: R.route(10),
    "timesteps: expected 0 to 9, got -1": lambda: R.route(torch.tensor([-1, 3])),
    "timesteps: expected a whole number": lambda: R.route(1.5),
    "timesteps: expected whole numbers": lambda: R.route(torch.tensor([0.5, 1.0])),
    r"timesteps: expected a number or \[B\]": lambda: R.route(torch.zeros(2, 2).long()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
