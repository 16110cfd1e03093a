"""The examples of masked language models and of attention run, with settings that take seconds."""

import re

import pytest

from pydenoise.models import load_masked_lm
from pydenoise.models.masked_lm import read_notes
from pydenoise.models.weights import PACKAGES


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"the number after {number} is {number + 1}, and so on." for number in range(2000)))
    return path


@pytest.fixture(scope="module")
def trained(run, text_file):
    """A tiny model that the example trained, and what it printed."""
    target = text_file.parent / "model.safetensors"
    sizes = ["--width", 32, "--layers", 2, "--heads", 2, "--hidden", 32, "--vocabulary", 120]
    small = ["--steps", 6, "--batch", 512, "--validation", 512, "--lengths", 64, 128]
    return target, run("train_masked_lm", target, "--text", text_file, *sizes, *small)


def test_training(trained):
    target, printed = trained
    perplexities = [float(value) for value in re.findall(r"windows of +\d+: perplexity ([\d.]+) a token", printed)]
    assert len(perplexities) == 2 and all(1 < value < 120 for value in perplexities)
    model, tokenizer = load_masked_lm(target)
    assert model.config["width"] == 32 and tokenizer.vocabulary == model.vocabulary <= 120
    notes = read_notes(target)
    assert notes["arguments"]["steps"] == 6 and set(notes["perplexity_per_token"]) == {"64", "128"}


def test_training_says_what_is_wrong(run, tmp_path):
    assert "--steps: expected at least 1" in run("train_masked_lm", tmp_path / "m", "--steps", 0, returncode=2)


def test_generation(run, trained, text_file):
    target, _ = trained
    lengths = ["--lengths", 96, 160, "--new-tokens", 32, "--steps", 8, "--block-length", 16, "--block-size", 16]
    printed = run(
        "sparse_generation", "--weights", target, "--text", text_file, *lengths, "--samples", 2, "--states", 2
    )
    rows = re.findall(
        r"^ +(96|160) +([\d.]+)% +([\d.]+)% +([\d.]+)% +([\d.]+)%(?: +[\d.]+){5} +[\d.]+x$", printed, re.M
    )
    assert [row[0] for row in rows] == ["96", "160"]
    assert all(20 < float(row[1]) < 100 and 0 < float(row[2]) <= 100 for row in rows)
    assert "full attention:" in printed and "SparseD:" in printed


def test_generation_says_what_is_wrong(run, trained, text_file):
    few = run("sparse_generation", "--steps", 2, returncode=2)
    assert "--steps: with --skip 0.2, all 2 steps would be full" in few
    target, _ = trained
    long = ["--weights", target, "--text", text_file, "--lengths", 10**6]
    assert "--lengths: expected 129 to" in run("sparse_generation", *long, returncode=1)


@pytest.mark.skipif(not PACKAGES["minilm"].is_cached(), reason="the published weights are not in the cache")
def test_recall(run):
    printed = run("attention_recall", "--lengths", 128, "--texts", 1, "--block-sizes", 32, "--select", 0.3, 1.0)
    pairs = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) / ([\d.]+)", printed)]
    assert len(pairs) == 12
    assert all(0.3 < own <= ideal + 1e-3 for own, ideal in pairs[::2])
    assert all(own == pytest.approx(1, abs=1e-3) for own, _ in pairs[1::2])  # everything is kept
    first, second = map(float, re.search(r"cosine +([\d.]+) +([\d.]+)\n", printed).groups())
    assert 0.5 < first < second == pytest.approx(1, abs=1e-4)
