"""The examples of single pictures and of cubes run, with settings that take seconds."""

import re

import pytest


def test_a_picture_denoises_itself(run, tmp_path):
    pytest.importorskip("matplotlib")
    printed = run("denoise_single_image", "--side", 64, "--steps", 60, "--out", tmp_path / "maps.png")
    noisy, denoised = map(float, re.search(r"noisy ([\d.]+) dB, denoised ([\d.]+) dB", printed).groups())
    assert denoised > noisy + 2
    assert len(re.findall(r"^stage \d: sigma x .* y .* r ", printed, re.M)) == 2
    assert "with a narrow sigma r in one corner" in printed
    assert (tmp_path / "maps.png").stat().st_size > 0


def test_cubes(run, tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("PIL")
    printed = run("hyperspectral", "--denoiser", "wavelet", "--size", 64, cwd=tmp_path)
    assert re.search(r"HySime: [4-8] components", printed)
    gains = [float(b) - float(a) for a, b in re.findall(r"([-\d.]+) dB -> +([-\d.]+) dB", printed)]
    assert len(gains) == 5 and min(gains) > 3
    assert (tmp_path / "hyperspectral.png").stat().st_size > 0
