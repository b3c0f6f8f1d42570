"""The process of a demo guest: counts in shared memory until it is told to pause or to end.

Started by handle.py with the arguments FD [--fill]. See layout.py for the shared memory.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import time

from migrate.guests.demo.layout import (
    CONTROL_BYTES,
    Command,
    DemoShape,
    Owner,
    State,
    Word,
    shape_words,
)
from migrate.guests.duty_cycle import RUN_SECONDS, stopped_seconds
from migrate.memory._memory import fill, run_load
from migrate.runtime import core_dumps

# How often a paused guest looks at the command, in seconds: it starts as much later, which is part
# of the downtime.
POLL_SECONDS = 0.0005
# The same for a throttled guest.
THROTTLED_POLL_SECONDS = 0.001
# The guest looks at every 20th poll whether the program that controls it has died.
POLLS_PER_LOCK_CHECK = 20


def wait_while_paused(words: memoryview, fd: int) -> None:
    """Wait until the command is not PAUSE, or the program that paused us has died (see layout)."""
    polls = 0
    while words[Word.COMMAND] == Command.PAUSE:
        time.sleep(POLL_SECONDS)
        polls += 1
        owner = words[Word.OWNER]
        if polls % POLLS_PER_LOCK_CHECK or owner in (Owner.RELINQUISHED, Owner.COMPLETE):
            continue
        if controller_died(fd):
            words[Word.COMMAND] = Command.RUN if owner == Owner.OURS else Command.END


def wait_throttled(words: memoryview, fd: int) -> None:
    """Stop for as long as the throttle word says; reset it if the program that set it has died."""
    percent = words[Word.THROTTLE]
    until = time.monotonic() + stopped_seconds(min(percent, 99))
    polls = 0
    while words[Word.COMMAND] == Command.RUN and words[Word.THROTTLE] == percent != 0:
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, THROTTLED_POLL_SECONDS))
        polls += 1
        if polls % POLLS_PER_LOCK_CHECK == 1 and controller_died(fd):
            words[Word.THROTTLE] = 0


def controller_died(fd: int) -> bool:
    """Return whether no program holds the lock on the shared memory."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def main() -> None:
    """Run the guest in the memory of the descriptor that the command line names."""
    inherited = int(sys.argv[1])
    shared = mmap.mmap(inherited, os.fstat(inherited).st_size)
    core_dumps.exclude(shared)
    whole = memoryview(shared)
    words = whole[:CONTROL_BYTES].cast("Q")
    # A description of our own: flock on the inherited one would take our parent's lock.
    fd = os.open(f"/proc/self/fd/{inherited}", os.O_RDWR)
    shape = DemoShape.unpack(shape_words(words))
    marks = whole[CONTROL_BYTES : CONTROL_BYTES + shape.marks]
    memory = whole[shape.memory_offset : shape.memory_offset + shape.size]
    if "--fill" in sys.argv:
        fill(memory, shape.hot, shape.stride, shape.random)
    while words[Word.COMMAND] != Command.END:
        if words[Word.COMMAND] == Command.RUN:
            words[Word.STATE] = State.RUNNING
            shape = DemoShape.unpack(shape_words(words))  # a place learns it after its first pages
            run_load(
                words, marks, memory, shape.hot, shape.stride, shape.page_size, shape.rate,
                RUN_SECONDS,
            )  # fmt: skip
            wait_throttled(words, fd)
        else:
            words[Word.STATE] = State.PAUSED
            wait_while_paused(words, fd)


if __name__ == "__main__":
    main()
