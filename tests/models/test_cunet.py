"""waifu2x cunet: sizes, tracing, the published weights and files that hold something else."""

import pytest
import torch
from torch import fx

from pydenoise.models import CUNet, WeightsError
from pydenoise.models.weights import find_cunet


@pytest.fixture(scope="module")
def published():
    try:
        return find_cunet(3)
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def small_pictures():
    torch.manual_seed(0)
    return CUNet().eval()


def test_the_network_loses_its_margin(small_pictures):
    with torch.inference_mode():
        assert small_pictures(torch.rand(2, 3, 60, 72)).shape == (2, 3, 4, 16)


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (7, 30), (29, 2)])
def test_pictures_keep_their_size(small_pictures, size):
    with torch.inference_mode():
        assert small_pictures.denoise(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_a_picture_is_the_middle_of_its_repeated_borders(small_pictures):
    x = torch.rand(1, 3, 6, 8)
    rows = torch.arange(-28, 36).clamp(0, 5)
    columns = torch.arange(-28, 36).clamp(0, 7)
    with torch.inference_mode():
        expected = small_pictures(x[:, :, rows][..., columns])[..., :6, :8]
        assert torch.equal(small_pictures.denoise(x), expected)


def test_another_network_may_stand_in(small_pictures):
    traced = fx.symbolic_trace(small_pictures)
    x = torch.rand(1, 3, 5, 6)
    with torch.inference_mode():
        assert torch.equal(small_pictures.denoise(x, traced), small_pictures.denoise(x))
        assert small_pictures.denoise(x, lambda padded: padded[..., 28:-28, 28:-28]).equal(x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"x: expected \[N, 3, H, W\]"),
        ((1, 1, 64, 64), r"x: expected \[N, 3, H, W\]"),
        ((1, 3, 64, 66), "multiples of 4 and at least 60"),
        ((1, 3, 56, 64), "multiples of 4 and at least 60"),
    ],
)
def test_bad_arguments(small_pictures, shape, message):
    with pytest.raises(ValueError, match=message):
        small_pictures(torch.rand(shape))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 0, 8)])
def test_bad_pictures(small_pictures, shape):
    with pytest.raises(ValueError, match="x: expected .* and at least one pixel"):
        small_pictures.denoise(torch.rand(shape))


# ----------------------------------------------------------------------------------------------- published weights


def test_published_weights_denoise_a_photograph(published):
    data = pytest.importorskip("skimage.data")
    model = CUNet.from_ncnn(*published)
    assert not model.training
    clean = torch.from_numpy(data.astronaut()[:160, 140:300]).permute(2, 0, 1).unsqueeze(0) / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)) * (10 / 255)
    noisy = (clean + noise).clamp(0, 1)
    with torch.inference_mode():
        result = model.denoise(noisy).clamp(0, 1)
    before, after = (-10 * (image - clean).square().mean().log10() for image in (noisy, result))
    assert 28 < before < 29
    assert after > before + 5


def test_published_weights_give_what_ncnn_gives(published):
    """ncnn itself in float32, where it is installed (it is no dependency of the tests)."""
    ncnn = pytest.importorskip("ncnn")
    import numpy as np

    x = torch.rand(1, 3, 68, 72, generator=torch.Generator().manual_seed(0))
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.num_threads = 1
    net.load_param(str(published[0]))
    net.load_model(str(published[1]))
    extractor = net.create_extractor()
    extractor.input("Input1", ncnn.Mat(x[0].numpy()).clone())
    _, theirs = extractor.extract("Eltwise4")
    with torch.inference_mode():
        ours = CUNet.from_ncnn(*published)(x)[0]
    assert np.abs(np.array(theirs) - ours.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0=4 1=4", "0=5 1=5", r"the crops are \[5, 4, 16, 20\]"),
        ("0=64 1=3 5=1 6=18432 9=2", "0=64 1=3 5=1 6=18432 9=1", "'activation': 1"),
        ("0=64 1=2 3=2 5=1", "0=64 1=2 3=1 5=1", "'stride': 1"),
        ("Eltwise ", "Concat ", "3 layers add"),
        ("0=32 1=3 5=1 6=864", "0=32 1=5 5=1 6=864", "Convolution Convolution1 has .*'kernel': 5"),
    ],
)
def test_other_graphs_are_refused(published, tmp_path, old, new, message):
    text = published[0].read_text()
    assert old in text
    (tmp_path / "m.param").write_text(text.replace(old, new, 1))
    with pytest.raises(WeightsError, match=message):
        CUNet.from_ncnn(tmp_path / "m.param", published[1])


def test_weights_that_are_not_finite_are_refused(published, tmp_path):
    data = bytearray(published[1].read_bytes())
    data[4:6] = b"\x00\x7e"  # NaN in half precision
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(WeightsError, match="Convolution1 holds values that are not finite"):
        CUNet.from_ncnn(published[0], tmp_path / "m.bin")


def test_noise_levels_and_where_their_files_are(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="noise: expected 0, 1, 2 or 3, got 4"):
        find_cunet(4)
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="pydenoise weights cunet"):
        find_cunet()
