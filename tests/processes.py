"""What /proc says of processes, whoever started them."""

from __future__ import annotations

from pathlib import Path


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on: state, parent, group, session, ...

    Raises OSError where there is no such process.
    """
    # The name of a program may be any bytes.
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def numbers() -> list[int]:
    """Return the numbers of all processes."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
