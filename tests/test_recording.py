"""Recorded forwards: the same results as the model's own, for other inputs, shapes, weights; refusals with reasons."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pydenoise as pdn
from pydenoise import recording
from pydenoise.recording import record_forward, release_forward

pytestmark = pytest.mark.skipif(recording.unavailable() is not None, reason=str(recording.unavailable()))


class Net(nn.Module):
    """Kernels of ours with torch operations, views, in-place writes and constants between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.embedding = nn.Linear(4, 16)
        self.register_buffer("table", torch.randn(1000))

    def forward(self, x, timestep=0.0, double=False):
        h = self.first(x)
        angles = torch.arange(4, dtype=self.table.dtype) * timestep
        h = h + self.embedding(angles.sin())[None, :, None, None]
        h = F.silu(h, inplace=True)
        h = torch.cat([h, h.flip(1)], 1)[:, ::2].contiguous(memory_format=torch.channels_last)
        h += self.table[:16].view(1, 16, 1, 1)
        y = self.last(h)
        return {"out": 2 * y if double else y, "constant": self.table[:2] * 2}


@pytest.fixture
def model():
    accelerated, _ = pdn.accelerate(Net().eval(), torch.randn(1, 3, 12, 14), measure=False, inplace=False)
    return accelerated


def same(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])  # operations arrive whole in the latter
def test_replays_give_the_forward_s_own_results(model, mode):
    own, x = copy.deepcopy(model), inputs(1, 3, 12, 14)
    recorded = record_forward(model)
    for shape in ((1, 3, 12, 14), (2, 3, 9, 7), (1, 3, 12, 14), (0, 3, 8, 8)):
        for _ in range(3):
            x = inputs(*shape)
            with mode():
                assert same(model(x), own(x))
    assert not recorded.refusals
    assert len(recorded.recordings()) == 3
    assert recorded.recordings()[0].kernel_steps >= 2 and recorded.recordings()[0].arena_bytes > 0


def test_expanded_inputs(model):
    own, gray = copy.deepcopy(model), torch.randn(1, 1, 12, 14)
    recorded = record_forward(model)
    for factor in (1.0, 2.0):
        x = (gray * factor).expand(-1, 3, -1, -1)
        with torch.no_grad():
            assert same(model(x), own(x))
    assert len(recorded.recordings()) == 1


def test_numbers_are_part_of_the_key_and_named_ones_become_tensors(model):
    own, x = copy.deepcopy(model), inputs(1, 3, 8, 8)
    recorded = record_forward(model)
    with torch.no_grad():
        for double in (True, False):
            assert same(model(x, double=double), own(x, double=double))
    assert len(recorded.recordings()) == 2
    release_forward(model)
    net = Net().eval()
    recorded = record_forward(net, as_tensors=("timestep",))
    with torch.no_grad():
        for timestep in (1, 7.5, 300):
            expected = Net.forward(net, x, torch.tensor(timestep))
            assert same(net(x, timestep), expected) and same(net(x, timestep=timestep), expected)
    assert len(recorded.recordings()) <= 4 and not recorded.refusals


def test_outputs_belong_to_the_caller(model):
    record_forward(model)
    with torch.no_grad():
        first = model(inputs(1, 3, 8, 8))
        kept = {key: value.clone() for key, value in first.items()}
        model(inputs(1, 3, 8, 8))
    assert same(first, kept)


def test_changed_weights_are_noticed():
    net = Net().eval()
    x = inputs(1, 3, 8, 8)
    record_forward(net)
    with torch.no_grad():
        before = net(x)["out"]
        net.last.weight.mul_(2)
        assert torch.equal(net(x)["out"], Net.forward(net, x)["out"])
        assert not torch.equal(net(x)["out"], before)
        net.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()})
        assert torch.equal(net(x)["out"], Net.forward(net, x)["out"])
        net.double()
        assert net(x.double())["out"].dtype == torch.float64


def test_gradients_run_the_model_itself():
    net = Net().eval()
    record_forward(net)
    x = inputs(1, 3, 8, 8).requires_grad_()
    net(x)["out"].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: x * 2 if x.sum().item() > 0 else x, "reads values back"),
        (lambda x: x[x > 0], "reads values back"),
    ],
)
def test_what_depends_on_values_is_refused_and_runs_as_it_is(forward, reason):
    class Branching(nn.Module):
        def forward(self, x):
            return forward(x)

    net = Branching().eval()
    recorded = record_forward(net)
    with torch.no_grad():
        for sign in (1, -1):
            x = sign * torch.rand(3, 4)
            assert torch.equal(net(x), forward(x))
    assert any(reason in text for text in recorded.refusals)


def test_constants_that_are_written_later_are_not_taken_for_constants():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(3))

        def forward(self, x):
            before = self.state + 1
            self.state.copy_(x)
            return before + x

    net, own = Counting().eval(), Counting().eval()
    record_forward(net)
    with torch.no_grad():
        warm = torch.zeros(3)
        net(warm), own(warm)
        for _ in range(4):
            x = torch.randn(3)
            assert torch.equal(net(x), own(x))


def test_copies_and_pickles_record_anew(model):
    record_forward(model)
    x = inputs(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.forward.model is twin
            assert same(twin(x), expected)


def test_release(model):
    record_forward(model)
    release_forward(model)
    assert "forward" not in model.__dict__
