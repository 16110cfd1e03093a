"""``pydenoise info``: what is installed, built and usable on this machine, and why something is not."""

import argparse
import json
import os
import platform
import struct
from pathlib import Path

VARIABLES = ("PYDENOISE_ISA", "PYDENOISE_CACHE", "PYDENOISE_POOL_MIB", "OMP_NUM_THREADS", "TRITON_INTERPRET")
FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
FATBIN_PTX = 1


def add_parser(subparsers) -> None:
    """Add the ``info`` command."""
    parser = subparsers.add_parser(
        "info",
        help="what is installed, built and usable here",
        description="Versions, compiled libraries, ISA levels, CUDA architectures, devices, threads, and for every op "
        "which backend would run it and why the others would not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Gather and print."""
    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    from pydenoise.imaging import require

    require("rich.console", "rich", "tables (--json works without it)")
    _print_tables(facts)
    return 0


def gather() -> dict:
    """Everything ``info`` shows, as plain data."""
    import torch

    import pydenoise
    from pydenoise._native import cuda_extension, extension
    from pydenoise.benchmarks.machine import cpu_model, version
    from pydenoise.models.weights import PACKAGES

    packages = ("numpy", "triton", "rich", "Pillow", "tifffile", "imagecodecs", "scikit-image", "matplotlib")
    weights = {name: str(p.location()) if p.is_cached() else None for name, p in PACKAGES.items()}
    return {
        "versions": {
            "pydenoise": pydenoise.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in packages},
        },
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": _gpus(),
            "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
        "libraries": {library.name: _library(library) for library in (extension(), cuda_extension())},
        "isa": _isa(extension()),
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "architectures": cuda_architectures(cuda_extension().path),
            "gpu_usable": torch.cuda.is_available(),
        },
        "backends": _backends(),
        "weights": weights,
    }


def _gpus() -> list[dict]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "architecture": f"sm_{gpu.major}{gpu.minor}", "gib": round(gpu.total_memory / 2**30, 1)}
        for gpu in gpus
    ]


def _library(library) -> dict:
    facts = {"state": library.state, "detail": library.detail, "path": library.path}
    if library.module is not None:
        facts["build"] = dict(library.module.build_info())
    return facts


def _isa(library) -> dict | None:
    if library.module is None:
        return None
    module = library.module
    return {
        "offered": list(module.isa_levels()),
        "detected": module.detected_isa(),
        "active": module.active_isa(),
        "error": module.isa_environment_error(),
    }


def cuda_architectures(path: str) -> list[str]:
    """Architectures in a library built by nvcc, as ``sm_90`` (machine code) and ``compute_90`` (PTX).

    Read from the headers of the embedded fat binaries: the file's own word, and no CUDA tool is needed.
    """
    if not path or not Path(path).is_file():
        return []
    data = Path(path).read_bytes()
    found: set[tuple[int, str]] = set()
    start = data.find(FATBIN_MAGIC)
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6) if start + 16 <= len(data) else (0, 0)
        position, end = start + header, min(start + header + size, len(data))
        while header and position + 32 <= end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, position)
            (number,) = struct.unpack_from("<I", data, position + 28)
            if entry_header == 0 or kind not in (1, 2):
                break
            found.add((number, "compute" if kind == FATBIN_PTX else "sm"))
            position += entry_header + entry_size
        start = data.find(FATBIN_MAGIC, start + 4)
    return [f"{kind}_{number}" for number, kind in sorted(found)]


def _backends() -> list[dict]:
    """Every op's verdicts on a typical call: one 64-channel 3x3 layer, float32, on each device that is there."""
    import torch

    from pydenoise.ops import registry, weighted_conv

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        x, weight = torch.zeros(1, 64, 8, 8, device=device), torch.zeros(64, 64, 3, 3, device=device)
        args = weighted_conv.prepare(2, x, weight, None, None, None, 1, 1, 1, 1, "none")
        stride, padding, dilation, groups, _, algorithm = args[5:]
        backward = (x, x, weight, None, stride, padding, dilation, groups, algorithm, [True, True, False])
        for op, call in ((weighted_conv.OP, args), (weighted_conv.OP_BACKWARD, backward)):
            verdicts = registry.verdicts(op, call)
            chosen = next((name for name, reason in verdicts if reason is None), None)
            for name, reason in verdicts:
                rows.append({"op": op, "device": device, "backend": name, "auto": name == chosen, "reason": reason})
    return rows


# ---------------------------------------------------------------------------------------------------------- printing


def _print_tables(facts: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def section(title: str, rows: dict) -> None:
        table = Table(
            box=None, show_header=False, title=title, title_justify="left", title_style="bold", padding=(0, 2, 0, 0)
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(key, Text(str(value)))
        console.print(table)
        console.print()

    section("Versions", {name: text or "not installed" for name, text in facts["versions"].items()})
    section("Machine", _machine_rows(facts["machine"]))
    section("Compiled libraries", _library_rows(facts))
    section(
        "Weights", {name: path or f"not fetched: pydenoise weights {name}" for name, path in facts["weights"].items()}
    )
    console.print(_backend_table(facts["backends"]))


def _machine_rows(machine: dict) -> dict:
    gpus = [f"{gpu['name']} ({gpu['architecture']}, {gpu['gib']} GiB)" for gpu in machine["gpus"]]
    rows = {
        "platform": machine["platform"],
        "processor": machine["cpu"],
        "threads": f"{machine['threads']} of {machine['cores']} cores",
        "GPU": ", ".join(gpus) or "none that torch can use",
    }
    return rows | machine["environment"]


def _library_rows(facts: dict) -> dict:
    rows = {}
    for name, library in facts["libraries"].items():
        rows[f"pydenoise.{name}"] = library["state"] + (f": {library['detail']}" if library["detail"] else "")
        if library["path"]:
            rows[f"  {name} file"] = library["path"]
        if "build" in library:
            rows[f"  {name} build"] = ", ".join(f"{key} {value}" for key, value in library["build"].items())
    isa = facts["isa"]
    if isa is not None:
        rows["ISA levels"] = f"{' < '.join(isa['offered'])}; in use: {isa['active']}"
        if isa["error"]:
            rows["ISA error"] = isa["error"]
    rows["CUDA architectures"] = ", ".join(facts["cuda"]["architectures"]) or "none built"
    rows["torch's CUDA"] = facts["cuda"]["torch_built_for"] or "none: a CPU build of torch"
    return rows


def _backend_table(backends: list[dict]):
    from rich import box
    from rich.table import Table

    title = "Backends, in the order in which auto asks them (a 64-channel 3x3 layer in float32)"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for column in ("op", "device", "backend", "verdict"):
        table.add_column(column, overflow="fold")
    for row in backends:
        verdict = row["reason"] or ("chosen by auto" if row["auto"] else "can run")
        table.add_row(row["op"], row["device"], row["backend"], verdict, style="green" if row["auto"] else None)
    return table
