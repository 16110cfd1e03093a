"""What a user is told when the compiled part is missing: no compiler, no torch, not built, built but broken."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def run(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=(path or [ROOT])[0], env=variables
    )


def build(tmp_path: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    arguments = ["setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    code = f"import runpy, sys\n{before}\nsys.argv = {arguments!r}\nrunpy.run_path('setup.py', run_name='__main__')"
    return run(code, PYDENOISE_CUDA="0", **environment)


def test_no_compiler(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "the C++ compiler 'no-such-compiler' was not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_torch(tmp_path):
    hide = "import importlib.util, sysconfig\n"
    hide += "importlib.util.find_spec = lambda name, *rest: None\n"
    hide += f"real = sysconfig.get_path\nsysconfig.get_path = lambda name, *rest: {str(tmp_path)!r}"
    done = build(tmp_path, hide)
    assert done.returncode != 0
    assert "pip install 'torch>=2.10'" in done.stderr


@pytest.fixture
def copy_without_libraries(tmp_path) -> Path:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pydenoise", tmp_path / "pydenoise", ignore=ignore)
    return tmp_path


HIDE_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
CALL = (
    HIDE_EDITABLE + "import torch, pydenoise as pdn, pydenoise.functional as PF\n"
    "x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)\n"
)


def test_not_built(copy_without_libraries):
    done = run(CALL + "PF.weighted_conv2d(x, w, None, backend='cpu')", copy_without_libraries)
    assert (
        "BackendUnavailable: weighted_conv: backend 'cpu' cannot run this call: pydenoise._C is not built"
        in done.stderr
    )


def test_without_libraries_the_reference_runs_and_says_so(copy_without_libraries):
    done = run(CALL + "print(PF.weighted_conv2d(x, w, None).item())", copy_without_libraries)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "9.0"
    assert "FallbackWarning" in done.stderr and "not built" in done.stderr


def test_built_but_failed_to_load(copy_without_libraries):
    (copy_without_libraries / "pydenoise" / f"_C{SUFFIX}").write_bytes(b"no library")
    done = run(CALL + "PF.weighted_conv2d(x, w, None, backend='cpu')", copy_without_libraries)
    assert "pydenoise._C is built but failed to load (ImportError" in done.stderr


def test_a_word_that_is_no_isa_level():
    done = run("import torch, pydenoise.functional as PF\n" + CALL + "PF.weighted_conv2d(x, w, None, backend='cpu')",
               PYDENOISE_ISA="avx9000")  # fmt: skip
    assert "PYDENOISE_ISA: expected one of baseline, avx2, avx2vnni, avx512, avx512vnni, avx512bf16" in done.stderr
