"""Reading PNG, JPEG and TIFF files. The content decides the format, not the name."""

import logging
import mmap
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pydenoise.imaging.extras import require
from pydenoise.imaging.picture import ImageError, Picture, check_size, from_samples, upright

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274
ICC = 34675
ROWS_AT_ONCE = 256


def read_picture(path: str | Path) -> Picture:
    """Read a PNG, JPEG or TIFF file: gray or RGB, 8 or 16 bit, with or without alpha.

    The picture is turned upright where its EXIF or TIFF orientation says so. Raises :class:`ImageError` if the file is
    missing, is no picture, is damaged, or is of a kind that has no defined treatment (CMYK, floating point, several
    pages, animation); MissingExtra if the package that reads it is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path}: is a directory, not a picture")
    try:
        with path.open("rb") as file:
            head = file.read(33)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith(TIFF):
        return _read_tiff(path)
    if head.startswith(PNG):
        if len(head) < 33 or head[12:16] != b"IHDR":
            raise ImageError(f"{path}: a damaged PNG file: it ends before its header does")
        return _read_png16(path, head) if head[24] == 16 else _read_pillow(path)
    if head.startswith(JPEG):
        return _read_pillow(path)
    raise ImageError(f"{path}: not a PNG, JPEG or TIFF picture")


# ------------------------------------------------------------------------------------------------------------ Pillow


def _open_pillow(path: Path):
    image_module = require("PIL.Image", "Pillow", "reading pictures")
    with warnings.catch_warnings():  # Pillow's own limit is lower than ours, and check_size stands in for it
        warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
        previous, image_module.MAX_IMAGE_PIXELS = image_module.MAX_IMAGE_PIXELS, None
        try:
            image = image_module.open(path, formats=("PNG", "JPEG", "MPO"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"{path}: a damaged picture: {first_line(error)}") from error
        finally:
            image_module.MAX_IMAGE_PIXELS = previous
    check_size(str(path), *image.size)
    return image


def _read_pillow(path: Path) -> Picture:
    with _open_pillow(path) as image:
        if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise ImageError(f"{path}: an animation of {image.n_frames} frames; save one frame as a picture of its own")
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            raise ImageError(f"{path}: a damaged picture: {first_line(error)}") from error
        others, orientation = _pillow_metadata(image)
        if getattr(image, "n_frames", 1) > 1:
            others["notes"].append(f"the file holds {image.n_frames} pictures; only the first is used")
        samples = _samples_of(_as_gray_or_rgb(path, image))
    return from_samples(upright(samples, orientation), **others)


def _as_gray_or_rgb(path: Path, image):
    transparent = "transparency" in image.info
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if transparent or image.mode == "PA" else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("L", "RGB"):
        return image.convert({"L": "LA", "RGB": "RGBA"}[image.mode]) if transparent else image
    if image.mode in ("LA", "RGBA"):
        return image
    raise ImageError(f"{path}: a {image.mode} picture; convert it to RGB or gray first")


def _samples_of(image) -> np.ndarray:
    """The samples, copied in strips: a whole-image conversion would hold the picture three times."""
    width, height = image.size
    bands = len(image.getbands())
    samples = np.empty((height, width, bands), np.uint8)
    for top in range(0, height, ROWS_AT_ONCE):
        bottom = min(top + ROWS_AT_ONCE, height)
        samples[top:bottom] = np.asarray(image.crop((0, top, width, bottom))).reshape(bottom - top, width, bands)
    return samples


def _pillow_metadata(image) -> tuple[dict, int]:
    """(fields of a Picture besides samples, orientation); the EXIF is rewritten as upright, as the samples will be."""
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning here is about a part of the EXIF data that is lost
            exif = image.getexif()
        orientation = int(exif.get(ORIENTATION, 1))
        if ORIENTATION in exif:
            exif[ORIENTATION] = 1
        data = exif.tobytes() if len(exif) else None
    except Exception as error:
        orientation, data = 1, None  # cameras write EXIF broken in every way: the picture matters more
        notes.append(f"the EXIF data cannot be read and is left out ({first_line(error)})")
    dpi = image.info.get("dpi")
    others = {"icc": image.info.get("icc_profile"), "exif": data, "notes": notes}
    others["dpi"] = (float(dpi[0]), float(dpi[1])) if dpi and min(dpi) > 0 else None
    return others, orientation


# -------------------------------------------------------------------------------------------------------- 16-bit PNG


def _read_png16(path: Path, head: bytes) -> Picture:
    """Pillow reads 16-bit colour as 8-bit, so libpng (through imagecodecs) does it; Pillow reads the metadata."""
    check_size(str(path), *struct.unpack(">II", head[16:24]))
    codecs = require("imagecodecs", "imagecodecs", "reading 16-bit PNG pictures")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            samples = codecs.png_decode(data)
        except (RuntimeError, ValueError) as error:
            raise ImageError(f"{path}: a damaged PNG file: {first_line(error)}") from error
    with _open_pillow(path) as image:
        others, orientation = _pillow_metadata(image)
    return from_samples(upright(samples, orientation), **others)


# -------------------------------------------------------------------------------------------------------------- TIFF


def _read_tiff(path: Path) -> Picture:
    tifffile = require("tifffile", "tifffile", "reading TIFF pictures")
    try:
        with silent("tifffile"), tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if not page.is_reduced]
            if not pages:
                raise ImageError(f"{path}: a damaged TIFF file: it holds no picture")
            if len(pages) != 1:
                raise ImageError(f"{path}: {len(pages)} pages; save the one to denoise as a picture of its own")
            page = pages[0].aspage() if hasattr(pages[0], "aspage") else pages[0]
            samples = _tiff_samples(path, tifffile, page)
            icc = page.tags.valueof(ICC)
            orientation = int(page.tags.valueof(ORIENTATION, 1) or 1)
            dpi = _tiff_dpi(page)
    except ImageError:
        raise
    except Exception as error:  # tifffile meets damaged files with many kinds of exceptions, IndexError to zlib.error
        raise ImageError(f"{path}: a damaged or unsupported TIFF file: {first_line(error)}") from error
    return from_samples(upright(samples, orientation), icc=bytes(icc) if icc else None, dpi=dpi)


@contextmanager
def silent(logger: str) -> Iterator[None]:
    """Without the log lines of a library whose complaints arrive as exceptions too."""
    target = logging.getLogger(logger)
    level = target.level
    target.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        target.setLevel(level)


def _tiff_samples(path: Path, tifffile, page) -> np.ndarray:
    check_size(str(path), page.imagewidth, page.imagelength)
    photometric, kinds = page.photometric, tifffile.PHOTOMETRIC
    if photometric not in (kinds.MINISBLACK, kinds.MINISWHITE, kinds.RGB, kinds.YCBCR):
        raise ImageError(
            f"{path}: a TIFF picture of kind {getattr(photometric, 'name', photometric)}; convert it to RGB or gray"
        )
    if page.dtype not in (np.uint8, np.uint16) or page.bitspersample not in (8, 16):
        raise ImageError(
            f"{path}: {page.bitspersample}-bit samples of type {page.dtype}; expected 8 or 16 bit unsigned integers"
        )
    colours = 1 if photometric in (kinds.MINISBLACK, kinds.MINISWHITE) else 3
    if page.imagedepth != 1 or page.samplesperpixel not in (colours, colours + 1):
        raise ImageError(f"{path}: {page.samplesperpixel} samples a pixel; expected {colours}, or one more for alpha")
    samples = page.asarray()
    if page.axes.startswith("S"):  # the channels lie one after the other
        samples = np.ascontiguousarray(np.moveaxis(samples, 0, -1))
    samples = samples.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    if photometric == kinds.MINISWHITE:
        samples = samples.copy()
        samples[:, :, 0] = np.iinfo(samples.dtype).max - samples[:, :, 0]
    return samples


def _tiff_dpi(page) -> tuple[float, float] | None:
    unit = page.tags.valueof("ResolutionUnit", 2)
    pair = page.tags.valueof("XResolution"), page.tags.valueof("YResolution")
    if unit not in (2, 3) or not all(value and value[0] and value[1] for value in pair):
        return None
    scale = 2.54 if unit == 3 else 1.0
    return pair[0][0] / pair[0][1] * scale, pair[1][0] / pair[1][1] * scale


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
