"""The free memory of this machine, or of this container."""

from __future__ import annotations

import contextlib
from pathlib import Path

from migrate.runtime.proc_lines import proc_lines

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def machine_memory(meminfo: Path = MEMINFO) -> int:
    """Return the bytes available without swapping (MemAvailable); 0 if the system hides them."""
    return _bytes_of(b"MemAvailable:", meminfo)


def free_memory() -> int:
    """Return the bytes that nothing uses, not even the page cache; 0 if the system hides them."""
    return _bytes_of(b"MemFree:", MEMINFO)


def _bytes_of(name: bytes, meminfo: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in proc_lines(str(meminfo)):
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return 0


def available_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Return the bytes that the machine has and its cgroup allows; 0 if the system hides them."""
    machine = machine_memory(meminfo)
    found = [machine] if machine else []
    with contextlib.suppress(OSError, ValueError):  # "max" is not a number: there is no limit
        limit = int((cgroup / "memory.max").read_text())
        found.append(max(limit - int((cgroup / "memory.current").read_text()), 0))
    return min(found, default=0)
