"""Examples run as a user runs them, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


def run_example(name, *arguments, returncode=0, cwd=None, **variables):
    """What examples/NAME.py prints; ``variables`` join the environment."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment = os.environ | own | {key: str(value) for key, value in variables.items()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=cwd)
    assert done.returncode == returncode, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def run():
    return run_example
