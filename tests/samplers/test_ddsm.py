"""DDSM: widths of a network, strategies, the sandwich rule and the search."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydenoise.samplers.ddpm import DDPM
from pydenoise.samplers.ddsm import DDSM, Strategy, sandwich_backward
from pydenoise.samplers.ddsm_search import search_strategy
from pydenoise.samplers.levels import NoiseSchedule
from pydenoise.samplers.runtime import Sampler
from pydenoise.samplers.slimmable import Slimmable, make_divisible

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm = nn.GroupNorm(8, inputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(64, outputs)

    def forward(self, x, embedding):
        return self.conv(F.silu(self.norm(x))) + self.time(embedding)[:, :, None, None]


class Net(nn.Module):
    """A small U-Net: a skip connection that is concatenated, a time and a class embedding, attention."""

    def __init__(self):
        super().__init__()
        self.embed, self.classes = nn.Linear(2, 64), nn.Embedding(10, 64)
        self.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.down, self.up = Block(32, 64), Block(96, 32)
        self.norm = nn.LayerNorm(64)
        self.qkv = nn.Linear(64, 192)
        self.proj = nn.Linear(64, 64)
        self.conv_out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x, t, labels=None):
        labels = torch.zeros(x.shape[0], dtype=torch.int64) if labels is None else labels
        t = t.to(x.dtype) / 1000
        embedding = F.silu(self.embed(torch.stack([t.sin(), t.cos()], 1)) + self.classes(labels))
        first = self.conv_in(x)
        h = self.down(F.avg_pool2d(first, 2), embedding)
        tokens = self.norm(h.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(h.shape)
        h = self.up(torch.cat([F.interpolate(h, scale_factor=2), first], 1), embedding)
        return self.conv_out(h)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([10, 500]), torch.tensor([3, 7])


def cut_by_hand(net, width):
    """A network of its own with the first channels of every layer."""
    cut = copy.deepcopy(net)

    def of(channels):
        return make_divisible(channels * width, 8)

    parts = {
        "embed": (of(64), None), "conv_in": (of(32), None), "down.conv": (of(64), of(32)),
        "down.time": (of(64), of(64)), "up.conv": (of(32), of(64) + of(32)), "up.time": (of(32), of(64)),
        "qkv": (of(192), of(64)), "proj": (of(64), of(64)), "conv_out": (None, of(32)),
    }  # fmt: skip
    for name, (outputs, given) in parts.items():
        layer = cut.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight[:outputs, :given].clone())
        layer.bias = nn.Parameter(layer.bias[:outputs].clone())
    cut.classes.weight = nn.Parameter(cut.classes.weight[:, : of(64)].clone())
    for name, channels in (("down.norm", of(32)), ("up.norm", of(64) + of(32)), ("norm", of(64))):
        layer = cut.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight[:channels].clone())
        layer.bias = nn.Parameter(layer.bias[:channels].clone())
        layer.num_channels, layer.normalized_shape = channels, (channels,)
    return cut


def test_make_divisible():
    assert [make_divisible(32 * w, 8) for w in (1, 0.75, 0.5, 0.25)] == [32, 24, 16, 8]
    assert make_divisible(11, 8) == 16 and make_divisible(1, 8) == 8 and make_divisible(12, 8) == 16


@pytest.mark.parametrize("presliced", [False, True])
@pytest.mark.parametrize("width", [1.0, 0.75, 0.5, 0.25])
def test_a_width_is_the_network_of_the_first_channels(net, inputs, width, presliced):
    model = Slimmable(net, presliced=presliced)
    with torch.no_grad(), model.at(width):
        for _ in range(2):  # the second call reads what was kept
            torch.testing.assert_close(model(*inputs), cut_by_hand(net, width)(*inputs), rtol=1e-12, atol=1e-12)
    assert model.width == 1.0


def test_names_and_parameters_are_the_models(net):
    model = Slimmable(net)
    assert set(model.state_dict()) == {f"model.{name}" for name in net.state_dict()}
    assert type(net.conv_in) is nn.Conv2d, "the model itself is not changed"
    clone = copy.deepcopy(model)
    clone.width = 0.5
    assert model.width == 1.0 and clone.model.conv_in._width is clone.model.conv_out._width


def test_slices_follow_the_weights(net, inputs):
    model = Slimmable(net, presliced=True)
    model.width = 0.5
    with torch.no_grad():
        before = model(*inputs)
        model.model.conv_in.weight.mul_(2)
        assert not torch.equal(model(*inputs), before)
        assert model.model.down.conv._slices, "contiguous slices are kept"
    with torch.inference_mode():
        torch.testing.assert_close(model(*inputs), cut_by_hand(model_of(model, net), 0.5)(*inputs))


def model_of(model, net):
    plain = copy.deepcopy(net)
    plain.load_state_dict({name[6:]: value for name, value in model.state_dict().items()})
    return plain


def test_gradients_reach_the_parameters_of_the_slice_only(net, inputs):
    model = Slimmable(net, presliced=True)
    with model.at(0.5):
        model(*inputs).square().sum().backward()
    gradient = model.model.down.conv.weight.grad
    assert gradient[:32, :16].abs().min() > 0 and not gradient[32:].any() and not gradient[:, 16:].any()


def test_macs(net, inputs):
    macs = Slimmable(net).macs(*inputs)
    widths = [1.0, 0.75, 0.5, 0.25]
    assert list(macs) == widths and all(macs[a] > macs[b] for a, b in zip(widths, widths[1:], strict=False))
    conv = nn.Conv2d(8, 16, 3, padding=1)
    assert Slimmable(nn.Sequential(conv), (1.0, 0.5)).macs(torch.zeros(1, 8, 4, 4))[1.0] == 8 * 16 * 9 * 16


def test_sandwich(net, inputs):
    model = Slimmable(net)
    target = torch.zeros_like(inputs[0])
    losses = sandwich_backward(
        model, lambda: F.mse_loss(model(*inputs), target), generator=torch.Generator().manual_seed(0)
    )
    assert len(losses) == 3 and {1.0, 0.25} < set(losses) and model.width == 1.0
    gradient = model.model.conv_in.weight.grad.clone()
    expected = torch.zeros_like(gradient)
    for width in losses:
        model.zero_grad()
        with model.at(width):
            F.mse_loss(model(*inputs), target).backward()
        expected += model.model.conv_in.weight.grad
    torch.testing.assert_close(gradient, expected)


def test_strategy(tmp_path):
    bands = Strategy.bands({0: 1.0, 270: 0.75, 500: 0.5})
    assert bands.at(269) == 1.0 and bands.at(269.6) == 0.75 and bands.at(999) == 0.5 and bands.num_timesteps == 1000
    bands.save(tmp_path / "strategy.json")
    assert Strategy.load(tmp_path / "strategy.json") == bands
    costs = {1.0: 6070.0, 0.75: 3420.0, 0.5: 1520.0}
    assert bands.mean_cost(costs) == pytest.approx((270 * 6070 + 230 * 3420 + 500 * 1520) / 1000)
    assert bands.mean_cost(costs, [999.0, 300.0]) == pytest.approx((1520 + 3420) / 2)


def test_a_sampler_sets_the_width_of_every_call(net):
    """Trajectories of DDPM with a width per step are those of the cut networks called by hand."""
    model = Slimmable(net, presliced=True)
    strategy = Strategy.bands({0: 1.0, 400: 0.5, 800: 0.25})
    schedule, times = NoiseSchedule.linear(), [900.0, 600.0, 300.0, 10.0]
    nets = {width: cut_by_hand(net, width) for width in (1.0, 0.5, 0.25)}
    torch.manual_seed(2)
    x, noise = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)

    def by_hand(x, t):
        return nets[strategy.at(float(t[0]))](x, t)

    def run(denoiser, observers=()):
        sampler = Sampler(denoiser, schedule, DDPM("fixed_large_ddsm"), timesteps=times, observers=observers,
                          backend="reference")  # fmt: skip
        return sampler.sample(x, noise=noise)

    observer = DDSM(model, strategy)
    torch.testing.assert_close(run(model, [observer]), run(by_hand), rtol=0, atol=1e-9)
    assert [observer.graph_key(call) for call in range(4)] == [0.25, 0.5, 1.0, 1.0]


def test_an_observer_without_a_run_says_so(net):
    with pytest.raises(RuntimeError, match="begin_run"):
        DDSM(Slimmable(net), Strategy.constant(1.0)).begin_step(0, 4)
    with pytest.raises(ValueError, match="time"):
        DDSM(Slimmable(net), Strategy.constant(1.0, 100)).begin_run([500.0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Strategy(()), "widths"),
        (lambda: Strategy((1.0, 0.0)), "timestep 1"),
        (lambda: Strategy.bands({10: 1.0}), "bands"),
        (lambda: Strategy.constant(1.0, 10).at(10), "time"),
        (lambda: Strategy.constant(1.0, 10).mean_cost({0.5: 1.0}), "costs"),
        (lambda: Slimmable(nn.Conv2d(3, 8, 3), (0.5,)), "full width"),
        (lambda: Slimmable(nn.Conv2d(3, 8, 3), (1.0, 1.5)), "widths"),
        (lambda: Slimmable(nn.Conv2d(3, 8, 3), keep=["x"]), "keep"),
        (lambda: Slimmable(nn.Sequential(nn.GroupNorm(32, 64), nn.Conv2d(64, 3, 1))), "0 has 48 channels"),
        (lambda: Slimmable(nn.Conv2d(3, 8, 3), divisor=0), "divisor"),
        (lambda: setattr(Slimmable(nn.Conv2d(3, 8, 3)), "width", 0.6), "width"),
        (lambda: DDSM(Slimmable(nn.Conv2d(3, 8, 3)), Strategy((0.6,))), "strategy"),
    ],
)  # fmt: skip
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Slimmable(nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.Conv2d(8, 3, 1))), "0 .ConvTranspose2d"),
        (lambda: Slimmable(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1))), "groups"),
        (lambda: Slimmable(lambda x: x), "model"),
        (lambda: DDSM(nn.Identity(), Strategy((1.0,))), "model"),
        (lambda: sandwich_backward(nn.Identity(), lambda: None), "model"),
        (lambda: search_strategy(3, {1.0: 1.0}), "quality"),
        (lambda: search_strategy(lambda s: 0.0, {1.0: 1.0}, population=2.5), "population"),
    ],
)
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_search_finds_the_trade_off():
    """Width matters at the first four timesteps only: the best strategy is full there and narrow elsewhere."""
    costs = {1.0: 4.0, 0.5: 1.0}

    def quality(strategy):
        return sum(1.0 for w in strategy.widths[:4] if w < 1)

    arguments = {"num_timesteps": 12, "population": 24, "generations": 20, "mutation": 0.05, "cost_weight": 0.5}
    result = search_strategy(quality, costs, seed=1, **arguments)
    assert result.best.strategy.widths == (1.0,) * 4 + (0.5,) * 8
    assert result.best.quality == 0 and result.best.cost == pytest.approx((4 * 4 + 8) / 12)
    assert {c.strategy.widths for c in result.evaluated[:2]} == {(1.0,) * 12, (0.5,) * 12}
    assert len({c.strategy for c in result.evaluated}) == len(result.evaluated)
    assert search_strategy(quality, costs, seed=1, **arguments) == result, "a seed gives the same strategies"


def test_search_of_two_objectives():
    def quality(strategy):
        return sum(1.0 for w in strategy.widths[:4] if w < 1)

    result = search_strategy(
        quality, {1.0: 4.0, 0.5: 1.0}, num_timesteps=8, population=16, generations=12, mutation=0.1, objectives="pareto"
    )
    assert [c.cost for c in result.front] == sorted(c.cost for c in result.front)
    assert [c.quality for c in result.front] == sorted((c.quality for c in result.front), reverse=True)
    assert result.front[0].strategy.widths == (0.5,) * 8 and len(result.front) >= 4
    with pytest.raises(ValueError, match="NaN"):
        search_strategy(lambda s: float("nan"), {1.0: 1.0, 0.5: 0.5}, num_timesteps=4, population=4)
