"""Pictures in and out (PNG, JPEG, TIFF; 8 and 16 bit; gray and RGB), cubes of many bands (.npy, TIFF), and large ones
of both in overlapping tiles.

Pillow, tifffile and imagecodecs are imported when a file of theirs is met: ``pip install pydenoise[cli]``.
"""

from pydenoise.imaging.cubes import Cube, check_cube_output, create_cube, is_cube, open_cube
from pydenoise.imaging.extras import MissingExtra, require
from pydenoise.imaging.picture import ImageError, Picture
from pydenoise.imaging.reading import read_picture
from pydenoise.imaging.tiles import map_tiles, tile_windows
from pydenoise.imaging.writing import check_output, write_picture

__all__ = [
    "Cube",
    "ImageError",
    "MissingExtra",
    "Picture",
    "check_cube_output",
    "check_output",
    "create_cube",
    "is_cube",
    "map_tiles",
    "open_cube",
    "read_picture",
    "require",
    "tile_windows",
    "write_picture",
]
