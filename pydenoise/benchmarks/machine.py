"""Which machine and which versions made a result."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

import pydenoise
from pydenoise._native import cuda_extension, extension

PACKAGES = ("torch", "numpy", "triton", "onnxruntime", "openvino")
VARIABLES = ("PYDENOISE_ISA", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_")


def describe_machine(threads: int, device: str) -> dict:
    """Date, command, processor, cores, versions and the environment variables that change timings."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"pydenoise": pydenoise.__version__, **{name: version(name) for name in PACKAGES}},
        "libraries": {library.name: library.reason or "loaded" for library in (extension(), cuda_extension())},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cpu_model() -> str:
    """The processor's name, with family and model numbers where the system tells them (a name alone can be vague)."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    entries = {}
    for line in info.read_text().splitlines():
        key, separator, value = line.partition(":")
        if separator:
            entries.setdefault(key.strip(), value.strip())
    name = entries.get("model name", platform.machine())
    numbers = [f"{key} {entries[key]}" for key in ("cpu family", "model", "stepping") if key in entries]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def version(package: str) -> str | None:
    """Installed version of ``package``, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
