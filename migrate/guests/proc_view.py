"""What /proc shows here of a process: its threads, its tables of open files, its memories."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator

from migrate.files.mounts import mounts
from migrate.guests.guest_file import OutOfTime, libc
from migrate.runtime import processes

KCMP_FILES = 2
KCMP_NUMBERS = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
COMMAND_LINE_BYTES = 4096
HIDES = {"hidepid=2", "hidepid=4", "hidepid=invisible", "hidepid=ptraceable"}


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line, at most COMMAND_LINE_BYTES of them.

    Returns none of a process that is neither root's nor ours. A process decides itself what /proc
    shows there, and how much: an area of its memory (PR_SET_MM_MAP). And reading waits for the
    lock of that memory, which a process can keep for good, with a mapping of a FUSE file of its
    own. So use `command_name` for what people are told.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb", buffering=0) as words:
        # Opened before the check: it is empty once the process has ended, whoever has its number.
        acting = processes.user_ids(pid)
        if acting and acting <= {0, os.geteuid()}:
            return os.fsdecode(words.read(COMMAND_LINE_BYTES) or b"").rstrip("\0").split("\0")
    return []


def memory_size(pid: int) -> str:
    """Return the size of a process's memory, in pages, as text. Raises OSError."""
    with open(f"/proc/{pid}/statm") as file:
        return file.read().partition(" ")[0]


def _tasks(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/task")


def file_tables(pid: int, deadline: float) -> Iterator[str]:
    """Yield the folders in /proc that show each table of open files of a process.

    deadline -- in the time of time.thread_time; raises OutOfTime after it
    """
    yield f"/proc/{pid}/fd"
    for task in _tasks(pid):
        if time.thread_time() >= deadline:
            raise OutOfTime
        folder = f"/proc/{pid}/task/{task}/fd"
        if int(task) != pid and not _same_files(pid, int(task)) and os.path.isdir(folder):
            yield folder


def memories(pid: int) -> Iterator[str]:
    """Yield folders in /proc that show the maps of a process.

    A main thread that has ended shows none; the other threads still do.
    """
    yield f"/proc/{pid}"
    if processes.state(pid) in processes.ENDED:
        for task in _tasks(pid):
            yield f"/proc/{pid}/task/{task}"


def _same_files(pid: int, task: int) -> bool:
    """Return whether two threads share their table of open files; False if that is unknown."""
    number = KCMP_NUMBERS.get(platform.machine())
    if number is None:
        return False
    return bool(libc().syscall(number, pid, task, KCMP_FILES, 0, 0) == 0)


def why_unavailable() -> str:
    """Return why no process can be seen at all, or ""."""
    try:
        own = os.readlink("/proc/self")
    except OSError as error:
        return f"/proc cannot be read ({error.strerror})"
    if own != str(os.getpid()):
        return "/proc is that of another PID namespace"
    return ""


def narrow_view() -> str:
    """Return why there may be processes that /proc does not show here, or ""."""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self/ns/pid") != INITIAL_PID_NAMESPACE:
            return "processes outside this container (PID namespace)"
    with contextlib.suppress(OSError):
        hides = any(mount.point == "/proc" and HIDES & {*mount.super_options} for mount in mounts())
        if hides and os.geteuid():
            return "processes of other users (/proc is mounted with hidepid)"
    return ""
