"""Which processes have a file or a block device open.

Any user may have thousands of processes with hundreds of thousands of open files each. So the
processes of root, of the file's owner and our own come first, and the search ends after a time.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

from migrate.runtime._proc import find_descriptors, list_processes
from migrate.runtime.processes import owners, user_ids

# Of the processor: 200000 open files. On a busy machine processor time passes slowly, so that the
# search ends after MAX_SECONDS by the clock too.
SEARCH_SECONDS = 0.5
MAX_SECONDS = 2.0


def openers(file: os.stat_result) -> list[int]:
    """Find the other processes that have a file open, or a block device by any of its nodes.

    Processes that may not be looked into are left out. So are those of other users, if there is no
    time left for them.
    """
    trusted_users = owners(file)
    table = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        processes = [one for one in list_processes(table) if one[0] != os.getpid()]
    finally:
        os.close(table)
    trusted: list[int] = []
    others: list[int] = []
    for pid, _, owner in processes:
        ours = owner in trusted_users and user_ids(pid) <= trusted_users
        (trusted if ours else others).append(pid)
    found = [pid for pid in trusted if _has_open(pid, file, float("inf"))]
    deadline, late = time.thread_time() + SEARCH_SECONDS, time.monotonic() + MAX_SECONDS
    for pid in others:
        if time.thread_time() >= deadline or time.monotonic() >= late:
            break
        if _has_open(pid, file, deadline):
            found.append(pid)
    return sorted(found)


def _has_open(pid: int, file: os.stat_result, deadline: float) -> bool:
    block = stat.S_ISBLK(file.st_mode)
    device, inode = (file.st_rdev, 0) if block else (file.st_dev, file.st_ino)
    with contextlib.suppress(OSError):
        table = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return bool(find_descriptors(table, device, inode, block=block, deadline=deadline)[0])
        finally:
            os.close(table)
    return False
