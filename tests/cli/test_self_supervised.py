"""``pydenoise denoise --self-supervised``: what comes out, the progress bar, regions, maps, and what is refused."""

import numpy as np
import pytest
import torch

from pydenoise import self_supervised
from pydenoise.imaging import Picture, read_picture, write_picture


def make(path, channels=1, size=(24, 40), dtype=np.uint8):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (*size, channels)).astype(dtype)
    write_picture(path, Picture(pixels))
    return path


@pytest.fixture
def command(tmp_path):
    """The words of a short run, without those of a test."""
    return ["denoise", "--self-supervised", make(tmp_path / "in.png"), "-o", tmp_path / "out.png", "--steps", 2]


@pytest.mark.parametrize(
    ("channels", "dtype", "name"), [(1, np.uint8, "png"), (3, np.uint8, "png"), (3, np.uint16, "tif")]
)
def test_result_is_the_librarys(cli, tmp_path, channels, dtype, name):
    source = make(tmp_path / f"in.{name}", channels, dtype=dtype)
    target = tmp_path / f"out.{name}"
    options = ("--steps", 3, "--seed", 5, "--detail", 100, "--stages", 1)
    code, out, err = cli("denoise", "--self-supervised", source, "-o", target, *options)
    assert code == 0, err
    assert out == "" and "training on the picture" in err and "3/3 steps" in err and "loss" in err
    pixels = read_picture(source).pixels
    top = np.iinfo(dtype).max
    noisy = torch.from_numpy(pixels.astype(np.float32) / top).permute(2, 0, 1)
    expected = self_supervised.denoise_single_image(noisy, steps=3, seed=5, detail=100.0, stages=1).image
    expected = expected.permute(1, 2, 0).clamp(0, 1).mul(top).round().numpy().astype(dtype)
    found = read_picture(target).pixels
    assert found.dtype == dtype and np.array_equal(found, expected) and not np.array_equal(found, pixels)


def test_regions_and_maps(cli, command, tmp_path):
    pytest.importorskip("matplotlib")
    maps = tmp_path / "maps.png"
    options = ("--region", "2:20,4:30=0.001,0.001,-", "--region", "0:1,0:1=-,-,9@1", "--sigma-maps", maps)
    code, _, err = cli(*command, *options)
    assert code == 0, err
    before, after = (read_picture(tmp_path / name).pixels for name in ("in.png", "out.png"))
    assert np.array_equal(after[2:20, 4:30], before[2:20, 4:30]) and not np.array_equal(after[21:], before[21:])
    assert read_picture(maps).pixels.shape[2] == 3 and "wrote" in err


def test_quiet_tiles_and_crop(cli, command):
    code, out, err = cli(*command, "--quiet", "--tile", 24, "--crop", 16)
    assert (code, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma", 5], "--sigma does not go with --self-supervised"),
        (["--weights", "x.pth"], "--weights does not go with --self-supervised"),
        (["--precision", "bf16"], "--precision bf16 does not go with"),
        (["--backend", "torch"], "--backend torch does not go with"),
        (["--steps", 0], "--steps: expected a whole number of at least 1"),
        (["--detail", -1], "--detail: expected a number of zero or more"),
        (["--crop", "x"], "--crop: expected a whole number, zero or more"),
        (["--tile", 100], "--tile 100: --self-supervised needs a multiple of 8"),
        (["--overlap", 16], "--overlap does not go with --self-supervised"),
        (["--region", "1:2,3:4"], "--region: expected TOP:BOTTOM"),
        (["--region", "2:2,3:4=1,1,1"], "is empty"),
        (["--region", "1:2,3:4=1,x,1"], "expected a number or a dash, got 'x'"),
        (["--region", "1:2,3:4=1,0,1"], "expected a positive number, at most 127, or a dash, got '0'"),
        (["--region", "1:2,3:4=200,1,1"], "at most 127"),
        (["--region", "1:25,3:4=1,1,1"], "ends outside the picture's 24 rows and 40 columns"),
        (["--region", "1:2,3:4=1,1,1@2"], "there is no stage 2"),
        (["--sigma-maps", "maps.jpg"], "expected the name of a .png file"),
        (["--sigma-maps", "nowhere/maps.png"], "is no directory"),
    ],
)
def test_refused(refused, command, options, message):
    assert message in " ".join(refused(*command, *options).split())


@pytest.mark.parametrize(
    "option", [["--steps", 3], ["--region", "1:2,3:4=1,1,1"], ["--sigma-maps", "m.png"], ["--seed", 0]]
)
def test_options_of_the_other_way(refused, tmp_path, option):
    line = refused("denoise", make(tmp_path / "in.png"), "-o", tmp_path / "out.png", "--sigma", 5, *option)
    assert f"{option[0]} belongs to --self-supervised" in line
