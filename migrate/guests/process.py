"""What the kernel says of a process, by its number."""

from __future__ import annotations


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on; none where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # its name may be no text
            return stat.read().rpartition(b")")[2].decode("ascii").split()
    except OSError:
        return []


def state(pid: int) -> str:
    """One letter, as in proc(5): Z or X where it has ended; "" where there is none."""
    return "".join(_fields(pid)[:1])


def start_time(pid: int) -> str:
    """When a process started, in the kernel's own units; "" where it has ended.

    It tells a process that outlives the program that knows it from a later one with its number.
    """
    fields = _fields(pid)
    return "" if not fields or fields[0] in "ZX" else fields[19]
