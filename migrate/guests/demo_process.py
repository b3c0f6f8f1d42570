"""The process of a demo guest: counts in shared memory until it is told to pause or to end.

Started by demo.py, isolated (see isolated.py), with the arguments FD [--fill]. See demo.py for the
shared layout.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import time

from migrate._memory import fill, run_load
from migrate.guests.duty import RUN_SECONDS, stopped_seconds

CONTROL_BYTES = 4096
COMMAND, STATE, SWEEP, INDEX, OWNER = range(5)
OURS, GIVEN_UP, NOT_YET_OURS, PREPARED = range(4)
SHAPE = 5
THROTTLE = 12
RUN, PAUSE, END = 1, 2, 3
RUNNING, PAUSED = 1, 2
LOOK = 0.0005
LOOK_THROTTLED = 0.001
LOOKS_PER_LEASE = 20


def wait_paused(words: memoryview, fd: int) -> None:
    """Parks until the command is not PAUSE, or whoever paused us has died (see demo.py)."""
    looks = 0
    while words[COMMAND] == PAUSE:
        time.sleep(LOOK)
        looks += 1
        if looks % LOOKS_PER_LEASE or words[OWNER] in (GIVEN_UP, PREPARED) or not holder_died(fd):
            continue
        words[COMMAND] = RUN if words[OWNER] == OURS else END


def nap(words: memoryview, fd: int) -> None:
    """Stands still as the throttle word says; takes no notice of it once who wrote it has died."""
    percent = words[THROTTLE]
    until = time.monotonic() + stopped_seconds(min(percent, 99))
    looks = 0
    while words[COMMAND] == RUN and words[THROTTLE] == percent != 0:
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, LOOK_THROTTLED))
        looks += 1
        if looks % LOOKS_PER_LEASE == 1 and holder_died(fd):
            words[THROTTLE] = 0


def holder_died(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def main() -> None:
    fd = int(sys.argv[1])
    whole = memoryview(mmap.mmap(fd, os.fstat(fd).st_size))
    words = whole[:CONTROL_BYTES].cast("Q")
    # a description of our own: a lock we try for is not the one our parent may hold
    fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    page_size, size = words[SHAPE + 6], words[SHAPE + 1]
    pages = -(-size // page_size)
    marks = whole[CONTROL_BYTES : CONTROL_BYTES + (pages + 7) // 8 * 8]
    start = -(-(CONTROL_BYTES + len(marks)) // (2 << 20)) * (2 << 20)
    memory = whole[start : start + size]
    if "--fill" in sys.argv:
        fill(memory, words[SHAPE + 2], words[SHAPE + 3], bool(words[SHAPE + 5]))
    while words[COMMAND] != END:
        if words[COMMAND] == RUN:
            words[STATE] = RUNNING
            rate = struct.unpack("d", struct.pack("Q", words[SHAPE + 4]))[0]
            run_load(
                words, marks, memory, words[SHAPE + 2], words[SHAPE + 3], page_size, rate,
                RUN_SECONDS,
            )  # fmt: skip
            nap(words, fd)
        else:
            words[STATE] = PAUSED
            wait_paused(words, fd)


if __name__ == "__main__":
    main()
