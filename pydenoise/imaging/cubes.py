"""Cubes of many bands in .npy and TIFF files, memory-mapped: arrays [H, W, bands], whatever order the file has."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pydenoise.imaging.extras import require
from pydenoise.imaging.picture import ImageError
from pydenoise.imaging.reading import TIFF, first_line, silent
from pydenoise.imaging.tiles import SAMPLES
from pydenoise.imaging.writing import check_place, replacing

NPY = b"\x93NUMPY"
FORMATS = {".npy": "NumPy", ".tif": "TIFF", ".tiff": "TIFF"}
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # beyond, offsets need the 64 bits of BigTIFF


@dataclass
class Cube:
    """``pixels`` [H, W, bands]; ``bands_first`` says whether the file stores one band after the other."""

    pixels: np.ndarray
    bands_first: bool

    def describe(self) -> str:
        """For example ``614 x 512, 224 bands, uint16``."""
        height, width, bands = self.pixels.shape
        return f"{width} x {height}, {bands} bands, {self.pixels.dtype.name}"


def is_cube(path: str | Path) -> bool:
    """Whether a file is a cube and not a picture: .npy, and TIFF of several pages, of over 4 samples a pixel, or of
    several that are not unsigned.

    Anything else, missing files too, is left to :func:`~pydenoise.imaging.read_picture`, which says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(6)
    if head == NPY:
        return True
    if not head.startswith(TIFF):
        return False
    tifffile = require("tifffile", "tifffile", "reading TIFF files")
    try:
        with silent("tifffile"), tifffile.TiffFile(path) as tiff:
            page, pages = tiff.pages[0], len(tiff.pages)
            samples, picture = page.samplesperpixel, page.dtype in (np.uint8, np.uint16)
            return len(tiff.series) == 1 and (pages > 1 or samples > 4 or (samples > 1 and not picture))
    except Exception:  # damaged files meet tifffile as many kinds of exceptions; read_picture puts them into words
        return False


def open_cube(path: str | Path, bands_first: bool = False) -> Cube:
    """Open a cube without reading it: its samples come from the file as they are used.

    A compressed TIFF is unpacked into a temporary file first. ``bands_first``: a .npy file holds [bands, H, W] and not
    [H, W, bands]; TIFF files say it themselves. Raises :class:`ImageError` for anything but three axes of uint8,
    uint16, int16, float32 or float64, and for damaged files.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(6)
    cube = _open_npy(path, bands_first) if head == NPY else _open_tiff(path)
    if cube.pixels.dtype.newbyteorder("=").name not in SAMPLES:
        raise ImageError(f"{path}: samples of type {cube.pixels.dtype}; expected {', '.join(SAMPLES)}")
    if cube.pixels.shape[2] < 2:
        raise ImageError(f"{path}: one band; a cube has at least 2")
    return cube


def _open_npy(path: Path, bands_first: bool) -> Cube:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ImageError(f"{path}: a damaged or unsupported .npy file: {first_line(error)}") from error
    if array.ndim != 3 or 0 in array.shape:
        raise ImageError(f"{path}: an array of shape {list(array.shape)}; expected three axes, none of them empty")
    return Cube(np.moveaxis(array, 0, -1) if bands_first else array, bands_first)


def _open_tiff(path: Path) -> Cube:
    tifffile = require("tifffile", "tifffile", "reading TIFF files")
    try:
        with _errors_of("tifffile") as errors, tifffile.TiffFile(path) as tiff:
            page, pages = tiff.pages[0], len(tiff.pages)
            if errors:  # a chain of pages that breaks off would pass for a cube of fewer bands
                raise ValueError(errors[0])
            height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
            array = tiff.series[0].asarray(out="memmap") if not tiff.series[0].dataoffset else None
        if array is None:
            array = tifffile.memmap(path, mode="r")
    except Exception as error:  # many kinds of exceptions, from IndexError to zlib.error
        raise ImageError(f"{path}: a damaged or unsupported TIFF file: {first_line(error)}") from error
    if pages > 1 and samples > 1:
        raise ImageError(f"{path}: {pages} pages of {samples} samples a pixel; expected pages of one, or one page")
    first = pages > 1 or page.planarconfig == 2
    shape = (max(pages, samples), height, width) if first else (height, width, samples)
    if array.size != np.prod(shape):
        raise ImageError(f"{path}: {array.size} samples where {list(shape)} were announced")
    array = array.reshape(shape)
    return Cube(np.moveaxis(array, 0, -1) if first else array, first)


@contextmanager
def _errors_of(name: str) -> Iterator[list[str]]:
    """The errors that a library logs, in place of its log."""
    errors: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield errors
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def check_cube_output(path: str | Path) -> str:
    """Check that a cube can be written to ``path``; returns the format. Raises :class:`ImageError`."""
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path}: is a directory; give the name of a file")
    if path.suffix.lower() not in FORMATS:
        raise ImageError(f"{path}: cubes are written as {', '.join(FORMATS)}, not {path.suffix!r}")
    check_place(path)
    if FORMATS[path.suffix.lower()] == "TIFF":
        require("tifffile", "tifffile", "writing TIFF files")
    return FORMATS[path.suffix.lower()]


@contextmanager
def create_cube(path: str | Path, like: Cube) -> Iterator[np.ndarray]:
    """An array [H, W, bands] of the size, dtype and order of ``like``, in a new memory-mapped file.

    The file appears under its name when the block ends; if it fails, what was written goes.
    """
    kind = check_cube_output(path)
    shape = like.pixels.shape
    shape = (shape[2], *shape[:2]) if like.bands_first else shape
    dtype = like.pixels.dtype.newbyteorder("=")
    with replacing(path) as temporary:
        array = _create_tiff(temporary, shape, dtype, like.bands_first) if kind == "TIFF" else None
        if array is None:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        yield np.moveaxis(array, 0, -1) if like.bands_first else array
        array.flush()


def _create_tiff(path: str, shape: tuple[int, ...], dtype: np.dtype, bands_first: bool) -> np.ndarray:
    tifffile = require("tifffile", "tifffile", "writing TIFF files")
    large = int(np.prod(shape)) * dtype.itemsize > CLASSIC_TIFF_BYTES
    options = {"photometric": "minisblack", "bigtiff": large, "metadata": None}
    if not bands_first:
        options |= {"planarconfig": "contig", "extrasamples": ["unspecified"] * (shape[2] - 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on shapes that might be meant otherwise; ours is said above
        return tifffile.memmap(path, shape=shape, dtype=dtype, **options)
