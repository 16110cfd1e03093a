"""Memory-mapped arrays: how to let go of pages that have been read or written."""

import mmap

import numpy as np


def release(array: np.ndarray) -> None:
    """Drop the pages of a memory-mapped file from this process; anything else is left alone.

    Without it, a pass over a large file counts as memory of the process until the system needs the pages elsewhere.
    Nothing is lost: the mapping is shared with the file, so written pages stay in the system's cache until they are on
    disk. A private mapping (mode "c") holds changes that exist nowhere else, and is therefore not touched.
    """
    if not isinstance(array, np.memmap) or array.mode == "c":
        return
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)
