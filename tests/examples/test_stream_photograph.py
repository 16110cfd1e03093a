"""The example of a stream runs, with a network that has not learnt anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydenoise.models import FFDNet

ROOT = Path(__file__).resolve().parents[2]


def test_a_photograph_is_panned_over(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("PIL")
    torch.save(FFDNet().state_dict(), tmp_path / "ffdnet_color.pth")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYDENOISE_CACHE": str(tmp_path)}
    command = [sys.executable, ROOT / "examples" / "stream_photograph.py", tmp_path / "out.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    frames, evaluations = map(int, re.search(r"(\d+) frames, (\d+) evaluations", done.stdout).groups())
    assert frames == 72 and 24 <= evaluations <= 40
    assert (tmp_path / "out.png").stat().st_size > 0
