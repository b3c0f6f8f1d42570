"""A mark on a file that was given up to a destination.

The lock of a mover ends with its program, and its journal may not be ours to read. So what a later
mover must know stands on the file itself, in an extended attribute: the processes that wrote it
then. While one of them still stands still, the guest is what runs at the destination, and what is
here is old. File systems without `user.` attributes (tmpfs before Linux 6.6) have no mark.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from migrate.errors import UsageError
from migrate.guests.process import STOPPED, start_time, state

ATTRIBUTE = "user.xbmigrate.moved"
MAX_PROCESSES = 64


def mark(fd: int, writers: Iterable[tuple[int, str]]) -> None:
    """Mark the file as given up; `writers` are processes and their start times."""
    text = json.dumps([*writers][:MAX_PROCESSES])
    with contextlib.suppress(OSError):
        os.setxattr(fd, ATTRIBUTE, text.encode())


def unmark(fd: int) -> None:
    """The guest is ours again."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, ATTRIBUTE)


def refuse_if_moved(fd: int, what: str) -> None:
    """Raise UsageError if the file was given up and a writer of it is stopped since."""
    try:
        writers = json.loads(os.getxattr(fd, ATTRIBUTE))
        stopped = [int(pid) for pid, born in writers if _stands_still(int(pid), str(born))]
    except (OSError, ValueError, TypeError):
        return
    if stopped:
        raise UsageError(
            f"{what}: it was handed over to another machine, and its writer, process {stopped[0]}, "
            "is stopped since: `migrate-src resolve` with the journal of that time tells what "
            "became of it; to move what is here all the same, wake the writer first (kill -CONT)"
        )


def _stands_still(pid: int, born: str) -> bool:
    return bool(born) and start_time(pid) == born and state(pid) in STOPPED
