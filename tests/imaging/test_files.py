"""Pictures in and out: formats, bit depths, alpha, metadata, and files that are no pictures."""

import io
import struct
import zlib

import numpy as np
import pytest

from pydenoise.imaging import ImageError, MissingExtra, Picture, check_output, read_picture, require, write_picture

Image = pytest.importorskip("PIL.Image")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


def picture(dtype=np.uint8, channels=3, alpha=False, size=(13, 17), **others) -> Picture:
    generator = np.random.default_rng(0)
    top = np.iinfo(dtype).max + 1
    pixels = generator.integers(0, top, (*size, channels)).astype(dtype)
    return Picture(pixels, generator.integers(0, top, size).astype(dtype) if alpha else None, **others)


def profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("extension", [".png", ".tif", ".tiff", ".PNG"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_lossless_round_trip(tmp_path, extension, dtype, channels, alpha):
    original = picture(dtype, channels, alpha)
    write_picture(tmp_path / f"p{extension}", original)
    again = read_picture(tmp_path / f"p{extension}")
    assert again.pixels.dtype == dtype
    assert np.array_equal(again.pixels, original.pixels)
    assert (again.alpha is None) == (not alpha)
    assert not alpha or np.array_equal(again.alpha, original.alpha)
    assert list(tmp_path.iterdir()) == [tmp_path / f"p{extension}"]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close(tmp_path, channels):
    smooth = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 24, axis=0)
    write_picture(tmp_path / "p.jpg", Picture(np.repeat(smooth, channels, axis=2)))
    again = read_picture(tmp_path / "p.jpg")
    assert again.pixels.shape == (24, 32, channels)
    assert np.abs(again.pixels.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize(("name", "dtype"), [("p.png", np.uint8), ("p.png", np.uint16), ("p.jpg", np.uint8)])
def test_metadata_travels(tmp_path, name, dtype):
    exif = Image.Exif()
    exif[271] = "A camera maker"
    icc = profile()
    write_picture(tmp_path / name, picture(dtype, icc=icc, exif=exif.tobytes(), dpi=(300.0, 300.0)))
    again = read_picture(tmp_path / name)
    assert again.icc == icc
    read = Image.Exif()
    read.load(again.exif)
    assert read[271] == "A camera maker"
    assert again.dpi == pytest.approx((300, 300), abs=0.1)


def test_tiff_keeps_the_profile_and_says_that_exif_is_lost(tmp_path):
    exif = Image.Exif()
    exif[271] = "A camera maker"
    notes = write_picture(tmp_path / "p.tif", picture(icc=profile(), exif=exif.tobytes(), dpi=(300.0, 150.0)))
    assert notes == ["EXIF data is not carried into TIFF"]
    again = read_picture(tmp_path / "p.tif")
    assert again.icc == profile()
    assert again.dpi == pytest.approx((300, 150))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    from PIL import ImageOps

    pixels = picture(size=(3, 5)).pixels
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    tifffile.imwrite(tmp_path / "p.tif", pixels, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "p.png")))
    for name in ("p.png", "p.tif"):
        again = read_picture(tmp_path / name)
        assert np.array_equal(again.pixels, expected)
        write_picture(tmp_path / f"again-{name}", again)  # and not turned a second time
        assert np.array_equal(read_picture(tmp_path / f"again-{name}").pixels, expected)


@pytest.mark.parametrize("mode", ["1", "P", "PA"])
def test_palettes_and_bitmaps_become_gray_or_rgb(tmp_path, mode):
    image = Image.fromarray(picture().pixels).convert("P" if mode == "PA" else mode)
    image.save(tmp_path / "p.png", **({"transparency": 3} if mode == "PA" else {}))
    again = read_picture(tmp_path / "p.png")
    expected = image.convert("L" if mode == "1" else "RGB")
    assert np.array_equal(again.pixels, np.asarray(expected).reshape(again.pixels.shape))
    assert (again.alpha is not None) == (mode == "PA")


@pytest.mark.parametrize("options", [{"planarconfig": "separate"}, {"compression": "lzw"}, {"compression": "jpeg"}])
def test_tiff_kinds(tmp_path, options):
    smooth = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 24, axis=0).repeat(3, axis=2)
    data = smooth.transpose(2, 0, 1) if "planarconfig" in options else smooth
    tifffile.imwrite(tmp_path / "p.tif", data, photometric="rgb", **options)
    again = read_picture(tmp_path / "p.tif")
    assert np.abs(again.pixels.astype(int) - smooth).max() <= (6 if options.get("compression") == "jpeg" else 0)


def test_tiff_with_white_as_zero(tmp_path):
    pixels = picture(np.uint16, 1).pixels
    tifffile.imwrite(tmp_path / "p.tif", 65535 - pixels[:, :, 0], photometric="miniswhite")
    assert np.array_equal(read_picture(tmp_path / "p.tif").pixels, pixels)


def _png(**options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture().pixels).save(data, "PNG", **options)
    return data.getvalue()


def _tiff(data, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, data, **options)
    return file.getvalue()


def _huge_png() -> bytes:
    data = bytearray(_png())
    data[16:24] = struct.pack(">II", 2**20, 2**20)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _png16() -> bytes:
    import imagecodecs

    return imagecodecs.png_encode(picture(np.uint16, size=(40, 40)).pixels)


def _jpeg(mode="RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (64, 64)).save(data, "JPEG")
    return data.getvalue()


def _animation() -> bytes:
    data = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(data, "PNG", save_all=True, append_images=frames[1:])
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "not a PNG, JPEG or TIFF picture"),
        (lambda: b"just some words, no picture", "not a PNG, JPEG or TIFF picture"),
        (lambda: _png()[:20], "damaged"),
        (lambda: _png()[:60], "damaged"),
        (lambda: _png16()[:300], "damaged"),
        (lambda: _jpeg()[:200], "damaged"),
        (_huge_png, "1048576 x 1048576 pixels are more than"),
        (lambda: b"II*\0" + b"\xff" * 40, "damaged TIFF file"),
        (lambda: _tiff(np.zeros((8, 8, 3), np.uint8), photometric="rgb")[:100], "TIFF"),
        (lambda: _tiff(np.zeros((8, 8), np.float32)), "32-bit samples of type float32"),
        (lambda: _tiff(np.zeros((3, 8, 8), np.uint8), photometric="minisblack"), "3 pages"),
        (lambda: _tiff(np.zeros((8, 8, 4), np.uint8), photometric="separated"), "kind SEPARATED"),
        (
            lambda: _tiff(np.zeros((8, 8, 6), np.uint8), photometric="minisblack", planarconfig="contig"),
            "6 samples a pixel",
        ),
        (lambda: _jpeg("CMYK"), "a CMYK picture"),
        (_animation, "an animation of 2 frames"),
    ],
)
def test_what_is_no_usable_picture_is_refused(tmp_path, content, message):
    path = tmp_path / "p.png"
    path.write_bytes(content())
    with pytest.raises(ImageError, match=message):
        read_picture(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a directory"):
        read_picture(tmp_path)


def test_broken_exif_does_not_lose_the_picture(tmp_path):
    Image.fromarray(picture().pixels).save(tmp_path / "p.png", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    again = read_picture(tmp_path / "p.png")
    assert np.array_equal(again.pixels, picture().pixels)
    assert again.exif is None
    assert "EXIF data cannot be read" in again.notes[0]


@pytest.mark.parametrize(
    ("name", "subject", "message"),
    [
        ("p.bmp", picture(), "unknown extension '.bmp'"),
        ("p", picture(), "unknown extension ''"),
        ("", picture(), "is a directory"),
        ("none/p.png", picture(), "is no directory"),
        ("file.txt/p.png", picture(), "is no directory"),
        ("p.jpg", picture(np.uint16), "JPEG holds 8 bit"),
        ("p.jpg", picture(alpha=True), "JPEG holds no alpha"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, name, subject, message):
    (tmp_path / "file.txt").write_text("a file")
    with pytest.raises(ImageError, match=message):
        check_output(tmp_path / name, subject)


def test_special_files_are_not_replaced():
    with pytest.raises(ImageError, match="unknown extension|cannot be written"):
        check_output("/dev/null", picture())


def test_checking_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "p.png", picture())
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_bytes(b"old")
    monkeypatch.setattr(
        Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(ImageError, match="No space left"):
        write_picture(tmp_path / "p.png", picture())
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == b"old"


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write_picture(tmp_path / "link.png", picture())
    assert (tmp_path / "link.png").is_symlink()
    assert np.array_equal(read_picture(tmp_path / "real.png").pixels, picture().pixels)


def test_missing_package_is_named_with_its_extra():
    with pytest.raises(MissingExtra, match=r"reading dreams needs dreams .*pip install pydenoise\[cli\]"):
        require("no_such_module_of_ours", "dreams", "reading dreams")


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros((4, 4, 3), np.float32),),
        (np.zeros((4, 4, 2), np.uint8),),
        (np.zeros((0, 4, 3), np.uint8),),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 3), np.uint8)),
    ],
)
def test_picture_checks_its_fields(arguments):
    with pytest.raises(ValueError, match="expected"):
        Picture(*arguments)
