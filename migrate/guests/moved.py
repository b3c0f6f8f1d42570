"""A mark on a file that was given up to a destination.

The lock of a mover ends with its program, and its journal may not be ours to read. So what a later
mover must know stands on the file itself, in an extended attribute: the processes that wrote it
then. While one of them still stands still, the guest is what runs at the destination, and what is
here is old. From outside nobody sees whether a writer that a command has paused stands still, so
there the mark counts until it is removed. File systems without `user.` attributes (tmpfs before
Linux 6.6) have no mark.
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


def mark(fd: int, writers: Iterable[tuple[int, str]], *, commanded: bool = False) -> None:
    """Mark the file as given up.

    writers   -- the processes that were stopped, and their start times
    commanded -- a --pause-cmd has paused who writes it
    """
    said = {"writers": [*writers][:MAX_PROCESSES], "commanded": commanded}
    with contextlib.suppress(OSError):
        os.setxattr(fd, ATTRIBUTE, json.dumps(said).encode())


def unmark(fd: int) -> None:
    """The guest is ours again."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, ATTRIBUTE)


def refuse_if_moved(fd: int, what: str) -> None:
    """Raise UsageError if the file was given up, and a writer of it stands still since, or may."""
    try:
        said = json.loads(os.getxattr(fd, ATTRIBUTE))
        stopped = [int(pid) for pid, born in said["writers"] if _stands_still(int(pid), str(born))]
        commanded = said["commanded"]
    except (OSError, ValueError, TypeError, KeyError):
        return
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


def _stands_still(pid: int, born: str) -> bool:
    return bool(born) and start_time(pid) == born and state(pid) in STOPPED
