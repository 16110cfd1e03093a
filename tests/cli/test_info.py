"""``pydenoise info``, ``--version`` and ``--help``."""

import json
import subprocess
import sys

import pytest

import pydenoise
from pydenoise import _native
from pydenoise.cli import info

pytest.importorskip("rich")


def test_json_holds_the_facts(cli):
    code, out, _ = cli("info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["versions"]["pydenoise"] == pydenoise.__version__
    assert set(facts["libraries"]) == {"_C", "_cuda"}
    assert facts["machine"]["threads"] >= 1
    reference = [row for row in facts["backends"] if row["backend"] == "reference"]
    assert reference
    assert all(row["reason"] is None for row in reference)
    for op in {row["op"] for row in facts["backends"]}:
        assert sum(row["auto"] for row in facts["backends"] if row["op"] == op and row["device"] == "cpu") == 1


def test_tables_say_the_same(cli):
    code, out, _ = cli("info")
    assert code == 0
    for word in (
        pydenoise.__version__,
        "Compiled libraries",
        "pydenoise._C",
        "pydenoise._cuda",
        "weighted_conv",
        "threads",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("state", "detail"),
    [(_native.NOT_BUILT, "reinstall with a C++20 compiler"), (_native.FAILED, "ImportError: undefined symbol: foo")],
)
def test_states_of_a_library_are_told_apart(cli, monkeypatch, state, detail):
    monkeypatch.setattr(_native, "extension", lambda: _native.Library("_C", state, detail))
    code, out, _ = cli("info")
    text = " ".join(out.split())
    assert code == 0
    assert f"{state}: {detail}" in text
    assert json.loads(cli("info", "--json")[1])["isa"] is None


def test_isa_levels_of_the_compiled_library(cli):
    if not _native.extension().loaded:
        pytest.skip(_native.extension().reason)
    isa = json.loads(cli("info", "--json")[1])["isa"]
    assert isa["offered"][0] == "baseline"
    assert isa["active"] in isa["offered"]


def test_cuda_architectures_are_read_from_the_library(tmp_path):
    library = _native.cuda_extension()
    assert info.cuda_architectures("") == []
    (tmp_path / "none.so").write_bytes(b"\x7fELF" + info.FATBIN_MAGIC)
    assert info.cuda_architectures(str(tmp_path / "none.so")) == []
    if library.loaded:
        assert any(name.startswith("sm_") for name in info.cuda_architectures(library.path))


def test_json_needs_no_rich(cli, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli("info", "--json")[0] == 0
    assert "pip install pydenoise[cli]" in refused("info")


def test_version_and_help(cli):
    assert cli("--version") == (0, f"pydenoise {pydenoise.__version__}\n", "")
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("denoise", "sample", "gallery", "demo", "bench", "info", "weights"):
        assert command in out


def test_help_does_not_wait_for_torch():
    code = "import sys; from pydenoise.cli.main import build_parser; build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_command_and_unknown_command(refused):
    assert "required: COMMAND" in refused()
    assert "invalid choice" in refused("paint")
