"""Files that a command writes."""

from pathlib import Path

from pydenoise.cli.main import CommandError


def check_picture_target(path: Path) -> None:
    """A picture can be written there: said before anything is computed. Makes the folder."""
    import numpy as np

    from pydenoise.imaging import Picture, check_output

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{path.parent}: the folder cannot be made: {error.strerror}") from error
    check_output(path, Picture(np.zeros((1, 1, 3), np.uint8)))
