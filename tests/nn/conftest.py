"""What every int8 module must stand."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pydenoise.nn._int8 import Int8Layer


def same(one, other):
    return torch.equal(one, other) and one.dtype == other.dtype


@pytest.fixture
def stands(tmp_path):
    """A function that checks copies, pickles, checkpoints, casts and the refusal of training.

    ``empty`` makes a module of the same structure with other numbers, or with weights on the meta device.
    """

    def check(module, empty, *args, **kwargs):
        with torch.no_grad():
            expected = module(*args, **kwargs)
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert same(twin(*args, **kwargs), expected)
            assert same(module.to(memory_format=torch.channels_last)(*args, **kwargs), expected)
            save_file(module.state_dict(), tmp_path / "module.safetensors")
            loaded = empty()
            loaded.load_state_dict(load_file(tmp_path / "module.safetensors"), assign=True)
            assert same(loaded.eval()(*args, **kwargs), expected)
            scales = [layer.weight_scale for layer in copy.deepcopy(module).half().modules()
                      if isinstance(layer, Int8Layer)]  # fmt: skip
            assert all(scale.dtype == torch.float32 for scale in scales)
            with pytest.raises(RuntimeError, match="evaluation mode"):
                copy.deepcopy(module).train()(*args, **kwargs)

    return check


@pytest.fixture
def on_meta():
    """A function that puts a copy of a float module on the meta device: structure without weights."""

    def move(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).to("meta")

    return move
