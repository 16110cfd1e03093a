"""``accelerate``: what is fused, what must not be, and that every way gives the original's results."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydenoise as pdn
from pydenoise.nn.fused_conv import FusedConv1d, FusedConv2d, FusedConv3d

FUSED = (FusedConv1d, FusedConv2d, FusedConv3d)
BOUND = {"fp32": 1e-4, "bf16": 0.05}


# ---------------------------------------------------------------------------------------------------- networks


def conv(cin, cout, k=3, **options):
    return nn.Conv2d(cin, cout, k, padding=k // 2, **options)


class DnCNN(nn.Module):
    def __init__(self, depth=6, width=16, channels=1):
        super().__init__()
        layers = [conv(channels, width), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [conv(width, width, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, conv(width, channels))

    def forward(self, x):
        return x - self.body(x)


class ResBlock(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.conv1, self.act, self.conv2 = conv(width, width), activation, conv(width, width)

    def forward(self, x):
        return x + self.conv2(self.act(self.conv1(x)))


class ResBlockNet(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.head = conv(3, width)
        self.blocks = nn.Sequential(*(ResBlock(width, act) for act in (nn.SiLU(), nn.GELU(), nn.GELU("tanh"))))
        self.tail = conv(width, 3)

    def forward(self, x):
        return self.tail(self.blocks(self.head(x)))


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down1, self.down2 = conv(3, width), conv(width, 2 * width, stride=2)
        self.mid = conv(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge, self.out = conv(2 * width, width), conv(width, 3)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = torch.relu(self.down2(a))
        b = b + F.gelu(self.mid(b))
        a = torch.cat([a, self.up(b)], 1)
        return self.out(F.silu(self.merge(a)))


class ResNetStyle(nn.Module):
    """The activation comes after the addition; in-place addition and activation."""

    def __init__(self, width=12):
        super().__init__()
        self.conv1, self.bn1 = conv(width, width, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(conv(width, width, 1), nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class Branching(nn.Module):
    """Cannot be traced: its way depends on values."""

    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU(), conv(width, 3))
        self.single = conv(3, 3)

    def forward(self, x):
        if x.mean() > 100:
            return x
        return self.body(x) + self.single(x)


def prepared(model):
    """``model`` in eval mode, with batch statistics that are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def accelerate(model, example, precision="fp32", **options):
    options.setdefault("measure", False)
    return pdn.accelerate(model, example, precision, **options)


def fused_of(report):
    return {swap.name: swap.fused for swap in report.swapped}


def assert_same(accelerated, model, *inputs, precision="fp32"):
    with torch.no_grad():
        want, got = model(*(x.clone() for x in inputs)), accelerated(*(x.clone() for x in inputs))
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.numel():
        error = (got - want).abs().max() / want.abs().max()
        assert error <= BOUND[precision], f"relative error {error:.1e}"


class Expression(nn.Module):
    """A few layers under a forward given as a function: one hazard per test."""

    def __init__(self, forward, width=8, **modules):
        super().__init__()
        self.a, self.b = conv(width, width), conv(width, width)
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def check_expression(forward, precision="fp32", **modules):
    """Accelerate ``Expression``; its results must be the original's. Returns name -> what was fused."""
    model = prepared(Expression(forward, **modules))
    x = torch.randn(2, 8, 6, 7)
    accelerated, report = accelerate(model, x, precision)
    assert_same(accelerated, model, x, precision=precision)
    assert_same(accelerated, model, torch.randn(1, 8, 9, 5), precision=precision)
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        accelerated(mine), model(theirs)
    # What the original writes into its input, the accelerated model writes as well.
    assert (mine - theirs).abs().max() < (1e-4 if precision == "fp32" else 0.1)
    return fused_of(report), report


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", [DnCNN, ResBlockNet, UNet, ResNetStyle, Branching])
def test_network(network, precision):
    model = prepared(network())
    channels = {DnCNN: 1, ResNetStyle: 12}.get(network, 3)
    x = torch.randn(1, channels, 16, 20)
    before = copy.deepcopy(model.state_dict())
    accelerated, report = accelerate(model, x, precision)
    assert report.swapped and report.error.relative <= BOUND[precision] and not report.fallbacks
    for size in ((2, 12, 8), (3, 16, 20), (0, 8, 8)):
        assert_same(accelerated, model, torch.randn(size[0], channels, *size[1:]), precision=precision)
    assert_same(accelerated, model, torch.randn(1, channels, 16, 40)[..., ::2], precision=precision)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before), "the caller's model changed"
    assert not any(isinstance(m, FUSED) for m in model.modules())


def test_dncnn_is_fused_entirely():
    accelerated, report = accelerate(prepared(DnCNN(depth=17)), torch.randn(1, 1, 16, 16))
    assert len(report.swapped) == 17 and not report.kept and report.mode == "graph"
    fused = fused_of(report)
    assert fused["body.0"] == ("relu",)
    assert fused["body.2"] == ("BatchNorm2d (folded)", "relu")
    assert fused["body.47"] == ("residual - y",)
    names = {f"{swap.name}.{parameter}" for swap in report.swapped for parameter in ("weight", "bias")}
    assert set(accelerated.state_dict()) == names


def test_residual_blocks():
    _, report = accelerate(prepared(ResBlockNet()), torch.randn(1, 3, 8, 8))
    fused = fused_of(report)
    assert [fused[f"blocks.{i}.conv1"] for i in range(3)] == [("silu",), ("gelu",), ("gelu_tanh",)]
    assert [fused[f"blocks.{i}.conv2"] for i in range(3)] == [("+ residual",)] * 3


def test_activation_after_the_addition_stays_after_it():
    _, report = accelerate(prepared(ResNetStyle()), torch.randn(1, 12, 8, 8))
    fused = fused_of(report)
    assert fused["conv1"] == ("BatchNorm2d (folded)", "relu")
    assert sorted((fused["conv2"], fused["shortcut.0"])) == [
        ("BatchNorm2d (folded)",),
        ("BatchNorm2d (folded)", "+ residual"),
    ]
    assert [kept.kind for kept in report.kept] == ["ReLU"]


def test_unet_keeps_what_has_no_fused_form():
    _, report = accelerate(UNet().eval(), torch.randn(1, 3, 8, 8))
    assert len(report.swapped) == 5
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert "transposed" in reasons["up"] and "cat" in reasons
    assert fused_of(report)["mid"] == ("gelu", "+ residual")


def test_untraceable_model_is_swapped_module_by_module():
    model = prepared(Branching())
    accelerated, report = accelerate(model, torch.randn(1, 3, 8, 8))
    assert report.mode == "modules" and type(accelerated) is Branching
    assert any("cannot be traced" in note for note in report.notes)
    assert fused_of(report) == {"body.0": ("BatchNorm2d (folded)", "relu"), "body.3": (), "single": ()}
    assert torch.equal(accelerated(torch.full((1, 3, 4, 4), 200.0)), torch.full((1, 3, 4, 4), 200.0))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ranks_and_weighted_convolutions(dims, precision):
    kinds = ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    plain, norm = kinds[0][dims - 1], kinds[1][dims - 1]
    weighted = getattr(pdn.nn, f"WeightedConv{dims}d")
    net = nn.Sequential(
        plain(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        weighted(8, 8, 3, padding="same", density=(0.6,)), norm(8), nn.SiLU(),
        plain(8, 4, 3, stride=2, groups=2, dilation=1),
    )  # fmt: skip
    model = prepared(net)
    x = torch.randn(2, 3, *(9, 8, 7)[:dims])
    accelerated, report = accelerate(model, x, precision)
    assert_same(accelerated, model, x, precision=precision)
    assert fused_of(report)["2"] == ("density (folded)", f"BatchNorm{dims}d (folded)", "silu")
    assert report.error_float64 is not None


# ------------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu(m.a(x)),
        lambda m, x: F.relu(m.a(x), inplace=True),
        lambda m, x: torch.relu(m.a(x)),
        lambda m, x: m.a(x).relu(),
        lambda m, x: m.a(x).relu_(),
    ],
)
def test_forms_of_relu(forward):
    assert check_expression(forward)[0] == {"a": ("relu",)}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.silu(m.a(x)) + x,
        lambda m, x: x + F.silu(m.a(x)),
        lambda m, x: torch.add(F.silu(m.a(x), inplace=True), x),
        lambda m, x: torch.add(x, F.silu(m.a(x)), alpha=1),
        lambda m, x: F.silu(m.a(x)).add(x),
        lambda m, x: F.silu(m.a(x)).add_(x),
    ],
)
def test_forms_of_addition(forward):
    assert check_expression(forward)[0] == {"a": ("silu", "+ residual")}


def _iadd_to_result(m, x):
    y = m.a(x)
    y += x
    return y


def _iadd_to_input(m, x):
    x += m.a(x)
    return x * 2


def _mutated_operand(m, x):
    y = m.a(x)
    z = F.relu(x, inplace=True)
    return y + z


def _two_users(m, x):
    y = m.a(x)
    return F.relu(y) * y


def _residual_broadcasts(m, x):
    return m.a(x) + x.mean(dim=(2, 3), keepdim=True)


def _shared(m, x):
    return m.a(F.relu(m.a(x))) + x


def test_inplace_addition_to_a_fresh_result():
    assert check_expression(_iadd_to_result)[0] == {"a": ("+ residual",)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "forward",
    [
        _iadd_to_input,
        _mutated_operand,
        _two_users,
        lambda m, x: torch.add(x, m.a(x), alpha=2),
        lambda m, x: m.a(x) - x,
        lambda m, x: m.a(x) + 1.5,
        lambda m, x: (lambda y: y + y)(m.a(x)),
        lambda m, x: F.leaky_relu(m.a(x), 0.3),
    ],
)
def test_what_must_not_be_fused(forward, precision):
    assert check_expression(forward, precision)[0] == {"a": ()}


def test_subtraction_is_not_fused_behind_an_activation():
    assert check_expression(lambda m, x: x - F.relu(m.a(x)))[0] == {"a": ("relu",)}
    assert check_expression(lambda m, x: x - m.a(x))[0] == {"a": ("residual - y",)}


def test_broadcast_residual_and_shared_convolution():
    check_expression(_residual_broadcasts)
    fused, _ = check_expression(_shared)
    assert sorted(fused.values()) == [("+ residual",), ("relu",)]
    fused, _ = check_expression(lambda m, x: F.relu(m.a(F.relu(m.a(x)))))
    assert fused == {"a": ("relu",)}


def test_two_convolutions_meet_in_one_sum():
    fused, _ = check_expression(lambda m, x: F.relu(m.a(x)) + m.b(x))
    assert fused == {"a": ("relu",), "b": ("+ residual",)}


def test_view_of_a_fused_result():
    check_expression(lambda m, x: F.relu(m.a(x)).view(x.shape[0], -1).view(x.shape[0], 8, -1))


def _writes_through_view(m, x):
    y = m.a(x)
    y.view(x.shape[0], -1).mul_(0.5)
    return F.relu(m.b(y))


def _inplace_with_other_readers(m, x):
    y = m.a(x)
    z = y.abs()
    y *= 0.25
    return m.b(y) + z


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("forward", [_writes_through_view, _inplace_with_other_readers])
def test_writes_into_a_fused_result(forward, precision):
    check_expression(forward, precision)


def test_identities_are_looked_through():
    fused, report = check_expression(
        lambda m, x: m.act(m.drop(m.a(x))), drop=nn.Sequential(nn.Dropout(0.5), nn.Identity()), act=nn.ReLU()
    )
    assert fused == {"a": ("relu",)} and not report.kept


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8)])
def test_norms_that_cannot_be_folded(norm):
    fused, report = check_expression(lambda m, x: F.relu(m.norm(m.a(x))), norm=norm)
    assert fused == {"a": ()} and report.kept[0].name == "norm"


def test_batch_norm_without_affine_parameters():
    fused, _ = check_expression(lambda m, x: m.norm(m.a(x)), norm=nn.BatchNorm2d(8, affine=False))
    assert fused == {"a": ("BatchNorm2d (folded)",)}


# ----------------------------------------------------------------------------------------------- kept convolutions


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def _kept_reason(model, name="0", **options):
    x = torch.randn(1, 3, 8, 8)
    accelerated, report = accelerate(model, x, **options)
    assert_same(accelerated, model, x)
    return {kept.name: kept.reason for kept in report.kept}[name]


def test_convolutions_that_stay_and_why():
    hooked = nn.Sequential(conv(3, 3), conv(3, 3)).eval()
    calls = []
    hooked[0].register_forward_hook(lambda *a: calls.append(1))
    assert "hooks" in _kept_reason(hooked)
    assert calls
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 3)), conv(3, 3)).eval()
    assert "parametrizations" in _kept_reason(parametrized)
    assert "forward of its own" in _kept_reason(nn.Sequential(OwnForward(3, 3, 3), conv(3, 3)).eval())
    assert "named in keep" in _kept_reason(nn.Sequential(conv(3, 3), conv(3, 3)).eval(), keep="0")


def test_keep_takes_globs_and_containers():
    model = prepared(ResBlockNet())
    _, report = accelerate(model, torch.randn(1, 3, 8, 8), keep=("blocks.1", "he*"))
    assert set(fused_of(report)) == {"blocks.0.conv1", "blocks.0.conv2", "blocks.2.conv1", "blocks.2.conv2", "tail"}
    with pytest.raises(ValueError, match="keep: 'nothing'"):
        accelerate(model, torch.randn(1, 3, 8, 8), keep=["nothing"])


def test_nothing_to_swap_warns():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="no layer"):
        accelerated, report = accelerate(model, torch.randn(2, 4))
    assert not report.swapped and {kept.kind for kept in report.kept} == {"Linear", "ReLU"}
    assert_same(accelerated, model, torch.randn(2, 4))
    double = nn.Sequential(conv(3, 3)).eval().double()
    with pytest.warns(UserWarning, match="no layer"):
        _, report = accelerate(double, torch.randn(1, 3, 4, 4).double())
    assert "float64" in report.kept[0].reason


def test_single_convolution():
    model = conv(3, 5).eval()
    accelerated, report = accelerate(model, torch.randn(1, 3, 6, 6))
    assert_same(accelerated, model, torch.randn(2, 3, 7, 5))
    assert len(report.swapped) == 1


# ------------------------------------------------------------------------------------------------------- tracing


class Frozen(nn.Module):
    """Makes a tensor in its forward: a trace would freeze it."""

    def __init__(self):
        super().__init__()
        self.a = conv(3, 3)

    def forward(self, x):
        return self.a(x) + torch.randn(1) * 0


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 3), conv(3, 3)

    def forward(self, x, y=None, *, scale=1.0):
        x = self.a(x) if y is None else self.b(x) + y
        return {"out": x * scale, "pair": (x, 3)}


def test_tensors_made_in_forward_are_not_frozen():
    accelerated, report = accelerate(Frozen().eval(), torch.randn(1, 3, 8, 8))
    assert report.mode == "modules" and any("freeze" in note for note in report.notes)


def test_optional_arguments_and_structured_outputs():
    model = Optional().eval()
    x, y = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 6, 6)
    for example in ((x,), {"x": x}, [x, y], {"x": x, "y": y, "scale": 2.0}):
        args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
        accelerated, report = accelerate(model, example)
        want, got = model(*args, **kwargs), accelerated(*args, **kwargs)
        assert (got["out"] - want["out"]).abs().max() < 1e-5 and got["pair"][1] == 3
        assert report.swapped


def test_branch_that_the_example_did_not_take_is_never_silently_wrong():
    model = Optional().eval()
    x, y = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 6, 6)
    accelerated, report = accelerate(model, (x,))
    try:
        got = accelerated(x, y)["out"]
    except AssertionError:
        return
    assert (got - model(x, y)["out"]).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------- the accelerated model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", [DnCNN, Branching])
def test_copies_pickles_and_state_dict(network, precision):
    model = prepared(network())
    x = torch.randn(1, 1 if network is DnCNN else 3, 12, 12)
    accelerated, _ = accelerate(model, x, precision)
    with torch.inference_mode():
        want = accelerated(x)
        for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
            assert torch.equal(twin(x), want)
        other, _ = accelerate(prepared(network()), x, precision)
        other.load_state_dict(accelerated.state_dict())
        assert torch.equal(other(x), want)


def test_gradients_reach_the_input():
    model = prepared(ResNetStyle())
    x = torch.randn(1, 12, 8, 8)
    accelerated, _ = accelerate(model, x)
    x.requires_grad_()
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (model, accelerated)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[0].abs().max()


def test_made_and_run_in_inference_mode():
    model = prepared(DnCNN())
    x = torch.randn(1, 1, 12, 12)
    with torch.inference_mode():
        accelerated, _ = accelerate(model, x)
        got = accelerated(x)
    assert_same(accelerated, model, x)
    assert torch.equal(got, accelerated(x))


def test_autocast():
    model = prepared(DnCNN())
    x = torch.randn(1, 1, 12, 12)
    accelerated, _ = accelerate(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert (accelerated(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_bf16_output_is_exact_where_the_residual_is_float32():
    """``x - noise`` is summed in float32: x itself is not rounded."""
    model = prepared(DnCNN())
    with torch.no_grad():
        model.body[-1].weight.zero_()
        model.body[-1].bias.zero_()
    x = torch.randn(1, 1, 12, 12)
    accelerated, _ = accelerate(model, x, "bf16")
    assert torch.equal(accelerated(x), x)


def test_inplace_keeps_the_object_and_its_class():
    model = prepared(DnCNN())
    x = torch.randn(1, 1, 12, 12)
    original = copy.deepcopy(model)
    accelerated, report = accelerate(model, x, inplace=True)
    assert accelerated is model and type(model) is DnCNN and isinstance(model.body[0], FusedConv2d)
    assert len(report.swapped) == 6
    assert_same(model, original, x)


def test_inplace_with_a_shared_activation():
    """ResNetStyle uses one ReLU module twice, once after the addition: it must stay."""
    model = prepared(ResNetStyle())
    original = copy.deepcopy(model)
    _, report = accelerate(model, torch.randn(1, 12, 8, 8), inplace=True)
    assert isinstance(model.relu, nn.ReLU) and isinstance(model.bn1, nn.Identity)
    assert_same(model, original, torch.randn(1, 12, 9, 9))


# --------------------------------------------------------------------------------------------- report, bad input


def test_report_reads_well_and_round_trips():
    _, report = accelerate(prepared(UNet()), torch.randn(1, 3, 16, 16), measure=True)
    text = str(report)
    assert "down1" in text and "FusedConv2d" in text and "\x1b" not in text
    assert report.speedup > 0 and report.original_ms > 0 and f"{report.speedup:.2f}x" in text
    data = json.loads(report.to_json())
    assert data["precision"] == "fp32" and len(data["swapped"]) == 5
    assert {swap["kernel"] for swap in data["swapped"]} - {""}
    assert data["error_float64"]["relative"] <= 2e-5 * 5


def test_bad_arguments():
    model, x = conv(3, 3).eval(), torch.randn(1, 3, 4, 4)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        pdn.accelerate(lambda x: x, x)
    for precision in ("int4", "fp16", None):
        with pytest.raises(ValueError, match="precision: expected one of 'fp32', 'bf16'"):
            pdn.accelerate(model, x, precision)
    with pytest.raises(ValueError, match="eval"):
        pdn.accelerate(conv(3, 3).train(), x)
    with pytest.raises(TypeError, match="example_inputs"):
        pdn.accelerate(model, 3)
    with pytest.raises(ValueError, match="example_inputs: the model cannot run") as info:
        pdn.accelerate(model, torch.randn(1, 4, 4, 4))
    assert isinstance(info.value.__cause__, RuntimeError)
    with pytest.raises(TypeError, match="keep"):
        pdn.accelerate(model, x, keep=(3,))


def test_no_warning_in_the_ordinary_case():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(prepared(DnCNN(depth=4)), torch.randn(1, 1, 12, 12))
