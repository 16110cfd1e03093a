"""int8 modules on a GPU: the CPU's results, and scales that a captured graph reads anew at every step."""

import copy

import pytest
import torch
from torch import nn

from pydenoise.nn import Int8Conv2d, Int8ResnetBlock, ResnetSpec, TimestepScales
from pydenoise.quantization import Scheme, TimestepBuckets, snr_db

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_block_matches_the_cpu(dtype):
    spec = ResnetSpec(
        nn.GroupNorm(8, 64), nn.Conv2d(64, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.Conv2d(96, 96, 3, padding=1),
        nn.Linear(20, 96), shortcut=nn.Conv2d(64, 96, 1),
    )  # fmt: skip
    block = Int8ResnetBlock.from_float(spec, skip_channels=16)
    x, temb, skip = torch.randn(2, 48, 9, 7), torch.randn(2, 20), torch.randn(2, 16, 9, 7)
    expected = block(x, temb, skip)
    y = copy.deepcopy(block).to("cuda")(*(t.to("cuda", dtype) for t in (x, temb, skip)))
    assert y.dtype == dtype and snr_db(expected, y.cpu()) > 35


@torch.no_grad()
def test_one_graph_serves_every_timestep():
    conv = nn.Conv2d(32, 32, 3, padding=1)
    high = torch.tensor([1.0, 2, 4, 8])
    layer = Int8Conv2d.from_float(conv, Scheme("per_timestep", buckets=4), input_range=(-high, high)).to("cuda")
    owner = TimestepScales(layer, TimestepBuckets.uniform(4))
    x, timestep = torch.randn(1, 32, 16, 16, device="cuda"), torch.zeros(1, device="cuda")

    def step():
        owner.select(timestep)
        return layer(x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for value in (10, 999, 300):
        timestep.fill_(value)
        graph.replay()
        assert torch.equal(y.clone(), step())
