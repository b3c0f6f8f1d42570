"""How much memory this machine, or this container, has to spare."""

from __future__ import annotations

import contextlib
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def machine_memory(meminfo: Path = MEMINFO) -> int:
    """Bytes that can be had without swapping (MemAvailable); 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def available_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """What the machine has, or what a cgroup leaves of it; 0 where the system does not tell."""
    machine = machine_memory(meminfo)
    found = [machine] if machine else []
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int((cgroup / "memory.max").read_text())
        found.append(max(limit - int((cgroup / "memory.current").read_text()), 0))
    return min(found, default=0)
