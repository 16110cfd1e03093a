"""WeightedConv1d/2d/3d: torch.nn's interface, densities, conversions, checkpoints, the packed weight in evaluation."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pydenoise as pdn
from pydenoise import FallbackWarning
from pydenoise.nn import WeightedConv1d, WeightedConv2d, WeightedConv3d
from pydenoise.nn.weighted_conv import _WeightedConvNd

MODULES = {1: WeightedConv1d, 2: WeightedConv2d, 3: WeightedConv3d}
TWINS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def image(dims: int = 2, channels: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, *(9, 8, 7)[:dims], dtype=dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------- torch.nn's interface

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2, "bias": False},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_without_density_it_is_the_torch_module(dims, options):
    """Same draws from the generator, repr, attributes, state_dict and values."""
    torch.manual_seed(3)
    plain = TWINS[dims](4, 6, 3, **options)
    torch.manual_seed(3)
    ours = MODULES[dims](4, 6, 3, **options)
    assert repr(ours) == "Weighted" + repr(plain)
    assert torch.equal(ours.weight, plain.weight)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(ours, name) == getattr(plain, name)
    x = image(dims)
    assert_same(ours(x), plain(x))
    assert_same(ours(x[0]), plain(x[0]))
    with torch.no_grad():
        assert_same(ours.eval()(x), plain(x))
        assert_same(ours(x[0]), plain(x[0]))
    plain.reset_parameters()
    ours.load_state_dict(plain.state_dict())
    assert_same(ours(x), plain(x))


def test_no_torch_tool_mistakes_it_for_a_plain_convolution():
    """Tools that read ``weight`` of every nn.Conv2d would drop the density."""
    assert not isinstance(WeightedConv2d(3, 3, 3), nn.Conv2d)
    assert isinstance(WeightedConv2d(3, 3, 3), nn.modules.conv._ConvNd)


def test_meta_device_and_reset():
    module = WeightedConv2d(3, 4, 3, density=(0.5,), device="meta")
    assert module.density.is_meta and module(torch.randn(1, 3, 5, 5, device="meta")).shape == (1, 4, 3, 3)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.density, pdn.density((0.5,), 3))
    assert module.weight.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize(
    ("kernel", "density", "expected"),
    [
        (5, (0.2, 0.8), pdn.density((0.2, 0.8), 5)),
        (5, torch.tensor([0.2, 0.8]), pdn.density((0.2, 0.8), 5)),
        ((3, 5), ((0.7,), (0.2, 0.8)), pdn.density(((0.7,), (0.2, 0.8)), (3, 5))),
        ((2, 4), torch.arange(8.0).reshape(2, 4), torch.arange(8.0).reshape(2, 4)),
        (3, pdn.density((0.3,), 3).numpy(), pdn.density((0.3,), 3)),
        (3, 1, None),
        (1, (), None),
    ],
    ids=["flat", "tensor", "per axis", "dense, even sizes", "numpy", "one", "no coefficients"],
)
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
def test_density_argument(kernel, density, expected, trainable):
    module = WeightedConv2d(4, 6, kernel, density=density, trainable_density=trainable)
    phi = module.density_function()
    x = image()
    if expected is None:
        assert phi is None or torch.equal(phi, torch.ones(module.kernel_size))
    else:
        torch.testing.assert_close(phi.detach(), expected)
    weight = module.weight if expected is None else module.weight * expected
    assert_same(module(x), nn.functional.conv2d(x, weight, module.bias))
    trained = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    if max(module.kernel_size) == 1 or not trainable:
        assert not trained
    else:
        assert trained == ({"density"} if isinstance(density, torch.Tensor) and density.dim() == 2 else trained)
        assert len(trained) == 1
        module(x).square().sum().backward()
        assert getattr(module, trained.pop()).grad.abs().min() > 0


def test_trainable_names_and_shapes():
    shared = WeightedConv2d(4, 6, 5, density=(0.2, 0.8), trainable_density=True)
    assert shared.state_dict()["coefficients"].tolist() == pytest.approx([0.2, 0.8])
    per_axis = WeightedConv3d(4, 6, (3, 1, 5), density=((0.7,), (), (0.2, 0.8)), trainable_density=True)
    assert per_axis.state_dict()["coefficients"].tolist() == pytest.approx([0.7, 0.2, 0.8])
    ones = WeightedConv2d(4, 6, (3, 5), trainable_density=True)
    assert ones.coefficients.tolist() == [1, 1, 1]
    assert "density=trainable coefficients" in repr(shared)
    assert "density=fixed" in repr(WeightedConv2d(4, 6, 3, density=(0.5,)))
    assert "density=trainable" in repr(WeightedConv2d(4, 6, 2, density=torch.ones(2, 2), trainable_density=True))


def test_density_is_the_modules_own():
    dense = torch.full((3, 3), 0.5)
    module = WeightedConv2d(4, 6, 3, density=dense)
    dense.zero_()
    assert module.density.eq(0.5).all()


def test_init():
    kwargs = {"density": (0.05, 0.3, 0.6), "bias": True}
    matched = WeightedConv2d(64, 96, 7, init="matched", **kwargs)
    plain = nn.Conv2d(64, 96, 7)
    assert matched.effective_weight().std().item() == pytest.approx(plain.weight.std().item(), rel=0.02)
    fan_out = WeightedConv2d(64, 96, 7, init="fan_out", **kwargs)
    assert fan_out.weight.std().item() == pytest.approx((2 / (96 * 49)) ** 0.5, rel=0.02)
    assert not fan_out.bias.any()


def test_one_optimizer_step_trains_the_density():
    module = WeightedConv2d(4, 6, 7, padding=3, density=(0.25, 0.15, 0.55), trainable_density=True)
    before = module.coefficients.detach().clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    module(image()).square().mean().backward()
    optimizer.step()
    assert (module.coefficients - before).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((4, 6, 4), {"density": (0.5, 0.5)}, ValueError, "density: coefficients need odd kernel sizes"),
        ((4, 6, 4), {"trainable_density": True}, ValueError, "density: coefficients need odd kernel sizes"),
        ((4, 6, 3), {"density": (0.5, 0.5)}, ValueError, "takes 1 coefficients"),
        ((4, 6, 3), {"density": 0.5}, TypeError, "density: expected coefficients"),
        ((4, 6, 3), {"density": torch.ones(5, 5)}, ValueError, r"tensor of shape \(3, 3\)"),
        ((4, 6, 3), {"density": torch.ones(3, 3).long()}, TypeError, "floating-point"),
        ((4, 6, 3), {"density": torch.full((3, 3), float("nan"))}, ValueError, "finite"),
        ((4, 6, 3), {"density": torch.ones(3, 3, device="meta")}, ValueError, "meta"),
        ((4, 6, 3), {"density": torch.zeros(3, 3), "init": "matched"}, ValueError, "all zeros"),
        ((4, 6, 3), {"init": "xavier"}, ValueError, "init: expected one of"),
        ((4, 6, 0), {}, ValueError, "kernel_size: expected ints >= 1"),
        ((4, 6, (3, 3, 3)), {}, ValueError, "kernel_size: expected one int or 2"),
        ((4, 6, 3), {"stride": 0}, ValueError, "stride: expected ints >= 1"),
        ((4, 6, 3), {"dilation": -1}, ValueError, "dilation: expected ints >= 1"),
        ((4, 6, 3), {"padding": -1}, ValueError, "padding: expected ints >= 0"),
        ((4, 6, 3), {"padding": "same", "stride": 2}, ValueError, "padding='same'"),
        ((4, 6, 3), {"padding": "full"}, ValueError, "full"),
        ((4, 6, 3), {"padding_mode": "wrap"}, ValueError, "padding_mode"),
        ((4, 6, 3), {"groups": 3}, ValueError, "divisible by groups"),
    ],
)
def test_bad_arguments(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        WeightedConv2d(*args, **kwargs)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bad_inputs(mode):
    module = getattr(WeightedConv2d(4, 6, 3, density=(0.5,)), mode)()
    with torch.set_grad_enabled(mode == "train"):
        for bad, error in ((image(channels=3), ValueError), (image().double(), TypeError), (image()[0, 0], ValueError)):
            with pytest.raises(error, match="expected"):
                module(bad)


# -------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_from_float_and_fold(dims):
    conv = TWINS[dims](4, 6, 5, stride=2, padding=2, groups=2, padding_mode="replicate").eval()
    x = image(dims)
    same = MODULES[dims].from_float(conv)
    assert torch.equal(same.weight, conv.weight) and same.density is None and not same.training
    assert same.weight.data_ptr() != conv.weight.data_ptr()
    assert_same(same(x), conv(x))
    weighted = MODULES[dims].from_float(conv, (0.2, 0.8), trainable_density=True)
    phi = pdn.density((0.2, 0.8), 5, dims=dims)
    assert torch.equal(weighted.weight, conv.weight)
    folded = weighted.fold()
    assert type(folded) is TWINS[dims] and not folded.training
    assert_same(folded.weight, conv.weight * phi)
    assert_same(folded(x), weighted(x))
    assert list(folded.state_dict()) == list(conv.state_dict())


def test_from_float_keeps_dtype_requires_grad_and_memory_format():
    conv = nn.Conv2d(4, 6, 3, bias=False).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    module = WeightedConv2d.from_float(conv, torch.full((3, 3), 0.5))
    assert module.weight.dtype == module.density.dtype == torch.bfloat16 and module.bias is None
    assert not module.weight.requires_grad
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4), OwnForward(4, 4, 3), nn.LazyConv2d(4, 3)]
)
def test_from_float_refuses(conv):
    with pytest.raises(TypeError, match="conv: expected a torch.nn.Conv2d"):
        WeightedConv2d.from_float(conv)


# --------------------------------------------------------------------------------- checkpoints of the published classes


def published(dims: int, trainable: bool, prefix: str = "") -> dict[str, torch.Tensor]:
    """A state_dict as the published classes write it: 7-tap kernels, 3 coefficients."""
    coefficients = torch.tensor([0.27, 0.17, 0.54])
    state = {"weight": torch.randn(6, 4, *(7,) * dims), "bias": torch.randn(6)}
    if trainable:
        state["den"] = coefficients
    else:
        state["alfa"] = torch.cat([coefficients, torch.ones(1), coefficients.flip(0)])
        state["Phi"] = pdn.density(coefficients, 7, dims=dims)
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_published_checkpoints(dims, trainable):
    state = published(dims, trainable)
    x = image(dims)
    weight = state["weight"] * pdn.density((0.27, 0.17, 0.54), 7, dims=dims)
    expected = getattr(nn.functional, f"conv{dims}d")(x, weight, state["bias"], padding=3)
    module = MODULES[dims].from_reference_state_dict(state, padding=3)
    assert module.trainable_density == trainable
    assert_same(module(x), expected)
    # a whole network: its modules take the published keys
    network = nn.Sequential(MODULES[dims](4, 6, 7, padding=3, density=(1.0, 1.0, 1.0), trainable_density=trainable))
    keys = network.load_state_dict(published(dims, trainable, "0.") | {f"0.{k}": v for k, v in state.items()})
    assert not keys.missing_keys and not keys.unexpected_keys
    assert_same(network(x), expected)
    again = MODULES[dims].from_reference_state_dict({f"a.b.{k}": v for k, v in state.items()}, padding=3, prefix="a.b.")
    assert_same(again(x), expected)


def test_bad_published_checkpoints():
    state = published(2, False)
    for change, message in (
        ({"weight": None}, "expected weight and either Phi or den"),
        ({"Phi": None}, "expected weight and either Phi or den"),
        ({"Phi": torch.ones(5, 5)}, "expected Phi of the kernel's shape"),
        ({"weight": torch.ones(6, 4, 7)}, "expected weight with 2 kernel axes"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedConv2d.from_reference_state_dict(
                {k: v for k, v in (state | change).items() if v is not None}, padding=3
            )
    with pytest.raises(RuntimeError, match="alfa"):  # a layer without density has no place for it
        WeightedConv2d(4, 6, 7).load_state_dict(state)
    with pytest.raises(RuntimeError, match="density"):  # nor does a plain checkpoint say what the density is
        WeightedConv2d(4, 6, 7, density=(1.0, 1.0, 1.0)).load_state_dict(nn.Conv2d(4, 6, 7).state_dict())


# ------------------------------------------------------------------------------------ the packed weight in evaluation


def weighted(**kwargs) -> _WeightedConvNd:
    options = {"padding": 1, "density": (0.6,), "trainable_density": True} | kwargs
    return WeightedConv2d(4, 6, 3, **options).eval()


def check_fresh(module: _WeightedConvNd, x: torch.Tensor) -> None:
    """The inference path gives what the gradient path, which packs nothing, gives."""
    with torch.enable_grad():
        expected = module(x.detach().clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.detach(), rtol=1e-4, atol=1e-4)


def replace(module):
    module.weight = nn.Parameter(torch.randn_like(module.weight))


def in_place(module):
    with torch.no_grad():
        module.weight.mul_(-2)


CHANGES = {
    "in place": in_place,
    "one element": lambda m: m.weight.detach()[3, 1].fill_(7.0),
    "through .data": lambda m: m.weight.data.mul_(-1.5),
    "other .data": lambda m: setattr(m.weight, "data", torch.randn_like(m.weight)),
    "replaced": replace,
    "coefficients": lambda m: m.coefficients.detach().fill_(0.1),
    "coefficients through .data": lambda m: m.coefficients.data.fill_(0.2),
    "bias": lambda m: m.bias.data.fill_(3.0),
    "load_state_dict": lambda m: m.load_state_dict(weighted().state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(weighted().state_dict(), assign=True),
    "reset": lambda m: m.reset_parameters(),
    "geometry": lambda m: setattr(m, "stride", (2, 2)),
    "padding": lambda m: setattr(m, "padding", (2, 0)),
    "no bias": lambda m: setattr(m, "bias", None),
    "optimizer step": lambda m: (
        m.train(),
        m(image()).sum().backward(),
        torch.optim.SGD(m.parameters(), 0.1).step(),
        m.eval(),
    ),
    "to channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "precision": lambda m: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_packed_weight_follows_every_change(change):
    module, x = weighted(), image()
    check_fresh(module, x)
    CHANGES[change](module)
    check_fresh(module, x)
    with torch.no_grad():
        for parameter in module.parameters():  # of the module as the change left it
            parameter.mul_(1.25)
    check_fresh(module, x)


def test_packed_weight_is_made_once():
    module, x = weighted(), image()
    with torch.no_grad():
        module(x)
        cache = module._cache
        assert cache is not None
        module(x)
        module(x[:, :, :5])
        assert module._cache is cache
    module.train()
    assert module._cache is None
    module(x)
    assert module._cache is None
    module.eval()(x)  # gradients are on
    assert module._cache is None


def test_packed_weight_is_no_part_of_the_module():
    module, x = weighted(), image()
    keys = list(module.state_dict())
    with torch.no_grad():
        y = module(x)
        assert list(module.state_dict()) == keys == ["weight", "bias", "coefficients"]
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
        for other in copies:
            assert other._cache is None and list(other.state_dict()) == keys
            assert torch.equal(other(x), y)
        copies[0].weight.zero_()
        assert torch.equal(module(x), y) and not torch.equal(copies[0](x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_follow_the_module(dtype):
    module, x = weighted(trainable_density=False), image()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # float16 and float64 have no compiled backend on the CPU
        y = module(x)
        other = module.to(dtype)(x.to(dtype))
    assert module.density.dtype == dtype == other.dtype
    torch.testing.assert_close(other.float(), y, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast(mode):
    module, x = getattr(weighted(), mode)(), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(y.float(), module(x), rtol=3e-2, atol=5e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), y)


def test_inference_mode_and_tensors_made_there():
    module, x = weighted(), image()
    with torch.inference_mode():
        y = module(x)
        inside = weighted()
        inside.load_state_dict(module.state_dict())
        assert_same(inside(x), y)
        inside.weight.mul_(2)
        assert_same(inside(x) - inside.bias[:, None, None], 2 * (y - inside.bias[:, None, None]))
    with torch.no_grad():
        assert_same(module(x), y)


def test_vmap_is_refused_rather_than_served_from_the_packed_weight():
    modules = [weighted(), weighted()]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = image()
    with torch.no_grad():
        modules[0](x)  # packs
        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,)))(parameters, buffers)


def test_functional_call_uses_the_parameters_it_is_given():
    module, other, x = weighted(), weighted(), image()
    with torch.no_grad():
        module(x)  # packs
        assert_same(torch.func.functional_call(module, other.state_dict(), (x,)), other(x))
        check_fresh(module, x)


# --------------------------------------------------------------------------------------------- compilation and export


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = WeightedConv2d(4, 8, 7, padding=3, density=(0.25, 0.15, 0.55), trainable_density=True)
        self.last = WeightedConv2d(8, 4, 3, padding="same", density=(0.5,), padding_mode="reflect")

    def forward(self, x):
        return x - self.last(torch.relu(self.first(x)))


def test_compile_training_and_evaluation():
    torch._dynamo.reset()
    network, x = Network(), image()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    expected = network(x)
    expected.square().sum().backward()
    assert_same(y, expected)
    for grad, parameter in zip(grads, network.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)
    network.eval()
    with torch.no_grad():
        network(x)  # packs
        assert_same(compiled(x), network(x))
        network.first.weight.mul_(2)
        assert_same(compiled(x), network(x))


def test_inductor():
    torch._dynamo.reset()
    module, x = weighted(), image()
    try:
        with torch.no_grad():
            assert_same(torch.compile(module, fullgraph=True)(x), module(x))
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working compiler for inductor: {error}")


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    network, x = Network().eval(), image()
    with torch.no_grad():
        expected = network(x)
        batch = torch.export.Dim("batch", min=1, max=16)
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)
        assert_same(program.module()(x), expected)
        assert_same(program.module()(torch.cat([x, x])), torch.cat([expected, expected]))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        assert_same(torch.export.load(buffer).module()(x), expected)
