"""A mark on a file that was given up to a destination.

The lock of a mover ends with its program, and its journal may not be ours to read. So what a later
mover must know stands on the file itself, in an extended attribute: the processes that wrote it
then. While one of them still stands still, the guest is what runs at the destination, and what is
here is old. From outside nobody sees whether a writer that a command has paused stands still, so
there the mark counts until it is removed. File systems without `user.` attributes (tmpfs before
Linux 6.6) have no mark. A block device has none either: its mark is a file in /run, which goes when
the machine starts anew, as the writers do. Its number may be another device's by then, so there
only the processes count.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable

from migrate.errors import UsageError
from migrate.filesystem import write_whole
from migrate.guests.process import STOPPED, start_time, state

ATTRIBUTE = "user.xbmigrate.moved"
MAX_PROCESSES = 64
RUN = "/run/xbmigrate"


def mark(fd: int, writers: Iterable[tuple[int, str]], *, commanded: bool = False) -> None:
    """Mark the file as given up.

    writers   -- the processes that were stopped, and their start times
    commanded -- a --pause-cmd has paused who writes it
    """
    said = {"writers": [*writers][:MAX_PROCESSES], "commanded": commanded}
    device = _device_mark(fd)
    with contextlib.suppress(OSError):
        if not device:
            os.setxattr(fd, ATTRIBUTE, json.dumps(said).encode())
            return
        os.makedirs(RUN, 0o755, exist_ok=True)
        write_whole(device, json.dumps(said | {"commanded": False}).encode(), "mark")


def unmark(fd: int) -> None:
    """The guest is ours again."""
    device = _device_mark(fd)
    with contextlib.suppress(OSError):
        if device:
            os.unlink(device)
        else:
            os.removexattr(fd, ATTRIBUTE)


def _device_mark(fd: int) -> str:
    """The path of a block device's mark; "" for a file."""
    here = os.fstat(fd)
    if not stat.S_ISBLK(here.st_mode):
        return ""
    return f"{RUN}/moved-{os.major(here.st_rdev)}:{os.minor(here.st_rdev)}"


def _mark_of(fd: int) -> bytes:
    """Raises OSError where there is none."""
    if not (device := _device_mark(fd)):
        return os.getxattr(fd, ATTRIBUTE)
    with open(device, "rb") as file:
        return file.read()


def refuse_if_moved(fd: int, what: str) -> None:
    """Raise UsageError if the file was given up, and a writer of it stands still since, or may."""
    try:
        said = json.loads(_mark_of(fd))
        stopped = [int(pid) for pid, born in said["writers"] if _stands_still(int(pid), str(born))]
        commanded = said["commanded"]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return  # whoever may write the file may have made it up
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
