"""Memory of this process, as the system counts it.

``resource.getrusage`` does not tell: a child process starts with the peak of its parent.
"""

from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes(field: str) -> int:
    """ "VmRSS" (now) or "VmHWM" (the peak so far) of this process."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def unsupported() -> str | None:
    """Why memory cannot be measured here, or ``None``."""
    return None if STATUS.exists() else f"the peak of memory is read from {STATUS}, which this system does not have"
