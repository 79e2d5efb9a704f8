"""What this process holds, has held at most, and could still get, in bytes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

__all__ = ["free_bytes", "peak_bytes", "readable", "resident_bytes"]


def resident_bytes() -> int:
    """Bytes that this process holds now; where there is no /proc (macOS), the most it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * mmap.PAGESIZE


def peak_bytes() -> int:
    """Most bytes that this process has held.

    Not ``ru_maxrss`` where /proc is there: a process that was started by a large one begins with
    the peak of its parent.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))


def free_bytes() -> float:
    """Bytes that the machine, or the container, has free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except OSError:
        free = 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        most = float((group / "memory.max").read_text())
        return min(free, most - float((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


def readable(n_bytes: float) -> str:
    """Return a number of bytes in GiB, or in MiB below a tenth of one."""
    if n_bytes < 0.1 * 2**30:
        return f"{n_bytes / 2**20:.1f} MiB"
    return f"{n_bytes / 2**30:.2f} GiB"
