"""A mark on a guest's file that was relinquished to a destination.

The lock of a source ends with its program, and we may not be allowed to read its journal. So the
file itself tells a later source, in an extended attribute, which processes wrote it. While one of
them is still stopped, the guest is what runs at the destination, and the file here is old. If a
command has paused the writers, no one else can see whether they are still stopped: such a mark
counts until it is removed. File systems without `user.` attributes (tmpfs before Linux 6.6) have no
mark.

The mark of a block device is a file in /run, which ends with a restart of the machine, as the
writers do. Its number may be another device's by then, so only the processes count there.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable

from migrate.errors import UsageError
from migrate.files.filesystem import write_whole
from migrate.runtime.processes import STOPPED, start_time_of, state

ATTRIBUTE = "user.xbmigrate.moved"
# An attribute of ext4 must fit into a block: 64 writers take about 1500 bytes.
MAX_PROCESSES = 64
# Where the marks of block devices are.
RUN = "/run/xbmigrate"


def mark(fd: int, writers: Iterable[tuple[int, str]], *, commanded: bool = False) -> None:
    """Mark a file as relinquished. Does nothing if the file system has no attributes.

    writers   -- number and start time of each process that was stopped
    commanded -- whether a --pause-cmd has paused the writers
    """
    content = {"writers": [*writers][:MAX_PROCESSES], "commanded": commanded}
    device = _device_mark(fd)
    with contextlib.suppress(OSError):
        if not device:
            os.setxattr(fd, ATTRIBUTE, json.dumps(content).encode())
            return
        os.makedirs(RUN, 0o755, exist_ok=True)
        write_whole(device, json.dumps(content | {"commanded": False}).encode(), "mark")


def unmark(fd: int) -> None:
    """Remove the mark: the guest is ours again."""
    device = _device_mark(fd)
    with contextlib.suppress(OSError):
        if device:
            os.unlink(device)
        else:
            os.removexattr(fd, ATTRIBUTE)


def _device_mark(fd: int) -> str:
    """Return the path of a block device's mark; "" for a file."""
    here = os.fstat(fd)
    if not stat.S_ISBLK(here.st_mode):
        return ""
    return f"{RUN}/moved-{os.major(here.st_rdev)}:{os.minor(here.st_rdev)}"


def _mark_of(fd: int) -> bytes:
    """Return the mark of a file or device. Raises OSError if there is none."""
    if not (device := _device_mark(fd)):
        return os.getxattr(fd, ATTRIBUTE)
    with open(device, "rb") as file:
        return file.read()


def refuse_if_moved(fd: int, what: str) -> None:
    """Raise UsageError if a file was relinquished, and its writers are, or may be, still stopped.

    what -- what the error calls the file
    """
    try:
        content = json.loads(_mark_of(fd))
        writers = [(int(pid), str(start_time)) for pid, start_time in content["writers"]]
        stopped = [pid for pid, start_time in writers if _is_stopped(pid, start_time)]
        commanded = content["commanded"]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return  # no mark, or one that a writer of the file has made up
    if stopped:
        raise UsageError(
            f"{what}: it was handed over to another machine, and its writer, process {stopped[0]}, "
            "is stopped since: `migrate-src resolve` with the journal of that time tells what "
            "became of it; to move what is here all the same, wake the writer first (kill -CONT)"
        )
    if commanded:
        raise UsageError(
            f"{what}: it was handed over to another machine, and its writer, which a --pause-cmd "
            "has paused, may stand still since: `migrate-src resolve` with the journal of that "
            "time tells what became of it; to move what is here all the same, remove the mark "
            f"first (setfattr -x {ATTRIBUTE} FILE), or move a copy"
        )


def _is_stopped(pid: int, start_time: str) -> bool:
    return bool(start_time) and start_time_of(pid) == start_time and state(pid) in STOPPED
