"""The memory of this process."""

from __future__ import annotations

from pathlib import Path


def peak_resident_mib() -> float:
    """Return the largest amount of resident memory that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage would include what the parent process held when it started this one
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, as on macOS
