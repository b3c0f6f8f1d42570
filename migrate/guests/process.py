"""Processes that outlive the program that knows them: told from later ones with the same number."""

from __future__ import annotations


def start_time(pid: int) -> str:
    """When a process started, in the kernel's own units; "" where it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
