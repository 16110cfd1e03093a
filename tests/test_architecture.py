"""Who may import whom: the rules of docs/DESIGN.md, read from the source without running it."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS, CSRC = ROOT / "pydenoise", ROOT / "kernels", ROOT / "csrc"

# From the bottom up. A module imports from its own layer's package and from lower layers, never from beside or above.
# A new module of the package takes its place here.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"step_row"}),
    frozenset({"reference", "kernels", "_native", "block_mask"}),
    frozenset({"ops"}),
    frozenset({"functional", "densities", "explain", "testing"}),
    frozenset({"quantization"}),
    frozenset({"nn", "samplers", "models", "imaging", "recording"}),
    frozenset({"surgery", "hyperspectral", "self_supervised"}),
    frozenset({"accelerate"}),
    frozenset({"benchmarks"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
# What a part may use of third parties; only inside functions where it is optional.
OPTIONAL = {"triton", "rich", "matplotlib", "PIL", "tifffile", "skimage", "onnx", "onnxruntime", "openvino"}
OPTIONAL |= {"diffusers", "transformers", "sklearn", "scipy", "pymoo"}
USER_INTERFACES = {"cli", "benchmarks", "imaging"}


@dataclass(frozen=True)
class Import:
    """One import: the dotted name, where it stands, and whether it runs when the module is imported."""

    name: str
    line: int
    eager: bool


def imports_of(path: Path, package: str) -> list[Import]:
    """Every import in a file, relative ones resolved; those under ``if TYPE_CHECKING`` count as well."""
    found = []

    def visit(node: ast.AST, eager: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.extend(Import(f"{module}.{alias.name}", node.lineno, eager) for alias in node.names)
        inside = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), True)
    return found


def package_of(path: Path, folder: Path, name: str) -> str:
    return ".".join([name, *path.relative_to(folder).parent.parts])


FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = sorted(KERNELS.glob("*.py"))


def part_of(dotted: str) -> str | None:
    """The part of pydenoise that ``pydenoise.x.y`` belongs to; a public name belongs to the module that defines it."""
    import pydenoise

    names = dotted.split(".")
    if names[0] != "pydenoise" or len(names) == 1:
        return None
    module = pydenoise._NAMES.get(names[1], f"pydenoise.{names[1]}")
    return module.split(".")[1]


def own_part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_part_has_its_place():
    parts = {own_part(path) for path in FILES} - {"__init__"}
    assert parts <= set(LEVEL), f"place {sorted(parts - set(LEVEL))} in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upwards(path):
    own = own_part(path)
    wrong = []
    for found in imports_of(path, package_of(path, PACKAGE, "pydenoise")):
        used = part_of(found.name)
        if found.name.split(".")[0] != "pydenoise" or used in (None, own, "__version__"):
            continue
        if own == "__init__" or used not in LEVEL or LEVEL[used] >= LEVEL[own]:
            wrong.append(f"line {found.line}: {own} imports {found.name}")
        if own in ("ops", "nn", "functional") and used == "kernels" and found.eager:
            wrong.append(f"line {found.line}: kernels are imported inside functions, so that Triton stays optional")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_late(path):
    """Importing a module needs torch and NumPy only; the rest is asked for where it is used."""
    wrong = []
    for found in imports_of(path, package_of(path, PACKAGE, "pydenoise")):
        top = found.name.split(".")[0]
        if top in OPTIONAL and found.eager and own_part(path) not in USER_INTERFACES:
            wrong.append(f"line {found.line}: {found.name}")
        if top == "triton" and own_part(path) not in USER_INTERFACES:
            wrong.append(f"line {found.line}: {found.name}; Triton is used in kernels/ only")
        if found.name.startswith(("pydenoise._C", "pydenoise._cuda")) and own_part(path) != "_native":
            wrong.append(f"line {found.line}: {found.name}; compiled libraries come from pydenoise._native")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_triton_kernels_import_torch_and_triton_only(path):
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for found in imports_of(path, "pydenoise.kernels"):
        own = found.name.startswith("pydenoise.kernels.")
        assert own or found.name.split(".")[0] in allowed, f"line {found.line}: {found.name}"


def test_samplers_do_not_know_the_modules():
    for path in (PACKAGE / "samplers").rglob("*.py"):
        for found in imports_of(path, package_of(path, PACKAGE, "pydenoise")):
            assert part_of(found.name) not in ("nn", "accelerate", "quantization"), f"{path.name}: {found.name}"


def test_every_op_has_the_same_stem_in_every_layer():
    ops = {path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")} - {"registry"}
    references = {path.stem for path in (PACKAGE / "reference").glob("*.py") if not path.stem.startswith("_")}
    references -= {"activations"}
    folders = {path.name for path in CSRC.iterdir() if path.is_dir()} - {"core", "bindings"}
    kernels = {path.stem for path in KERNEL_FILES if not path.stem.startswith("_")}
    assert references == ops, "an op has a reference of its own name"
    assert folders <= ops and kernels <= ops, "kernels carry the name of the op they compute"


# ------------------------------------------------------------------------------------------------------------ C++


INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".inl", ".cpp", ".cu", ".cuh"})
FRAMEWORK = ("torch/", "ATen/", "c10/", "pybind11/", "Python.h", "caffe2/")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes(path):
    """Only bindings know torch and Python; an op includes itself and core, core only itself."""
    folder = path.relative_to(CSRC).parts[0]
    for kind, name in INCLUDE.findall(path.read_text()):
        if folder == "bindings":
            continue
        assert not name.startswith(FRAMEWORK), f"{name}: kernels know no framework"
        if kind == '"':
            target = (path.parent / name).resolve()
            assert target.is_file(), f"{name} is not found beside the file"
            assert target.relative_to(CSRC).parts[0] in {folder, "core"}, f"{name}: an op includes itself and core"


PLAIN_CORE = [CSRC / "core" / "activation.h", CSRC / "core" / "attention" / "tokens.h"]
PLAIN = [*PLAIN_CORE, *sorted(CSRC.rglob("params.h"))]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_interfaces_are_plain(path):
    """params.h holds plain structs: no STL, which would put templates into objects of one instruction set."""
    plain = {"cstdint", "cstddef", *(f"../{part.relative_to(CSRC)}" for part in PLAIN_CORE)}
    assert {name for _, name in INCLUDE.findall(path.read_text())} <= plain and "std::" not in path.read_text()


# ------------------------------------------------------------------------------------------------------- at run time


def modules_after(statement: str) -> set[str]:
    """Top-level and pydenoise modules that a fresh interpreter has loaded after ``statement``."""
    script = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_import_is_light():
    loaded = modules_after("import pydenoise")
    assert "torch" not in loaded, "submodules load on first use"
    assert not loaded & {*OPTIONAL, "pydenoise._C", "pydenoise.kernels", "numpy"}


def test_modules_and_functional_add_nothing_optional_to_torch():
    loaded = modules_after("import torch, pydenoise; pydenoise.functional; pydenoise.nn; pydenoise.density")
    extra = loaded - modules_after("import torch")
    assert not extra & {*OPTIONAL, "pydenoise._C", "pydenoise.kernels"}
