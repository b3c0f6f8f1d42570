"""Processes as /proc shows them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.requirements import need


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


def ended(pid: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        return stat_of(pid)[0] in "ZX"
    except OSError:
        return True


def thread_states(pid: int) -> set[str]:
    """Return the states of all threads of a process."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states


@contextlib.contextmanager
def process_with_number(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process with the number of one that has ended. Skips the test if that fails."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(3000):
        try:
            last.write_text(str(pid - 1))
        except OSError as error:
            need(False, f"root, to choose the next process number: {error.strerror}")
        child = subprocess.Popen(["sleep", "60"])
        try:
            if child.pid == pid:
                yield child
                return
        finally:
            child.kill()
            child.wait()
    need(False, "a process number that others do not take at once")
