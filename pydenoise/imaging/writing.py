"""Writing PNG, JPEG and TIFF files: the name decides the format, and everything is checked before the work starts."""

import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pydenoise.imaging.extras import require
from pydenoise.imaging.picture import ImageError, Picture

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
JPEG_QUALITY = 95
PNG_HEADER_BYTES = 33  # the signature and the IHDR chunk
JPEG_MAX_SIDE = 65535


def check_output(path: str | Path, picture: Picture) -> str:
    """Check that ``picture`` can be written to ``path``, before any work is done; returns the format.

    Raises :class:`ImageError` for an unknown extension, a directory, a place that cannot be written to, and for what
    the format cannot hold (16-bit samples or alpha in JPEG); MissingExtra if the package that writes it is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path}: is a directory; give the name of a picture file")
    if path.suffix.lower() not in FORMATS:
        raise ImageError(f"{path}: unknown extension {path.suffix!r}; known: {', '.join(FORMATS)}")
    kind = FORMATS[path.suffix.lower()]
    _check_holds(path, kind, picture)
    check_place(path)
    if kind == "TIFF":
        require("tifffile", "tifffile", "writing TIFF pictures")
    elif kind == "PNG" and picture.bits == 16:
        require("imagecodecs", "imagecodecs", "writing 16-bit PNG pictures")
    else:
        require("PIL.Image", "Pillow", "writing pictures")
    return kind


def _check_holds(path: Path, kind: str, picture: Picture) -> None:
    if kind != "JPEG":
        return
    if picture.bits == 16:
        raise ImageError(f"{path}: JPEG holds 8 bit and the picture has 16; write .png or .tif")
    if picture.alpha is not None:
        raise ImageError(f"{path}: JPEG holds no alpha and the picture has it; write .png or .tif")
    if max(picture.pixels.shape[:2]) > JPEG_MAX_SIDE:
        raise ImageError(f"{path}: JPEG holds {JPEG_MAX_SIDE} pixels a side; write .png or .tif")


def check_place(path: Path) -> None:
    """Raise :class:`ImageError` where no file can be written at ``path``."""
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
        raise ImageError(f"{path}: cannot be written: not a file that may be replaced")
    if not target.parent.is_dir():
        raise ImageError(f"{path}: cannot be written: {target.parent} is no directory")
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".pydenoise-"):
            pass
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror}") from error


def write_picture(path: str | Path, picture: Picture) -> list[str]:
    """Write ``picture`` in the format of the name; returns notes on what the format could not carry.

    The file appears complete or not at all: it is written beside its place and moved there. PNG and TIFF are lossless;
    JPEG is written with quality 95 and without chroma subsampling.
    """
    kind = check_output(path, picture)
    writer: Callable[[str, Picture], list[str]] = {"TIFF": _write_tiff, "JPEG": _write_jpeg}.get(kind, _write_png)
    with replacing(path) as temporary:
        return writer(temporary, picture)


@contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """A file beside ``path`` that takes its place when the block ends, and goes when it fails.

    Raises :class:`ImageError` for what the system says against it.
    """
    target = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".pydenoise-", suffix=target.suffix)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, _mode_of(target))
        os.replace(temporary, target)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _mode_of(target: Path) -> int:
    """Permissions of the file that is replaced, or those of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _samples(picture: Picture) -> np.ndarray:
    """Samples as the writers want them: [H, W] for gray, [H, W, C] otherwise, contiguous."""
    pixels = picture.pixels
    if picture.alpha is not None:
        pixels = np.concatenate((pixels, picture.alpha[:, :, None]), axis=2)
    return np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _pillow_options(picture: Picture) -> dict:
    options = {"icc_profile": picture.icc, "exif": picture.exif, "dpi": picture.dpi}
    return {key: value for key, value in options.items() if value is not None}


def _write_jpeg(path: str, picture: Picture) -> list[str]:
    image_module = require("PIL.Image", "Pillow", "writing pictures")
    image = image_module.fromarray(_samples(picture))
    image.save(path, "JPEG", quality=JPEG_QUALITY, subsampling=0, **_pillow_options(picture))
    return []


def _write_png(path: str, picture: Picture) -> list[str]:
    if picture.bits == 16:
        return _write_png16(path, picture)
    image_module = require("PIL.Image", "Pillow", "writing pictures")
    image_module.fromarray(_samples(picture)).save(path, "PNG", **_pillow_options(picture))
    return []


def _write_png16(path: str, picture: Picture) -> list[str]:
    """libpng writes the samples; the chunks for profile, EXIF and resolution go in behind the header."""
    codecs = require("imagecodecs", "imagecodecs", "writing 16-bit PNG pictures")
    data = memoryview(codecs.png_encode(_samples(picture)))
    with open(path, "wb") as file:
        file.write(data[:PNG_HEADER_BYTES])
        if picture.icc:
            file.write(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc)))
        if picture.dpi:
            file.write(_chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in picture.dpi), 1)))
        if picture.exif:
            file.write(_chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
        file.write(data[PNG_HEADER_BYTES:])
    return []


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _write_tiff(path: str, picture: Picture) -> list[str]:
    tifffile = require("tifffile", "tifffile", "writing TIFF pictures")
    options: dict = {"photometric": "minisblack" if picture.gray else "rgb", "compression": "zlib", "metadata": None}
    if picture.alpha is not None:
        options["extrasamples"] = ["unassalpha"]
        options["planarconfig"] = "contig"
    if picture.dpi:
        options |= {"resolution": picture.dpi, "resolutionunit": "INCH"}
    tifffile.imwrite(path, _samples(picture), iccprofile=picture.icc, rowsperstrip=64, **options)
    return ["EXIF data is not carried into TIFF"] if picture.exif else []
