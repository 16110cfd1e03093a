"""The example of windows: its panorama closes."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_ends_meet():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / "panorama.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r": ([\d.]+) from column to column, ([\d.]+) where the ends meet", done.stdout)
    assert len(steps) == 2 and all(float(ends) < 3 * float(inside) for inside, ends in steps)
    hills = done.stdout.splitlines()[2:]
    assert len(hills) == 8 and all(row[:8] == row[96:] for row in hills)
