"""DclsConv1d/2d/3d and the variants: published layers, parameters, the kept kernel, conversion of state dicts."""

import copy
import io
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydenoise import FallbackWarning
from pydenoise.nn import (
    DclsConv1d,
    DclsConv2_1d,
    DclsConv2d,
    DclsConv2dK1d,
    DclsConv3_1d,
    DclsConv3d,
    load_dcls_state_dict,
)
from pydenoise.ops.dcls_kernel import VERSIONS
from pydenoise.reference import dcls_kernel as reference

MODULES = {1: DclsConv1d, 2: DclsConv2d, 3: DclsConv3d}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# A layer of the published package in float64: Dcls2d(4, 4, 3, padding=3, dilated_kernel_size=7, groups=4).
GOLDEN = np.load(Path(__file__).parent.parent / "data" / "blocks_dcls.npz")


def image(dims: int = 2, channels: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, *(11, 9, 8)[:dims], dtype=dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def scattered(module: nn.Module) -> nn.Module:
    """The module with positions all over its kernel, and widths that differ."""
    with torch.no_grad():
        for i, size in enumerate(module.dilated_kernel_size):
            module.P[i].uniform_(-(size // 2) + 0.1, (size - 1) // 2 - 0.1) if size > 1 else module.P[i].zero_()
        if module.SIG is not None:
            module.SIG.normal_(0, 0.3)
    return module


# -------------------------------------------------------------------------------------------------- published layers


def published(prefix: str = "") -> dict[str, torch.Tensor]:
    keys = {"weight": "W", "P": "P", "SIG": "SIG", "bias": "b"}
    return {prefix + key: torch.from_numpy(GOLDEN[f"dcls_dw_{name}"]).float() for key, name in keys.items()}


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"dcls_dw_{name}"]).float()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_published_layer(mode):
    module = DclsConv2d(4, 4, 3, padding=3, dilated_kernel_size=7, groups=4, compat="reference")
    module.load_state_dict(published())
    with torch.no_grad():
        assert_same(getattr(module, mode)()(golden("x")), golden("out"))


def test_the_published_layer_converted():
    module = DclsConv2d(4, 4, 3, padding=3, dilated_kernel_size=7, groups=4)
    report = load_dcls_state_dict(module, published())
    assert_same(module(golden("x")), golden("out"))
    assert "P[0] is what was P[1], P[1] is what was P[0]" in str(report)
    assert 0.1 < report.layers[0].difference and f"{report.layers[0].difference:.2g}" in str(report)
    module.load_state_dict(published())  # as it is: no metadata, no warning, other axes
    assert (module(golden("x")) - golden("out")).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------- the layer

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 2},
    {"padding": "same", "groups": 4},
    {"padding": "valid", "groups": 2, "bias": False},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 3, "padding_mode": "replicate", "stride": 2},
    {"padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values(dims, options, version):
    """The plain convolution with the constructed kernel, in training and in evaluation, with and without a batch."""
    size = (5, 4, 3)[:dims]
    module = scattered(MODULES[dims](4, 8, 3, dilated_kernel_size=size, version=version, **options))
    plain = module.fold()
    assert isinstance(plain, (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims])
    assert plain.weight.shape == (8, 4 // module.groups, *size)
    assert torch.equal(plain.weight, module.construct_kernel())
    x = image(dims)
    assert_same(module(x), plain(x))
    assert_same(module(x[0]), plain(x[0]))
    with torch.no_grad():
        assert_same(module.eval()(x), plain(x))
        assert_same(module(x[0]), plain(x[0]))
        assert_same(module(x), plain(x))


def test_gradients_are_those_of_plain_torch():
    module = scattered(DclsConv2d(6, 6, 5, padding=4, dilated_kernel_size=9, groups=6))
    x = image(channels=6).requires_grad_()
    y = module(x)
    grad = torch.randn_like(y)
    leaves = {"input": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(y, list(leaves.values()), grad)
    args = ((9, 9), (0, 1), (4, 4), True, True, 0.27)
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    kernel = reference.dcls_kernel(wide["weight"], wide["P"], wide["SIG"], *args)
    exact = F.conv2d(wide["input"], kernel, wide["bias"], padding=4, groups=6)
    wanted = torch.autograd.grad(exact, list(wide.values()), grad.double())
    for name, one, other in zip(leaves, found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item(), msg=name)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_parameters(dims):
    module = MODULES[dims](8, 16, 10, dilated_kernel_size=17, groups=2)
    assert list(module.state_dict()) == ["weight", "P", "SIG", "bias"]
    assert module.weight.shape == (16, 4, 10) and module.P.shape == module.SIG.shape == (dims, 16, 4, 10)
    assert module.weight.abs().max() <= 40**-0.5 and module.weight.std().item() == pytest.approx(
        (3 * 40) ** -0.5, rel=0.15
    )
    assert module.bias.abs().max() <= 40**-0.5
    assert module.P.std().item() == pytest.approx(0.5, rel=0.1) and (module.SIG == 0.23).all()
    assert not MODULES[dims](4, 4, 2, version="max").SIG.any()
    for version in ("v0", "v1"):
        assert list(MODULES[dims](4, 4, 2, version=version, bias=False).state_dict()) == ["weight", "P"]
    torch.manual_seed(5)
    first = MODULES[dims](4, 4, 2, dilated_kernel_size=7).state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(v, first[k]) for k, v in MODULES[dims](4, 4, 2, dilated_kernel_size=7).state_dict().items())


def test_clamp_parameters():
    module = DclsConv2d(2, 2, 50, dilated_kernel_size=(5, 8))
    with torch.no_grad():
        module.P.normal_(0, 20)
    module(image(channels=2))
    assert module.P.abs().max() > 10, "the forward pass clamps nothing"
    module.clamp_parameters()
    assert (module.P[0].min(), module.P[0].max()) == (-2, 2)
    assert (module.P[1].min(), module.P[1].max()) == (-4, 3), "the last tap of an even size"
    theirs = DclsConv2d(2, 2, 50, dilated_kernel_size=(5, 8), compat="reference")
    with torch.no_grad():
        theirs.P.normal_(0, 20)
    theirs.clamp_parameters()
    assert (theirs.P[0].abs().max(), theirs.P[1].abs().max()) == (2, 4)


def test_training_moves_the_positions():
    module = DclsConv2d(4, 4, 3, padding=3, dilated_kernel_size=7, groups=4)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        module(image()).square().mean().backward()
        optimizer.step()
        module.clamp_parameters()
    assert all((p - before[name]).abs().max() > 1e-3 for name, p in module.named_parameters())


def test_repr():
    text = repr(DclsConv2d(4, 8, 3, padding=3, dilated_kernel_size=7, groups=2, compat="reference"))
    assert text.startswith("DclsConv2d(4, 8, kernel_count=3, stride=(1, 1), dilated_kernel_size=(7, 7)")
    assert "padding=(3, 3)" in text and "groups=2" in text and "compat='reference'" in text
    assert "bias=False" in repr(DclsConv1d(4, 8, 3, bias=False)) and "padding" not in repr(DclsConv1d(4, 8, 3))


def test_meta_device_and_reset():
    module = DclsConv2d(4, 4, 3, dilated_kernel_size=5, device="meta")
    assert module(torch.randn(1, 4, 9, 9, device="meta")).shape == (1, 4, 5, 5)
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(image()).isfinite().all() and (module.SIG == 0.23).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, mode):
    module = getattr(scattered(DclsConv2d(4, 4, 3, padding=2, dilated_kernel_size=5)), mode)()
    x = image()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # no compiled CPU backend for float16 and float64
        y = module(x)
        other = module.to(dtype)(x.to(dtype))
    assert other.dtype == dtype
    torch.testing.assert_close(other.float(), y, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast(mode):
    module, x = getattr(scattered(DclsConv2d(4, 4, 3, padding=2, dilated_kernel_size=5)), mode)(), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16 and torch.equal(module(x), y)
    with torch.no_grad():
        assert module(x).dtype == torch.float32
        torch.testing.assert_close(y.float(), module(x), rtol=3e-2, atol=5e-2)


def test_compiles():
    module, x = scattered(DclsConv2d(4, 4, 3, padding=2, dilated_kernel_size=5, groups=4)), image()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), module(x))
    with torch.no_grad():
        module.eval()
        assert_same(compiled(x), module(x))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((4, 6, 0), {}, ValueError, "kernel_count: expected ints >= 1"),
        ((4, 6, 2.5), {}, TypeError, "kernel_count: expected ints"),
        ((0, 6, 3), {}, ValueError, "in_channels: expected ints >= 1"),
        ((4, 6, 3), {"groups": 4}, ValueError, "out_channels: 6 is not divisible by groups = 4"),
        ((6, 4, 3), {"groups": 4}, ValueError, "in_channels: 6 is not divisible"),
        ((4, 6, 3), {"stride": 0}, ValueError, "stride: expected ints >= 1"),
        ((4, 6, 3), {"padding": -1}, ValueError, "padding: expected ints >= 0"),
        ((4, 6, 3), {"padding": "same", "stride": 2}, ValueError, "'same' needs stride 1"),
        ((4, 6, 3), {"padding": "full"}, ValueError, "padding: expected ints"),
        ((4, 6, 3), {"padding_mode": "wrap"}, ValueError, "padding_mode: expected one of"),
        ((4, 6, 3), {"dilated_kernel_size": 0}, ValueError, "dilated_kernel_size: expected ints >= 1"),
        ((4, 6, 3), {"dilated_kernel_size": (3, 3, 3)}, ValueError, "dilated_kernel_size: expected one int or 2"),
        ((4, 6, 3), {"version": "v2"}, ValueError, "version: expected one of"),
        ((4, 6, 3), {"compat": "old"}, ValueError, "compat: expected None or 'reference'"),
    ],
)
def test_bad_arguments(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        DclsConv2d(*args, **kwargs)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bad_inputs(mode):
    module = getattr(DclsConv2d(4, 6, 3, dilated_kernel_size=5), mode)()
    with torch.set_grad_enabled(mode == "train"):
        for bad, error in (
            (image(channels=3), ValueError),
            (image().double(), TypeError),
            (image()[0, 0], ValueError),
            (image()[:, :, :3], ValueError),
        ):
            with pytest.raises(error, match="input|weight"):
                module(bad)
    for padding_mode in ("reflect", "circular"):
        module = DclsConv2d(4, 6, 3, padding=9, padding_mode=padding_mode)
        with pytest.raises(ValueError, match=f"input: '{padding_mode}' padding by .* spatial axis"):
            module(image()[:, :, :, :8])


# ------------------------------------------------------------------------------------------------------ the kept kernel


def layer(**kwargs) -> DclsConv2d:
    options = {"padding": 3, "dilated_kernel_size": 7, "groups": 4} | kwargs
    return scattered(DclsConv2d(4, 4, 3, **options)).eval()


def check_fresh(module: DclsConv2d, x: torch.Tensor) -> None:
    """Evaluation gives what the gradient path, which keeps nothing, gives."""
    with torch.enable_grad():
        expected = module(x.detach().clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.detach(), rtol=1e-4, atol=1e-4)


def set_position(module):
    with torch.no_grad():
        module.P[0, 2, 0, 1] = 2.5


CHANGES = {
    "weight": lambda m: m.weight.detach().mul_(-2),
    "one position": set_position,
    "width": lambda m: m.SIG.detach().add_(0.5),
    "through .data": lambda m: m.P.data.mul_(-1),
    "replaced": lambda m: setattr(m, "P", nn.Parameter(torch.randn_like(m.P))),
    "bias": lambda m: m.bias.data.fill_(3.0),
    "no bias": lambda m: setattr(m, "bias", None),
    "load_state_dict": lambda m: m.load_state_dict(layer().state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(layer().state_dict(), assign=True),
    "clamped": lambda m: (m.P.data.mul_(5), m.clamp_parameters()),
    "compat": lambda m: setattr(m, "compat", "reference"),
    "padding": lambda m: setattr(m, "padding", (2, 0)),
    "stride": lambda m: setattr(m, "stride", (2, 1)),
    "frozen": lambda m: m.requires_grad_(False),
    "precision": lambda m: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_kernel_follows_every_change(change):
    module, x = layer(), image()
    check_fresh(module, x)
    CHANGES[change](module)
    check_fresh(module, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.75)
    check_fresh(module, x)


def test_kernel_is_made_once():
    module, x = layer(), image()
    with torch.no_grad():
        module(x)
        cache = module._cache
        assert cache is not None
        module(x[:, :, :8])
        assert module._cache is cache
        module.bfloat16()
        assert module._cache is None
        module(x.bfloat16())
        assert module._cache.kernel.dtype == torch.bfloat16
    module.float().train()(x)
    assert module._cache is None
    module.eval()(x)  # gradients are wanted
    assert module._cache is None


def test_frozen_layer_passes_gradients_on():
    """The kept kernel, and yet a gradient of the input."""
    module, x = layer().requires_grad_(False), image().requires_grad_()
    (grad,) = torch.autograd.grad(module(x).square().sum(), x)
    assert module._cache is not None
    (plain,) = torch.autograd.grad(module.train()(x).square().sum(), x)
    assert_same(grad, plain)


def test_kept_kernel_is_no_part_of_the_module():
    module, x = layer(), image()
    with torch.no_grad():
        y = module(x)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
        for other in copies:
            assert other._cache is None and list(other.state_dict()) == ["weight", "P", "SIG", "bias"]
            assert torch.equal(other(x), y)
        copies[0].P.zero_()
        assert torch.equal(module(x), y) and not torch.equal(copies[0](x), y)


def test_inference_mode():
    module, x = layer(), image()
    with torch.inference_mode():
        y = module(x)
    check_fresh(module, x)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    with torch.inference_mode():
        made_there = copy.deepcopy(module)
        first = made_there(x)
        made_there.P.zero_()
        assert not torch.equal(made_there(x), first)


# ---------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [DclsConv2_1d, DclsConv3_1d])
def test_last_axis_only(kind, version):
    """Each dense tap has a 1-D kernel of its own along the last axis."""
    dense = (2, 3)[: kind.dims - 1]
    module = scattered(kind(4, 6, 3, dense_kernel_size=dense, dilated_kernel_size=5, groups=2, version=version))
    assert module.weight.shape == (6, 2, *dense, 3) and module.P.shape == (1, 6, 2, *dense, 3)
    assert list(module.state_dict()) == ["weight", "P", *(["SIG"] if module.SIG is not None else []), "bias"]
    line = DclsConv1d(4, 6, 3, dilated_kernel_size=5, groups=2, version=version)
    kernel = module.construct_kernel()
    assert kernel.shape == (6, 2, *dense, 5)
    where = (0,) * (kind.dims - 2) + (1,)
    at = (slice(None), slice(None), *where)
    SIG = None if module.SIG is None else module.SIG[(slice(None), *at)]
    expected = line.construct(module.weight[at], module.P[(slice(None), *at)], SIG)
    assert_same(kernel[at], expected)
    x = image(kind.dims)
    assert_same(module(x), CONVOLUTIONS[kind.dims](x, kernel, module.bias, groups=2))
    with torch.no_grad():
        assert_same(module.eval()(x), module.train()(x))
    assert "dense_kernel_size" in repr(module)


def test_published_gaussians_of_2_1d_are_wider():
    options = {"dense_kernel_size": 3, "dilated_kernel_size": 9}
    theirs = scattered(DclsConv2_1d(4, 4, 3, **options, compat="reference"))
    ours = DclsConv2_1d(4, 4, 3, **options)
    report = load_dcls_state_dict(ours, theirs.state_dict())
    assert "SIG is |SIG| +0.73" in str(report)
    assert_same(ours.construct_kernel(), theirs.construct_kernel())
    with pytest.raises(ValueError, match="too narrow"):
        load_dcls_state_dict(theirs, scattered(DclsConv2_1d(4, 4, 3, **options)).state_dict(), compat=None)


@pytest.mark.parametrize("flat_dim", [0, 1])
def test_one_axis_in_two(flat_dim):
    module = scattered(DclsConv2dK1d(4, 4, 3, dilated_kernel_size=7, padding="same", groups=4, flat_dim=flat_dim))
    assert module.version == "v1" and module.weight.shape == (4, 1, 3) and module.P.shape == (1, 4, 1, 3)
    assert module.construct_kernel().shape == ((4, 1, 7, 1), (4, 1, 1, 7))[flat_dim]
    line = DclsConv1d(4, 4, 3, dilated_kernel_size=7, groups=4, version="v1")
    line.load_state_dict(module.state_dict())
    assert torch.equal(line.construct_kernel(), module.construct_kernel().flatten(2))
    x = image()
    assert_same(module(x), F.conv2d(x, module.construct_kernel(), module.bias, padding="same", groups=4))
    with pytest.raises(ValueError, match="flat_dim: expected 0 or 1"):
        DclsConv2dK1d(4, 4, 3, flat_dim=2)


# ------------------------------------------------------------------------------------------- state dicts of other axes


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(7,), (7, 7), (5, 9), (6, 9), (3, 5, 8)], ids=str)
def test_conversion_is_exact(size, version):
    dims = len(size)
    theirs = scattered(MODULES[dims](4, 6, 5, dilated_kernel_size=size, version=version, compat="reference"))
    ours = MODULES[dims](4, 6, 5, dilated_kernel_size=size, version=version)
    state = theirs.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_dcls_state_dict(ours, state)
    torch.testing.assert_close(ours.construct_kernel(), theirs.construct_kernel(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in state.items())
    alike = ours.reads_alike("reference", None)
    assert alike == (not report.layers[0].changes) == (dims == 1 or (version == "v0" and dims == 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dcls_state_dict(theirs, ours.state_dict(), compat=None)  # and back
    torch.testing.assert_close(ours.construct_kernel(), theirs.construct_kernel(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.P.detach(), before["P"], rtol=1e-6, atol=1e-6)


def test_a_network_is_converted():
    def network(compat):
        return nn.Sequential(
            nn.Conv2d(3, 4, 1),
            DclsConv2d(4, 4, 3, padding=3, dilated_kernel_size=7, groups=4, compat=compat),
            nn.BatchNorm2d(4),
            nn.Sequential(DclsConv2d(4, 2, 3, dilated_kernel_size=(3, 5), version="v0", compat=compat)),
        )

    theirs, ours = network("reference"), network(None)
    scattered(theirs[1]), scattered(theirs[3][0])
    report = load_dcls_state_dict(ours, theirs.state_dict())
    assert [part.name for part in report.layers] == ["1", "3.0"]
    assert "3.0: nothing to convert." in str(report)
    x = image(channels=3)
    assert_same(ours.eval()(x), theirs.eval()(x))
    state = theirs.state_dict() | {"new": torch.ones(1)}
    del state["0.bias"]
    report = load_dcls_state_dict(ours, state, strict=False)
    assert report.missing_keys == ("0.bias",) and "unexpected: new" in str(report)


def test_metadata_tell_of_other_axes():
    """A state dict with metadata says whose it is; reading it another way is announced."""
    theirs = DclsConv2d(4, 4, 3, dilated_kernel_size=7, compat="reference")
    ours = DclsConv2d(4, 4, 3, dilated_kernel_size=7)
    with pytest.warns(UserWarning, match="P comes from a layer with compat='reference'.*load_dcls_state_dict"):
        ours.load_state_dict(theirs.state_dict())
    foreign = theirs.state_dict()
    foreign._metadata[""] = {"version": 1}  # as of a class that sets no version
    with pytest.warns(UserWarning, match="P comes from the published package"):
        nn.Sequential(ours)[0].load_state_dict(foreign)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs.load_state_dict(foreign)
        ours.load_state_dict(ours.state_dict())
        ours.load_state_dict(dict(theirs.state_dict()))  # nothing is known
        buffer = io.BytesIO()
        torch.save(theirs.state_dict(), buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=True)
        theirs.load_state_dict(again)
    with pytest.warns(UserWarning, match="compat='reference'"):
        ours.load_state_dict(again)


def test_report_counts_what_lies_outside():
    theirs = DclsConv2d(2, 2, 3, dilated_kernel_size=(3, 9), version="v1", compat="reference")
    with torch.no_grad():
        theirs.P.zero_()
        theirs.P[0, 0, 0, 0] = 5.0  # along the last axis, whose middle they take for tap 1: tap 6
        theirs.P[1, 0, 0, 1] = 1.0  # along the first, from tap 4: far below the last one
    ours = DclsConv2d(2, 2, 3, dilated_kernel_size=(3, 9), version="v1")
    report = load_dcls_state_dict(ours, theirs.state_dict())
    assert report.layers[0].outside == 12, "along the short axis all start beyond the last tap"
    assert "12 components lie outside of the kernel" in str(report)


def test_bad_conversions():
    module = DclsConv2d(4, 4, 3, dilated_kernel_size=7)
    state = module.state_dict()
    with pytest.raises(ValueError, match="compat: expected"):
        load_dcls_state_dict(module, state, compat="v1")
    with pytest.raises(ValueError, match="model: expected a DCLS layer or a network with some, got Conv2d"):
        load_dcls_state_dict(nn.Conv2d(4, 4, 3), state)
    with pytest.raises(ValueError, match=r"expected P of shape \(2, 4, 4, 3\)"):
        load_dcls_state_dict(module, state | {"P": torch.zeros(2, 4, 4, 5)})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_dcls_state_dict(module, {"P": state["P"]})
