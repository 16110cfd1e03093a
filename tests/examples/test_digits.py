"""The examples of digits run, with settings that take seconds."""

import pytest

from pydenoise.models import load_digits
from pydenoise.models.digits import read_notes


def test_training(run, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    target = tmp_path / "m.safetensors"
    small = ["--multipliers", 1, "--attention-levels", "--batch", 16, "--threads", 1]
    printed = run("train_digits", target, "--steps", 3, "--ema", 0.5, *small)
    assert "1797 digits, 0.1" in printed and f"wrote {target}" in printed
    assert load_digits(target).config["multipliers"] == [1]
    notes = read_notes(target)
    assert notes["command"].startswith("python ") and "--ema 0.5" in notes["command"]
    assert notes["arguments"]["steps"] == 3 and notes["loss"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--steps", 0), "--steps: expected at least 1"), (("--ema", 1), "--ema: expected 0 or more and less than 1")],
)
def test_training_says_what_is_wrong(run, tmp_path, options, message):
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    assert message in run("train_digits", tmp_path / "m", *options, returncode=2)


def test_sampling(run):
    lines = run("sample_digits").splitlines()
    assert len(lines) == 18 and sum("@" in line for line in lines) > 10


def test_reward_gradient(run):
    lines = run("reward_gradient", 6).splitlines()
    rewards = [line.split("reward ")[1].split(" -> ") for line in lines[:5]]
    assert all(float(last) > float(first) for first, last in rewards) and len(lines) == 13


def test_distillation(run):
    pytest.importorskip("sklearn")
    lines = run("distil_digits", "--steps", 2, "--samples", 1, "--width", 4, "--batch", 4).splitlines()
    assert [line[:24].strip() for line in lines[1:]] == ["teacher", "student", "+ features", "+ features, frequencies"]
    assert "--width: expected a multiple of 4" in run("distil_digits", "--width", 6, returncode=2)


def test_continuous_unet(run):
    pytest.importorskip("sklearn")
    small = ["--steps", 2, "--batch", 4, "--samples", 1, "--n-features", 4, "--n-steps", 1, "--ema", 0.5]
    lines = run("train_continuous_unet", *small).splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("network"))
    names = [line[:24].strip() for line in lines[header + 1 : header + 4]]
    assert names == ["plain U-Net", "continuous", "continuous, second order"]
    assert sum("@" in line for line in lines) > 3


@pytest.mark.parametrize("method", ["stacked", "sequence"])
def test_ensemble(run, method):
    pytest.importorskip("sklearn")
    lines = run(
        "ensemble_digits", "--steps", 2, "--specialise", 2, "--batch", 4, "--hidden", 4, "--method", method
    ).splitlines()
    assert lines[0].startswith(f"{method}: ") and len(lines) == 6
    assert all(0 < float(line.split("loss ")[1].split()[0]) < 1 for line in lines[1:])
