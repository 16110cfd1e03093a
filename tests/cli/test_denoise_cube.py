"""``pydenoise denoise`` on cubes of many bands."""

import numpy as np
import pytest
import torch

from pydenoise.hyperspectral import FFDNetDenoiser, fasthyde
from pydenoise.imaging import Cube, Picture, create_cube, open_cube, write_picture
from pydenoise.models import load_ffdnet
from pydenoise.testing.hyperspectral import add_noise, low_rank_cube

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("tifffile")


def make(path, dtype=np.uint16, size=(40, 50), first=False, scale=1000):
    cube = add_noise(low_rank_cube(bands=12, size=size, rank=3), 0.02).permute(1, 2, 0).numpy()
    cube = np.rint(cube * scale).clip(0, 60000).astype(dtype) if np.dtype(dtype).kind == "u" else cube.astype(dtype)
    with create_cube(path, Cube(cube, first)) as out:
        out[:] = cube
    return path


def expected(path, denoiser, first=False, **options):
    values = torch.from_numpy(np.array(open_cube(path, first).pixels, np.float64)).permute(2, 0, 1)
    return fasthyde(values, denoiser=denoiser, **options).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["c.npy", "c.tif"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_result_is_fasthydes(cli, tmp_path, name, first, dtype):
    source, target = make(tmp_path / f"in-{name}", dtype, first=first), tmp_path / name
    flag = ["--bands-first"] if first and name.endswith("npy") else []
    code, out, err = cli("denoise", source, "-o", target, "--denoiser", "wavelet", *flag)
    assert (code, out) == (0, ""), err
    shown = " ".join(err.split())
    assert "50 x 40, 12 bands" in shown and "components" in shown and "wrote" in shown
    result = open_cube(target, first)
    assert result.pixels.dtype == dtype
    assert result.bands_first == first
    wrong = np.abs(result.pixels - expected(source, "wavelet", first)) > (0.52 if dtype == np.uint16 else 1e-4)
    assert wrong.mean() < 1e-3


@pytest.mark.parametrize("backend", ["torch", "pydenoise"])
def test_the_network(cli, weights, tmp_path, backend):
    source, target = make(tmp_path / "in.npy", np.float32), tmp_path / "out.npy"
    options = ("--weights", weights, "--backend", backend, "--tile", 32, "--batch", 2, "--rank", 4, "--quiet")
    assert cli("denoise", source, "-o", target, *options) == (0, "", "")
    result = open_cube(target).pixels
    np.testing.assert_allclose(result, expected(source, FFDNetDenoiser(load_ffdnet(weights)), rank=4), atol=1e-4)


def test_kinds_of_noise(cli, tmp_path):
    source = make(tmp_path / "in.npy")
    results = []
    for number, options in enumerate((["--noise", "iid"], ["--noise", "poisson"], ["--sigma", "20"], ["--blend"])):
        target = tmp_path / f"{number}.npy"
        code, _, err = cli("denoise", source, "-o", target, "--denoiser", "wavelet", *options)
        assert code == 0, err
        results.append(np.array(open_cube(target).pixels))
    assert len({result.tobytes() for result in results}) == 4


def test_the_cube_may_be_replaced(cli, tmp_path):
    source = make(tmp_path / "c.npy")
    before = np.load(source)
    assert cli("denoise", source, "-o", source, "--denoiser", "wavelet", "--quiet")[0] == 0
    after = np.load(source)
    assert after.shape == before.shape
    assert not np.array_equal(after, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise", "salt"], "--noise: invalid choice"),
        (["--rank", "13"], "rank: expected an integer of 1 to 12"),
        (["--rank", "0"], "--rank: expected a whole number of at least 1"),
        (["--noise", "poisson", "--sigma", "3"], "leave out --sigma"),
        (["--precision", "int8"], "--precision int8 is for pictures"),
        (["--tile", "100"], "--tile 100: with this denoiser, a multiple of 16"),
        (["--tile", "64", "--overlap", "32"], "--tile 64 leaves nothing"),
        (["--sigma", "0"], "sigma: expected a finite number above zero"),
    ],
)
def test_options(refused, tmp_path, options, message):
    source = make(tmp_path / "in.npy")
    assert message in refused("denoise", source, "-o", tmp_path / "out.npy", "--denoiser", "wavelet", *options)
    assert not (tmp_path / "out.npy").exists()


def test_files_that_do_not_fit(refused, tmp_path, weights):
    source, options = make(tmp_path / "in.npy"), ("--denoiser", "wavelet")
    assert "cubes are written as" in refused("denoise", source, "-o", tmp_path / "out.png", *options)
    np.save(tmp_path / "flat.npy", np.zeros((4, 5)))
    assert "expected three axes" in refused("denoise", tmp_path / "flat.npy", "-o", tmp_path / "out.npy", *options)
    np.save(tmp_path / "nan.npy", np.full((9, 9, 3), np.nan))
    assert "not finite" in refused("denoise", tmp_path / "nan.npy", "-o", tmp_path / "out.npy", *options)
    np.save(tmp_path / "few.npy", np.zeros((2, 2, 9)))
    assert "more pixels" in refused("denoise", tmp_path / "few.npy", "-o", tmp_path / "out.npy", *options)
    write_picture(tmp_path / "p.png", Picture(np.zeros((8, 8, 3), np.uint8)))
    for option in (["--rank", "3"], ["--noise", "iid"], ["--bands-first"], ["--denoiser", "wavelet"]):
        line = refused("denoise", tmp_path / "p.png", "-o", tmp_path / "q.png", "--sigma", 5, *option)
        assert f"{option[0]} is for cubes" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.npy", "flat.npy", "in.npy", "nan.npy", "p.png"]
