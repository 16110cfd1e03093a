"""The example of a stream runs, with a network that has not learnt anything."""

import re

import pytest
import torch

from pydenoise.models import FFDNet


def test_a_photograph_is_panned_over(run, tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("PIL")
    torch.save(FFDNet().state_dict(), tmp_path / "ffdnet_color.pth")
    printed = run("stream_photograph", tmp_path / "out.png", PYDENOISE_CACHE=tmp_path)
    frames, evaluations = map(int, re.search(r"(\d+) frames, (\d+) evaluations", printed).groups())
    assert frames == 72 and 24 <= evaluations <= 40
    assert (tmp_path / "out.png").stat().st_size > 0
