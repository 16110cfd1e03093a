"""TimestepScales: one place switches the scales of all layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pydenoise.nn import Int8Conv2d, Int8Linear, TimestepScales
from pydenoise.quantization import Scheme, TimestepBuckets, snr_db

BUCKETS = TimestepBuckets.uniform(4, 1000)


class Model(nn.Module):
    """Two layers with a table, one with a scale of its own."""

    def __init__(self, symmetric=False, buckets=BUCKETS):
        super().__init__()
        torch.manual_seed(0)
        scheme = Scheme("per_timestep", buckets=len(BUCKETS), symmetric=symmetric)
        low, high = -torch.tensor([1.0, 2, 4, 8]), torch.tensor([2.0, 3, 5, 9])
        self.plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Linear(6, 5), nn.Conv2d(8, 4, 1)).eval()
        self.conv = Int8Conv2d.from_float(self.plain[0], scheme, input_range=(low, high))
        self.linear = Int8Linear.from_float(self.plain[1], scheme, input_range=(low * 2, high / 2))
        self.last = Int8Conv2d.from_float(self.plain[2], Scheme("per_tensor"), input_range=(-4, 4))
        self.timestep_scales = TimestepScales(self, buckets)

    def forward(self, x, timestep):
        self.timestep_scales.select(timestep)
        return self.last(self.conv(x)), self.linear(x)


def conv_scale(model):
    return tuple(None if value is None else value.item() for value in model.conv.input_parameters)


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_timestep_has_its_row(symmetric):
    model = Model(symmetric)
    for timestep in (0, 249.9, torch.tensor(250), torch.tensor([999, 999]), torch.tensor([700.0])):
        model.timestep_scales.select(timestep)
        row = BUCKETS(timestep).flatten()[0]
        for layer in (model.conv, model.linear):
            scale, zero_point = layer.input_parameters
            assert scale == layer.input_scale[row] and scale.dim() == 0
            assert zero_point is None if symmetric else zero_point == layer.input_zero_point[row]


def test_addresses_stay():
    """A captured graph or a recording reads the same memory at every step."""
    model = Model()
    model.timestep_scales.select(0)
    before = [t.data_ptr() for layer in (model.conv, model.linear) for t in layer.input_parameters]
    with torch.inference_mode():
        model.timestep_scales.select(torch.tensor([800]))
    model.timestep_scales.select(400)
    assert before == [t.data_ptr() for layer in (model.conv, model.linear) for t in layer.input_parameters]
    scales = [model.conv.input_parameters[0], model.linear.input_parameters[0]]
    assert scales[1].data_ptr() - scales[0].data_ptr() == 4


@pytest.mark.parametrize("symmetric", [False, True])
def test_mixed_buckets_take_the_union(symmetric):
    model = Model(symmetric)
    model.timestep_scales.select(torch.tensor([100, 800, 300]))
    scale, zero_point = model.conv.input_parameters
    offset = 0 if zero_point is None else zero_point.item()
    expected = (-9, 9) if symmetric else (-8, 9)
    assert ((-127 if symmetric else -128) - offset) * scale == pytest.approx(expected[0], abs=scale.item())
    assert (127 - offset) * scale == pytest.approx(expected[1], abs=scale.item())
    model.timestep_scales.select(torch.tensor([800, 900]))  # of one bucket: its row, exactly
    assert conv_scale(model)[0] == model.conv.input_scale[3].item()
    scale, zero_point = model.timestep_scales._merged(torch.tensor([2, 2, 2]))  # as a GPU takes them, one by one
    assert scale[1] == model.linear.input_scale[2]
    assert symmetric or zero_point[1] == model.linear.input_zero_point[2]


@torch.no_grad()
def test_accuracy_by_bucket():
    """A range that fits the timestep is better than the widest one."""
    model, x = Model(), torch.rand(2, 3, 7, 6) - 0.5
    expected = model.plain[0](x)
    errors = []
    for timestep in (0, 999):
        model.timestep_scales.select(timestep)
        errors.append(snr_db(expected, model.conv(x)))
    assert errors[0] > errors[1] + 12


@torch.no_grad()
def test_copies_moves_and_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    model, x = Model(), torch.randn(2, 3, 5, 6)
    expected = model(x, 600)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half()):
        assert twin.timestep_scales._layers[0] is twin.conv
        assert all(torch.equal(a, b) for a, b in zip(twin(x, 600), expected, strict=True))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = Model(symmetric=True, buckets=TimestepBuckets.uniform(4, 10))
    other(x, 3)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other.timestep_scales.timesteps == BUCKETS
    assert all(torch.equal(a, b) for a, b in zip(other(x, 600), expected, strict=True))
    alone = copy.deepcopy(model.conv)  # a copy of a layer drags nothing along, and asks for its owner
    with pytest.raises(RuntimeError, match="TimestepScales.select"):
        alone(x)


def test_changed_tables():
    model = Model()
    model.timestep_scales.select(0)
    model.conv.input_scale.mul_(2)
    model.timestep_scales.refresh()
    model.timestep_scales.select(0)
    assert conv_scale(model)[0] == model.conv.input_scale[0].item()


def test_errors():
    model = Model()
    with pytest.raises(ValueError, match="NaN"):
        model.timestep_scales.select(torch.tensor([0.0, torch.nan]))
    with pytest.raises(TypeError, match="timesteps"):
        TimestepScales(model, 4)
    with pytest.raises(ValueError, match="3 buckets"):
        TimestepScales(model, TimestepBuckets.uniform(3))
    TimestepScales(nn.ReLU(), BUCKETS).select(0)  # nothing to switch
    model.timestep_scales.select(torch.zeros(0))  # an empty batch changes nothing
