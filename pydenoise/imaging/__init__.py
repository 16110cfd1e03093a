"""Pictures in and out (PNG, JPEG, TIFF; 8 and 16 bit; gray and RGB), and large ones in overlapping tiles.

Pillow, tifffile and imagecodecs are imported when a file of theirs is met: ``pip install pydenoise[cli]``.
"""

from pydenoise.imaging.extras import MissingExtra, require
from pydenoise.imaging.picture import ImageError, Picture
from pydenoise.imaging.reading import read_picture
from pydenoise.imaging.tiles import map_tiles, tile_windows
from pydenoise.imaging.writing import check_output, write_picture

__all__ = [
    "ImageError",
    "MissingExtra",
    "Picture",
    "check_output",
    "map_tiles",
    "read_picture",
    "require",
    "tile_windows",
    "write_picture",
]
