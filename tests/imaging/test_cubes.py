"""Cubes in and out: what is a cube, orders of axes, dtypes, files that are none."""

import numpy as np
import pytest

from pydenoise.imaging import (
    Cube,
    ImageError,
    Picture,
    check_cube_output,
    create_cube,
    is_cube,
    open_cube,
    write_picture,
)

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("PIL")


def make(shape=(5, 7, 6), dtype=np.float32):
    return (np.random.default_rng(0).random(shape) * 200).astype(dtype)


def write_tiff(path, cube, first, **options):
    data = np.moveaxis(cube, -1, 0) if first else cube
    more = {} if first else {"planarconfig": "contig"}
    tifffile.imwrite(path, data, photometric="minisblack", **more, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["c.npy", "c.tif"])
@pytest.mark.parametrize("shape", [(5, 7, 6), (1, 7, 6), (5, 1, 2), (1, 1, 9)])
def test_round_trip(tmp_path, name, first, dtype, shape):
    cube = make(shape, dtype)
    with create_cube(tmp_path / name, Cube(cube, first)) as out:
        assert out.shape == shape
        out[:] = cube
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if not (name == "c.tif" and not first and shape[2] <= 4 and np.dtype(dtype).kind == "u"):
        assert is_cube(tmp_path / name)  # few integer samples a pixel are a picture
    again = open_cube(tmp_path / name, bands_first=first)
    assert again.pixels.dtype == dtype
    assert np.array_equal(again.pixels, cube)
    assert isinstance(again.pixels, np.memmap)
    assert f"{shape[1]} x {shape[0]}, {shape[2]} bands" in again.describe()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True}])
def test_tiff_kinds(tmp_path, first, options):
    cube = make(dtype=np.uint16)
    write_tiff(tmp_path / "c.tif", cube, first, **options)
    assert is_cube(tmp_path / "c.tif")
    assert np.array_equal(open_cube(tmp_path / "c.tif").pixels, cube)


def test_planes_of_one_page(tmp_path):
    cube = make(dtype=np.uint16)
    tifffile.imwrite(tmp_path / "c.tif", np.moveaxis(cube, -1, 0), photometric="minisblack", planarconfig="separate")
    found = open_cube(tmp_path / "c.tif")
    assert found.bands_first
    assert np.array_equal(found.pixels, cube)


def test_pictures_are_no_cubes(tmp_path):
    for name in ("p.png", "p.tif"):
        write_picture(tmp_path / name, Picture(make((4, 5, 3), np.uint8)))
        assert not is_cube(tmp_path / name)
    (tmp_path / "words.npy").write_text("just words")
    (tmp_path / "broken.tif").write_bytes(b"II*\0" + b"\xff" * 40)
    for name in ("words.npy", "broken.tif", "none.npy", ""):
        assert not is_cube(tmp_path / name)
    tifffile.imwrite(tmp_path / "sizes.tif", make((4, 5), np.uint8))
    tifffile.imwrite(tmp_path / "sizes.tif", make((6, 5), np.uint8), append=True)
    assert not is_cube(tmp_path / "sizes.tif")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (make((4, 5)), "expected three axes"),
        (make((4, 5, 0)), "expected three axes"),
        (make((4, 5, 1)), "one band"),
        (make(dtype=np.int64), "samples of type int64"),
        (make().astype(complex), "samples of type complex128"),
        (np.array([[[None]]]), "damaged or unsupported"),
    ],
)
def test_arrays_that_are_no_cubes(tmp_path, array, message):
    np.save(tmp_path / "c.npy", array)
    with pytest.raises(ImageError, match=message):
        open_cube(tmp_path / "c.npy")


def test_damaged_files(tmp_path):
    np.save(tmp_path / "c.npy", make())
    (tmp_path / "short.npy").write_bytes((tmp_path / "c.npy").read_bytes()[:200])
    with pytest.raises(ImageError, match="damaged"):
        open_cube(tmp_path / "short.npy")
    write_tiff(tmp_path / "c.tif", make(dtype=np.uint16), True)
    for lost in (400, 900):  # some of the last pages; nearly all of them
        (tmp_path / "short.tif").write_bytes((tmp_path / "c.tif").read_bytes()[:-lost])
        with pytest.raises(ImageError, match="damaged"):
            open_cube(tmp_path / "short.tif")


@pytest.mark.parametrize(
    ("name", "message"), [("c.png", "cubes are written as"), ("", "is a directory"), ("none/c.npy", "is no directory")]
)
def test_outputs_that_cannot_be(tmp_path, name, message):
    with pytest.raises(ImageError, match=message):
        check_cube_output(tmp_path / name)


def test_a_failure_leaves_the_old_file(tmp_path):
    (tmp_path / "c.npy").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), create_cube(tmp_path / "c.npy", Cube(make(), False)):
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["c.npy"]
    assert (tmp_path / "c.npy").read_bytes() == b"old"
